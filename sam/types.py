"""Sentences, mentions and predictions: the values that packages hand to one another.

Offsets count characters (Python string indices), end exclusive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Pair = tuple[str, str]
"""An (entity type, surface text) pair: what a completion holds and what set scores compare."""


@dataclass(frozen=True, order=True)
class Mention:
    """A typed span of a sentence: ``sentence.text[start:end]`` is an entity of type ``type``."""

    start: int
    end: int
    type: str


@dataclass(frozen=True)
class Sentence:
    """A text with its gold mentions, in order of start; ``mentions`` is None where there is no gold.

    ``types``: the entity types that it is annotated with, where they differ from sentence to sentence; None where they
    are those of its dataset or target.
    """

    id: str
    text: str
    mentions: tuple[Mention, ...] | None = None
    types: tuple[str, ...] | None = None

    def surface(self, mention: Mention) -> str:
        """The text that ``mention`` covers."""
        return self.text[mention.start : mention.end]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The distinct (type, text) pairs of the gold mentions, in order of appearance."""
        return tuple(dict.fromkeys((m.type, self.surface(m)) for m in self.mentions or ()))


@dataclass(frozen=True)
class Prediction:
    """What one model predicts for one sentence.

    ``pairs`` are the distinct (type, text) pairs as written, also those that are not in the sentence or
    not of a type asked for (they count as false positives); ``mentions`` are their aligned, flat spans.
    """

    pairs: tuple[Pair, ...]
    mentions: tuple[Mention, ...]
    completion: str
    unparsable: bool = False
    truncated: bool = False
    not_in_sentence: int = 0
    not_asked: int = 0


def entity_types(sentences: Iterable[Sentence]) -> list[str]:
    """The distinct types of ``sentences``, of their gold and their own ones, sorted."""
    return sorted({t for s in sentences for t in (*(m.type for m in s.mentions or ()), *(s.types or ()))})
