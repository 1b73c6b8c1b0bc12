"""A text a document, with tables of sentences and of tagged tokens as character offsets."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from sam.data.readers.base import Draft, Source, tag_spans
from sam.types import Mention


@dataclass(frozen=True)
class Standoff:
    """Tables separated by tabs; in the paths ``{name}`` is a document's name.

    metadata: table with a header, quoted fields and the columns ``name`` and ``subset`` (the document's split).
    sentences: sentence id, flag (1 = annotated), begin, end in the text.
    tags: sentence id, token id, begin, end in the sentence, tag.
    """

    metadata: str
    text: str
    sentences: str
    tags: str
    name: str = "name"
    subset: str = "set"
    scheme: str = "IOB2"

    def read(self, source: Source, counts: Counter[str]) -> Iterator[Draft]:
        """The sentences of the documents whose subset is ``source.subset``, in order of the metadata."""
        table = csv.DictReader(io.StringIO(source.text(self.metadata), newline=""), delimiter="\t")
        names = [row[self.name] for row in table if row[self.subset] == source.subset]
        for document, name in enumerate(names):
            path, *tables = (pattern.format(name=name) for pattern in (self.text, self.sentences, self.tags))
            sentences, tags = map(source.text, tables)
            yield from self.parse(source.text(path), sentences, tags, counts, path, document)

    def parse(
        self, text: str, sentences: str, tags: str, counts: Counter[str], path: str = "", document: int = 0
    ) -> Iterator[Draft]:
        """The sentences of one document from the contents of its three files."""
        tokens: dict[str, list[list[str]]] = defaultdict(list)
        for cells in _cells(tags):
            tokens[cells[0]].append(cells)
        for key, flag, begin, end, *_ in _cells(sentences):
            rows = tokens[key]
            spans = tag_spans([row[4] for row in rows], self.scheme, counts)
            mentions = tuple(Mention(int(rows[a][2]), int(rows[b - 1][3]), label) for a, b, label in spans)
            # A line break inside a sentence becomes a space: the offsets stay.
            yield Draft(text[int(begin) : int(end)].replace("\n", " "), mentions, path, document, flag == "1")


def _cells(table: str) -> Iterator[list[str]]:
    return (line.split("\t") for line in table.split("\n") if line and not line.isspace())
