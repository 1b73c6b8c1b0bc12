"""Merges as the config names them: options, messages, and what identifies them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sam.errors import SamError
from sam.merging import Merge, dare, factor_linear, linear, task_arithmetic, ties

TARGET = "_target_"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({TARGET: "sam.merging.linear", "density": 0.5}, "merge: sam.merging.linear does not take these options (got"),
        ({TARGET: "sam.merging.ties"}, "merge: sam.merging.ties does not take these options (missing"),
        ({TARGET: "sam.merging.tiers"}, "merge._target_=sam.merging.tiers cannot be imported"),
        ({}, "merge._target_ is missing"),
        ({TARGET: "sam.merging.ties", "density": 0}, "merge.density=0 is not in (0, 1]"),
        ({TARGET: "sam.merging.dare", "density": True, "seed": 0}, "merge.density=True is not in (0, 1]"),
        ({TARGET: "sam.merging.dare", "density": 0.5, "seed": "x"}, "merge.seed='x' is not an integer"),
        ({TARGET: "sam.merging.ties", "density": 1, "sign": "total"}, "merge.sign='total' is unknown; choose one of"),
        ({TARGET: "sam.merging.ties", "density": 1, "trim_scope": "x"}, "merge.trim_scope='x' is unknown"),
        ({TARGET: "sam.merging.ties", "density": 1, "aggregate": "max"}, "merge.aggregate='max' is unknown"),
        ({TARGET: "sam.merging.linear", "lam": None}, "merge.lam=None is not a finite number"),
        ({TARGET: "sam.merging.linear", "weights": [1, -1]}, "merge.weights=[1, -1] holds a negative weight"),
        ({TARGET: "sam.merging.linear", "weights": [0]}, "merge.weights=[0] sums to 0"),
        ({TARGET: "sam.merging.linear", "weights": "12"}, "merge.weights='12' is not a list"),
    ],
)
def test_messages(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SamError, match=re.escape(message)) as caught:
        Merge.from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["task_arithmetic", "factor_linear", "factor_ties"])
def test_sums_take_negative_weights(name: str) -> None:
    options = {"task_arithmetic": {"lam": 1.0}, "factor_ties": {"density": 0.5}}.get(name, {})
    merge = Merge.from_config({TARGET: f"sam.merging.{name}", "name": name, "weights": [1, -1], **options})
    assert merge.name == name and merge.weights == [1, -1]


def test_content_is_the_method_and_its_options() -> None:
    assert Merge(ties, {"density": 1, "lam": 1, "weights": [1, 2]}).content() == {
        "name": "ties",
        "density": 1.0,
        "lam": 1.0,
    }
    assert Merge(dare, {"density": 0.5, "seed": 3}).content() == {"name": "dare", "density": 0.5, "seed": 3}
    contents = [
        Merge(f, o).content()
        for f, o in ((linear, {}), (linear, {"lam": 0.5}), (task_arithmetic, {"lam": 0.5}), (factor_linear, {}))
    ]
    assert all(contents.count(one) == 1 for one in contents)
