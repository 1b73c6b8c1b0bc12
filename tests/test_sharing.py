"""Jobs of one sweep shared by processes: who takes which, and what is reported at the end."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from filelock import FileLock

from sam import sharing
from sam.experts.card import Pool
from sam.models.spec import BaseSpec
from sam.results import RESULT, STATUS, write_status
from tests.test_cli import Runner, make_runner, table_rows


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, tiny_spec: BaseSpec, shared_pool: Pool) -> Runner:
    return make_runner(tmp_path_factory.mktemp("sharing"), tiny_spec, shared_pool)


def test_a_job_is_held_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "k=1"
    with sharing.claimed(folder) as ours:
        assert ours
        with sharing.claimed(folder) as theirs:
            assert not theirs
    with sharing.claimed(folder) as ours:
        assert ours


@pytest.mark.parametrize("state", ["done", "failed", "running"])
def test_what_ended_while_the_sweep_ran_is_not_taken_again(
    tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what a killed process left is, and what was done or failed before: the task says what still stands."""
    write_status(tmp_path, state, ["k=1"], "why" if state == "failed" else None)
    assert sharing.outcome(tmp_path) == (state, "why" if state == "failed" else "")
    for begin, taken in ((time.time() - 100, state == "running"), (time.time() + 100, True)):
        monkeypatch.setattr(sharing, "_BEGIN", begin)
        with sharing.claimed(tmp_path) as ours:
            assert ours == taken


def test_no_status_or_half_a_one_is_running(tmp_path: Path) -> None:
    assert sharing.outcome(tmp_path) == ("running", "")
    (tmp_path / STATUS).write_text('{"state": "do')
    assert sharing.outcome(tmp_path) == ("running", "")


def test_jobs_of_another_process_are_waited_for_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {state: tmp_path / state for state in ("done", "failed", "running")}
    monkeypatch.setattr(sharing, "ELSEWHERE", [(f"k={state}", folder) for state, folder in folders.items()])
    for state, folder in folders.items():
        write_status(folder, state, [], "why" if state == "failed" else None)
    assert sharing.failed_elsewhere() == [("k=failed", "why")]
    started = Event()

    def run() -> None:
        with FileLock(folders["running"] / sharing.LOCK):
            started.set()
            time.sleep(0.2)
            write_status(folders["running"], "done", [])

    Thread(target=run).start()
    assert started.wait(30)
    sharing.join()
    assert not sharing.left_over()
    write_status(folders["running"], "running", [])  # as a killed process leaves it
    assert sharing.left_over() and not sharing.ELSEWHERE


def test_processes_that_run_the_same_command_share_its_jobs(runner: Runner) -> None:
    command = runner.command("-m", "merge=linear", "k=1,2,99,3", "selector=sampling", "sweep=two")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, cwd=runner.home, env=runner.environment, **pipes) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    jobs = runner.jobs("two")
    assert {name: json.loads((folder / STATUS).read_text())["state"] for name, folder in jobs.items()} == {
        f"k={k},merge=linear,selector=sampling": "failed" if k == 99 else "done" for k in (1, 2, 3, 99)
    }
    assert sum(text.count("another process's") for text in said) == 4, said
    for text in said:
        assert len(table_rows(text[text.rindex("┏") :], "k=")) == 4
        assert "1 of the sweep's jobs failed" in text and "k=99 must be" in text.splitlines()[-1]


def test_a_job_that_another_process_left_is_done_after_all(runner: Runner) -> None:
    """One that holds k=1, and is killed when the rest is done."""
    command = [
        "-m",
        "merge=linear",
        "k=1,2,99",
        "selector=sampling",
        "sweep=left",
        "limit=1",
        "hydra.sweep.subdir=${k}",
    ]
    sweep = runner.home / "outputs" / "sweeps" / "left"
    write_status(sweep / "1", "running", [])
    with FileLock(sweep / "1" / sharing.LOCK) as lock:
        process = subprocess.Popen(
            runner.command(*command),
            cwd=runner.home,
            env=runner.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if [sharing.outcome(sweep / k)[0] for k in ("2", "99")] == ["done", "failed"]:
                break
            time.sleep(0.01)
        assert not (sweep / "1" / RESULT).exists()
        lock.release()
        said, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in said
    assert (sweep / "1" / RESULT).is_file()
    assert "1 of the sweep's jobs failed" in said and said.count("error: k=99") == 1
