"""Merge specs: what each method needs and refuses, and the canonical form."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sam.errors import SamError
from sam.merging import USES, MergeSpec

FULL: dict[str, Any] = {"density": 0.5, "trim_scope": "tensor", "sign": "sum", "aggregate": "mean", "seed": 3}


def spec(name: str, **options: Any) -> MergeSpec:
    """A valid spec of that method, with ``options`` on top."""
    return MergeSpec(name, **{o: v for o, v in FULL.items() if o in USES[name]} | options)


@pytest.mark.parametrize("name", USES)
def test_each_method_takes_exactly_what_it_uses(name: str) -> None:
    spec(name).validate()
    spec(name, weights=(1.0, 2.0), lam=0.3).validate()
    for option, value in FULL.items():
        if option in USES[name]:
            with pytest.raises(SamError, match=f"^merge={name} needs {option}; give merge.{option}="):
                spec(name, **{option: None}).validate()
        else:
            with pytest.raises(SamError, match=f"^merge={name} does not use {option}; remove merge.{option} or choose"):
                spec(name, **{option: value}).validate()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            MergeSpec("linear", density=0.5),
            "merge=linear does not use density; remove merge.density or choose "
            "merge=ties, dare, dare_ties or factor_ties",
        ),
        (MergeSpec("linear", seed=1), "choose merge=dare or dare_ties"),
        (spec("factor_ties", trim_scope="global"), "remove merge.trim_scope or choose merge=ties"),
        (MergeSpec("tiers"), "merge='tiers' is unknown; choose one of ties, dare, linear, dare_ties, task_arithmetic"),
        (spec("ties", density=0), "merge.density=0 is not in (0, 1]"),
        (spec("dare", density=True), "merge.density=True is not in (0, 1]"),
        (spec("dare", seed="x"), "merge.seed='x' is not an integer"),
        (spec("ties", sign="total"), "merge.sign='total' is unknown; choose one of sum, count"),
        (spec("ties", trim_scope="layer"), "merge.trim_scope='layer' is unknown; choose one of tensor, global"),
        (spec("ties", aggregate="max"), "merge.aggregate='max' is unknown; choose one of mean, sum"),
        (spec("linear", lam=None), "merge.lam=None is not a finite number"),
        (spec("linear", weights=(1, -1)), "merge.weights=[1, -1] holds a negative weight"),
        (spec("linear", weights=(0,)), "merge.weights=[0] sums to 0"),
    ],
)
def test_messages(given: MergeSpec, message: str) -> None:
    with pytest.raises(SamError, match=re.escape(message)) as caught:
        given.validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["task_arithmetic", "factor_linear", "factor_ties"])
def test_sums_take_negative_weights(name: str) -> None:
    spec(name, weights=(1, -1)).validate()


def test_spec_is_hashable_with_weights_from_a_list() -> None:
    assert hash(MergeSpec("linear", weights=[1, 2])) == hash(MergeSpec("linear", weights=(1, 2)))  # type: ignore[arg-type]


EQUAL = [
    (spec("ties", density=1, trim_scope="global"), spec("ties", density=1.0, trim_scope="tensor")),
    (spec("dare", density=1, seed=1), spec("dare", density=1, seed=2)),
    (spec("linear", lam=1), spec("linear", lam=1.0)),
    (spec("linear", weights=(2, 2)), spec("linear")),
    (spec("linear", weights=(1, 3)), spec("linear", weights=(0.5, 1.5))),
    (spec("ties", weights=(3, 3)), spec("ties")),
    (spec("task_arithmetic", weights=(1, 1)), spec("task_arithmetic")),
]
DIFFERENT = [
    (spec("ties"), spec("ties", density=0.4)),
    (spec("ties"), spec("ties", trim_scope="global")),
    (spec("ties"), spec("ties", sign="count")),
    (spec("ties"), spec("ties", aggregate="sum")),
    (spec("ties"), spec("ties", lam=0.9)),
    (spec("dare"), spec("dare", seed=4)),
    (spec("dare"), spec("dare_ties")),
    (spec("ties", aggregate="sum", weights=(2, 2)), spec("ties", aggregate="sum")),
    (spec("task_arithmetic", weights=(2, 2)), spec("task_arithmetic")),
    (spec("factor_linear", weights=(2, 2)), spec("factor_linear")),
    (spec("linear", weights=(1, 3)), spec("linear", weights=(3, 1))),
]


def test_canonical_form_holds_what_matters_only() -> None:
    for one, other in EQUAL:
        assert one.canonical() == other.canonical()
    for one, other in DIFFERENT:
        assert one.canonical() != other.canonical()
    assert spec("ties", density=0.2).canonical() == {
        "name": "ties",
        "aggregate": "mean",
        "density": 0.2,
        "lam": 1.0,
        "sign": "sum",
        "trim_scope": "tensor",
    }
