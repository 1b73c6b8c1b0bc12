"""The parts of the GPU benchmark on a CPU, with tiny shapes; no timings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.bench import __main__ as cli
from experiments.bench.decode import RATE
from experiments.bench.gpu import EXPERTS, LAYERS, QWEN, OnDevice, generate, merge_case, merged
from experiments.bench.merge import DENSITY, QWEN_ENTRIES
from sam.generation import Completion
from sam.merging import AdapterDeltas, ties
from sam.models.base import load
from sam.models.spec import BaseSpec
from tests.fakes import FakeGenerator, numbered
from tests.generation.models import TEXTS, requests
from tests.tiny import write_adapter

SHAPES = {"mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}


def test_it_refuses_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the benchmark gpu needs an NVIDIA GPU")


def test_the_shapes_are_those_of_qwen() -> None:
    assert LAYERS * sum(out * into for out, into in QWEN.values()) == QWEN_ENTRIES


def test_the_merge_is_ties() -> None:
    experts = [OnDevice(SHAPES, 2, "cpu", seed) for seed in range(EXPERTS)]
    expected = ties([dict(one) for one in experts], density=DENSITY, trim_scope="global")
    found = dict(merged(experts))
    assert set(found) == set(expected) and len(found) == 4
    assert all(torch.equal(found[module], expected[module]) for module in found)
    assert not torch.equal(experts[0]["model.layers.0.mlp.up_proj"], experts[1]["model.layers.0.mlp.up_proj"])
    (case,) = merge_case("cpu", SHAPES, 2, 2).cases
    assert len(case.rounds["SaM"]) == 2 and "4 modules" in case.name


def test_a_round_keeps_the_completions_of_the_merged_model(tiny_spec: BaseSpec, tmp_path: Path) -> None:
    write_adapter(tmp_path, load(tiny_spec, "cpu").model, seed=1)
    fake, asked, made = FakeGenerator(numbered), requests(TEXTS[:3]), dict[str, list[Completion]]()
    figures = generate("fake", fake, AdapterDeltas.open(tmp_path), asked, made)
    assert fake.loads[0] > 0 and RATE in figures
    assert made["fake"] == [dict(fake.generate(asked))[i] for i in range(3)]
