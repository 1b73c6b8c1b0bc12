"""What a merge is: its method and every option that the method uses, no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam import extend
from sam.errors import SamError
from sam.merging.checks import check_choice, check_density, check_lam, check_seed, check_weights
from sam.merging.deltas import AdapterDeltas
from sam.merging.streams import AGGREGATES, SIGNS, TRIM_SCOPES

USES: dict[str, frozenset[str]] = {
    "ties": frozenset({"density", "lam", "trim_scope", "sign", "aggregate", "weights"}),
    "dare": frozenset({"density", "lam", "seed", "weights"}),
    "linear": frozenset({"lam", "weights"}),
    "dare_ties": frozenset({"density", "lam", "seed", "sign", "aggregate", "weights"}),
    "task_arithmetic": frozenset({"lam", "weights"}),
    "factor_ties": frozenset({"density", "lam", "sign", "weights"}),
    "factor_linear": frozenset({"lam", "weights"}),
}
"""Which options each method uses. All but ``lam`` (1) and ``weights`` (equal) have to be given."""

_OPTIONS = ("density", "trim_scope", "sign", "aggregate", "seed", "weights")  # those that are None when not given
_OPTIONAL = frozenset({"lam", "weights"})


@dataclass(frozen=True)
class MergeSpec:
    """A merge method and its options; None where an option is not given. Methods: the keys of ``USES``.

    ``density`` is the fraction of entries kept (ties, factor_ties: by magnitude; dare, dare_ties: at random, the drop
    probability is 1 - density), ``lam`` the factor on the merged delta, ``weights`` one an expert, in their order.
    """

    name: str
    density: float | None = None
    lam: float = 1.0
    trim_scope: str | None = None
    sign: str | None = None
    aggregate: str | None = None
    seed: int | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))  # lists come from YAML; a spec is hashable

    def validate(self) -> None:
        """Raise SamError for an unknown method, an option that it does not use, or lacks, or a value out of range."""
        check_choice(self.name, USES, "merge")
        for option in _OPTIONS:
            given = getattr(self, option) is not None
            if given and option not in USES[self.name]:
                users = _listed([name for name, used in USES.items() if option in used])
                raise SamError(
                    f"merge={self.name} does not use {option}; remove merge.{option} or choose merge={users}"
                )
            if not given and option in USES[self.name] - _OPTIONAL:
                raise SamError(f"merge={self.name} needs {option}; give merge.{option}={_HINTS[option]}")
        self._check_values()

    def _check_values(self) -> None:
        check_lam(self.lam, "merge.lam")
        if self.density is not None:
            check_density(self.density, "merge.density")
        if self.seed is not None:
            check_seed(self.seed, "merge.seed")
        for option, allowed in (("trim_scope", TRIM_SCOPES), ("sign", SIGNS), ("aggregate", AGGREGATES)):
            if getattr(self, option) is not None:
                check_choice(getattr(self, option), allowed, f"merge.{option}")
        if self.weights is not None:
            check_weights(self.weights, signed=self.signed_weights, option="merge.weights")

    @property
    def signed_weights(self) -> bool:
        """Whether weights may be negative: where nothing is divided by their sum and no vote is weighted with them."""
        return self.name in ("task_arithmetic", "factor_linear", "factor_ties")

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a random draw, and so on the seed and the experts' names."""
        return self.name in ("dare", "dare_ties") and self.density != 1

    def canonical(self) -> dict[str, Any]:
        """The name and the options that can change the result, as plain values for JSON: two specs with equal
        canonical forms give equal merges (weights: of one size only where they are divided by their sum).
        """
        options: dict[str, Any] = {o: getattr(self, o) for o in USES[self.name] if getattr(self, o) is not None}
        options.update({o: float(options[o]) for o in ("density", "lam") if o in options})
        if self.density == 1:
            options.pop("trim_scope", None)  # nothing is trimmed or dropped
            options.pop("seed", None)
        if self.weights is not None:
            options["weights"] = self._canonical_weights(self.weights)
            if set(options["weights"]) == {1.0}:
                del options["weights"]
        return {"name": self.name, **{option: options[option] for option in sorted(options)}}

    def _canonical_weights(self, weights: tuple[float, ...]) -> list[float]:
        means = self.name in ("linear", "dare") or (self.name in ("ties", "dare_ties") and self.aggregate == "mean")
        return [w / (max(weights) if means else 1.0) for w in weights]


@dataclass(frozen=True)
class CustomMerge:
    """A merge by a function that is not ours: of the list of ΔW of one module (fp32, in an order that does not depend
    on the selection's) and of ``options``, it returns the merged ΔW."""

    target: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: None = None
    signed_weights = is_random = False

    @property
    def name(self) -> str:
        """The function's name."""
        return self.target

    def validate(self) -> None:
        """Options were checked against the function's signature."""

    def canonical(self) -> dict[str, Any]:
        """The function, the source file that it is in, and its options."""
        return extend.identity(self.target, self.function, self.options)

    def stream(self, adapters: Sequence[AdapterDeltas]) -> Iterator[tuple[str, Tensor]]:
        """(module, merged ΔW), a module at a time; an expert without a module counts as zero there."""
        for module in sorted({module for adapter in adapters for module in adapter}):
            shape = next(adapter.shape(module) for adapter in adapters if module in adapter)
            deltas = [adapter[module] if module in adapter else torch.zeros(shape) for adapter in adapters]
            merged = self.function(deltas, **self.options)
            if not isinstance(merged, Tensor) or merged.shape != shape:
                got = f"shape {list(merged.shape)}" if isinstance(merged, Tensor) else f"a {type(merged).__name__}"
                raise SamError(
                    f"merge: {self.target} returned {got} for {module}; it must return a ΔW of {list(shape)}"
                )
            yield module, merged.float()


Merge = MergeSpec | CustomMerge

_HINTS = {
    "density": "a fraction in (0, 1], e.g. 0.2",
    "trim_scope": " or ".join(TRIM_SCOPES),
    "sign": " or ".join(SIGNS),
    "aggregate": " or ".join(AGGREGATES),
    "seed": "an integer, e.g. 0",
}


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
