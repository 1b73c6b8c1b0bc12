"""What selection yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ranking:
    """Experts best first, each with its score; ``details`` is what a reader needs to check it."""

    experts: tuple[str, ...]
    scores: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def by(cls, scores: Mapping[str, float], details: Mapping[str, Any] | None = None) -> Ranking:
        """From scores, higher is better; equal scores are ordered by name."""
        order = sorted(scores, key=lambda name: (-scores[name], name))
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
