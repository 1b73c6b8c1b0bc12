"""One token a line, its tag in a column: CoNLL files and their relatives, and the same as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sam.data.readers.base import SCHEMES, Draft, Source, join_tokens, tag_spans
from sam.errors import SamError

Row = tuple[str, str, str]
"""Token, tag, note."""

DOCSTART = "-DOCSTART-"
SEPARATORS = ("tab", "space", "csv")


@dataclass(frozen=True)
class Columns:
    """Columns counted from 0.

    separator: ``tab``; ``space``, cut from the right so that a token may hold spaces (the tag is the last
        column); ``csv``, commas and quotes, where a row with a tag but no token ends a sentence.
    header: the first line names the columns. comment: lines that begin so are skipped.
    note: a column of notes, in which ``EndOfSentence`` ends the sentence and ``NoSpaceAfter`` joins tokens;
        blank lines then separate documents.
    documents: what a document is, a ``file`` or what follows a ``docstart`` line.
    """

    tag: int
    token: int = 0
    separator: str = "tab"
    scheme: str = "IOB2"
    header: bool = False
    comment: str = ""
    note: int | None = None
    documents: str = "file"

    def __post_init__(self) -> None:
        """Raises SamError on a parameter value that does not exist."""
        for key, allowed in (("separator", SEPARATORS), ("scheme", SCHEMES), ("documents", ("file", "docstart"))):
            if getattr(self, key) not in allowed:
                raise SamError(f"format.{key}: '{getattr(self, key)}' is not one of {', '.join(allowed)}")

    def read(self, source: Source, counts: Counter[str]) -> Iterator[Draft]:
        """The sentences of all files, in order; a file ends a sentence."""
        for number, path in enumerate(source.files):
            yield from self.parse(source.text(path), counts, path, number)

    def parse(self, text: str, counts: Counter[str], path: str = "", number: int = 0) -> Iterator[Draft]:
        """The sentences of one file's ``text``; ``number`` is the file's place in the split."""
        by_docstart = self.documents == "docstart"
        document = -1 if by_docstart else number
        rows: list[Row] = []
        for row in self._csv_rows(text) if self.separator == "csv" else self._rows(text):
            if row is not None and row[0] != DOCSTART:
                rows.append(row)
                if self.note is None or "EndOfSentence" not in row[2]:
                    continue
            if rows:
                yield self._draft(rows, counts, path, document)
                rows = []
            if row is not None and row[0] == DOCSTART and by_docstart:
                document += 1
        if rows:
            yield self._draft(rows, counts, path, document)

    def _rows(self, text: str) -> Iterator[Row | None]:
        """Rows, with None where a sentence may end."""
        tab, note = self.separator == "tab", self.note
        lines: Iterable[str] = text.removeprefix("\ufeff").split("\n")
        if self.header:
            lines = iter(lines)
            next(lines, None)
        for line in lines:
            if not line or line.isspace():
                yield None
            elif line.startswith(DOCSTART):
                yield DOCSTART, "O", ""
            elif not (self.comment and line.startswith(self.comment)):
                cells = line.split("\t") if tab else line.rsplit(" ", self.tag)
                tag = cells[self.tag].strip() if len(cells) > self.tag else ""
                extra = cells[note] if note is not None and len(cells) > note else ""
                yield cells[self.token].strip() if len(cells) > self.token else "", tag, extra

    def _csv_rows(self, text: str) -> Iterator[Row | None]:
        for cells in csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")):
            if not any(cells):
                continue
            token = cells[self.token].strip() if len(cells) > self.token else ""
            if not token:
                yield None
            else:
                yield token, cells[self.tag].strip() if len(cells) > self.tag else "", ""

    def _draft(self, rows: list[Row], counts: Counter[str], path: str, document: int) -> Draft:
        tokens, tags, notes = zip(*rows, strict=True)
        gaps = None if self.note is None else ["" if "NoSpaceAfter" in n else " " for n in notes]
        text, mentions = join_tokens(tokens, tag_spans(tags, self.scheme, counts), counts, gaps)
        return Draft(text, mentions, path, document)
