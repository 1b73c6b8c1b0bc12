"""The merge methods: each a function of the experts' deltas and its options, built from a sparsifier and a rule.

``conf/merge/NAME.yaml`` names one by ``_target_`` and gives its options. Each is a :class:`~sam.merging.stream.Method`:
called with tensors, mappings or adapters it returns the merged delta or deltas, and ``.stream`` yields them module by
module. ``lam`` is a factor on the result; ``weights`` has one number per expert (None: equal); ``names`` are the
experts' names, all different (None: "0", "1", …).

A module that an expert lacks is a *structural zero*: a zero delta that has no vote and is not counted in its density.

Public implementations differ, which each docstring states: the three TIES in use give three results for one entry,
(-3, 2, 2) with weights (1, 0.1, 1), which is 1.1 in PEFT and -3 in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence

from sam.merging import factors, spectral
from sam.merging.sparsify import at_random, by_rank, everything, largest, middle
from sam.merging.stream import DeltaSet, Merged, Method, vote, weighted_mean, weighted_sum

Sets = Sequence[DeltaSet]
Weights = Sequence[float] | None
Names = Sequence[str] | None


@Method
def ties(
    deltas: Sets,
    *,
    density: float,
    lam: float = 1.0,
    trim_scope: str = "tensor",
    sign: str = "sum",
    aggregate: str = "mean",
    weights: Weights = None,
) -> Merged:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim each expert, elect a sign for each entry, merge the experts that
    agree with it, times ``lam``.

    1. Trim: of each expert's n entries keep exactly ``round(density * n)`` (halves to even, at least 1) by magnitude,
       equal magnitudes in order of module name, then index. ``trim_scope="tensor"`` counts in each module by itself,
       ``"global"`` in all of an expert's modules together; for single tensors they are the same. Density 1 keeps all.
    2. Elect: ``sign="sum"``, the sign of the sum of w·τ over the trimmed values τ; ``"count"``, the sign of the sum of
       w·sign(τ), where a tied count is decided by the sum. Where the sum is exactly zero too, the entry is 0.
    3. Merge the nonzero τ that have the elected sign: ``aggregate="mean"``, Σw·τ / Σw; ``"sum"``, Σw·τ.

    ``weights`` are >= 0. One expert, density 1 and lam 1 give that expert back.

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
    sparsify = largest(deltas, density, trim_scope)
    return vote(deltas, sparsify, lam=lam, sign=sign, aggregate=aggregate, weights=weights)


@Method
def dare(
    deltas: Sets, *, density: float, seed: int, lam: float = 1.0, weights: Weights = None, names: Names = None
) -> Merged:
    """DARE (Yu et al. 2024, arXiv 2311.03099): keep each entry with probability ``density``, divide it by that; then
    the weighted mean, times ``lam``.

    Weights (>= 0) are normalised to 1, so the expectation is ``linear(deltas)``. The mask comes from a generator of its
    own, seeded by (``seed``, expert's name, module's name): the experts' order and the global random state do not
    matter.

    Differences: PEFT ``dare_linear`` draws from the global random state and does not normalise the weights; the paper's
    code takes the dropped fraction; mergekit rescales to the L1 norm before the drop instead of dividing by the
    density.
    """
    return weighted_mean(deltas, at_random(len(deltas), density, seed, names), lam=lam, weights=weights)


@Method
def dare_ties(
    deltas: Sets,
    *,
    density: float,
    seed: int,
    lam: float = 1.0,
    sign: str = "sum",
    aggregate: str = "mean",
    weights: Weights = None,
    names: Names = None,
) -> Merged:
    """The drop and rescaling of :func:`dare` in place of the trim of :func:`ties`, then its steps 2 and 3.

    Differences: PEFT ``dare_ties`` as in both those functions; mergekit's does not divide by Σw by default.
    """
    sparsify = at_random(len(deltas), density, seed, names)
    return vote(deltas, sparsify, lam=lam, sign=sign, aggregate=aggregate, weights=weights)


@Method
def della(
    deltas: Sets,
    *,
    density: float,
    epsilon: float,
    seed: int,
    lam: float = 1.0,
    sign: str = "sum",
    aggregate: str = "mean",
    weights: Weights = None,
    names: Names = None,
) -> Merged:
    """DELLA (Deep et al. 2024, arXiv 2406.11617): as :func:`dare_ties`, but the probability to keep an entry rises
    linearly with its rank by magnitude in its row of ΔW, from ``density`` - ``epsilon``/2 to ``density`` +
    ``epsilon``/2, and each is divided by its own.

    Differences: mergekit ``della`` takes half the range as its epsilon, and rescales to the L1 norm before the drop.
    """
    sparsify = by_rank(len(deltas), density, epsilon, seed, names)
    return vote(deltas, sparsify, lam=lam, sign=sign, aggregate=aggregate, weights=weights)


@Method
def breadcrumbs(deltas: Sets, *, density: float, gamma: float, lam: float, weights: Weights = None) -> Merged:
    """Model breadcrumbs (Davari & Belilovsky 2024, arXiv 2312.06795): of each module, drop the ``gamma`` largest
    entries by magnitude and keep the next ``density``; then the weighted sum, times ``lam``.

    Differences: the paper counts β = 1 - density - gamma from below; mergekit ``breadcrumbs`` is this.
    """
    return weighted_sum(deltas, middle(density, gamma), lam=lam, weights=weights)


@Method
def linear(deltas: Sets, *, lam: float = 1.0, weights: Weights = None) -> Merged:
    """The weighted mean Σw·δ / Σw, times ``lam``; weights >= 0. A structural zero counts in Σw.

    PEFT's ``combination_type="linear"`` is not this but (Σ√(w·s)·B)(Σ√(w·s)·A), with cross terms between experts; see
    :func:`factor_linear`. Its ``"cat"`` is this, with the weights given.
    """
    return weighted_mean(deltas, everything, lam=lam, weights=weights)


@Method
def task_arithmetic(deltas: Sets, *, lam: float, weights: Weights = None) -> Merged:
    """The weighted sum ``lam`` · Σw·δ; weights may have any sign (Ilharco et al. 2023, arXiv 2212.04089).

    Same as PEFT's ``task_arithmetic``.
    """
    return weighted_sum(deltas, everything, lam=lam, weights=weights)


@Method
def iso_c(deltas: Sets, *, lam: float) -> Merged:
    """Iso-C (Marczak et al. 2025, arXiv 2502.04959): the sum of the deltas U Σ Vᵀ with all its singular values replaced
    by their mean σ̄, ``lam`` · σ̄ U Vᵀ per module, so that no expert's directions dominate.

    Difference: the paper takes the mean over all min(out, in) singular values. The sum of k LoRA deltas has at most
    k·r that are not 0; the mean is over these, and the others stay 0.
    """
    return spectral.isotropic(deltas, lam)


@Method
def knots_ties(
    deltas: Sets,
    *,
    density: float,
    lam: float = 1.0,
    trim_scope: str = "global",
    sign: str = "sum",
    aggregate: str = "mean",
    weights: Weights = None,
) -> Merged:
    """KnOTS with TIES (Stoica et al. 2025, arXiv 2410.19735): with [ΔW_1 … ΔW_n] = U Σ [V_1ᵀ … V_nᵀ] per module,
    :func:`ties` merges the Σ V_iᵀ, in which experts are better aligned, and U is applied to the result.

    Density counts the entries of Σ V_iᵀ. The decompositions of all modules are in memory at once: rank · (out + n · in)
    numbers per module.
    """
    bases, parts = spectral.aligned(deltas)
    merged = ties.stream(
        parts, density=density, lam=lam, trim_scope=trim_scope, sign=sign, aggregate=aggregate, weights=weights
    )
    return ((module, bases[module] @ delta) for module, delta in merged)


@Method
def factor_linear(deltas: Sets, *, lam: float = 1.0, weights: Weights = None, names: Names = None) -> Merged:
    """PEFT's ``combination_type="linear"``, lam · (Σ√(w·s)·B)(Σ√(w·s)·A), of adapters; weights default to 1 each.

    A negative weight puts its sign on A. PEFT scales the result of an rsLoRA merge by √r once more; that is not copied.
    Raises SamError unless all are adapters with the same modules and ranks. See :mod:`sam.merging.factors`.
    """
    return factors.linear_stream(deltas, names, lam, weights)


@Method
def factor_ties(
    deltas: Sets, *, density: float, sign: str = "sum", lam: float = 1.0, weights: Weights = None, names: Names = None
) -> Merged:
    """PEFT's ``combination_type="ties"``, TIES on A and on B apart, each tensor trimmed by itself, of adapters.

    ``sign="sum"`` is PEFT's ``majority_sign_method="total"``, ``"count"`` its ``"frequency"``. Otherwise as
    :func:`factor_linear`; the differences of PEFT's TIES are listed at :func:`ties`.
    """
    return factors.ties_stream(deltas, names, density, sign, lam, weights)
