"""Breadcrumbs, DELLA, Iso-C and KnOTS, each against its definition written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sam.merging import AdapterDeltas, breadcrumbs, della, iso_c, knots_ties, task_arithmetic, ties
from sam.merging.sparsify import drop_generator

Make = Callable[..., AdapterDeltas]


def random_deltas(count: int = 3, shape: tuple[int, int] = (30, 40)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * (1 + 0.3 * i) for i in range(count)]


def test_breadcrumbs_by_hand() -> None:
    delta = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, 0.5, 0.25, 0.1, 0.0, 0.0])
    assert breadcrumbs([delta], density=0.3, gamma=0.1, lam=1).tolist() == [0, -4, 3, -2, 0, 0, 0, 0, 0, 0]
    assert breadcrumbs([delta], density=0.2, gamma=0, lam=2).tolist() == [10, -8, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("density", "gamma"), [(0.2, 0.01), (0.85, 0.15), (0.5, 0.0), (1.0, 0.0)])
def test_breadcrumbs_equals_its_definition(density: float, gamma: float) -> None:
    deltas = random_deltas()
    expected = torch.zeros_like(deltas[0])
    for delta in deltas:
        order = delta.abs().flatten().argsort(descending=True)
        first, last = round(gamma * delta.numel()), round((gamma + density) * delta.numel())
        mask = torch.zeros(delta.numel())
        mask[order[first:last]] = 1
        expected += 0.4 * delta * mask.view_as(delta)
    torch.testing.assert_close(breadcrumbs(deltas, density=density, gamma=gamma, lam=0.4), expected)


def magprune(delta: Tensor, density: float, epsilon: float, name: str, seed: int) -> Tensor:
    """MAGPRUNE of the paper: keep probabilities linear in the rank within each row, rescaled one by one."""
    out, columns = torch.zeros_like(delta), delta.shape[1]
    bits = drop_generator(seed, name, "").random_raw(delta.numel() // 4).astype("<u8").view("<i2")
    uniform = torch.from_numpy(bits.copy()).view_as(delta).double().add(32768) / 65536
    for i, row in enumerate(delta):
        rank = {int(j): place for place, j in enumerate(row.abs().argsort())}
        for j in range(columns):
            keep = density - epsilon / 2 + epsilon * rank[j] / (columns - 1)
            if uniform[i, j] < keep:
                out[i, j] = row[j] / keep
    return out


def test_della_equals_its_definition() -> None:
    deltas, names = random_deltas(), ["a", "b", "c"]
    pruned = [magprune(d, 0.5, 0.6, n, 7) for d, n in zip(deltas, names, strict=True)]
    got = della(deltas, density=0.5, epsilon=0.6, seed=7, lam=0.9, names=names)
    torch.testing.assert_close(got, ties(pruned, density=1, lam=0.9))


def test_della_keeps_large_entries_more_often_and_is_unbiased() -> None:
    (delta,) = random_deltas(1, (60, 41))
    draws = [della([delta], density=0.5, epsilon=0.8, seed=seed) for seed in range(300)]
    kept = torch.stack(draws).ne(0).float().mean(0)
    ranks = delta.abs().argsort(1).argsort(1)
    for rank, chance in ((0, 0.1), (20, 0.5), (40, 0.9)):
        assert kept[ranks == rank].mean().item() == pytest.approx(chance, abs=0.02)
    error = (torch.stack(draws).mean(0) - delta) / delta
    assert error.mean().abs() < 0.02


def test_della_without_range_keeps_the_mean_share() -> None:
    (delta,) = random_deltas(1)
    once = della([delta], density=0.25, epsilon=0, seed=0)
    torch.testing.assert_close(once[once != 0], delta[once != 0] * 4)
    assert (once != 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_iso_c_equals_its_definition() -> None:
    deltas = random_deltas()
    u, sigma, v = torch.linalg.svd(sum(deltas, torch.zeros(())), full_matrices=False)
    torch.testing.assert_close(iso_c(deltas, lam=0.7), 0.7 * sigma.mean() * (u @ v), rtol=1e-4, atol=1e-5)


def test_iso_c_flattens_the_nonzero_singular_values_of_adapters(make_adapter: Make) -> None:
    adapters = [make_adapter("a", 1), make_adapter("b", 2, r=2)]
    for module, merged in iso_c(adapters, lam=1.0).items():
        before = torch.linalg.svdvals(task_arithmetic(adapters, lam=1)[module])[:6]
        after = torch.linalg.svdvals(merged)
        torch.testing.assert_close(after[:6], before.mean().expand(6), rtol=1e-4, atol=1e-5)
        assert after[6:].max() < 1e-4 * after[0]


def knots_by_definition(deltas: list[Tensor], density: float) -> Tensor:
    u, sigma, v = torch.linalg.svd(torch.cat(deltas, 1).double(), full_matrices=False)
    u, rows = u[:, sigma > 1e-5].float(), (sigma[:, None] * v)[sigma > 1e-5].float()
    return u @ ties(list(rows.split(deltas[0].shape[1], 1)), density=density)


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_knots_ties_equals_its_definition(density: float) -> None:
    deltas = random_deltas()
    torch.testing.assert_close(
        knots_ties(deltas, density=density), knots_by_definition(deltas, density), rtol=1e-3, atol=1e-3
    )


def test_knots_ties_of_adapters_and_untrimmed(make_adapter: Make) -> None:
    adapters = [make_adapter("a", 1), make_adapter("b", 2, r=2)]
    got = knots_ties(adapters, density=0.5, trim_scope="tensor")
    for module, merged in got.items():
        expected = knots_by_definition([a.delta(module) for a in adapters], 0.5)
        torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    (delta,) = random_deltas(1)
    torch.testing.assert_close(knots_ties([delta], density=1), delta, rtol=1e-4, atol=1e-5)


def test_methods_of_singular_vectors_count_a_missing_module_as_zero() -> None:
    a, b = random_deltas(2)
    first, second = {"m": a, "n": b}, {"m": b}
    torch.testing.assert_close(iso_c([first, second], lam=1)["n"], iso_c([b], lam=1))
    torch.testing.assert_close(knots_ties([first, second], density=1)["n"], b, rtol=1e-4, atol=1e-5)


def test_a_zero_delta_stays_zero() -> None:
    zero = torch.zeros(4, 6)
    assert not iso_c([zero, zero], lam=1).any() and not knots_ties([zero], density=0.5).any()
