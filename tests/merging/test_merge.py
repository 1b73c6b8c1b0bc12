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

from sam.errors import SamError
from sam.merging import (
    AdapterDeltas,
    Factors,
    Merge,
    breadcrumbs,
    dare,
    dare_ties,
    della,
    factor_linear,
    factor_ties,
    iso_c,
    knots_ties,
    linear,
    merge_modules,
    model_key,
    task_arithmetic,
    ties,
)

Experts = tuple[list[AdapterDeltas], list[str]]

MERGES = {
    "ties global": Merge(ties, {"density": 0.3, "trim_scope": "global", "lam": 0.7}),
    "ties tensor": Merge(ties, {"density": 0.3, "sign": "count", "aggregate": "sum"}),
    "ties weights": Merge(ties, {"density": 1.0, "trim_scope": "global", "weights": [0.5, 2.0, 1.0]}),
    "dare": Merge(dare, {"density": 0.4, "seed": 2}),
    "dare_ties": Merge(dare_ties, {"density": 0.4, "seed": 2}),
    "della": Merge(della, {"density": 0.4, "epsilon": 0.6, "seed": 2}),
    "breadcrumbs": Merge(breadcrumbs, {"density": 0.3, "gamma": 0.05, "lam": 0.5}),
    "linear": Merge(linear, {"weights": [0.5, 2.0, 1.0]}),
    "task_arithmetic": Merge(task_arithmetic, {"lam": 0.4, "weights": [1.0, -1.0, 0.5]}),
    "iso_c": Merge(iso_c, {"lam": 0.5}),
    "knots_ties": Merge(knots_ties, {"density": 0.3}),
}
FACTOR_MERGES = {
    "factor_ties": Merge(factor_ties, {"density": 0.4}),
    "factor_linear": Merge(factor_linear),
}


def whole(adapters: list[AdapterDeltas]) -> list[dict[str, Tensor]]:
    return [{m: a.delta(m) for m in a.modules()} for a in adapters]


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_stream_equals_the_function_on_all_deltas(three: Experts, merge: Merge) -> None:
    adapters, names = three
    got = list(merge_modules(adapters, names, merge))
    named = {"names": names} if "seed" in merge.options else {}
    expected = merge.function(whole(adapters), **merge.options, **named)
    assert [module for module, _ in got] == sorted(expected) and len(got) == 14
    for module, delta in got:
        if merge.name == "knots_ties":  # its basis differs by rounding, and with it single entries at the threshold
            assert (delta - expected[module]).norm() < 0.01 * expected[module].norm()
        else:
            torch.testing.assert_close(delta, expected[module], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_selection_order_does_not_change_a_bit(three: Experts, merge: Merge) -> None:
    adapters, names = three
    first = dict(merge_modules(adapters, names, merge))
    key = model_key("base", adapters, names, merge)
    for order in permutations(range(3)):
        weights = {} if merge.weights is None else {"weights": [merge.weights[i] for i in order]}
        turned = replace(merge, options={**merge.options, **weights})
        experts, titles = [adapters[i] for i in order], [names[i] for i in order]
        for module, delta in merge_modules(experts, titles, turned):
            assert torch.equal(delta, first[module])
        assert model_key("base", experts, titles, turned) == key


def test_factor_merges_by_name(make_adapter: Callable[..., AdapterDeltas]) -> None:
    adapters, names = [make_adapter("a", 1), make_adapter("b", 2, lora_alpha=3)], ["a", "b"]
    for merge in (
        Merge(factor_ties, {"density": 0.4, "sign": "count", "lam": 0.5}),
        Merge(factor_linear, {"weights": [0.5, 0.5]}),
    ):
        expected = merge.function(adapters, **merge.options)
        got = dict(merge_modules(adapters, names, merge))
        assert got.keys() == expected.keys() and all(torch.equal(got[m], expected[m]) for m in got)


@pytest.mark.parametrize("merge", (MERGES | FACTOR_MERGES).values(), ids=MERGES | FACTOR_MERGES)
def test_one_expert_is_untouched(three: Experts, merge: Merge) -> None:
    adapters, names = three
    weights = {} if merge.weights is None else {"weights": merge.weights[1:2]}
    merge = replace(merge, options={**merge.options, **weights})
    for module, delta in merge_modules(adapters[1:2], names[1:2], merge):
        assert torch.equal(delta, adapters[1].delta(module))


def test_no_expert_gives_nothing() -> None:
    assert list(merge_modules([], [], MERGES["ties global"])) == []


def rotated(adapter: AdapterDeltas, seed: int) -> AdapterDeltas:
    """The same ΔW from other factors: (B R, R⁻¹ A) with an orthogonal R."""
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for module in adapter.modules():
        f = adapter.factors(module)
        r, _ = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=generator))
        turned[module] = Factors(r.T @ f.a, f.b @ r, f.scale, f.transposed)
    return AdapterDeltas(adapter.folder, turned)


def relative_change(merge: Merge, adapters: list[AdapterDeltas], others: list[AdapterDeltas]) -> float:
    names = [str(i) for i in range(len(adapters))]
    one, other = dict(merge_modules(adapters, names, merge)), dict(merge_modules(others, names, merge))
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
    for name in ("linear", "task_arithmetic", "iso_c"):
        merge = replace(
            MERGES[name], options={**MERGES[name].options} | ({"weights": None} if name == "linear" else {})
        )
        assert relative_change(merge, adapters, others) < 1e-5
    for name in ("ties tensor", "ties global", "knots_ties", "breadcrumbs"):
        # rounding may move single entries across the threshold or a tied vote
        assert relative_change(MERGES[name], adapters, others) < 0.01
    for merge in FACTOR_MERGES.values():
        assert relative_change(merge, adapters, others) > 0.3


def test_equal_experts_give_that_expert(make_adapter: Callable[..., AdapterDeltas]) -> None:
    adapter = make_adapter("one")
    copies, names = [adapter, adapter, adapter], ["x", "y", "z"]
    for merge in (Merge(linear), Merge(ties, {"density": 1}), Merge(knots_ties, {"density": 1})):
        for module, delta in merge_modules(copies, names, merge):
            torch.testing.assert_close(delta, adapter.delta(module))
    factor = dict(merge_modules(copies[:2], names[:2], Merge(factor_linear, {"weights": [0.5, 0.5]})))
    for module, delta in factor.items():  # the cross terms: twice the expert
        torch.testing.assert_close(delta, 2 * adapter.delta(module))


def test_global_trim_keeps_the_exact_share_of_each_expert(make_adapter: Callable[..., AdapterDeltas]) -> None:
    one, other = (
        make_adapter("a", 1, target_modules=["q_proj", "up_proj"]),
        make_adapter("b", 2, target_modules=["v_proj"]),
    )
    merge = Merge(ties, {"density": 0.1, "trim_scope": "global"})
    merged = dict(merge_modules([one, other], ["a", "b"], merge))  # disjoint modules: the merge is the trimmed experts
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
    for name, merge in MERGES.items():
        if name not in ("iso_c", "knots_ties"):  # which read the factors
            places.clear()
            for _module, _delta in merge_modules(adapters, names, merge):
                pass
            assert len(places) == (3 if merge.name in ("ties", "dare_ties", "della") else 1)


def test_merged_deltas_share_no_memory(three: Experts) -> None:
    for merge in MERGES.values():
        kept = list(merge_modules(*three, merge))
        assert len({delta.untyped_storage().data_ptr() for _, delta in kept}) == len(kept)
        for (_, delta), (_, again) in zip(kept, merge_modules(*three, merge), strict=True):
            assert torch.equal(delta, again)


def test_mistakes_are_raised_at_the_call(three: Experts, make_adapter: Callable[..., AdapterDeltas]) -> None:
    adapters, names = three
    good = MERGES["ties global"]
    cases: list[tuple[tuple[Any, Any, Merge], str]] = [
        ((adapters, ["a", "b", "a"], good), "expert 'a' is selected twice; a merge takes each expert once"),
        ((adapters, names[:2], good), "2 names for 3 experts; give one name per expert"),
        ((adapters[:1], names[:1], MERGES["linear"]), "weights=[0.5, 2.0, 1.0] has 3 values for 1 experts"),
        ((adapters[:2], names[:2], MERGES["linear"]), "weights=[0.5, 2.0, 1.0] has 3 values for 2 experts"),
        ((adapters, names, Merge(ties, {"density": 2})), "merge.density=2 is not in (0, 1]"),
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
        merge_modules([adapters[0], odd], ["alpha", "odd"], Merge(linear))


def test_model_key_holds_what_decides_the_weights(three: Experts) -> None:
    adapters, names = three
    trim, drop = MERGES["ties global"], MERGES["dare"]
    key = model_key("base", adapters, names, trim)
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert key == model_key("base", adapters, ["x", "y", "z"], trim)  # names do not matter where nothing is drawn
    others = [
        model_key("other base", adapters, names, trim),
        model_key("base", adapters[:2], names[:2], trim),
        model_key("base", adapters, names, replace(trim, options={**trim.options, "density": 0.31})),
        model_key("base", adapters, names, drop),
        model_key("base", adapters, ["x", "y", "z"], drop),
        model_key("base", adapters, names, Merge(linear)),
        model_key("base", adapters, names, MERGES["linear"]),
        model_key("base", adapters, names, Merge(linear, {"weights": [2.0, 0.5, 1.0]})),
        model_key("base", adapters[:1], names[:1], trim),
        model_key("base", [], [], trim),
        key,
    ]
    assert len(set(others)) == len(others)


def test_model_key_of_one_or_no_expert_ignores_the_merge(three: Experts) -> None:
    adapters, names = three
    specs = [MERGES["ties global"], MERGES["dare"], Merge(factor_linear), Merge(linear, {"weights": [0.3]})]
    assert len({model_key("base", adapters[:1], [name], spec) for spec in specs for name in ("x", "y")}) == 1
    assert len({model_key("base", [], [], spec) for spec in specs}) == 1
    assert model_key("base", adapters[:1], names[:1], specs[0]) != model_key(
        "base", adapters[1:2], names[1:2], specs[0]
    )
