"""Bootstrap intervals over sentences, trainings and draws for micro F1, paired between systems that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam.seeding import rng

ROUNDS = 2000
LEVEL = 0.95

Counts = NDArray[np.float64]
"""[3, n]: true positives, predicted and gold pairs of each sentence."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and the percentile interval around it."""

    value: float
    low: float
    high: float


def resamples(n: int, name: str, rounds: int = ROUNDS) -> NDArray[np.float64]:
    """[rounds, n]: how often each of ``n`` sentences is in each resample with replacement; the same for a ``name``.

    Systems that are scored with the same resamples are compared in pairs.
    """
    generator = np.random.default_rng(rng("bootstrap", name, n).getrandbits(63))
    return generator.multinomial(n, np.full(n, 1 / n), size=rounds).astype(np.float64)


def redrawn(runs: Sequence[Sequence[NDArray[np.float64]]], name: str) -> NDArray[np.float64]:
    """[rounds]: the mean of ``runs``, drawn with replacement in each round: trainings, then of each the seeds.

    ``runs[t][s]`` [rounds] is of training ``t`` and seed ``s``. Trainings are the same draw for every ``name`` (a
    target's), as one training answers on all targets; seeds are drawn by name. So systems with the same runs are
    compared in pairs. Few trainings or seeds understate their spread.
    """
    trainings = [_drawn(np.stack(seeds), f"{name} {place}") for place, seeds in enumerate(runs)]
    return _drawn(np.stack(trainings), "trainings")


def _drawn(runs: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """[rounds]: in each round the mean of as many of ``runs`` [n, rounds] as there are, drawn with replacement."""
    count, rounds = runs.shape
    generator = np.random.default_rng(rng("redrawn", name, count).getrandbits(63))
    chosen = generator.integers(count, size=(count, rounds))
    return np.take_along_axis(runs, chosen, axis=0).mean(axis=0)


def f1(counts: Counts) -> float:
    """Micro F1 of all sentences (0 to 1; 0 where there is neither gold nor prediction)."""
    tp, predicted, gold = counts.sum(axis=1)
    return float(2 * tp / (predicted + gold)) if predicted + gold else 0.0


def f1_of(counts: Counts, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rounds]: micro F1 of each resample."""
    tp, predicted, gold = counts @ weights.T
    total = predicted + gold
    return np.divide(2 * tp, total, out=np.zeros_like(total), where=total > 0)


def interval(value: float, replicates: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """``value`` with the percentile interval of its ``replicates``."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def mean(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean of several systems' or targets' replicates, resample by resample."""
    return np.mean(np.stack(parts), axis=0)
