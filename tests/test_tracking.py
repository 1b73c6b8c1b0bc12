"""W&B runs, on a stand-in for wandb that writes down what it is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sam.errors import SamError
from sam.tracking import tracked

LOGGER = {"name": "wandb", "project": "sam", "mode": "offline", "entity": None, "tags": ["a"]}
CONFIG: dict[str, Any] = {"logger": LOGGER, "task": {"name": "run"}, "k": 3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One entry a run: the arguments of ``init``, and under ``ended`` the exit codes that ``finish`` got."""
    runs: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        runs.append({**options, "ended": []})
        ended = runs[-1]["ended"]
        return SimpleNamespace(finish=lambda exit_code=0: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **options: options))
    return runs


def test_one_run_a_job_in_the_group_of_its_sweep(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("k=1", "k=2", "k=1"):
        with tracked(CONFIG, tmp_path / name, "k_by_merge", name):
            assert calls[-1]["ended"] == []
    assert [run["ended"] for run in calls] == [[0], [0], [0]]
    assert {run["group"] for run in calls} == {"k_by_merge"}
    assert {run["mode"] for run in calls} == {"offline"}
    assert calls[0]["config"] == CONFIG
    assert calls[0]["dir"] == str(tmp_path / "k=1")
    # A job that is run again is the same run.
    assert calls[0]["id"] == calls[2]["id"] != calls[1]["id"]
    assert {run["resume"] for run in calls} == {"allow"}


@pytest.mark.parametrize("error", [SamError("bad"), KeyboardInterrupt()])
def test_a_job_that_fails_is_a_failed_run(
    calls: list[dict[str, Any]], tmp_path: Path, error: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), tracked(CONFIG, tmp_path, None, "run"):
        raise error
    assert [run["ended"] for run in calls] == [[1]]
    assert capfd.readouterr().err == ""


def test_a_run_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class RefusedError(Exception):
        pass

    def init(**options: Any) -> Any:
        raise RefusedError("No API key\nconfigured.")

    fake = SimpleNamespace(init=init, Settings=lambda **options: options, Error=RefusedError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(SamError) as error, tracked(CONFIG, tmp_path, None, "run"):
        pass
    assert str(error.value).startswith("W&B does not start (No API key configured.); `wandb login`, or logger.mode=")


def test_no_logger_no_run(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    with tracked({**CONFIG, "logger": {"name": "none"}}, tmp_path, None, "run") as run:
        assert run is None
    assert calls == []


def test_an_unknown_mode_is_refused(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    with (
        pytest.raises(SamError, match="logger.mode=later is unknown; allowed: offline, online"),
        tracked({**CONFIG, "logger": {**LOGGER, "mode": "later"}}, tmp_path, None, "run"),
    ):
        pass
    assert calls == []
