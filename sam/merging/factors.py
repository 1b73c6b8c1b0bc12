"""Merging LoRA factors instead of deltas: an ablation, what PEFT's ``add_weighted_adapter`` does.

A and B are merged apart, each weighted by √(weight · scale), and multiplied afterwards. The result holds the cross
terms B_i A_j of different experts, and it depends on the gauge: (B R, R⁻¹ A) is the same expert with another result.
Two equal experts under ``factor_linear`` with weights 1 give four times the expert, with weights 0.5 twice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam.errors import SamError
from sam.merging.checks import check_choice, check_density, check_lam, raw_weights
from sam.merging.deltas import AdapterDeltas, Factors
from sam.merging.stream import SIGNS, DeltaSet, Merged

Combine = Callable[[list[Tensor], Tensor], Tensor]
"""(one factor of each expert, a weight for each) to the merged factor."""

_PEFT_SIGN = {"sum": "total", "count": "frequency"}


def linear_stream(
    sets: Sequence[DeltaSet], names: Sequence[str] | None, lam: float, weights: Sequence[float] | None
) -> Merged:
    """See :func:`sam.merging.factor_linear`."""
    check_lam(lam)
    scales = raw_weights(weights, len(sets), signed=True)
    adapters = compatible(sets, names)

    def merge(parts: list[Tensor], sides: Tensor) -> Tensor:
        from peft.utils.merge_utils import task_arithmetic  # here, because importing PEFT takes seconds

        return task_arithmetic(parts, sides)

    return ((module, _merged(adapters, module, scales, merge) * lam) for module in adapters[0].modules())


def ties_stream(
    sets: Sequence[DeltaSet],
    names: Sequence[str] | None,
    density: float,
    sign: str,
    lam: float,
    weights: Sequence[float] | None,
) -> Merged:
    """See :func:`sam.merging.factor_ties`."""
    check_density(density)
    check_lam(lam)
    check_choice(sign, SIGNS, "sign")
    scales = raw_weights(weights, len(sets), signed=True)
    adapters = compatible(sets, names)

    def merge(parts: list[Tensor], sides: Tensor) -> Tensor:
        from peft.utils.merge_utils import ties

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # at density 1 PEFT warns for each tensor that it keeps all
            return ties(parts, sides, density, _PEFT_SIGN[sign])  # type: ignore[arg-type]

    return ((module, _merged(adapters, module, scales, merge) * lam) for module in adapters[0].modules())


def compatible(sets: Sequence[DeltaSet], names: Sequence[str] | None) -> list[AdapterDeltas]:
    """The adapters. Raises SamError, naming two experts, unless all have the same modules, shapes and ranks."""
    adapters = [one for one in sets if isinstance(one, AdapterDeltas)]
    if not sets or len(adapters) < len(sets):
        raise SamError("merging factors takes LoRA adapters, at least one; other deltas have no factors")
    names = names or [str(index) for index in range(len(adapters))]
    first = adapters[0]
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        differing = sorted(set(first.modules()) ^ set(adapter.modules()))
        if differing:
            raise SamError(
                f"experts {names[0]} and {name} differ in modules (e.g. {differing[0]}); "
                "merging factors needs the same target modules, merging deltas does not"
            )
        for module in first.modules():
            one, other = first.factors(module), adapter.factors(module)
            if one.shape != other.shape or one.transposed != other.transposed:
                raise SamError(
                    f"experts {names[0]} and {name} differ in the shape of {module} ({one.shape} and {other.shape}); "
                    "merge experts of the same base model"
                )
            if one.rank != other.rank:
                raise SamError(
                    f"experts {names[0]} and {name} differ in rank at {module} ({one.rank} and {other.rank}); "
                    "merging factors needs equal ranks, merging deltas does not"
                )
    return adapters


def _merged(
    adapters: Sequence[AdapterDeltas],
    module: str,
    weights: list[float],
    merge: Combine,
) -> Tensor:
    factors = [adapter.factors(module) for adapter in adapters]
    signed = [weight * one.scale for weight, one in zip(weights, factors, strict=True)]
    on_b = torch.tensor([math.sqrt(abs(value)) for value in signed])
    on_a = torch.tensor([math.copysign(math.sqrt(abs(value)), value) for value in signed])
    a, b = merge([one.a for one in factors], on_a), merge([one.b for one in factors], on_b)
    return Factors(a, b, 1.0, factors[0].transposed).product()
