"""Sparsifiers: which entries of an expert's delta take part in a merge.

Each checks its options at the call and returns a :data:`~sam.merging.stream.Sparsify`. ``density`` is the fraction of
entries kept; 1 keeps all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sam.errors import SamError
from sam.merging.checks import check_choice, check_density, check_fraction, check_seed
from sam.merging.stream import BLOCK, DeltaSet, Scratch, Sparsifier, Sparsify, blocks, read
from sam.merging.trim import Cut, Trimmer, find_cut, work_memory

TRIM_SCOPES = ("tensor", "global")


def everything(_scratch: Scratch) -> Sparsifier:
    """Keeps every entry."""
    return lambda _index, _module, delta: blocks(delta)


def largest(sets: Sequence[DeltaSet], density: float, scope: str) -> Sparsify:
    """Keep exactly the largest entries by magnitude, of each module (``scope`` "tensor") or of all an expert's modules
    together ("global")."""
    check_density(density)
    check_choice(scope, TRIM_SCOPES, "trim_scope")
    if density == 1:
        return everything
    return (lambda _scratch: _per_module(density)) if scope == "tensor" else partial(_per_expert, sets, density)


def _per_module(density: float) -> Sparsifier:
    work = work_memory()
    return lambda _index, _module, delta: map(Trimmer(find_cut(lambda: [delta], density, work)), blocks(delta))


def _per_expert(sets: Sequence[DeltaSet], density: float, scratch: Scratch) -> Sparsifier:
    work = work_memory()
    trimmers = [Trimmer(_global_cut(one, density, scratch, work)) for one in sets]
    return lambda index, _module, delta: map(trimmers[index], blocks(delta))


def _global_cut(one: DeltaSet, density: float, scratch: Scratch, work: Tensor) -> Cut:
    """The cut over all of an expert's modules; one that keeps its cuts is searched once for all merges."""
    cuts: dict[float, Cut] = getattr(one, "cuts", {})
    if density not in cuts:
        cuts[density] = find_cut(lambda: (read(one, module, scratch) for module in sorted(one)), density, work)
    return cuts[density]


def middle(density: float, gamma: float) -> Sparsify:
    """Of each module, drop the ``gamma`` largest entries by magnitude, then keep the ``density`` largest of all."""
    check_density(density)
    check_fraction(gamma, "gamma")
    if density + gamma > 1:
        raise SamError(f"density={density} and gamma={gamma} sum to more than 1; lower one of them")

    def keep(_index: int, _module: str, delta: Tensor) -> Iterator[Tensor]:
        outer = Trimmer(find_cut(lambda: [delta], density + gamma, work))
        top = round(gamma * delta.numel())
        inner = Trimmer(find_cut(lambda: [delta], gamma, work)) if top else torch.zeros_like
        return (outer(block).sub_(inner(block)) for block in blocks(delta))

    work = work_memory()
    return lambda _scratch: keep


def drop_generator(seed: int, name: str, module: str) -> np.random.SFC64:
    """The generator that draws which entries of an expert's module are kept: 16 bits per entry.

    It is seeded with SHA-256 of (seed, expert, module): the order of the experts, the global random state, the device
    and Python's salted ``hash`` do not matter.
    """
    digest = hashlib.sha256(json.dumps([seed, name, module]).encode()).digest()
    return np.random.SFC64(int.from_bytes(digest[:16], "big"))


def at_random(count: int, density: float, seed: int, names: Sequence[str] | None) -> Sparsify:
    """Keep each entry with probability ``density`` and divide it by that, so that the mean stays.

    The probability is the nearest multiple of 2^-16 between 0 and 1. ``names``: of the ``count`` experts, all
    different; None names them by position.
    """
    check_density(density)
    experts = _drawn(count, seed, names)
    if density == 1:
        return everything
    chances = min(max(round(density * 65536), 1), 65535)  # of the values of 16 bits, those that keep an entry

    def drop(index: int, module: str, delta: Tensor) -> Iterator[Tensor]:
        work = torch.empty(min(BLOCK, delta.numel()), dtype=torch.float32, device=delta.device)
        for block, bits in _random_bits(delta, seed, experts[index], module):
            # 1 or 0, then the entry or 0, in place: much faster than a boolean mask and torch.where
            kept = torch.lt(bits, chances - 32768, out=work[: block.numel()])
            yield kept.mul_(block).mul_(65536 / chances)

    return lambda _scratch: drop


def by_rank(count: int, density: float, epsilon: float, seed: int, names: Sequence[str] | None) -> Sparsify:
    """Keep entries with a probability that rises with their rank by magnitude in their row of ΔW, from ``density`` -
    ``epsilon``/2 to ``density`` + ``epsilon``/2, and divide each by its own probability."""
    check_density(density)
    check_fraction(epsilon, "epsilon")
    if density != 1 and not (density - epsilon / 2 > 0 and density + epsilon / 2 <= 1):
        raise SamError(f"epsilon={epsilon} with density={density} gives probabilities outside (0, 1]; lower epsilon")
    experts = _drawn(count, seed, names)
    if density == 1:
        return everything

    def drop(index: int, module: str, delta: Tensor) -> Iterator[Tensor]:
        chances = blocks(_chances(delta, density, epsilon))
        drawn = _random_bits(delta, seed, experts[index], module)
        for chance, (block, bits) in zip(chances, drawn, strict=True):
            kept = bits.to(torch.float32).add_(32768) < chance * 65536
            yield torch.where(kept, block / chance, 0.0)

    return lambda _scratch: drop


def _chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability of each entry to be kept: linear in its rank in its row (a vector is one row)."""
    rows = delta.reshape(-1, delta.shape[-1])
    width = rows.shape[1]
    by_rank = (
        torch.linspace(density - epsilon / 2, density + epsilon / 2, width) if width > 1 else torch.tensor([density])
    )
    chances = torch.empty_like(rows, dtype=torch.float32)
    return chances.scatter_(1, rows.abs().argsort(dim=1, stable=True), by_rank.to(rows.device).expand_as(rows))


def _drawn(count: int, seed: int, names: Sequence[str] | None) -> list[str]:
    check_seed(seed)
    experts = [str(index) for index in range(count)] if names is None else list(names)
    if len(experts) != count or len(set(experts)) != count:
        raise SamError(f"names={experts!r} must hold one name per expert ({count}), all different")
    return experts


def _random_bits(delta: Tensor, seed: int, expert: str, module: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Each block of ``delta`` with an int16 tensor of its size, uniform over all 65,536 values."""
    generator = drop_generator(seed, expert, module)
    for block in blocks(delta):
        drawn = generator.random_raw(-(-block.numel() // 4)).astype("<u8", copy=False)
        yield block, torch.from_numpy(drawn.view("<i2")[: block.numel()]).to(block.device)
