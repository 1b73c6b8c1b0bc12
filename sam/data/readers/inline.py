"""One sentence a line, ``word:tag word:tag … <=> intent``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sam.data.readers.base import Draft, Source, join_tokens, tag_spans


@dataclass(frozen=True)
class Inline:
    """``end`` closes the tagged part of a line; what follows it is not read."""

    end: str = " <=> "
    scheme: str = "IOB2"

    def read(self, source: Source, counts: Counter[str]) -> Iterator[Draft]:
        """The sentences of all files, in order; a file is a document."""
        for number, path in enumerate(source.files):
            yield from self.parse(source.text(path), counts, path, number)

    def parse(self, text: str, counts: Counter[str], path: str = "", number: int = 0) -> Iterator[Draft]:
        """One sentence for each line that is not blank."""
        for line in text.removeprefix("\ufeff").split("\n"):
            if not line or line.isspace():
                continue
            # A word may hold a colon (a time), a tag cannot.
            items = [item.rpartition(":") for item in line.split(self.end, 1)[0].split(" ") if item]
            tokens, tags = [i[0] for i in items], [i[2] for i in items]
            joined, mentions = join_tokens(tokens, tag_spans(tags, self.scheme, counts), counts)
            yield Draft(joined, mentions, path, number)
