"""Where the texts of pairs are in a sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from sam.ner.prompts import normalised
from sam.types import Mention, Pair


def align(text: str, pairs: Iterable[Pair]) -> tuple[Mention, ...]:
    """The spans of the pairs in ``text`` (raw, offsets in characters), sorted by start; never overlapping.

    Every occurrence of a pair's text counts, case-sensitive, a space matching any run of whitespace. Where a text
    occurs as whole words, only those occurrences count, else all (as within Chinese, or ``cat`` in ``category``).
    Longest text first; what overlaps a span already placed is dropped; a text under two types goes to the first.
    """
    plain, offsets = _with_offsets(text)
    taken = bytearray(len(plain))
    mentions: list[Mention] = []
    clean = [(entity_type, normalised(surface)) for entity_type, surface in pairs]
    for entity_type, surface in sorted(clean, key=lambda pair: -len(pair[1])):
        for start in _occurrences(plain, surface):
            end = start + len(surface)
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * len(surface)
                mentions.append(Mention(offsets[start], offsets[end - 1] + 1, entity_type))
    return tuple(sorted(mentions))


def _with_offsets(text: str) -> tuple[str, Sequence[int]]:
    """The normalised text, and for each of its characters the offset in ``text``."""
    plain = normalised(text)
    if plain == text:
        return plain, range(len(text))
    offsets: list[int] = []
    for word in re.finditer(r"\S+", text):
        if offsets:
            offsets.append(word.start() - 1)
        offsets.extend(range(*word.span()))
    return plain, offsets


def _occurrences(text: str, surface: str) -> list[int]:
    """Where ``surface`` starts in ``text``: as whole words if it does so anywhere, else at any place."""
    starts = list(_find_all(text, surface))
    whole = [start for start in starts if _is_whole(text, start, start + len(surface))]
    return whole or starts


def _find_all(text: str, surface: str) -> Iterator[int]:
    start = text.find(surface) if surface else -1
    while start >= 0:
        yield start
        start = text.find(surface, start + 1)


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether neither edge of the span lies between two alphanumeric characters."""
    cuts_left = start > 0 and text[start].isalnum() and text[start - 1].isalnum()
    cuts_right = end < len(text) and text[end - 1].isalnum() and text[end].isalnum()
    return not cuts_left and not cuts_right


def locate(pairs: Sequence[Pair], text: str, types: Collection[str]) -> tuple[tuple[Mention, ...], int, int]:
    """The spans of the pairs whose type is in ``types``, and how many pairs are not in the sentence, and not asked for.

    The two counts are apart: a pair can be in both.
    """
    plain = normalised(text)
    present = [pair for pair in pairs if normalised(pair[1]) in plain]
    mentions = align(text, [pair for pair in present if pair[0] in types])
    return mentions, len(pairs) - len(present), sum(entity_type not in types for entity_type, _ in pairs)
