"""Merging deltas (task vectors) of experts: TIES, DARE, their mixture, the weighted mean and the weighted sum.

Pure functions. ``deltas`` is a sequence with one item an expert: tensors of one shape (the result is a tensor), or
mappings from module name to a delta (the result is a dict with every module that some expert has). In the mapping
form a module that an expert lacks is a *structural zero*: a zero delta that has no vote and is not counted in its
density. Inputs may be of any floating dtype; the work and the result are fp32; inputs are never changed.

All raise SamError for an empty sequence, differing shapes, values that are not finite, and options out of range.

Sources: TIES, Yadav et al. 2023 (arXiv 2306.01708); DARE, Yu et al. 2024 (arXiv 2311.03099); task arithmetic,
Ilharco et al. 2023 (arXiv 2212.04089). Each docstring says where the public implementations differ, because the three
TIES in use give three results for one entry: (-3, 2, 2) with weights (1, 0.1, 1) is 1.1 in PEFT and -3 in mergekit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sam.errors import SamError
from sam.merging import streams
from sam.merging.checks import check_drop

Deltas = TypeVar("Deltas", Tensor, Mapping[str, Tensor])


def ties(
    deltas: Sequence[Deltas],
    *,
    density: float,
    lam: float = 1.0,
    trim_scope: str = "tensor",
    sign: str = "sum",
    aggregate: str = "mean",
    weights: Sequence[float] | None = None,
) -> Deltas:
    """TIES: trim each expert, elect a sign for each entry, merge the experts that agree with it, times ``lam``.

    1. Trim: of each expert's n entries keep exactly ``round(density * n)`` (halves to even, at least 1) by magnitude,
       equal magnitudes in order of module name, then index. ``trim_scope="tensor"`` counts in each module by itself,
       ``"global"`` in all of an expert's modules together; for single tensors they are the same. Density 1 keeps all.
    2. Elect: ``sign="sum"``, the sign of the sum of w·τ over the trimmed values τ; ``"count"``, the sign of the sum of
       w·sign(τ), where a tied count is decided by the sum. Where the sum is exactly zero too, the entry is 0.
    3. Merge the nonzero τ that have the elected sign: ``aggregate="mean"``, Σw·τ / Σw; ``"sum"``, Σw·τ.

    ``weights`` (None: 1 each) are >= 0. One expert, density 1 and lam 1 give that expert back.

    An exactly tied sum gives 0, so that ``ties(-d) == -ties(d)`` and no direction is preferred. Differences:

    - The paper's code gives a tied sum the majority sign of the whole model, keeps one entry more than asked and every
      entry equal to the threshold, keeps all entries of a vector that is mostly zeros, and fails at density 1. Its trim
      is global; its vote and mean are unweighted.
    - PEFT ``ties`` truncates ``int(density * n)``, votes without weights, divides the weighted sum by the *number* of
      agreeing experts, and reads a tied sum as +. On ΔW it equals this function at weights 1 where no sum is tied and
      the counts agree; ``add_weighted_adapter`` applies it to A and B apart, which is another thing (``factor_ties``).
    - mergekit ``ties`` trims each tensor to ``int(density * n)``, votes with weights and divides by Σw as here, and
      reads a tied sum as +.
    """

    def run(sets: Sequence[streams.DeltaSet]) -> streams.Merged:
        return streams.ties_stream(
            sets, density=density, lam=lam, trim_scope=trim_scope, sign=sign, aggregate=aggregate, weights=weights
        )

    return _merge(deltas, run)


def dare(
    deltas: Sequence[Deltas],
    *,
    drop: float,
    seed: int,
    lam: float = 1.0,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Deltas:
    """DARE: keep each entry with probability ``1 - drop``, divide it by that; then the weighted mean, times ``lam``.

    Weights (>= 0, None: equal) are normalised to 1, so the expectation is ``linear(deltas)``. The mask comes from a
    generator of its own, seeded by (``seed``, expert's name, module's name): the experts' order and the global random
    state do not matter. ``names`` are the experts' names, all different; None names them by position, "0", "1", ….

    Differences: PEFT ``dare_linear`` draws from the global random state and does not normalise the weights, and its
    ``density`` is the kept fraction; the paper's code takes the dropped one, as here; mergekit rescales to the L1 norm
    before the drop instead of dividing by ``1 - drop``.
    """
    check_drop(drop)

    def run(sets: Sequence[streams.DeltaSet]) -> streams.Merged:
        return streams.dare_stream(sets, density=1 - drop, seed=seed, lam=lam, weights=weights, names=names)

    return _merge(deltas, run)


def dare_ties(
    deltas: Sequence[Deltas],
    *,
    drop: float,
    seed: int,
    lam: float = 1.0,
    sign: str = "sum",
    aggregate: str = "mean",
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Deltas:
    """The drop and rescaling of :func:`dare` in place of the trim of :func:`ties`, then its steps 2 and 3.

    Differences: PEFT ``dare_ties`` as in both those functions; mergekit's does not divide by Σw by default.
    """
    check_drop(drop)

    def run(sets: Sequence[streams.DeltaSet]) -> streams.Merged:
        return streams.dare_ties_stream(
            sets,
            density=1 - drop,
            seed=seed,
            lam=lam,
            sign=sign,
            aggregate=aggregate,
            weights=weights,
            names=names,
        )

    return _merge(deltas, run)


def linear(deltas: Sequence[Deltas], *, lam: float = 1.0, weights: Sequence[float] | None = None) -> Deltas:
    """The weighted mean Σw·δ / Σw, times ``lam``; weights >= 0, None: equal. A structural zero counts in Σw.

    PEFT's ``combination_type="linear"`` is not this but (Σ√(w·s)·B)(Σ√(w·s)·A), with cross terms between experts; see
    ``factor_linear``. Its ``"cat"`` is this, with the weights given.
    """
    return _merge(deltas, lambda sets: streams.linear_stream(sets, lam=lam, weights=weights))


def task_arithmetic(deltas: Sequence[Deltas], *, lam: float, weights: Sequence[float] | None = None) -> Deltas:
    """The weighted sum ``lam`` · Σw·δ; weights may have any sign, None: 1 each. Same as PEFT's ``task_arithmetic``."""
    return _merge(deltas, lambda sets: streams.task_arithmetic_stream(sets, lam=lam, weights=weights))


def _merge(deltas: Sequence[Any], run: Callable[[Sequence[streams.DeltaSet]], streams.Merged]) -> Any:
    if not deltas:
        raise SamError("deltas is empty; give the deltas of at least one expert")
    single = isinstance(deltas[0], Tensor)
    if any(isinstance(one, Tensor) != single for one in deltas):
        raise SamError("deltas mixes tensors and mappings; give one form for all experts")
    sets = [{"": one} for one in deltas] if single else list(deltas)
    for number, one in enumerate(sets):
        for module in one:
            if not torch.isfinite(one[module]).all():
                raise SamError(f"delta {number}{' of module ' + module if module else ''} holds NaN or infinity")
    merged = dict(run(sets))
    return merged[""] if single else merged
