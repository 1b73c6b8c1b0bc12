"""``run.py`` as its users start it: a sweep, run again, with failing jobs, and killed. Each start costs seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sam
from experiments import tables
from sam.experts.card import Pool
from sam.models.spec import BaseSpec
from sam.results import RESULT, STATUS

ROOT = Path(sam.__file__).parent.parent


@dataclass
class Runner:
    """Starts run.py in ``home``, on the tiny base and pool, with a cache of its own."""

    home: Path
    base: str
    pool: Path

    def command(self, *arguments: str) -> list[str]:
        fixed = ["base=local", f"base.location={self.base}", f"experts.path={self.pool}", "trainer=cpu", "limit=3"]
        fixed += ["target=mini_movie", "decode.max_new_tokens=8", "sample_size=2", "selector=sampling", "logger=none"]
        # Of two values for one key the given one counts.
        given = {a.partition("=")[0] for a in arguments}
        return [
            sys.executable,
            str(ROOT / "run.py"),
            *arguments,
            *(f for f in fixed if f.partition("=")[0] not in given),
        ]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SAM_CACHE": str(self.home / "cache"), "COLUMNS": "200"}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.home, env=self.environment, capture_output=True, text=True, check=False
        )

    def jobs(self, sweep: str) -> dict[str, Path]:
        """The job folders of a sweep by what differs between them: ``k=1,merge=ties``."""
        statuses = sorted((self.home / "outputs" / "sweeps" / sweep).glob(f"*/{STATUS}"))
        found = {}
        for path in statuses:
            overrides = json.loads(path.read_text())["overrides"]
            swept = [o for o in overrides if o.partition("=")[0] in ("k", "merge", "selector")]
            found[",".join(sorted(swept))] = path.parent
        return found


def make_runner(home: Path, tiny_spec: BaseSpec, shared_pool: Pool) -> Runner:
    pool = Path(shutil.copytree(shared_pool.path, home / "pool"))
    shutil.rmtree(pool / "unified")
    return Runner(home, str(tiny_spec.location), pool)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, tiny_spec: BaseSpec, shared_pool: Pool) -> Runner:
    return make_runner(tmp_path_factory.mktemp("cli"), tiny_spec, shared_pool)


SWEEP = ["-m", "merge=ties,linear", "k=1,2", "selector=sampling", "sweep=first"]
JOBS = [f"k={k},merge={merge},selector=sampling" for k in (1, 2) for merge in ("linear", "ties")]


@pytest.fixture(scope="module")
def sweep(runner: Runner) -> subprocess.CompletedProcess[str]:
    return runner(*SWEEP)


def times(folders: dict[str, Path]) -> dict[str, int]:
    return {name: (folder / RESULT).stat().st_mtime_ns for name, folder in folders.items()}


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RESULT).read_text()))


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def table_rows(text: str, mark: str) -> list[str]:
    return [line for line in text.splitlines() if mark in line and line.startswith("│")]


def test_a_sweep_gives_a_result_a_job_and_a_summary(runner: Runner, sweep: subprocess.CompletedProcess[str]) -> None:
    assert sweep.returncode == 0, sweep.stderr
    jobs = runner.jobs("first")
    assert sorted(jobs) == sorted(JOBS)
    for name, folder in jobs.items():
        result = result_of(folder)
        assert f"k={result['config']['k']},merge={result['config']['merge']['name']}" in name
        assert len(result["targets"]["mini_movie"]["models"]["sampling"]["experts"]) == result["config"]["k"]
        assert folder.name.startswith(name.rpartition(",")[0])
    summary = sweep.stdout[sweep.stdout.rindex("┏") :]
    assert len(table_rows(summary, "merge=")) == 4
    # One expert is one model: the second k=1 generates nothing.
    counts = [result_of(jobs[name])["completions"].get("generated", 0) for name in JOBS]
    assert sorted(counts)[0] == 0


def test_the_same_command_again_runs_only_what_is_missing(
    runner: Runner, sweep: subprocess.CompletedProcess[str]
) -> None:
    before = times(runner.jobs("first"))
    lost = runner.jobs("first")[JOBS[3]]
    old = result_of(lost)
    (lost / RESULT).unlink()
    again = runner(*SWEEP)
    assert again.returncode == 0, again.stderr
    after = times(runner.jobs("first"))
    assert {name for name in JOBS if after[name] != before[name]} == {JOBS[3]}
    assert again.stderr.count("already done:") == 3
    new = result_of(lost)
    assert new["completions"].get("generated", 0) == 0
    found, before_found = (
        {name: (m["experts"], m["model_key"], m["scores"]) for name, m in r["targets"]["mini_movie"]["models"].items()}
        for r in (new, old)
    )
    assert found == before_found
    assert {m["generated"] for m in new["targets"]["mini_movie"]["models"].values()} == {0.0}
    assert len(table_rows(again.stdout[again.stdout.rindex("┏") :], "merge=")) == 4


def test_another_question_in_the_same_named_sweep_is_not_reused(
    runner: Runner, sweep: subprocess.CompletedProcess[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (runner.home / "outputs").rglob(RESULT)}
    other = runner("-m", "merge=ties", "k=2", "selector=sampling", "sweep=first", "sample_size=1")
    assert other.returncode == 0, other.stderr
    assert "already done" not in other.stderr
    found = {p: p.stat().st_mtime_ns for p in (runner.home / "outputs").rglob(RESULT)}
    assert {p: t for p, t in found.items() if p in before} == before
    (new,) = set(found) - set(before)
    assert result_of(new.parent)["config"]["sample_size"] == 1
    shutil.rmtree(new.parent)


def test_the_tables_of_a_real_sweep(
    runner: Runner, sweep: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main([str(runner.home / "outputs" / "sweeps" / "first")]) in (0, None)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("| ties", "| linear"))]
    assert len(rows) >= 2


def test_failing_jobs_do_not_stop_the_others(runner: Runner) -> None:
    """W&B is on: a job that fails before its run, and one that fails within it (the encoder is not the cards')."""
    swept = ["selector=sampling,domain", "k=1,2,99", "sweep=failing", "logger=wandb"]
    (runner.home / "encoder").mkdir()
    (runner.home / "encoder" / "model.safetensors").touch()
    done = runner("-m", *swept, "encoder=local", f"encoder.location={runner.home / 'encoder'}", "merge=linear")
    assert done.returncode == 1
    jobs = runner.jobs("failing")
    states = {name: json.loads((folder / STATUS).read_text()) for name, folder in jobs.items()}
    assert {n: s["state"] for n, s in states.items()} == {
        f"k={k},merge=linear,selector={selector}": "done" if k < 99 and selector == "sampling" else "failed"
        for k in (1, 2, 99)
        for selector in ("sampling", "domain")
    }
    too_many = states["k=99,merge=linear,selector=sampling"]["error"]
    assert "k=99 must be an integer in 1..4" in too_many
    assert "encoder=minilm" in states["k=1,merge=linear,selector=domain"]["error"]
    assert len(errors(done)) == 4
    assert "4 of the sweep's jobs failed" in done.stderr
    assert {name for name, folder in jobs.items() if (folder / RESULT).exists()} == {
        f"k={k},merge=linear,selector=sampling" for k in (1, 2)
    }
    summary = done.stdout[done.stdout.rindex("┏") :]
    assert len(table_rows(summary, "failed: k=99 must")) == 2
    runs = {name: list((folder / "wandb").glob("offline-run-*")) for name, folder in jobs.items()}
    assert all(len(found) == (0 if "k=99" in name else 1) for name, found in runs.items())
    ids = {found[0].name.rpartition("-")[2] for found in runs.values() if found}
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["merge=tie"], 2, ("merge=tie", "ties", "linear")),
        (["merge=linear", "merge.density=0.5"], 2, ("merge=linear", "density", "lam, weights")),
        (["k=99"], 1, ("k=99", "1..4")),
        (["task=train", "domain=start", "base.fold=/some"], 1, ("domain=start", "base.fold=null")),
        (["task=train", "domain.domains=[[open_types]]"], 1, ("open_types is mixed in by train.open_sentences",)),
    ],
)
def test_a_mistake_is_one_line(runner: Runner, arguments: Sequence[str], code: int, named: Sequence[str]) -> None:
    folder = runner.home / "mistake"
    done = runner(*arguments, f"hydra.run.dir={folder}")
    assert done.returncode == code
    (line,) = errors(done)
    assert done.stderr.splitlines() == [line]
    assert all(part in line for part in named)
    assert not (folder / RESULT).exists()


def test_help_answers_without_loading_anything_heavy(runner: Runner) -> None:
    code = (
        "import runpy, sys; sys.argv = ['run.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'wandb', 'pandas', 'sentence_transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("merge: breadcrumbs, dare, ", "selector: ", "target: ", "sample_size: 10", "experiment: "):
        assert part in done.stdout


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, tiny_spec: BaseSpec, shared_pool: Pool) -> None:
    runner = make_runner(tmp_path, tiny_spec, shared_pool)
    command = [*SWEEP, "limit=20", "decode.max_new_tokens=30"]
    folder = tmp_path / "outputs" / "sweeps" / "first"
    with subprocess.Popen(
        runner.command(*command),
        cwd=tmp_path,
        env=runner.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        # The bound is there so that a sweep that hangs fails; it is no measure of time.
        end = time.monotonic() + 300
        while not list(folder.glob(f"*/{RESULT}")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    first = {p: p.stat().st_mtime_ns for p in folder.glob(f"*/{RESULT}")}
    assert first
    again = runner(*command)
    assert again.returncode == 0, again.stderr
    jobs = runner.jobs("first")
    assert sorted(jobs) == sorted(JOBS)
    assert len(list(folder.glob(f"*/{RESULT}"))) == 4
    assert {p: p.stat().st_mtime_ns for p in first} == first
    assert again.stderr.count("already done:") == len(first)
