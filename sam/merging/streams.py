"""Merging one module at a time: the engine under :mod:`sam.merging.functions` and ``merge_modules``.

Every function takes *delta sets*, one an expert: a ``dict[str, Tensor]``, or anything that computes a module's delta
when it is asked for. It checks its options at once and returns an iterator of (module, merged delta, fp32), modules
in order of name. Held at a time: the (trimmed) deltas of one module.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sam.errors import SamError
from sam.merging.checks import check_choice, check_density, check_lam, check_seed, raw_weights, relative_weights
from sam.merging.trim import BLOCK, Cut, Trimmer, find_cut, work_memory

TRIM_SCOPES = ("tensor", "global")
SIGNS = ("sum", "count")
AGGREGATES = ("mean", "sum")

_TINY = torch.finfo(torch.float32).tiny

Merged = Iterator[tuple[str, Tensor]]
Change = Callable[[int, str, Tensor], Iterable[Tensor]]
"""(expert's index, module, delta) to what of the delta takes part in the merge, as flat blocks of ``BLOCK`` entries; a
block may be overwritten when the next is asked for."""


class DeltaSet(Protocol):
    """One expert's deltas by module name; a module that it lacks is a zero delta."""

    def __getitem__(self, module: str, /) -> Tensor: ...

    def __contains__(self, module: object, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


@runtime_checkable
class ComputedSet(Protocol):
    """A delta set that computes its deltas, fp32, and can write them into memory that is given."""

    def shape(self, module: str, /) -> tuple[int, ...]: ...

    def delta(self, module: str, out: Tensor | None, /) -> Tensor: ...


class Scratch:
    """Memory that deltas are computed into, one place an expert, used again for every module.

    Fresh memory would cost more than the arithmetic: the system clears it, page by page, at the first touch.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def place(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """An fp32 tensor of ``shape`` with arbitrary values; it takes the memory of the last one of that index."""
        entries = math.prod(shape)
        if index not in self._held or self._held[index].numel() < entries:
            self._held.pop(index, None)
            self._held[index] = torch.empty(entries)
        return self._held[index][:entries].view(shape)


def ties_stream(
    sets: Sequence[DeltaSet],
    *,
    density: float,
    lam: float,
    trim_scope: str,
    sign: str,
    aggregate: str,
    weights: Sequence[float] | None,
) -> Merged:
    """TIES; see :func:`sam.merging.functions.ties`."""
    check_density(density)
    check_choice(trim_scope, TRIM_SCOPES, "trim_scope")
    vote_weights = _check_vote(len(sets), lam, sign, aggregate, weights)
    return _vote_stream(
        sets, lambda scratch: _trimming(sets, density, trim_scope, scratch), vote_weights, lam, sign, aggregate
    )


def dare_ties_stream(
    sets: Sequence[DeltaSet],
    *,
    density: float,
    seed: int,
    lam: float,
    sign: str,
    aggregate: str,
    weights: Sequence[float] | None,
    names: Sequence[str] | None,
) -> Merged:
    """DARE, then the vote of TIES; see :func:`sam.merging.functions.dare_ties`. ``density`` is 1 - drop."""
    change = _dropping(len(sets), density, seed, names)
    vote_weights = _check_vote(len(sets), lam, sign, aggregate, weights)
    return _vote_stream(sets, lambda _scratch: change, vote_weights, lam, sign, aggregate)


def dare_stream(
    sets: Sequence[DeltaSet],
    *,
    density: float,
    seed: int,
    lam: float,
    weights: Sequence[float] | None,
    names: Sequence[str] | None,
) -> Merged:
    """DARE, then the weighted mean; see :func:`sam.merging.functions.dare`. ``density`` is 1 - drop."""
    check_lam(lam)
    change = _dropping(len(sets), density, seed, names)
    scaled = relative_weights(weights, len(sets))
    return _sum_stream(sets, change, scaled, sum(scaled), lam)


def linear_stream(sets: Sequence[DeltaSet], *, lam: float, weights: Sequence[float] | None) -> Merged:
    """The weighted mean; see :func:`sam.merging.functions.linear`."""
    check_lam(lam)
    scaled = relative_weights(weights, len(sets))
    return _sum_stream(sets, _unchanged, scaled, sum(scaled), lam)


def task_arithmetic_stream(sets: Sequence[DeltaSet], *, lam: float, weights: Sequence[float] | None) -> Merged:
    """The weighted sum; see :func:`sam.merging.functions.task_arithmetic`."""
    check_lam(lam)
    return _sum_stream(sets, _unchanged, raw_weights(weights, len(sets), signed=True), 1.0, lam)


def drop_generator(seed: int, name: str, module: str) -> np.random.SFC64:
    """The generator that draws which entries of an expert's module DARE keeps: 16 bits an entry.

    It is seeded with SHA-256 of (seed, expert, module): neither the order of the experts, nor the global random
    state, nor the device, nor Python's salted ``hash`` has a part in it.
    """
    digest = hashlib.sha256(json.dumps([seed, name, module]).encode()).digest()
    return np.random.SFC64(int.from_bytes(digest[:16], "big"))


def _check_vote(count: int, lam: float, sign: str, aggregate: str, weights: Sequence[float] | None) -> list[float]:
    check_lam(lam)
    check_choice(sign, SIGNS, "sign")
    check_choice(aggregate, AGGREGATES, "aggregate")
    return relative_weights(weights, count) if aggregate == "mean" else raw_weights(weights, count)


def _unchanged(_index: int, _module: str, delta: Tensor) -> Iterable[Tensor]:
    return _blocks(delta)


def _trimming(sets: Sequence[DeltaSet], density: float, scope: str, scratch: Scratch) -> Change:
    """Trim each module by itself, or (global) all of an expert's modules at one threshold, found here first."""
    if density == 1:
        return _unchanged
    work = work_memory()
    if scope == "tensor":
        return lambda _index, _module, delta: map(Trimmer(find_cut(lambda: [delta], density, work)), _blocks(delta))
    trimmers = [Trimmer(_global_cut(one, density, scratch, work)) for one in sets]
    return lambda index, _module, delta: map(trimmers[index], _blocks(delta))


def _global_cut(one: DeltaSet, density: float, scratch: Scratch, work: Tensor) -> Cut:
    """The cut over all of an expert's modules; one that keeps its cuts is searched once for all merges."""
    cuts: dict[float, Cut] = getattr(one, "cuts", {})
    if density not in cuts:
        cuts[density] = find_cut(partial(_all_deltas, one, scratch), density, work)
    return cuts[density]


def _dropping(count: int, density: float, seed: int, names: Sequence[str] | None) -> Change:
    """Keep each entry with probability ``density`` and divide it by that, so that the mean stays.

    The probability is one of the multiples of 2^-16 between 0 and 1, the nearest.
    """
    check_density(density)
    check_seed(seed)
    experts = [str(index) for index in range(count)] if names is None else list(names)
    if len(experts) != count or len(set(experts)) != count:
        raise SamError(f"names={experts!r} must hold one name an expert ({count}), all different")
    if density == 1:
        return _unchanged

    chances = min(max(round(density * 65536), 1), 65535)  # of the values of 16 bits, those that keep an entry

    def drop(index: int, module: str, delta: Tensor) -> Iterator[Tensor]:
        generator = drop_generator(seed, experts[index], module)
        work = torch.empty(min(BLOCK, delta.numel()), dtype=torch.float32, device=delta.device)
        for block in _blocks(delta):
            drawn = generator.random_raw(-(-block.numel() // 4)).astype("<u8", copy=False)
            bits = torch.from_numpy(drawn.view("<i2")[: block.numel()]).to(block.device)
            # 1 or 0, then the entry or 0, in place: much faster than a boolean mask and torch.where
            kept = torch.lt(bits, chances - 32768, out=work[: block.numel()])
            yield kept.mul_(block).mul_(65536 / chances)

    return drop


def _sum_stream(sets: Sequence[DeltaSet], change: Change, weights: list[float], divisor: float, lam: float) -> Merged:
    scratch = Scratch()
    for module in _module_names(sets):
        yield module, _scaled(_sum_module(sets, module, change, weights, scratch).div_(divisor), lam)


def _sum_module(
    sets: Sequence[DeltaSet], module: str, change: Change, weights: list[float], scratch: Scratch
) -> Tensor:
    merged = torch.empty(0)
    for number, (index, delta) in enumerate(_present(sets, module, scratch, one_at_a_time=True)):
        merged = merged if number else _empty_like(delta).zero_()
        for out, part in zip(_blocks(merged), change(index, module, delta), strict=True):
            out.add_(part, alpha=weights[index])
    return merged


def _vote_stream(
    sets: Sequence[DeltaSet],
    prepare: Callable[[Scratch], Change],
    weights: list[float],
    lam: float,
    sign: str,
    aggregate: str,
) -> Merged:
    scratch = Scratch()
    change = prepare(scratch)  # here, not at the call: a global trim reads every delta
    for module in _module_names(sets):
        present = list(_present(sets, module, scratch))
        yield module, _scaled(_vote_module(present, module, change, weights, sign, aggregate), lam)


def _vote_module(
    present: list[tuple[int, Tensor]], module: str, change: Change, weights: list[float], sign: str, aggregate: str
) -> Tensor:
    merged = _empty_like(present[0][1])
    changed = [change(index, module, delta) for index, delta in present]
    part_weights = [weights[index] for index, _ in present]
    for out, *parts in zip(_blocks(merged), *changed, strict=True):
        _vote(out, parts, part_weights, sign, aggregate)
    return merged


def _vote(out: Tensor, parts: list[Tensor], weights: list[float], sign: str, aggregate: str) -> None:
    """Elect a sign an entry and aggregate the parts that agree with it, into ``out``."""
    elected = _elected_sign(parts, weights, sign)
    out.zero_()
    mass, agreeing = torch.zeros_like(elected), torch.empty_like(elected)
    for part, weight in zip(parts, weights, strict=True):
        torch.mul(part, elected, out=agreeing).clamp_(min=0)  # the magnitude where the sign agrees, else 0
        out.add_(agreeing, alpha=weight)
        if aggregate == "mean":
            mass.add_(agreeing.sign_(), alpha=weight)
    if aggregate == "mean":
        out.div_(mass.clamp_(min=_TINY))  # where none agrees the total is 0 and stays 0
    out.mul_(elected)


def _elected_sign(parts: list[Tensor], weights: list[float], sign: str) -> Tensor:
    """-1, 0 or 1 an entry."""
    by_sum = _weighted_sum(parts, weights).sign_()
    if sign == "sum":
        return by_sum
    by_count = _weighted_sum([part.sign() for part in parts], weights).sign_()
    return torch.where(by_count == 0, by_sum, by_count)


def _weighted_sum(parts: list[Tensor], weights: list[float]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _scaled(merged: Tensor, lam: float) -> Tensor:
    return merged if lam == 1 else merged.mul_(lam)


def _empty_like(delta: Tensor) -> Tensor:
    return torch.empty_like(delta, memory_format=torch.contiguous_format)


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.reshape(-1).split(BLOCK)


def _module_names(sets: Sequence[DeltaSet]) -> list[str]:
    return sorted({module for one in sets for module in one})


def _read(one: DeltaSet, module: str, scratch: Scratch, place: int) -> Tensor:
    if isinstance(one, ComputedSet):
        return one.delta(module, scratch.place(place, one.shape(module)))
    return one[module].detach().to(torch.float32)


def _all_deltas(one: DeltaSet, scratch: Scratch) -> Iterator[Tensor]:
    return (_read(one, module, scratch, 0) for module in sorted(one))


def _present(
    sets: Sequence[DeltaSet], module: str, scratch: Scratch, *, one_at_a_time: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(expert's index, fp32 delta) of the experts that have ``module``; SamError if their shapes differ.

    With ``one_at_a_time`` a delta may be overwritten when the next is asked for, else when the next module is.
    """
    shape: tuple[int, ...] | None = None
    for index, one in enumerate(sets):
        if module not in one:
            continue
        delta = _read(one, module, scratch, 0 if one_at_a_time else index)
        if shape is not None and tuple(delta.shape) != shape:
            of = f" of module {module}" if module else ""
            raise SamError(
                f"deltas{of} have shapes {list(shape)} and {list(delta.shape)}; merge experts of the same base model"
            )
        shape = tuple(delta.shape)
        yield index, delta
