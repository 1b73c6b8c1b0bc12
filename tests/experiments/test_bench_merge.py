"""The merge benchmark's arithmetic on tiny experts; no timings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.bench.harness import PEAK, Case, Report
from experiments.bench.merge import NAMES, Workload, _shares, differences, least_bytes, mergekit_merges, peft_merges
from sam.merging import AdapterDeltas, Factors


@pytest.fixture
def load() -> Workload:
    """Six random experts on two modules of 100 and 50 entries."""
    generator = torch.Generator().manual_seed(0)

    def factors(out: int) -> Factors:
        return Factors(torch.randn(2, 10, generator=generator), torch.randn(out, 2, generator=generator), 1.0, False)

    experts = [AdapterDeltas(Path(name), {"a": factors(10), "b": factors(5)}) for name in NAMES]
    return Workload("tiny", experts, 1)


def test_bytes_and_memory_units(load: Workload) -> None:
    assert load.entries == [100, 50]
    assert load.k_deltas_mb * 2**20 == 6 * 100 * 4
    assert least_bytes(load) == 150 * 4 * 13
    rounds = {"SaM": [{"seconds": 2.0, PEAK: 3 * load.k_deltas_mb}]}
    report = Report((Case("tiny: ties", "seconds", False, rounds, "SaM"),), machine={"slug": "none"})
    notes = _shares(load, report, bandwidth=150 * 4 * 13.0)
    assert list(notes.values()) == ["50%", "3.00"]


def test_ties_is_that_of_peft(load: Workload) -> None:
    assert differences(load, peft_merges(6)["ties"]).startswith("0 of 150 entries differ")
    linear = differences(load, peft_merges(6)["linear"])
    assert int(linear.split()[0]) > 100


def test_merges_are_those_of_mergekit(load: Workload) -> None:
    pytest.importorskip("mergekit")
    merges, theirs = mergekit_merges(6), peft_merges(6)
    assert differences(load, merges["ties"]).startswith("0 of 150 entries differ")
    deltas = [adapter.delta("a") for adapter in load.adapters]
    assert torch.allclose(merges["linear"](deltas), theirs["linear"](deltas), atol=1e-6)
    only = [deltas[0], *[torch.zeros_like(deltas[0])] * 5]
    dared = merges["dare"](only)
    assert 25 <= int((dared != 0).sum()) <= 75  # half of 100
    assert dared.abs().sum() == pytest.approx(float(deltas[0].abs().sum() / 6), rel=1e-4)
