"""Checks of merge options. Each message begins with the option's name and value."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from sam.errors import SamError


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_density(density: object) -> None:
    """Raise SamError unless ``density`` is a number in (0, 1], a fraction of entries that is kept."""
    if not (_is_number(density) and 0 < density <= 1):  # type: ignore[operator]
        raise SamError(f"density={density!r} is not in (0, 1]; give the fraction of entries to keep, e.g. 0.2")


def check_fraction(value: object, option: str) -> None:
    """Raise SamError unless ``value`` is a number in [0, 1)."""
    if not (_is_number(value) and 0 <= value < 1):  # type: ignore[operator]
        raise SamError(f"{option}={value!r} is not in [0, 1); give a fraction, e.g. 0.01")


def check_lam(lam: object) -> None:
    """Raise SamError unless ``lam`` is a finite number."""
    if not _is_number(lam):
        raise SamError(f"lam={lam!r} is not a finite number; give the factor on the merged delta, e.g. 1.0")


def check_seed(seed: object) -> None:
    """Raise SamError unless ``seed`` is an integer."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise SamError(f"seed={seed!r} is not an integer; e.g. 0")


def check_choice(value: object, allowed: Collection[str], option: str) -> None:
    """Raise SamError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise SamError(f"{option}={value!r} is unknown; choose one of {', '.join(allowed)}")


def check_count(weights: Sequence[float], count: int) -> None:
    """Raise SamError unless there are ``count`` weights."""
    if len(weights) != count:
        raise SamError(f"weights={list(weights)!r} has {len(weights)} values for {count} experts; give one per expert")


def raw_weights(weights: Sequence[float] | None, count: int, *, signed: bool = False) -> list[float]:
    """The weights as given, 1 each for None.

    Raises SamError unless there are ``count`` finite numbers, not negative with a sum above 0 (unless ``signed``).
    """
    if weights is None:
        return [1.0] * count
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise SamError(f"weights={weights!r} is not a list; give one number per expert")
    check_count(weights, count)
    shown = f"weights={list(weights)!r}"
    if not all(_is_number(w) for w in weights):
        raise SamError(f"{shown} holds a value that is not a finite number; give one number per expert")
    if not signed and any(w < 0 for w in weights):
        raise SamError(f"{shown} holds a negative weight; give weights >= 0 (task_arithmetic takes any)")
    if not signed and sum(weights) <= 0:
        raise SamError(f"{shown} sums to 0; give at least one weight above 0")
    return [float(w) for w in weights]


def relative_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights divided by their maximum, for means: equal weights of any size then give the same bits."""
    checked = raw_weights(weights, count)
    largest = max(checked)
    return [w / largest for w in checked]
