"""Jobs of one sweep shared by processes: who takes which, what is said at the end, and that none outlives the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from sam import sharing
from sam.base import BaseSpec
from sam.errors import SamError
from sam.experts.card import Pool
from sam.paths import conf_dir
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


@pytest.mark.parametrize(
    ("argv", "params", "jobs"),
    [
        (["-m", "merge=ties,dare,linear", "k=1,2,3,4,6"], [], 15),
        (["-m", "k=1,2", "limit=3", "hydra.sweep.dir='a,b'"], ["seed=0,1,2"], 6),
        (["--multirun", "--config-dir", "some,where", "k=range(1,4)"], [], 3),
        (["-m", "selector.experts=[a,b],[c]", "seed=1"], ["k=1", "seed=0,1,2"], 2),
        (["-m", "merge=glob(*ties)"], [], 3),
        (["-m", "k=1"], [], 1),
    ],
)
def test_the_jobs_of_a_command_are_counted(argv: list[str], params: list[str], jobs: int) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert sharing.sweep_jobs(argv, params) == jobs


@pytest.mark.parametrize("name", ["plain", "a b,c", "it's", "back\\slash"])
def test_a_helper_is_given_the_folder_as_it_is(name: str, tmp_path: Path) -> None:
    """Among the overrides: options may stand before them and after."""
    argv = ["-m", "merge=ties,dare", "k=1,2", "--config-dir", "conf2"]
    found = sharing.helper_argv(argv, tmp_path / name)
    assert [*found[:1], *found[2:]] == argv
    (override,) = OverridesParser.create().parse_overrides([found[1]])
    assert (override.key_or_group, override.value()) == ("hydra.sweep.dir", str(tmp_path / name))


def test_how_many_processes_share() -> None:
    worth = sharing.WORTH
    assert sharing.wanted(None, True, 2, worth, 1000, 1300) == 2 == sharing.wanted(None, True, 16, worth, 1000, 50000)
    assert sharing.wanted(None, True, 1, worth, 1000, 1300) == 1 == sharing.wanted(None, True, 2, worth, 1000, 1200)
    assert sharing.wanted(None, True, 2, worth / 2, 1000, 1300) == 1
    assert sharing.wanted(None, False, 16, worth, 1000, 50000) == 1 == sharing.wanted(1, True, 2, worth, 1000, 1300)
    assert sharing.wanted(4, False, 1, 0, 1000, 0) == 4
    for good in (None, 1, 7):
        sharing.check_processes(good)
    for bad in (0, -1, 1.5, True, "two"):
        with pytest.raises(SamError, match="processes=.* must be a whole number, at least 1, or null"):
            sharing.check_processes(bad)


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


def test_the_first_process_shares_a_sweep_and_tells_of_all_jobs(runner: Runner) -> None:
    done = runner("-m", "merge=linear", "k=1,2,99,3", "selector=sampling", "sweep=two", "processes=2")
    assert done.returncode == 1
    assert "2 processes share the jobs" in done.stderr
    jobs = runner.jobs("two")
    assert {name: json.loads((folder / STATUS).read_text())["state"] for name, folder in jobs.items()} == {
        f"k={k},merge=linear,selector=sampling": "failed" if k == 99 else "done" for k in (1, 2, 3, 99)
    }
    assert sum((folder / RESULT).is_file() for folder in jobs.values()) == 3
    assert len(table_rows(done.stdout[done.stdout.rindex("┏") :], "k=")) == 4
    assert "1 of the sweep's jobs failed" in done.stderr and "k=99 must be" in done.stderr.splitlines()[-1]


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


def test_a_helper_ends_well_and_starts_none(runner: Runner) -> None:
    command = ["-m", "merge=linear", "k=1,2,3", "selector=sampling", "sweep=helped", "processes=2"]
    with subprocess.Popen(
        runner.command(*command),
        cwd=runner.home,
        env={**runner.environment, sharing.HELPS: str(time.time())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as helper:
        assert helper.stdout is not None
        said = helper.stdout.read()
        assert helper.wait() == 0, said
    assert not any(word in said for word in ("Fatal", "Traceback", "share the jobs"))
    assert all((folder / RESULT).is_file() for folder in runner.jobs("helped").values())
    assert len(runner.jobs("helped")) == 3


def test_none_outlives_the_first(runner: Runner) -> None:
    """Killed, where it can tidy nothing up: the other one ends."""
    command = ["-m", "merge=linear", "k=1,2,3,4", "sweep=killed", "processes=2"]
    with subprocess.Popen(
        runner.command(*command),
        cwd=runner.home,
        env=runner.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        # The bound is there so that a sweep that hangs fails; it is no measure of time.
        end = time.monotonic() + 300
        helpers: list[psutil.Process] = []
        while not helpers and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
            helpers = [child for child in psutil.Process(process.pid).children() if _is_run(child)]
        os.kill(process.pid, signal.SIGKILL)
    assert helpers
    while any(_is_run(helper) for helper in helpers) and time.monotonic() < end:
        time.sleep(0.005)
    # An orphan that went on would end too, with all jobs done.
    assert len(list((runner.home / "outputs" / "sweeps" / "killed").glob(f"*/{RESULT}"))) < 4


def _is_run(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("run.py") for part in process.cmdline())
    except psutil.Error:  # gone by now
        return False
