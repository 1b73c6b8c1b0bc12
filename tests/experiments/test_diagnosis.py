"""The figures of the diagnosis hold the numbers of the files that they are made from."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from experiments.diagnosis import OWN, draw, main, own_data
from sam.errors import SamError
from tests.tiny import one_line

DOMAINS = ("news", "stem")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def write_own(root: Path, selector: str, models: dict[str, float], combined: float, domains: Any = DOMAINS) -> None:
    target = {
        "n": 60,
        "models": {name: {"experts": [name], "scores": {"f1": f1}} for name, f1 in models.items()},
        "combined": {"scores": {"f1": combined}},
    }
    result = {"schema": 1, "config": {"selector": {"name": selector}}, "targets": {d: target for d in domains}}
    (root / selector).mkdir(parents=True)
    (root / selector / "result.json").write_text(json.dumps(result))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    root = tmp_path / "own"
    write_own(root, "named", {"unified": 0.5}, 0.5)
    write_own(root, "each", {"news": 0.6, "stem": 0.4}, 0.1)
    write_own(root, "all", {"all": 0.3}, 0.3)
    write_own(root, "domain", {"domain": 0.45}, 0.45)
    return root


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "main_table.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "target", "uses_gold", "precision", "recall", "f1", "silent"])
        for n, system in enumerate(["unified", "SaM, domain only", "SaM, sampling only", "random 3", "SaM", "SaMeco"]):
            for target in ("crossner_ai", "mean"):
                writer.writerow([system, target, system == "random 3", 0.1 * n, 0.05 * n, 0.07 * n, 0.1])
    return path


def test_own_data_takes_each_domains_own_expert(own: Path) -> None:
    found = own_data(own)
    assert found[OWN] == {"news": 60.0, "stem": 40.0, "mean": 50.0}
    assert found["unified"]["mean"] == 50.0 and found["all merged"]["news"] == 30.0
    assert found["top k by domain"] == {"news": 45.0, "stem": 45.0, "mean": 45.0}


def test_figures_hold_the_numbers(own: Path, table: Path) -> None:
    figures: Any = draw(table, own_data(own))
    assert list(figures) == ["experts", "merge", "selection", "union", "silence"]
    bars = figures["experts"].axes[0].containers
    assert [[bar.get_height() for bar in series] for series in bars] == [[50.0] * 3, [60.0, 40.0, 50.0]]
    heights = [[bar.get_height() for bar in series] for series in figures["selection"].axes[0].containers]
    assert [h[0] for h in heights] == pytest.approx([7.0, 14.0, 21.0])
    heights = [[bar.get_height() for bar in series] for series in figures["silence"].axes[0].containers]
    assert heights == [[10.0, 10.0]] * 2  # unified and SaM
    points = [c.get_offsets().tolist() for c in figures["union"].axes[0].collections]
    assert points[0] == [[0.0, 0.0]] and points[-1][0] == pytest.approx([25.0, 50.0])


def test_files_are_the_same_again(own: Path, table: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert main([str(table), str(own), "--out", str(tmp_path / name)]) == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [f"diagnosis_{n}.svg" for n in ("experts", "merge", "selection", "silence", "union")] + [
        "own_data.csv"
    ]
    head, *rows = (tmp_path / "a" / "own_data.csv").read_text().splitlines()
    assert head.startswith("F1 (%) of,") and head.endswith(",mean,sentences a set,commit")
    assert len(rows) == len(own_data(own))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_missing_jobs_and_other_targets_are_named(
    tmp_path: Path, own: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own(tmp_path / "few", "named", {"unified": 0.5}, 0.5)
    with pytest.raises(SamError) as error:
        own_data(tmp_path / "few")
    assert "lacks all merged, the domain's own expert" in one_line(error)
    write_own(tmp_path / "odd", "each", {"news": 0.5}, 0.5, ["movie"])
    with pytest.raises(SamError) as error:
        own_data(tmp_path / "odd")
    assert "no expert named 'movie'" in one_line(error)
    assert main([str(tmp_path / "none.csv"), str(own), "--out", str(tmp_path)]) == 2
    assert "none.csv" in capsys.readouterr().err
    table.write_text(table.read_text().replace("silent", "other"))  # as tables of earlier versions
    assert main([str(table), str(own), "--out", str(tmp_path)]) == 2
    assert "silent" in capsys.readouterr().err
    shutil.copytree(own / "all", own / "again")
    with pytest.raises(SamError) as error:
        own_data(own)
    assert "two jobs of all merged" in one_line(error)
