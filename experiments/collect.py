"""Read the files of a sweep: its jobs, and their scores, selections and predictions as plain values or data frames.

A sweep folder holds one folder per job, with ``result.json`` (done; ``predictions.jsonl`` beside it) or
``status.json`` (failed or running).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sam.errors import SamError
from sam.results import PREDICTIONS, RESULT, SCHEMA, STATUS

MEAN = "mean"
"""The unweighted mean over targets, where a target is asked for."""
COMBINED = "combined"
"""The combined prediction, where a model is asked for."""
RIM = ("logger", "trainer", "completions", "cache", "sweep", "task")
"""Sections of the config that cannot change what is extracted."""
GROUP_LEAVES = ("name", "rule")
"""``merge=ties`` on the command line means that the config's ``merge.name`` (or ``combine.rule``) is ``ties``."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep; ``config`` is flat (dotted path to value), ``experts`` has the hash of each one's weights.

    ``targets`` is empty, and ``experts`` None, unless it is done; ``experts`` is None for old results too.
    """

    folder: Path
    state: str
    overrides: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    git_commit: str = ""
    error: str = ""
    experts: dict[str, str] | None = None


def load_jobs(folder: Path) -> list[Job]:
    """All jobs under ``folder``, in natural order of their paths.

    Raises ``SamError`` where there is no finished job, or where a file is broken or of an unknown schema.
    """
    if not folder.is_dir():
        raise SamError(f"no folder {folder}; give the folder of a sweep, which holds a folder per job")
    waiting = [path for path in folder.rglob(STATUS) if not _has_result(path)]
    folders = {path.parent for path in waiting}
    done = [_done_job(path) for path in folder.rglob(RESULT) if path.parent not in folders]
    others = [_unfinished_job(path) for path in waiting]
    if not done:
        first = next((f"; first error: {job.error}" for job in others if job.error), "")
        raise SamError(
            f"no {RESULT} under {folder} ({len(others)} unfinished jobs{first}); run the sweep first (tables that were "
            "made of one do not do)"
        )
    return sorted(done + others, key=lambda job: natural_key(str(job.folder)))


def finished(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that have a result."""
    return [job for job in jobs if job.state == "done"]


def load_finished(*folders: Path) -> list[Job]:
    """All jobs under ``folders``, to be compared with each other.

    Raises ``SamError`` as :func:`load_jobs`, where one is not done, and where an expert was trained anew between two.
    """
    jobs = [job for folder in folders for job in load_jobs(folder)]
    if left := [job for job in jobs if job.state != "done"]:
        why = f" ({left[0].error})" if left[0].error else ""
        raise SamError(
            f"{left[0].folder} is {left[0].state}{why}; run the sweep's command again until all jobs are done, or "
            "delete the folder of a job that was a mistake"
        )
    known = [job for job in jobs if job.experts is not None]
    if known and (bare := [job for job in jobs if job.experts is None]):
        raise SamError(f"{bare[0].folder} does not say its experts' weights, as {known[0].folder} does; run it anew")
    first: dict[tuple[Any, str], tuple[str, Path]] = {}
    for job in known:
        for name, weights in (job.experts or {}).items():
            other, folder = first.setdefault((job.config.get("experts.path"), name), (weights, job.folder))
            if other != weights:
                raise SamError(f"{folder} and {job.folder} had other weights of expert {name}; run both anew")
    return jobs


def target_names(jobs: Iterable[Job]) -> list[str]:
    """The targets that any job scored, in order of appearance."""
    return list(dict.fromkeys(name for job in jobs for name in job.targets))


def model_names(jobs: Iterable[Job]) -> list[str]:
    """The single models by the name of their ranking, in order of appearance, then ``combined``."""
    single = dict.fromkeys(name for job in jobs for target in job.targets.values() for name in target["models"])
    return [*single, COMBINED]


def metric_names(jobs: Iterable[Job]) -> list[str]:
    """The numbers that scores hold: fractions (precision, f1, …) and counts (gold, unparsable, …).

    Raises ``SamError`` where no job has any.
    """
    combined = (target["combined"]["scores"] or {} for job in jobs for target in job.targets.values())
    names = dict.fromkeys(name for s in combined for name, value in s.items() if isinstance(value, (int, float)))
    if not names:
        raise SamError("no job has scores: their targets have no gold")
    return list(names)


def score(job: Job, target: str, model: str, metric: str) -> float | None:
    """One number of a finished job, None where it has none; for ``mean`` the unweighted mean over its targets."""
    if target == MEAN:
        values = [score(job, name, model, metric) for name in job.targets]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None
    if target not in job.targets:
        return None
    result = job.targets[target]
    holder = result["combined"] if model == COMBINED else result["models"].get(model)
    return (holder["scores"] or {}).get(metric) if holder else None


def uses_labels(job: Job, target: str) -> bool:
    """Whether gold labels were used to select experts for ``target`` (for ``mean``: for any target)."""
    names = list(job.targets) if target == MEAN else [target]
    return any(job.targets[name].get("labels_used_for_selection", False) for name in names if name in job.targets)


def score_frame(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per finished job, target (``mean`` last) and model, with the config's dotted paths as columns.

    Scores are as stored: fractions from 0 to 1, and counts (their mean over targets in the ``mean`` rows).
    """
    metrics, models = metric_names(jobs), model_names(jobs)
    rows = [
        {
            **{path: label(value) if isinstance(value, (list, dict)) else value for path, value in job.config.items()},
            "job": job.folder.name,
            "target": target,
            "model": model,
            "labels_used": uses_labels(job, target),
            **{metric: score(job, target, model, metric) for metric in metrics},
        }
        for job in finished(jobs)
        for target in [*job.targets, MEAN]
        for model in models
        if score(job, target, model, metrics[0]) is not None
    ]
    return pd.DataFrame(rows)


def selection_frame(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per finished job, target, ranking and selected expert, with its rank (from 1) and score, if any."""
    rows = [
        {
            "job": job.folder.name,
            "target": target,
            "ranking": ranking,
            "rank": rank,
            "expert": expert,
            "score": (selection.get("scores") or {}).get(expert),
        }
        for job in finished(jobs)
        for target, result in job.targets.items()
        for ranking, selection in result["selections"].items()
        for rank, expert in enumerate(selection["experts"], start=1)
    ]
    return pd.DataFrame(rows, columns=["job", "target", "ranking", "rank", "expert", "score"])


def read_predictions(job: Job) -> list[dict[str, Any]]:
    """The lines of a finished job's ``predictions.jsonl``; empty where the file was not kept."""
    path = job.folder / PREDICTIONS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def config_path(name: str, known: Iterable[str]) -> str | None:
    """The dotted path that ``name`` stands for (``k``, ``merge.lam``, or ``merge`` for ``merge.name``), or None."""
    known = set(known)
    candidates = [name, *(f"{name}.{leaf}" for leaf in GROUP_LEAVES)]
    return next((path for path in candidates if path in known), None)


def label(value: Any) -> str:
    """A config value as tables and legends print it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ", ".join(map(label, value)) if isinstance(value, (list, tuple)) else str(value)


def short_commit(commit: str) -> str:
    """The first ten digits, with ``+dirty`` kept: such a commit alone does not give these numbers."""
    digits, plus, rest = commit.partition("+")
    return f"{digits[:10]}{plus}{rest}"


def natural_key(text: str) -> list[tuple[int, float, str]]:
    """A sort key that puts 2 before 10 and 0.05 before 0.2, also inside words, and numbers before words."""
    try:
        return [(0, float(text), "")]
    except ValueError:
        parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(parts) if p]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SamError(f"{path} is not JSON ({error}); delete it and run the job again") from None
    if not isinstance(content, dict):
        raise SamError(f"{path} holds no JSON object; delete it and run the job again")
    return content


def _has_result(status: Path) -> bool:
    """Whether the job's result stands: an attempt after it, not done, means that it is of an older config."""
    result = status.with_name(RESULT)
    if not result.is_file():
        return False
    older = result.stat().st_mtime_ns < status.stat().st_mtime_ns
    return not (older and _read_json(status).get("state") in ("failed", "running"))


def _done_job(path: Path) -> Job:
    result = _read_json(path)
    if result.get("schema") != SCHEMA:
        raise SamError(f"{path} has schema {result.get('schema')!r}, readable is {SCHEMA}; run the job again")
    missing = [key for key in ("config", "targets") if key not in result]
    if missing:
        raise SamError(f"{path} lacks {', '.join(missing)}; delete it and run the job again")
    config = _flatten(result["config"])
    # Equal names do not mean equal weights, and jobs of different base models must never be averaged.
    config |= {f"base.{key}": value for key, value in result.get("base", {}).items() if f"base.{key}" not in config}
    config |= _flatten({"generator": result.get("generator", {})})  # what `auto` came to
    overrides = tuple(result.get("overrides", ()))
    commit = str(result.get("git_commit") or "unknown")
    return Job(path.parent, "done", overrides, config, result["targets"], commit, experts=result.get("experts"))


def _unfinished_job(path: Path) -> Job:
    status = _read_json(path)
    if status.get("state") not in ("failed", "running"):
        raise SamError(f"{path} has state {status.get('state')!r} and no {RESULT} beside it; run the job again")
    overrides = tuple(status.get("overrides") or path.parent.name.split(","))
    error = " ".join(str(status.get("error") or "").split())
    return Job(path.parent, status["state"], overrides, _flatten(status.get("config") or {}), error=error)


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
