"""The training benchmark on a tiny model: both contestants learn the same, each from its own process's plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench import _train_peer, train
from sam.experts import Recipe
from tests.tiny import config, write_base


def test_contestants_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAM_MIRROR", raising=False)
    base = {**config("base", "local"), "location": str(write_base(tmp_path / "base"))}
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False}
    recipe = Recipe(sentences=12, batch_size=2, r=4, alpha=8)
    plan = train.make_plan(base, recipe)
    assert [len(batch.examples) for batch in plan] == [2] * 6
    job = train.describe({"base": base, "trainer": trainer}, recipe, plan)
    ours = train.train(job, tmp_path / "ours")
    peer = _train_peer.train(False, job, str(tmp_path / "peer"))
    assert len(ours["losses"]) == 6 and ours["seconds"] > 0 and ours["peak_mb"] > 0
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-3)
    assert ours["losses"][-1] != ours["losses"][0]
