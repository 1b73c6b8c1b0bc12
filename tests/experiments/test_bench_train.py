"""The training benchmark on a tiny model: both contestants learn the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench import train
from tests.tiny import config, write_base
from tests.toy_training import recipe


def test_contestants_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAM_MIRROR", raising=False)
    base = {**config("base", "local"), "location": str(write_base(tmp_path / "base"))}
    trainer = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    few = recipe(sentences=12, batch_size=2, r=4, alpha=8)
    plan = train.make_plan(base, few)
    assert [len(batch.examples) for batch in plan] == [2] * 6
    job = train.describe({"base": base, "trainer": trainer}, few, plan)
    ours, peer = (train.train(job, fused, "32-true", tmp_path / str(fused)) for fused in (True, False))
    assert len(ours["losses"]) == 6 and ours["seconds"] > 0 and ours["peak_mb"] > 0
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-4)
    assert ours["losses"][-1] != ours["losses"][0]
