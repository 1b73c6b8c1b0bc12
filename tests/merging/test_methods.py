"""The pure merges: hand-worked values, PEFT on ΔW as oracle, and properties."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils import merge_utils as peft
from torch import Tensor

from sam.errors import SamError
from sam.merging import (
    AdapterDeltas,
    breadcrumbs,
    dare,
    dare_ties,
    della,
    factor_linear,
    iso_c,
    linear,
    task_arithmetic,
    ties,
)


def entry(*values: float) -> list[Tensor]:
    return [torch.tensor([v]) for v in values]


def random_deltas(count: int = 3, shape: tuple[int, ...] = (37, 53), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + 0.3 * i) for i in range(count)]


# Hand-worked entries, no trimming: (values, weights, options, result).
ENTRIES: list[tuple[tuple[float, ...], list[float] | None, dict[str, Any], float]] = [
    ((-3, 2, 2), None, {}, 2.0),  # sum +1; mean of 2, 2
    ((-3, 2, 2), None, {"aggregate": "sum"}, 4.0),
    ((-3, 2, 2), [1, 0.1, 1], {}, -3.0),  # weighted sum -0.8
    ((-3, 2, 2), [1, 0.1, 1], {"sign": "count"}, 2.0),  # weighted count +0.1; (0.2 + 2) / 1.1
    ((-3, 2, 2), [1, 0.1, 1], {"sign": "count", "aggregate": "sum"}, 2.2),
    ((-5, 2, 2), None, {}, -5.0),  # sum -1
    ((-5, 2, 2), None, {"sign": "count"}, 2.0),  # two against one
    ((-4, 2, 2), None, {}, 0.0),  # the sum is tied
    ((-4, 2, 2), None, {"sign": "count"}, 2.0),
    ((-5, 2), None, {"sign": "count"}, -5.0),  # the count is tied, the sum decides
    ((-2, 2), None, {"sign": "count"}, 0.0),  # both are tied
    ((3, 0, 1), None, {}, 2.0),  # a zero has no vote and no part in the mean
    ((0, 0, 0), None, {}, 0.0),
    ((1, 4), [3, 1], {}, 1.75),
    ((1, 4), [3, 1], {"lam": 2.0}, 3.5),
]


@pytest.mark.parametrize(("values", "weights", "options", "expected"), ENTRIES)
def test_ties_by_hand(
    values: tuple[float, ...], weights: list[float] | None, options: dict[str, Any], expected: float
) -> None:
    assert ties(entry(*values), density=1, weights=weights, **options).item() == pytest.approx(expected, abs=1e-6)


def test_adapters_are_merged_as_their_deltas(three: tuple[list[AdapterDeltas], list[str]]) -> None:
    adapters, _ = three
    whole = [{module: adapter[module] for module in adapter} for adapter in adapters]
    merges: list[Callable[[Any], Any]] = [lambda d: ties(d, density=0.3), linear]
    for merge in merges:
        found, expected = merge(adapters), merge(whole)
        assert set(found) == set(expected) and all(torch.equal(found[m], expected[m]) for m in found)


def test_the_public_variants_differ_on_one_entry() -> None:
    """Why each option has a name: (-3, 2, 2) with weights (1, 0.1, 1) is 1.1 in PEFT."""
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = peft.ties(entry(-3, 2, 2), torch.tensor([1, 0.1, 1]), 1.0)
    assert theirs.item() == pytest.approx(1.1)
    assert ties(entry(-3, 2, 2), density=1, weights=[1, 0.1, 1]).item() == -3.0


def test_ties_trims_then_votes_by_hand() -> None:
    one, two = torch.tensor([4.0, -1.0, 0.5, 3.0]), torch.tensor([-1.0, -6.0, 2.0, 0.1])
    # kept at density 0.5: (4, 0, 0, 3) and (0, -6, 2, 0)
    assert ties([one, two], density=0.5).tolist() == [4.0, -6.0, 2.0, 3.0]
    assert linear([one, two]).tolist() == pytest.approx([1.5, -3.5, 1.25, 1.55])
    assert task_arithmetic([one, two], lam=0.5, weights=[1, -1]).tolist() == pytest.approx([2.5, 2.5, -0.75, 1.45])


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("sign", "method"), [("sum", "total"), ("count", "frequency")])
def test_ties_equals_peft_on_deltas(density: float, sign: str, method: str) -> None:
    deltas = random_deltas(3, (40, 50))  # density * 2000 is whole, so rounding and truncation agree
    theirs = peft.ties(deltas, torch.ones(3), density, method)  # type: ignore[arg-type]
    ours = ties(deltas, density=density, sign=sign)
    differ = (ours - theirs).abs() > 1e-6
    if sign == "count":  # PEFT reads a tied count as +, here the sum decides
        trimmed = [peft.prune(d, density, "magnitude") for d in deltas]
        differ &= torch.stack(trimmed).sign().sum(0) != 0
    assert not differ.any()


def test_linear_and_task_arithmetic_equal_peft() -> None:
    deltas, weights = random_deltas(), [0.5, 2.0, 1.0]
    theirs = peft.task_arithmetic(deltas, torch.tensor(weights))
    torch.testing.assert_close(task_arithmetic(deltas, lam=1.0, weights=weights), theirs)
    torch.testing.assert_close(linear(deltas, weights=weights), theirs / 3.5)


MERGES: dict[str, Callable[..., Any]] = {
    "ties": lambda d, **o: ties(d, density=0.3, **o),
    "ties_global": lambda d, **o: ties(d, density=0.3, trim_scope="global", **o),
    "ties_count_sum": lambda d, **o: ties(d, density=0.6, sign="count", aggregate="sum", **o),
    "linear": linear,
    "task_arithmetic": lambda d, **o: task_arithmetic(d, lam=0.4, **o),
    "dare": lambda d, **o: dare(d, density=0.6, seed=5, names=["a", "b", "c"][: len(d)], **o),
    "dare_ties": lambda d, **o: dare_ties(d, density=0.6, seed=5, names=["a", "b", "c"][: len(d)], **o),
    "della": lambda d, **o: della(d, density=0.6, epsilon=0.4, seed=5, names=["a", "b", "c"][: len(d)], **o),
    "breadcrumbs": lambda d, **o: breadcrumbs(d, density=0.3, gamma=0.02, lam=0.4, **o),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_negation_and_equal_weights(merge: Callable[..., Tensor]) -> None:
    deltas = random_deltas()
    assert torch.equal(merge([-d for d in deltas]), -merge(deltas))
    assert torch.equal(merge(deltas, weights=[1, 1, 1]), merge(deltas))


@pytest.mark.parametrize("merge", [v for k, v in MERGES.items() if not k.startswith("d")])
def test_permutation(merge: Callable[..., Tensor]) -> None:
    deltas, weights = random_deltas(), [0.2, 1.0, 3.0]
    order = [2, 0, 1]
    torch.testing.assert_close(
        merge([deltas[i] for i in order], weights=[weights[i] for i in order]), merge(deltas, weights=weights)
    )


@pytest.mark.parametrize("weights", [[2, 2, 2], [0.1, 0.1, 0.1]])
@pytest.mark.parametrize("merge", [ties, linear])
def test_the_size_of_equal_weights_does_not_matter_in_means(merge: Callable[..., Tensor], weights: list[float]) -> None:
    options = {"density": 0.3} if merge is ties else {}
    assert torch.equal(merge(random_deltas(), weights=weights, **options), merge(random_deltas(), **options))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("sign", ["sum", "count"])
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_one_expert_untrimmed_is_itself(scope: str, sign: str, aggregate: str) -> None:
    (delta,) = random_deltas(1)
    assert torch.equal(ties([delta], density=1, trim_scope=scope, sign=sign, aggregate=aggregate), delta)
    assert torch.equal(dare_ties([delta], density=1, seed=0, sign=sign, aggregate=aggregate), delta)
    assert torch.equal(dare([delta], density=1, seed=0), delta)
    assert torch.equal(linear([delta]), delta)
    assert torch.equal(task_arithmetic([delta], lam=1), delta)


def test_equal_experts_give_that_expert() -> None:
    (delta,) = random_deltas(1)
    for k in (2, 3, 6):
        torch.testing.assert_close(ties([delta] * k, density=1), delta)
        torch.testing.assert_close(linear([delta] * k), delta)
        kept = ties([delta], density=0.2)
        torch.testing.assert_close(ties([delta] * k, density=0.2), kept)
        assert int((kept != 0).sum()) == round(0.2 * delta.numel())


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_density_is_exact_where_most_entries_are_zero(density: float) -> None:
    delta = torch.zeros(40, 50)
    delta[::10] = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert int((ties([delta], density=density) != 0).sum()) == min(200, round(2000 * density))


def test_missing_modules_are_structural_zeros() -> None:
    a, b = random_deltas(2, (20, 30))
    first, second = {"m1": a, "m2": b}, {"m2": a}
    merged = ties([first, second], density=0.1, trim_scope="global")
    assert list(merged) == ["m1", "m2"]
    alone = ties([second], density=0.1)  # its density counts its own 600 entries, not m1's
    assert int((alone["m2"] != 0).sum()) == 60
    assert torch.equal(merged["m1"], ties([first], density=0.1, trim_scope="global")["m1"])
    assert torch.equal(ties([first, second], density=0.5)["m1"], ties([a], density=0.5))  # no vote, not in the mean
    torch.testing.assert_close(linear([first, second])["m1"], a / 2)  # but it is a zero in the mean of deltas
    torch.testing.assert_close(dare([first, second], density=1, seed=0, weights=[1, 3])["m1"], a / 4)


def test_scopes_differ_only_over_several_modules() -> None:
    small, large = random_deltas(2, (20, 30))
    sets = [{"a": small * 0.01, "b": large * 10}]
    per_tensor = ties(sets, density=0.25)
    over_all = ties(sets, density=0.25, trim_scope="global")
    assert [int((t != 0).sum()) for t in per_tensor.values()] == [150, 150]
    assert [int((t != 0).sum()) for t in over_all.values()] == [0, 300]
    assert torch.equal(ties([large], density=0.25), ties([large], density=0.25, trim_scope="global"))


def test_dare_depends_on_names_and_seed_only() -> None:
    deltas = random_deltas()
    first = dare(deltas, density=0.5, seed=1, names=["x", "y", "z"])
    torch.manual_seed(99)
    turned = dare(deltas[::-1], density=0.5, seed=1, names=["z", "y", "x"])
    torch.testing.assert_close(first, turned)
    for other in (
        dare(deltas, density=0.5, seed=2, names=["x", "y", "z"]),
        dare(deltas, density=0.5, seed=1, names=["x", "y", "w"]),
        dare([{"m": d} for d in deltas], density=0.5, seed=1, names=["x", "y", "z"])["m"],
    ):
        assert (first != other).float().mean() > 0.4  # half of the entries, where one mask of three differs


def test_dare_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dare(random_deltas(), density=0.5, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_dare_rescales_and_is_unbiased() -> None:
    (delta,) = random_deltas(1, (30, 40))
    once = dare([delta], density=0.25, seed=0)
    kept = once != 0
    torch.testing.assert_close(once[kept], delta[kept] * 4)
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.05)
    draws = 600
    mean = sum(dare([delta], density=0.25, seed=s) for s in range(draws)) / draws
    error = (mean - delta) / delta  # standard deviation sqrt(0.75 / 0.25 / 600) = 0.0707
    assert error.mean().abs() < 0.01
    assert error.std().item() == pytest.approx((3 / draws) ** 0.5, rel=0.1)


def test_dare_mask_is_fixed_for_ever() -> None:
    """Hand-copied draw: a change of it changes every stored DARE result."""
    kept = dare([torch.ones(12)], density=0.5, seed=0, names=["news"]) != 0
    assert kept.int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0]


def test_inputs_are_not_changed_and_results_are_fp32() -> None:
    deltas = [d.to(torch.bfloat16) for d in random_deltas()]
    before = [d.clone() for d in deltas]
    for name, merge in MERGES.items():
        result = merge(deltas)
        assert result.dtype == torch.float32, name
        assert torch.equal(result, merge([d.float() for d in deltas])), name
        assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True)), name
    (single,) = random_deltas(1)
    ties([single], density=1).zero_()
    assert single.abs().sum() > 0


def test_transposed_inputs_give_the_same() -> None:
    deltas = random_deltas()
    views = [d.T.contiguous().T for d in deltas]
    for merge in MERGES.values():
        assert torch.equal(merge(views), merge(deltas))


def test_blocks_do_not_show() -> None:
    """An entry's result is the same whether its tensor is longer than the working block or not."""
    deltas = random_deltas(3, (300, 700))
    for merge in (MERGES["linear"], lambda d: ties(d, density=1)):
        whole = merge(deltas)
        parts = [merge([d[i : i + 1] for d in deltas]) for i in range(0, 300, 37)]
        assert torch.equal(torch.cat(parts), whole[::37])


OK = {"density": 0.5}
BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (ties, {"density": 0}, "density=0 is not in (0, 1]; give the fraction of entries to keep, e.g. 0.2"),
    (ties, {"density": 1.5}, "density=1.5 is not in (0, 1]"),
    (ties, {"density": float("nan")}, "density=nan is not in (0, 1]"),
    (ties, {"density": "0.5"}, "density='0.5' is not in (0, 1]"),
    (ties, OK | {"trim_scope": "layer"}, "trim_scope='layer' is unknown; choose one of tensor, global"),
    (ties, OK | {"sign": "total"}, "sign='total' is unknown; choose one of sum, count"),
    (ties, OK | {"aggregate": "max"}, "aggregate='max' is unknown; choose one of mean, sum"),
    (ties, OK | {"lam": float("inf")}, "lam=inf is not a finite number"),
    (ties, OK | {"weights": [1]}, "weights=[1] has 1 values for 2 experts; give one per expert"),
    (ties, OK | {"weights": [0, 0]}, "weights=[0, 0] sums to 0; give at least one weight above 0"),
    (linear, {"weights": [1, -1]}, "weights=[1, -1] holds a negative weight; give weights >= 0"),
    (task_arithmetic, {"lam": 1, "weights": [1, float("nan")]}, "holds a value that is not a finite number"),
    (linear, {"weights": 3}, "weights=3 is not a list; give one number per expert"),
    (dare, {"density": 0, "seed": 0}, "density=0 is not in (0, 1]"),
    (dare, {"density": 0.9, "seed": 0.5}, "seed=0.5 is not an integer"),
    (dare_ties, {"density": 0.9, "seed": 0, "names": ["a", "a"]}, "names=['a', 'a'] must hold one name per expert (2)"),
    (della, {"density": 0.3, "epsilon": 0.7, "seed": 0}, "epsilon=0.7 with density=0.3 gives probabilities outside"),
    (della, {"density": 0.3, "epsilon": -1, "seed": 0}, "epsilon=-1 is not in [0, 1)"),
    (breadcrumbs, {"density": 0.9, "gamma": 0.2, "lam": 1}, "density=0.9 and gamma=0.2 sum to more than 1"),
    (breadcrumbs, {"density": 0.9, "gamma": 1, "lam": 1}, "gamma=1 is not in [0, 1)"),
    (iso_c, {"lam": None}, "lam=None is not a finite number"),
    (iso_c, {"lam": 1}, "merging singular vectors takes matrices"),
    (factor_linear, {}, "merging factors takes LoRA adapters"),
]


@pytest.mark.parametrize(("merge", "options", "message"), BAD)
def test_bad_options(merge: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SamError, match=re.escape(message)) as caught:
        merge(entry(1, 2), **options)
    assert "\n" not in str(caught.value)


def test_bad_deltas() -> None:
    with pytest.raises(SamError, match="deltas is empty"):
        linear([])
    with pytest.raises(SamError, match="mixes tensors and mappings"):
        linear([torch.ones(2), {"m": torch.ones(2)}])  # type: ignore[type-var]
    with pytest.raises(SamError, match=re.escape("deltas have shapes [2] and [3]; merge experts of the same base")):
        linear([torch.ones(2), torch.ones(3)])
    with pytest.raises(SamError, match=re.escape("deltas of module m have shapes [2, 3] and [3, 2]")):
        ties([{"m": torch.ones(2, 3)}, {"m": torch.ones(3, 2)}], density=0.5)
    with pytest.raises(SamError, match="delta 1 of module m holds NaN or infinity"):
        ties([{"m": torch.ones(2)}, {"m": torch.tensor([1, float("nan")])}], density=0.5)
