"""Streaming merges of adapters, and the key that names a merged model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from sam import merging
from sam.errors import SamError
from sam.merging import AdapterDeltas, Factors, MergeSpec, merge_modules, model_key

Experts = tuple[list[AdapterDeltas], list[str]]

SPECS = {
    "ties global": MergeSpec("ties", density=0.3, trim_scope="global", sign="sum", aggregate="mean", lam=0.7),
    "ties tensor": MergeSpec("ties", density=0.3, trim_scope="tensor", sign="count", aggregate="sum"),
    "ties weights": MergeSpec(
        "ties", density=1.0, trim_scope="global", sign="sum", aggregate="mean", weights=(0.5, 2.0, 1.0)
    ),
    "dare": MergeSpec("dare", density=0.4, seed=2),
    "dare_ties": MergeSpec("dare_ties", density=0.4, seed=2, sign="sum", aggregate="mean"),
    "linear": MergeSpec("linear", weights=(0.5, 2.0, 1.0)),
    "task_arithmetic": MergeSpec("task_arithmetic", lam=0.4, weights=(1.0, -1.0, 0.5)),
}
FACTOR_SPECS = {
    "factor_ties": MergeSpec("factor_ties", density=0.4, sign="sum"),
    "factor_linear": MergeSpec("factor_linear"),
}


def whole(adapters: list[AdapterDeltas]) -> list[dict[str, Tensor]]:
    return [{m: a.delta(m) for m in a.modules()} for a in adapters]


def by_functions(spec: MergeSpec, adapters: list[AdapterDeltas], names: list[str]) -> dict[str, Tensor]:
    """The same merge by the pure function on everything at once."""
    options: dict[str, Any] = {"lam": spec.lam, "weights": spec.weights}
    for option in ("trim_scope", "sign", "aggregate", "seed"):
        if getattr(spec, option) is not None:
            options[option] = getattr(spec, option)
    if spec.density is not None:
        options |= {"density": spec.density} if spec.name == "ties" else {"drop": 1 - spec.density, "names": names}
    return getattr(merging, spec.name)(whole(adapters), **options)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_stream_equals_the_pure_function(three: Experts, spec: MergeSpec) -> None:
    adapters, names = three
    got = list(merge_modules(adapters, names, spec))
    expected = by_functions(spec, adapters, names)
    assert [module for module, _ in got] == sorted(expected) and len(got) == 14
    for module, delta in got:
        torch.testing.assert_close(delta, expected[module], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_selection_order_does_not_change_a_bit(three: Experts, spec: MergeSpec) -> None:
    adapters, names = three
    first = dict(merge_modules(adapters, names, spec))
    key = model_key("base", adapters, names, spec)
    for order in permutations(range(3)):
        weights = None if spec.weights is None else tuple(spec.weights[i] for i in order)
        turned = replace(spec, weights=weights)
        experts, titles = [adapters[i] for i in order], [names[i] for i in order]
        for module, delta in merge_modules(experts, titles, turned):
            assert torch.equal(delta, first[module])
        assert model_key("base", experts, titles, turned) == key


def test_factor_specs_give_the_factor_merges(make_adapter: Callable[..., AdapterDeltas]) -> None:
    adapters, names = [make_adapter("a", 1), make_adapter("b", 2, lora_alpha=3)], ["a", "b"]
    ties = dict(merge_modules(adapters, names, MergeSpec("factor_ties", density=0.4, sign="count", lam=0.5)))
    linear = dict(merge_modules(adapters, names, MergeSpec("factor_linear", weights=(0.5, 1.0))))
    for module, delta in merging.factor_ties(adapters, names, density=0.4, sign="count", lam=0.5):
        torch.testing.assert_close(ties[module], delta)
    for module, delta in merging.factor_linear(adapters, names, weights=(0.5, 1.0)):
        torch.testing.assert_close(linear[module], delta)


@pytest.mark.parametrize("spec", (SPECS | FACTOR_SPECS).values(), ids=SPECS | FACTOR_SPECS)
def test_one_expert_is_untouched(three: Experts, spec: MergeSpec) -> None:
    adapters, names = three
    spec = replace(spec, weights=spec.weights and spec.weights[1:2])
    for module, delta in merge_modules(adapters[1:2], names[1:2], spec):
        assert torch.equal(delta, adapters[1].delta(module))


def test_no_expert_gives_nothing() -> None:
    assert list(merge_modules([], [], SPECS["ties global"])) == []


def rotated(adapter: AdapterDeltas, seed: int) -> AdapterDeltas:
    """The same ΔW from other factors: (B R, R⁻¹ A) with an orthogonal R."""
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for module in adapter.modules():
        f = adapter.factors(module)
        r, _ = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=generator))
        turned[module] = Factors(r.T @ f.a, f.b @ r, f.scale, f.transposed)
    return AdapterDeltas(adapter.folder, turned)


def relative_change(spec: MergeSpec, adapters: list[AdapterDeltas], others: list[AdapterDeltas]) -> float:
    names = [str(i) for i in range(len(adapters))]
    one, other = dict(merge_modules(adapters, names, spec)), dict(merge_modules(others, names, spec))
    difference = torch.cat([(one[m] - other[m]).flatten() for m in one])
    return float(difference.norm() / torch.cat([one[m].flatten() for m in one]).norm())


def test_delta_merges_do_not_depend_on_the_gauge_and_factor_merges_do(
    make_adapter: Callable[..., AdapterDeltas],
) -> None:
    adapters = [make_adapter(f"e{i}", i) for i in range(3)]
    others = [adapters[0], rotated(adapters[1], 5), adapters[2]]
    torch.testing.assert_close(
        others[1].delta("model.layers.0.mlp.up_proj"), adapters[1].delta("model.layers.0.mlp.up_proj")
    )
    for name in ("linear", "task_arithmetic"):
        assert relative_change(MergeSpec(name), adapters, others) < 1e-5
    for scope in ("tensor", "global"):  # rounding may move single entries across the threshold or a tied vote
        spec = MergeSpec("ties", density=0.3, trim_scope=scope, sign="sum", aggregate="mean")
        assert relative_change(spec, adapters, others) < 0.01
    for spec in FACTOR_SPECS.values():
        assert relative_change(spec, adapters, others) > 0.3


def test_equal_experts_give_that_expert(make_adapter: Callable[..., AdapterDeltas]) -> None:
    adapter = make_adapter("one")
    copies, names = [adapter, adapter, adapter], ["x", "y", "z"]
    for spec in (MergeSpec("linear"), MergeSpec("ties", density=1, trim_scope="global", sign="sum", aggregate="mean")):
        for module, delta in merge_modules(copies, names, spec):
            torch.testing.assert_close(delta, adapter.delta(module))
    factor = dict(merge_modules(copies[:2], names[:2], MergeSpec("factor_linear", weights=(0.5, 0.5))))
    for module, delta in factor.items():  # the cross terms: twice the expert
        torch.testing.assert_close(delta, 2 * adapter.delta(module))


def test_global_trim_keeps_the_exact_share_of_each_expert(make_adapter: Callable[..., AdapterDeltas]) -> None:
    one, other = (
        make_adapter("a", 1, target_modules=["q_proj", "up_proj"]),
        make_adapter("b", 2, target_modules=["v_proj"]),
    )
    spec = MergeSpec("ties", density=0.1, trim_scope="global", sign="sum", aggregate="mean")
    merged = dict(merge_modules([one, other], ["a", "b"], spec))  # disjoint modules: the merge is the trimmed experts
    of_one = sum(int((d != 0).sum()) for m, d in merged.items() if m in one)
    of_other = sum(int((d != 0).sum()) for m, d in merged.items() if m in other)
    assert of_one == round(0.1 * 2 * (64 * 64 + 112 * 64))
    assert of_other == round(0.1 * 2 * 32 * 64)


def test_deltas_of_one_module_are_held_at_a_time(
    make_adapter: Callable[..., AdapterDeltas], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All deltas of a merge are computed into the same places: one an expert, a single one for sums."""
    names = ["a", "b", "c"]
    adapters = [make_adapter(name, seed) for seed, name in enumerate(names)]
    places: set[int] = set()
    real = AdapterDeltas.delta

    def watched(self: AdapterDeltas, module: str, out: Tensor | None = None) -> Tensor:
        assert out is not None
        places.add(out.untyped_storage().data_ptr())
        return real(self, module, out)

    monkeypatch.setattr(AdapterDeltas, "delta", watched)
    for spec in SPECS.values():
        places.clear()
        for _module, _delta in merge_modules(adapters, names, spec):
            pass
        assert len(places) == (3 if spec.name in ("ties", "dare_ties") else 1)


def test_merged_deltas_share_no_memory(three: Experts) -> None:
    for spec in SPECS.values():
        kept = list(merge_modules(*three, spec))
        assert len({delta.untyped_storage().data_ptr() for _, delta in kept}) == len(kept)
        for (_, delta), (_, again) in zip(kept, merge_modules(*three, spec), strict=True):
            assert torch.equal(delta, again)


def test_mistakes_are_raised_at_the_call(three: Experts, make_adapter: Callable[..., AdapterDeltas]) -> None:
    adapters, names = three
    good = SPECS["ties global"]
    cases: list[tuple[tuple[Any, Any, MergeSpec], str]] = [
        ((adapters, ["a", "b", "a"], good), "expert 'a' is selected twice; a merge takes each expert once"),
        ((adapters, names[:2], good), "2 names for 3 experts; give one name an expert"),
        ((adapters[:1], names[:1], SPECS["linear"]), "weights=[0.5, 2.0, 1.0] has 3 values for 1 experts"),
        ((adapters[:2], names[:2], SPECS["linear"]), "weights=[0.5, 2.0, 1.0] has 3 values for 2 experts"),
        ((adapters, names, MergeSpec("linear", density=0.1)), "merge=linear does not use density"),
        ((adapters, names, MergeSpec("ties", density=0.1)), "merge=ties needs trim_scope"),
    ]
    for arguments, message in cases:
        with pytest.raises(SamError, match=re.escape(message)):
            merge_modules(*arguments)
        with pytest.raises(SamError, match=re.escape(message)):
            model_key("base", *arguments)
    odd = AdapterDeltas(
        adapters[0].folder,
        {"model.layers.0.mlp.up_proj": Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0, False)},
    )
    with pytest.raises(
        SamError, match=re.escape("experts alpha and odd differ in the shape of model.layers.0.mlp.up_proj")
    ):
        merge_modules([adapters[0], odd], ["alpha", "odd"], MergeSpec("linear"))


def test_model_key_holds_what_decides_the_weights(three: Experts) -> None:
    adapters, names = three
    ties, dare = SPECS["ties global"], SPECS["dare"]
    key = model_key("base", adapters, names, ties)
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert key == model_key("base", adapters, ["x", "y", "z"], ties)  # names do not matter where nothing is drawn
    others = [
        model_key("other base", adapters, names, ties),
        model_key("base", adapters[:2], names[:2], ties),
        model_key("base", adapters, names, replace(ties, density=0.31)),
        model_key("base", adapters, names, dare),
        model_key("base", adapters, ["x", "y", "z"], dare),
        model_key("base", adapters, names, MergeSpec("linear")),
        model_key("base", adapters, names, SPECS["linear"]),
        model_key("base", adapters, names, MergeSpec("linear", weights=(2.0, 0.5, 1.0))),
        model_key("base", adapters[:1], names[:1], ties),
        model_key("base", [], [], ties),
        key,
    ]
    assert len(set(others)) == len(others)


def test_model_key_of_one_or_no_expert_ignores_the_merge(three: Experts) -> None:
    adapters, names = three
    specs = [SPECS["ties global"], SPECS["dare"], MergeSpec("factor_linear"), MergeSpec("linear", weights=(0.3,))]
    assert len({model_key("base", adapters[:1], [name], spec) for spec in specs for name in ("x", "y")}) == 1
    assert len({model_key("base", [], [], spec) for spec in specs}) == 1
    assert model_key("base", adapters[:1], names[:1], specs[0]) != model_key(
        "base", adapters[1:2], names[1:2], specs[0]
    )
