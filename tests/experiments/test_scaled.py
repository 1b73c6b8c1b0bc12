"""A scaled expert is its ΔW times λ, for us and for PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.scaled import main, scaled
from sam.errors import SamError
from sam.experts import Card, Pool
from sam.merging import AdapterDeltas


def test_deltas_are_multiplied_and_the_rest_is_kept(shared_pool: Pool, tmp_path: Path) -> None:
    expert = tmp_path / "news"
    shutil.copytree(shared_pool.folder("news"), expert)
    plain = Card.read(expert)
    replace(plain, recipe={**plain.recipe, "alpha": 8, "precision": "32-true"}).write(expert)
    plain_alpha = json.loads((expert / "adapter_config.json").read_text())["lora_alpha"]
    card = scaled(expert, 0.25, tmp_path / "pool" / "quarter")
    before, after = AdapterDeltas.open(expert), AdapterDeltas.open(tmp_path / "pool" / "quarter")
    assert before.modules() == after.modules()
    for module in before.modules():
        assert torch.allclose(after.delta(module), before.delta(module) * 0.25, rtol=1e-6)
    assert after.content_hash != before.content_hash
    assert Pool(tmp_path / "pool").cards["quarter"] == card
    assert (card.recipe["scaled"], card.recipe["alpha"]) == (0.25, plain_alpha * 0.25) and "hash" not in card.recipe
    assert card.base_fingerprint == shared_pool.cards["news"].base_fingerprint


def test_what_cannot_be_copied_is_one_line(
    shared_pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = shared_pool.folder("news")
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(SamError, match="must be a number above 0"):
            scaled(expert, scale, tmp_path / "new")
    broken = tmp_path / "broken"
    shutil.copytree(expert, broken)
    (broken / "adapter_config.json").write_text("{")
    assert main([str(broken), "0.5", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(expert), "0.5", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is there already; name another folder\n"
    assert main([str(tmp_path), "0.5", "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
