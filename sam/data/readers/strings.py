"""JSON lines whose mentions are strings with a label, without offsets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sam.data.readers.base import Draft, Source
from sam.errors import SamError
from sam.types import Mention


@dataclass(frozen=True)
class Strings:
    """``text`` names the field of the sentence, ``mentions`` that of the ``[string, label]`` pairs."""

    text: str = "sentence"
    mentions: str = "ner"

    def read(self, source: Source, counts: Counter[str]) -> Iterator[Draft]:
        """The sentences of all files, in order; a file is a document."""
        for number, path in enumerate(source.files):
            yield from self.parse(source.text(path), counts, path, number)

    def parse(self, text: str, counts: Counter[str], path: str = "", number: int = 0) -> Iterator[Draft]:
        """One sentence a line. Raises SamError on a line that is no JSON object with both fields."""
        for n, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line)
                sentence, pairs = record[self.text], record[self.mentions]
            except (ValueError, KeyError, TypeError) as error:
                raise SamError(f"{path}:{n}: not an object with {self.text} and {self.mentions}: {error}") from None
            yield Draft(sentence, place(sentence, pairs, counts), path, number)


def place(sentence: str, pairs: Sequence[Sequence[str]], counts: Counter[str]) -> tuple[Mention, ...]:
    """A mention for each (string, label) pair: the place of its string as whole tokens, in order of the text.

    The pairs are taken to be in order: each is searched for behind the one before, then from that one's start
    (it overlaps), then anywhere. ``counts``: ``repeated_pairs`` (listed again: takes the next occurrence),
    ``pairs_without_occurrence`` (no free occurrence: lost), ``nested_mentions`` (overlap another).
    """
    padded = f" {sentence} "
    taken: dict[tuple[int, int, str], None] = {}
    seen: set[tuple[str, str]] = set()
    start = end = 0
    for surface, label in pairs:
        counts["repeated_pairs"] += (surface, label) in seen
        seen.add((surface, label))
        at = next((s for c in (end, start, 0) if (s := _free(padded, surface, label, c, taken)) >= 0), -1)
        if at < 0:
            counts["pairs_without_occurrence"] += 1
            continue
        start, end = at, at + len(surface)
        taken[start, end, label] = None
    mentions = sorted((Mention(*span) for span in taken), key=lambda m: (m.start, -m.end, m.type))
    reach = 0
    for mention in mentions:
        counts["nested_mentions"] += mention.start < reach
        reach = max(reach, mention.end)
    return tuple(mentions)


def _free(padded: str, surface: str, label: str, start: int, taken: dict[tuple[int, int, str], None]) -> int:
    """Where ``surface`` is as whole tokens at or after ``start``, not taken by its own label yet; -1 if nowhere."""
    at = padded.find(f" {surface} ", start)
    while at >= 0 and (at, at + len(surface), label) in taken:
        at = padded.find(f" {surface} ", at + 1)
    return at
