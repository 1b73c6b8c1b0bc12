"""A k by merge sweep of fifteen jobs against one job, each from a fresh process without kept completions.

There is no peer: the goal is a ratio to ourselves. A sweep shares its base model, embeddings and the experts' sampled
completions, and models that are equal are asked once. The one job is timed before and after the fifteen, as a
machine's speed drifts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.bench.harness import Contestant, Figures, Options, Report, compete, joined
from sam.errors import SamError
from sam.paths import cache_dir

ROOT = Path(__file__).parents[2]
SWEEP = ["-m", "merge=ties,dare,linear", "k=1,2,3,4,6", "sweep=bench"]
GOAL = 8.0
"""The most single jobs that fifteen may cost."""


def run(options: Options) -> Report:
    """One case; the note says how many single jobs the sweep costs."""
    limit = ["limit=4"] if options.quick else []
    rounds = 1 if options.quick else min(options.rounds, 3)
    with tempfile.TemporaryDirectory() as folder:
        cache = converted_models(Path(folder))
        contestants = [
            Contestant("one job before", _timed([*limit], cache)),
            Contestant("15 jobs", _timed([*SWEEP, *limit], cache), ours=True),
            Contestant("one job after", _timed([*limit], cache)),
        ]
        report = compete(contestants, rounds, "seconds", False, case="15 jobs and one", warmup=0, device="cpu")
    (case,) = report.cases
    before, jobs, after = (case.medians(one.name)["seconds"] for one in contestants)
    ratio = 2 * jobs / (before + after)
    met = "met" if ratio <= GOAL else "missed"
    return joined([report], {"15 jobs cost": f"{ratio:.1f} single jobs (goal {GOAL:g}, {met})"})


def converted_models(folder: Path) -> Path:
    """A cache directory with the converted models of the user's, and no completions."""
    for name in ("models", "fingerprints", "openvino"):
        if not (cache_dir() / name).is_dir():
            raise SamError("the base model is not converted yet; run `python run.py limit=1` once")
        (folder / name).symlink_to(cache_dir() / name, target_is_directory=True)
    return folder


def _timed(arguments: Sequence[str], cache: Path) -> Callable[[], Figures]:
    def once() -> Figures:
        shutil.rmtree(cache / "completions", ignore_errors=True)
        out = tempfile.mkdtemp()
        command = [sys.executable, "run.py", *arguments, "logger=none"]
        command += [f"hydra.run.dir={out}", f"hydra.sweep.dir={out}"]
        start = time.perf_counter()
        try:
            subprocess.run(
                command, cwd=ROOT, env={**os.environ, "SAM_CACHE": str(cache)}, stdout=subprocess.DEVNULL, check=True
            )
            return {"seconds": time.perf_counter() - start}
        finally:
            shutil.rmtree(out)

    return once
