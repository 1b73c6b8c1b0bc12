"""Two runs at the same time on one machine, against the same two one after the other: each a fresh process.

There is no peer: threads of several pools that wait actively would starve each other. Nothing is taken from the
completion cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from experiments.bench.harness import Contestant, Figures, Options, Report, compete, joined
from experiments.bench.sweep import converted_models

ROOT = Path(__file__).parents[2]
GOAL = 1.3
"""The most that two at once may cost, in times of one after the other."""


def run(options: Options) -> Report:
    """One case; the note says what two at once cost."""
    arguments = ["limit=3", "selector=domain", *(["target=mini_movie"] if options.quick else [])]
    rounds = 1 if options.quick else min(options.rounds, 3)
    with tempfile.TemporaryDirectory() as folder:
        cache = converted_models(Path(folder))
        contestants = [
            Contestant("two at once", _timed(arguments, cache, together=True), ours=True),
            Contestant("one after the other", _timed(arguments, cache, together=False)),
        ]
        report = compete(contestants, rounds, "seconds", False, case="two runs", warmup=0, device="cpu")
    (case,) = report.cases
    ratio = case.medians("two at once")["seconds"] / case.medians("one after the other")["seconds"]
    met = "met" if ratio <= GOAL else "missed"
    return joined([report], {"two at once cost": f"{ratio:.2f} times one after the other (goal {GOAL:g}, {met})"})


def _timed(arguments: list[str], cache: Path, together: bool) -> Callable[[], Figures]:
    def once() -> Figures:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            running = []
            for name in ("a", "b"):
                command = [sys.executable, "run.py", *arguments, "logger=none", "completions=fresh"]
                running.append(
                    subprocess.Popen(
                        [*command, f"hydra.run.dir={out}/{name}"],
                        cwd=ROOT,
                        env={**os.environ, "SAM_CACHE": str(cache)},
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                if not together:
                    running[-1].wait()
            if any(process.wait() for process in running):
                raise RuntimeError("a run failed")
            return {"seconds": time.perf_counter() - start}

    return once
