"""The exact cut: counts and entries against torch.topk on everything at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sam.merging.trim import Cut, Trimmer, find_cut, kept_count, work_memory


def trim_all(tensors: list[Tensor], density: float) -> Tensor:
    trimmer = Trimmer(find_cut(lambda: tensors, density))
    return torch.cat([trimmer(t.reshape(-1)) for t in tensors])


def brute(tensors: list[Tensor], density: float) -> Tensor:
    """A stable sort of the concatenation: the k largest magnitudes, equal ones in order of index."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    keep = torch.sort(flat.abs(), descending=True, stable=True).indices[: kept_count(density, len(flat))]
    out = torch.zeros_like(flat)
    out[keep] = flat[keep]
    return out


@pytest.mark.parametrize(
    ("density", "entries", "kept"),
    [(0.5, 3, 2), (0.5, 5, 2), (0.2, 10, 2), (0.25, 10, 2), (0.35, 10, 4), (0.001, 10, 1), (1.0, 7, 7), (0.5, 0, 0)],
)
def test_kept_count_rounds_halves_to_even_and_keeps_one(density: float, entries: int, kept: int) -> None:
    assert kept_count(density, entries) == kept


@pytest.mark.parametrize("density", [0.0001, 0.1, 0.2, 0.5, 0.9, 0.9999])
def test_cut_over_several_tensors_equals_topk_on_the_concatenation(density: float) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes_scales = [((40, 70), 1.0), ((3,), 100.0), ((500, 300), 1e-3), ((1,), 1e-30)]
    tensors = [torch.randn(size, generator=generator) * scale for size, scale in sizes_scales]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    got = trim_all(tensors, density)
    k = kept_count(density, len(flat))
    assert int((got != 0).sum()) == k
    assert torch.equal(got, brute(tensors, density))
    assert torch.equal(got.abs().topk(k).values, flat.abs().topk(k).values)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 2.0, -2.0, 1e-40, 3e38]), max_size=9)),
    density=st.floats(0.01, 1.0),
)
def test_cut_resolves_equal_magnitudes_in_order(values: list[list[float]], density: float) -> None:
    tensors = [torch.tensor(v, dtype=torch.float32) for v in values]
    if sum(map(len, values)) == 0:
        assert find_cut(lambda: tensors, density) == Cut(0.0, 0)
    else:
        assert torch.equal(trim_all(tensors, density), brute(tensors, density))


def test_random_values_from_few_levels_keep_the_exact_count() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-3, 4, (200, 700), generator=generator).float() for _ in range(3)]
    got = trim_all(tensors, 0.37)
    assert int((got != 0).sum()) == round(0.37 * 420_000)
    assert torch.equal(got, brute(tensors, 0.37))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.9])
def test_mostly_zeros(density: float) -> None:
    tensor = torch.zeros(1000)
    tensor[::10] = torch.arange(1, 101).float()
    assert int((trim_all([tensor], density) != 0).sum()) == min(100, round(1000 * density))


def test_cut_lies_below_the_smallest_kept_where_all_equals_are_kept() -> None:
    values = torch.tensor([3.0, -2.0, 2.0, 1.0, 0.5])
    below = float(torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)))
    assert find_cut(lambda: [values], 0.6) == Cut(below, 0)
    assert find_cut(lambda: [values], 0.4) == Cut(2.0, 1)  # one of the two has to go
    assert trim_all([values], 0.4).tolist() == [3, -2, 0, 0, 0]


def test_tensors_may_be_overwritten_and_work_memory_used_again() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=generator) for n in (1000, 300_000, 1)]
    expected = find_cut(lambda: tensors, 0.3)
    buffer, work = torch.empty(300_000), work_memory()
    for _ in range(2):
        assert find_cut(lambda: (buffer[: len(t)].copy_(t) for t in tensors), 0.3, work) == expected
