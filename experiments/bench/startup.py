"""How long the command line and the package take to start, each time a fresh process; the libraries as context.

Goals, with warm file caches: ``python run.py --help`` under 1.5 s, ``import sam`` under 0.3 s, the first answer of the
default job within 15 s of its start (seen where it is kept). They include Python's own start, which is measured beside
them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.bench.harness import Contestant, Figures, Options, Report, compete, joined
from experiments.bench.sweep import converted_models
from sam.errors import SamError

ROOT = Path(__file__).parents[2]
FIRST = "python run.py, first answer kept"
GOALS = {"python run.py --help": 1.5, "import sam": 0.3, FIRST: 15.0}
"""Seconds, for the medians."""
PATIENCE = 600
"""Seconds after which a job without answers is given up."""
LIBRARIES = ("torch", "transformers", "peft", "lightning")


def run(options: Options) -> Report:
    """A case for each goal, and one of the imports that ours put off."""
    ours = [_case(name, first_answer if name == FIRST else _timed(_command(name)), options.rounds) for name in GOALS]
    libraries = LIBRARIES[:1] if options.quick else LIBRARIES
    context = [Contestant("python -c pass", _timed(["-c", "pass"]))]
    context += [Contestant(f"import {name}", _timed(_command(f"import {name}"))) for name in libraries]
    others = compete(context, options.rounds, "seconds", False, case="for comparison", warmup=1, device="cpu")
    return joined([*ours, others], {f"goal of {name}": goal_met(case) for name, case in zip(GOALS, ours, strict=True)})


def goal_met(report: Report) -> str:
    """The goal and whether the median of the report's one case, named as in ``GOALS``, meets it."""
    (case,) = report.cases
    seconds = case.medians(case.name)["seconds"]
    goal = GOALS[case.name]
    return f"{goal} s, {'met' if seconds < goal else 'missed'} ({seconds:.2f} s)"


def _command(name: str) -> list[str]:
    return ["run.py", "--help"] if name.endswith("--help") else ["-c", name]


def _case(name: str, once: Callable[[], Figures], rounds: int) -> Report:
    ours = Contestant(name, once, ours=True)
    return compete([ours], rounds, "seconds", False, case=name, warmup=1, device="cpu")


def _timed(arguments: Sequence[str]) -> Callable[[], Figures]:
    def once() -> Figures:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        return {"seconds": time.perf_counter() - start}

    return once


def first_answer() -> Figures:
    """Start the default job without kept answers, and stop it when its first answer is kept.

    Raises SamError where the job ends before.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = converted_models(Path(folder))
        command = [sys.executable, "run.py", "logger=none", f"hydra.run.dir={folder}/run"]
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "SAM_CACHE": str(cache)}, stdout=subprocess.DEVNULL
        ) as job:
            try:
                while not any_kept(cache / "completions"):
                    if job.poll() is not None:
                        raise SamError(f"`{' '.join(command[1:])}` ended (status {job.returncode}) with no answer kept")
                    if time.perf_counter() - start > PATIENCE:
                        raise SamError(f"`{' '.join(command[1:])}` kept no answer in {PATIENCE} s")
                    time.sleep(0.02)
                return {"seconds": time.perf_counter() - start}
            finally:
                job.kill()


def any_kept(folder: Path) -> bool:
    """Whether the completion cache in ``folder`` holds a completion."""
    return any(file.stat().st_size for file in folder.glob("*/*.jsonl"))
