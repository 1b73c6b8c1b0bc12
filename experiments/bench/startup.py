"""How long the command line and the package take to start, each time a fresh process; the libraries as context.

Goals, with warm file caches: ``python run.py --help`` under 1.5 s, ``import sam`` under 0.3 s. They include Python's
own start, which is measured beside them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.bench.harness import Contestant, Figures, Options, Report, compete, joined

ROOT = Path(__file__).parents[2]
GOALS = {"python run.py --help": 1.5, "import sam": 0.3}
"""Seconds, for the medians."""
LIBRARIES = ("torch", "transformers", "peft", "lightning")


def run(options: Options) -> Report:
    """Two cases with a goal each, and one of the imports that ours put off."""
    ours = [_case(name, _command(name), options.rounds) for name in GOALS]
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


def _case(name: str, arguments: Sequence[str], rounds: int) -> Report:
    ours = Contestant(name, _timed(arguments), ours=True)
    return compete([ours], rounds, "seconds", False, case=name, warmup=1, device="cpu")


def _timed(arguments: Sequence[str]) -> Callable[[], Figures]:
    def once() -> Figures:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        return {"seconds": time.perf_counter() - start}

    return once
