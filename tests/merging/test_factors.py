"""Factor-space merges against PEFT's add_weighted_adapter."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from sam.errors import SamError
from sam.merging import AdapterDeltas, factor_linear, factor_ties

Make = Callable[..., Any]
MakeAdapter = Callable[..., AdapterDeltas]


@pytest.fixture
def loaded(make_peft: Make) -> tuple[PeftModel, list[AdapterDeltas], list[str]]:
    """One PEFT model with three adapters of rank 4 and different alphas, and the same adapters read from disk."""
    names = ["news", "legal", "stem"]
    folders = [
        make_peft(n, seed, lora_alpha=alpha)[1] for n, seed, alpha in zip(names, (1, 2, 3), (8, 8, 3), strict=True)
    ]
    peft_model = make_peft("unused")[0]
    for name, folder in zip(names, folders, strict=True):
        peft_model.load_adapter(str(folder), name)
    return peft_model, [AdapterDeltas.open(f) for f in folders], names


@pytest.mark.parametrize("weights", [None, [0.5, 0.5, 0.5], [1.0, -0.7, 2.0]])
def test_factor_linear_equals_peft(loaded: Any, peft_delta: Callable[..., Tensor], weights: list[float] | None) -> None:
    peft_model, adapters, names = loaded
    peft_model.add_weighted_adapter(names, weights or [1.0] * 3, "merged", combination_type="linear")
    for module, delta in factor_linear(adapters, weights=weights).items():
        torch.testing.assert_close(delta, peft_delta(peft_model, module, "merged"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("sign", "method"), [("sum", "total"), ("count", "frequency")])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_factor_ties_equals_peft(
    loaded: Any, peft_delta: Callable[..., Tensor], density: float, sign: str, method: str
) -> None:
    peft_model, adapters, names = loaded
    weights = [1.0, 0.5, 2.0]
    peft_model.add_weighted_adapter(
        names, weights, "merged", combination_type="ties", density=density, majority_sign_method=method
    )
    for module, delta in factor_ties(adapters, density=density, sign=sign, weights=weights).items():
        torch.testing.assert_close(delta, peft_delta(peft_model, module, "merged"), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error:The density")
def test_lam_scales_the_delta_and_density_one_does_not_warn(loaded: Any) -> None:
    _, adapters, _ = loaded
    full = factor_ties(adapters, density=1.0)
    for module, delta in factor_ties(adapters, density=1.0, lam=0.3).items():
        torch.testing.assert_close(delta, 0.3 * full[module])
    for module, delta in factor_linear(adapters[:1]).items():
        torch.testing.assert_close(delta, adapters[0].delta(module))


def test_rslora_is_not_scaled_twice(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter("a", 1, use_rslora=True, r=9)
    for module, delta in factor_linear([adapter]).items():
        torch.testing.assert_close(delta, adapter.delta(module))


def test_adapters_that_do_not_fit(make_adapter: MakeAdapter) -> None:
    first = make_adapter("first")
    for other, message in (
        (make_adapter("r", r=8), "experts first and other differ in rank at model.layers.0.mlp.down_proj (4 and 8)"),
        (
            make_adapter("m", target_modules=["q_proj"]),
            "experts first and other differ in modules (e.g. model.layers.0.mlp.down_proj)",
        ),
    ):
        for merge in (factor_linear, partial(factor_ties, density=0.5)):
            with pytest.raises(SamError, match=re.escape(message)):
                merge([first, other], names=["first", "other"])
    with pytest.raises(SamError, match=re.escape("density=2 is not in (0, 1]")):
        factor_ties([first], density=2)
