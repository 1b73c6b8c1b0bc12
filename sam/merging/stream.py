"""Merging one module at a time: what a merge method is made of, and how it is called.

A method computes on *delta sets*, one per expert: a ``dict[str, Tensor]``, or anything that computes a module's delta
when it is asked for. It checks its options at the call and returns an iterator of (module, merged ΔW in fp32), modules
in order of name. In memory at a time: the (trimmed) deltas of one module.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, runtime_checkable

import torch
from torch import Tensor

from sam.errors import SamError
from sam.merging.checks import check_choice, check_lam, raw_weights, relative_weights

SIGNS = ("sum", "count")
AGGREGATES = ("mean", "sum")

BLOCK = 1 << 16
"""Entries computed at a time, so that a dozen fp32 temporaries fit in the processor's cache."""

_TINY = torch.finfo(torch.float32).tiny

P = ParamSpec("P")
Merged = Iterator[tuple[str, Tensor]]
Sparsifier = Callable[[int, str, Tensor], Iterable[Tensor]]
"""(index of the expert, module, delta) to the sparse delta, as flat blocks of ``BLOCK`` entries; a block may be
overwritten when the next is asked for."""
Sparsify = Callable[["Scratch"], Sparsifier]
"""Makes a :data:`Sparsifier` when the first module is asked for: a global trim reads every delta before that."""


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


class Method(Generic[P]):
    """A merge method: called with deltas it returns the merged ones; ``stream`` yields them module by module.

    ``deltas`` has one item per expert: tensors of one shape (the result is a tensor), or delta sets (the result is a
    dict with every module that some expert has). Any floating dtype; the result is fp32; inputs are never changed.
    Raises SamError for no deltas, both forms at once, values that are not finite, and what the stream refuses.
    """

    def __init__(self, stream: Callable[Concatenate[Sequence[DeltaSet], P], Merged]) -> None:
        self.stream = stream
        functools.update_wrapper(self, stream)

    def __call__(self, deltas: Sequence[Any], *args: P.args, **options: P.kwargs) -> Any:
        if not deltas:
            raise SamError("deltas is empty; give the deltas of at least one expert")
        single = isinstance(deltas[0], Tensor)
        if any(isinstance(one, Tensor) != single for one in deltas):
            raise SamError("deltas mixes tensors and mappings; give one form for all experts")
        sets = [{"": one} for one in deltas] if single else list(deltas)
        _check_finite(sets)
        merged = dict(self.stream(sets, *args, **options))
        return merged[""] if single else merged

    @property
    def takes_names(self) -> bool:
        """Whether it is given the experts' names."""
        return "names" in inspect.signature(self.stream).parameters


def _check_finite(sets: Sequence[DeltaSet]) -> None:
    for number, one in enumerate(sets):
        for module in one:
            if not torch.isfinite(one[module]).all():
                raise SamError(f"delta {number}{of_module(module)} holds NaN or infinity")


class Scratch:
    """Memory that deltas are computed into, one place per expert, used again for every module.

    Fresh memory would cost more than the arithmetic: the system clears it, page by page, at the first touch.
    """

    def __init__(self) -> None:
        self._places: dict[int, Tensor] = {}

    def place(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """An fp32 tensor of ``shape`` with arbitrary values; it takes the memory of the last one of that index."""
        entries = math.prod(shape)
        if index not in self._places or self._places[index].numel() < entries:
            self._places.pop(index, None)
            self._places[index] = torch.empty(entries)
        return self._places[index][:entries].view(shape)


def weighted_mean(
    sets: Sequence[DeltaSet], sparsify: Sparsify, *, lam: float, weights: Sequence[float] | None
) -> Merged:
    """``lam`` · Σw·δ / Σw of the sparse deltas δ, weights >= 0; a module that an expert lacks counts in Σw."""
    check_lam(lam)
    scaled = relative_weights(weights, len(sets))
    return _sum_stream(sets, sparsify, scaled, sum(scaled), lam)


def weighted_sum(
    sets: Sequence[DeltaSet], sparsify: Sparsify, *, lam: float, weights: Sequence[float] | None
) -> Merged:
    """``lam`` · Σw·δ of the sparse deltas δ, weights of any sign."""
    check_lam(lam)
    return _sum_stream(sets, sparsify, raw_weights(weights, len(sets), signed=True), 1.0, lam)


def vote(
    sets: Sequence[DeltaSet],
    sparsify: Sparsify,
    *,
    lam: float,
    sign: str,
    aggregate: str,
    weights: Sequence[float] | None,
) -> Merged:
    """Steps 2 and 3 of TIES on the sparse deltas: see :func:`sam.merging.ties`."""
    check_lam(lam)
    check_choice(sign, SIGNS, "sign")
    check_choice(aggregate, AGGREGATES, "aggregate")
    scaled = (relative_weights if aggregate == "mean" else raw_weights)(weights, len(sets))
    return _vote_stream(sets, sparsify, scaled, lam, sign, aggregate)


def _sum_stream(
    sets: Sequence[DeltaSet], sparsify: Sparsify, weights: list[float], divisor: float, lam: float
) -> Merged:
    scratch = Scratch()
    change = sparsify(scratch)
    for module in module_names(sets):
        yield module, _scaled(_sum_module(sets, module, change, weights, scratch).div_(divisor), lam)


def _sum_module(
    sets: Sequence[DeltaSet], module: str, change: Sparsifier, weights: list[float], scratch: Scratch
) -> Tensor:
    merged = torch.empty(0)
    for number, (index, delta) in enumerate(present(sets, module, scratch, one_at_a_time=True)):
        merged = merged if number else _empty_like(delta).zero_()
        for out, part in zip(blocks(merged), change(index, module, delta), strict=True):
            out.add_(part, alpha=weights[index])
    return merged


def _vote_stream(
    sets: Sequence[DeltaSet], sparsify: Sparsify, weights: list[float], lam: float, sign: str, aggregate: str
) -> Merged:
    scratch = Scratch()
    change = sparsify(scratch)
    for module in module_names(sets):
        deltas = list(present(sets, module, scratch))
        yield module, _scaled(_vote_module(deltas, module, change, weights, sign, aggregate), lam)


def _vote_module(
    deltas: list[tuple[int, Tensor]], module: str, change: Sparsifier, weights: list[float], sign: str, aggregate: str
) -> Tensor:
    merged = _empty_like(deltas[0][1])
    changed = [change(index, module, delta) for index, delta in deltas]
    part_weights = [weights[index] for index, _ in deltas]
    for out, *parts in zip(blocks(merged), *changed, strict=True):
        _vote(out, parts, part_weights, sign, aggregate)
    return merged


def _vote(out: Tensor, parts: list[Tensor], weights: list[float], sign: str, aggregate: str) -> None:
    """Elect a sign per entry and aggregate the parts that agree with it, into ``out``."""
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
    """-1, 0 or 1 per entry."""
    by_sum = _total(parts, weights).sign_()
    if sign == "sum":
        return by_sum
    by_count = _total([part.sign() for part in parts], weights).sign_()
    return torch.where(by_count == 0, by_sum, by_count)


def _total(parts: list[Tensor], weights: list[float]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _scaled(merged: Tensor, lam: float) -> Tensor:
    return merged if lam == 1 else merged.mul_(lam)


def _empty_like(delta: Tensor) -> Tensor:
    return torch.empty_like(delta, memory_format=torch.contiguous_format)


def blocks(tensor: Tensor) -> Sequence[Tensor]:
    """The entries in flat blocks of ``BLOCK``."""
    return tensor.reshape(-1).split(BLOCK)


def of_module(module: str) -> str:
    """``" of module m"`` for a message; nothing for a tensor, which has no module."""
    return f" of module {module}" if module else ""


def module_names(sets: Sequence[DeltaSet]) -> list[str]:
    """Every module that some expert has, sorted."""
    return sorted({module for one in sets for module in one})


def read(one: DeltaSet, module: str, scratch: Scratch, place: int = 0) -> Tensor:
    """The module's delta, fp32; a computed one in the memory of ``place``."""
    if isinstance(one, ComputedSet):
        return one.delta(module, scratch.place(place, one.shape(module)))
    return one[module].detach().to(torch.float32)


def present(
    sets: Sequence[DeltaSet], module: str, scratch: Scratch, *, one_at_a_time: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(index of the expert, fp32 delta) of the experts that have ``module``; SamError if their shapes differ.

    With ``one_at_a_time`` a delta may be overwritten when the next is asked for, else when the next module is.
    """
    shape: tuple[int, ...] | None = None
    for index, one in enumerate(sets):
        if module not in one:
            continue
        delta = read(one, module, scratch, 0 if one_at_a_time else index)
        if shape is not None and tuple(delta.shape) != shape:
            raise SamError(
                f"deltas{of_module(module)} have shapes {list(shape)} and {list(delta.shape)}; merge experts of the "
                "same base model"
            )
        shape = tuple(delta.shape)
        yield index, delta
