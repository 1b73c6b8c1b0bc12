"""The leave-one-out table from made-up jobs: means worked by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.collect import MEAN, Job
from experiments.leave_one_out import build, main
from sam.errors import SamError


def job(domain: str | None, lam: float, *f1: float, **config: Any) -> Job:
    targets = {f"{domain}_{i}": {"models": {}, "combined": {"scores": {"n": 24, "f1": f}}} for i, f in enumerate(f1)}
    sets = {f"target.sets.{name}.split": "dev" for name in targets}
    shown = {"experts.exclude": [domain] if domain else [], "merge.lam": lam, "merge.name": "ties", **sets, **config}
    return Job(Path(f"{domain}-{lam}"), "done", config=shown, targets=targets, git_commit="abc")


def test_means_are_over_datasets_then_domains_and_the_best_comes_first() -> None:
    jobs = [job("news", 1.0, 0.1, 0.3), job("legal", 1.0, 0.4), job("news", 0.5, 0.3), job("legal", 0.5, 0.5)]
    table = build([*jobs, jobs[0]])
    assert table.rows == [("0.5",), ("1",)] and table.row_names == ("merge.lam",)
    assert [table.cell(("1",), column).mean for column in table.columns] == pytest.approx([20, 40, 30])
    assert table.columns[-1] == (MEAN,)


def test_open_types_are_a_column_of_their_own_and_half_of_the_choice() -> None:
    def opened(lam: float, f1: float) -> Job:
        one = job(None, lam, f1)
        one.targets["open_types"] = one.targets.pop("None_0")
        return one

    jobs = [job("news", 1.0, 0.4), job("legal", 1.0, 0.2), job("news", 0.5, 0.2), job("legal", 0.5, 0.2)]
    table = build([*jobs, opened(1.0, 0.1), opened(0.5, 0.3)])
    assert table.columns == [("news",), ("legal",), (MEAN,), ("open types",), ("both",)]
    assert table.rows == [("0.5",), ("1",)]  # best in both, though not on the domains
    assert [table.cell(("1",), column).mean for column in table.columns] == pytest.approx([40, 20, 30, 10, 20])
    assert "on 2 datasets of 2 source domains" in table.caption and "open types: all experts" in table.caption
    with pytest.raises(SamError, match="no job leaves out open types with merge.lam=1"):
        build([*jobs, opened(0.5, 0.3)])
    with pytest.raises(SamError, match="leaves out no domain"):
        build([opened(0.5, 0.3)])


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([job(None, 1.0, 0.1)], "leaves out no expert"),
        (
            [job("news", 1.0, 0.1), job("legal", 1.0, 0.1), job("news", 2.0, 0.1)],
            "leaves out legal with merge.lam=2",
        ),
        ([job("news", 1.0, 0.1), job("news", 1.0, 0.2)], "one setting with different scores"),
    ],
)
def test_incomplete_sweeps_are_refused(jobs: list[Job], message: str) -> None:
    with pytest.raises(SamError, match=message):
        build(jobs)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for domain, f1 in (("news", 0.25), ("legal", 0.5)):
        config = {"experts": {"exclude": [domain]}, "merge": {"name": "ties"}}
        targets = {domain: {"models": {}, "combined": {"scores": {"n": 24, "f1": f1}}}}
        folder = tmp_path / "sweep" / domain
        folder.mkdir(parents=True)
        result = {"schema": 1, "config": config, "git_commit": "c0ffee", "targets": targets, "overrides": []}
        (folder / "result.json").write_text(json.dumps(result))
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| ties | 50.0 | 25.0 | 37.5 |" in shown and shown == (tmp_path / "out" / "table.md").read_text()
    assert "ties,50.0000,25.0000,37.5000" in (tmp_path / "out" / "table.csv").read_text()
    assert "37.5" in (tmp_path / "out" / "table.tex").read_text()


def test_no_sweep_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err
