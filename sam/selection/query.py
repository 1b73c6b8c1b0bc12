"""What a selector is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sam.data.targets import Target
from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.encoder import Encoder
from sam.selection import by_domain, by_sampling
from sam.selection.by_sampling import Ask
from sam.selection.types import Ranking
from sam.task import Task


@dataclass
class Query:
    """A target, and the experts ``names`` of a pool to choose from; rankings are made when asked for, once."""

    target: Target
    pool: Pool
    names: Sequence[str]
    encoder: Encoder
    task: Task
    ask: Ask
    k: int
    sample_size: int
    seed: int

    @cached_property
    def domain(self) -> Ranking:
        """By domain similarity."""
        return by_domain.rank(self.target.unlabelled, self.names, self.pool, self.encoder, self.seed)

    @cached_property
    def sampling(self) -> Ranking:
        """By sampling evaluation."""
        texts = self.target.unlabelled
        ids = by_sampling.draw(texts, self.sample_size, self.seed, self.target.name)
        if not ids:
            raise SamError(f"target {self.target.name} has no unlabelled sentence to sample; give at least one")
        return by_sampling.rank(texts, ids, self.names, self.ask, (self.seed, self.target.name))
