"""What every reader takes and gives, and how a row of tags becomes character spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sam.errors import SamError
from sam.types import Mention

TagSpan = tuple[int, int, str]
"""First row, row after the last, label."""

SCHEMES = ("IOB1", "IOB2", "BILOU")


@dataclass(frozen=True)
class Draft:
    """A sentence as read: mentions carry the corpus's own labels; ``document`` counts within the split.

    ``types``: the labels that the sentence is annotated with, where they are its own.
    """

    text: str
    mentions: tuple[Mention, ...]
    path: str
    document: int = 0
    annotated: bool = True
    types: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """The files of a split, by upstream path, in order; ``subset`` picks documents where a table names the split."""

    files: Mapping[str, Path]
    subset: str | None = None

    def text(self, path: str) -> str:
        """The file as UTF-8, newlines untouched. Raises SamError where it is no UTF-8."""
        try:
            return self.files[path].read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise SamError(f"{self.files[path]}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None


class Reader(Protocol):
    """A format with its parameters. What is repaired or lost while reading is added to ``counts``."""

    def read(self, source: Source, counts: Counter[str]) -> Iterator[Draft]:
        """The sentences of ``source`` in order."""
        ...


ParseText = Callable[[str, Counter[str]], Iterator[Draft]]


def tag_spans(tags: Sequence[str], scheme: str, counts: Counter[str]) -> list[TagSpan]:
    """Spans of a tag row in any IOB or BILOU scheme, read leniently.

    A tag that does not continue a span of its own label opens one: ``counts["opened_by_I"]`` grows where
    ``scheme`` does not allow that. An empty tag is read as O (``missing_tag_read_as_O``), and so is one
    without a label (``stray_tag_read_as_O``).
    """
    spans: list[TagSpan] = []
    start, label = -1, ""
    for i, tag in enumerate(tags):
        if tag == "O":
            prefix, new = "O", ""
        else:
            prefix, _, new = tag.partition("-")
            if not new:
                counts["stray_tag_read_as_O" if tag else "missing_tag_read_as_O"] += 1
                prefix = "O"
        if label and (prefix in "OBSU" or new != label):
            spans.append((start, i, label))
            label = ""
        if prefix == "O":
            continue
        if not label:
            start, label = i, new
            if prefix not in "BSU" and scheme != "IOB1":
                counts["opened_by_I"] += 1
        if prefix in "LESU":
            spans.append((start, i + 1, label))
            label = ""
    if label:
        spans.append((start, len(tags), label))
    return spans


def join_tokens(
    tokens: Sequence[str], spans: Sequence[TagSpan], counts: Counter[str], gaps: Sequence[str] | None = None
) -> tuple[str, tuple[Mention, ...]]:
    """Text of ``tokens`` with one space (or ``gaps[i]``) after each, and ``spans`` as character mentions.

    Empty tokens take no room (``blank_token_dropped``); a span of nothing else is lost (``blank_mention_dropped``).
    """
    starts: list[int] = []
    ends: list[int] = []
    pieces: list[str] = []
    position = end = 0
    for i, token in enumerate(tokens):
        starts.append(position)
        if token:
            gap = " " if gaps is None else gaps[i]
            end = position + len(token)
            position = end + len(gap)
            pieces += (token, gap)
        else:
            counts["blank_token_dropped"] += 1
        ends.append(end)
    mentions = tuple(Mention(starts[a], ends[b - 1], label) for a, b, label in spans if starts[a] < ends[b - 1])
    lost = len(spans) - len(mentions)
    if lost:
        counts["blank_mention_dropped"] += lost
    return "".join(pieces)[:end], mentions
