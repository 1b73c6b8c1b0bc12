"""What selection yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from sam.seeding import rng


@dataclass(frozen=True)
class Ranking:
    """Experts best first, each with its score; ``details`` is what a reader needs to check it."""

    experts: tuple[str, ...]
    scores: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, float]:
        """The place of each expert, from 1 on; equal ones share the mean of their places."""
        places: dict[float, list[int]] = {}
        for place, name in enumerate(self.experts, start=1):
            places.setdefault(self.scores[name], []).append(place)
        return {name: fmean(places[self.scores[name]]) for name in self.experts}

    @classmethod
    def by(
        cls, scores: Mapping[str, float], details: Mapping[str, Any] | None = None, seeds: Sequence[object] = ()
    ) -> Ranking:
        """From scores, higher is better; equal scores are in an order drawn by ``seeds``, so that no name is ahead of
        others everywhere."""
        drawn = rng("ties", *seeds).sample(sorted(scores), len(scores))
        order = sorted(drawn, key=lambda name: -scores[name])
        return cls(tuple(order), {name: scores[name] for name in order}, dict(details or {}))


@dataclass(frozen=True)
class Selection:
    """The experts to merge, best first, the selector that chose them, and all scores it saw."""

    selector: str
    experts: tuple[str, ...]
    scores: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def top(cls, selector: str, ranking: Ranking, k: int) -> Selection:
        """The first ``k`` of a ranking."""
        return cls(selector, ranking.experts[:k], ranking.scores, ranking.details)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``result.json``."""
        return {**asdict(self), "experts": list(self.experts)}
