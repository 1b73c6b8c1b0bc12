"""The table of sweeps over ``experiment=loo_…``: ``python -m experiments.leave_one_out DIR [DIR …] --out FOLDER``.

A row per setting, a column per source domain that was left out (mean F1 of its datasets, in percent), then the mean
over domains, by which settings are chosen. With jobs of ``experiment=loo_open`` there are two more columns: the
held-out open types, and the mean of that and of the mean over domains, which then chooses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import render
from experiments.collect import (
    COMBINED,
    MEAN,
    RIM,
    Job,
    label,
    load_finished,
    natural_key,
    score,
    short_commit,
    target_names,
)
from experiments.render import Cell, Key, Table
from sam.errors import SamError
from sam.results import write_text

DOMAIN = "experts.exclude"
OPEN, BOTH = "open types", "both"
PLACE = ("target.", "experiment")
"""What differs between domains, whatever the setting."""


def build(jobs: Sequence[Job]) -> Table:
    """The table, best setting first.

    Raises ``SamError`` for jobs that leave out no domain, or that do not cover all columns in every setting.
    """
    paths = dict.fromkeys(path for job in jobs for path in job.config)
    axes = [p for p in paths if p != DOMAIN and p.split(".")[0] not in RIM and not p.startswith(PLACE)]
    axes = [p for p in axes if len({label(job.config.get(p)) for job in jobs}) > 1] or ["merge.name"]
    settings: dict[Key, dict[str, Job]] = {}
    for job in jobs:
        setting, column = settings.setdefault(tuple(label(job.config.get(p)) for p in axes), {}), _column(job)
        if _f1(setting.get(column, job)) != _f1(job):
            raise SamError(f"{setting[column].folder} and {job.folder} are one setting with different scores")
        setting[column] = job
    columns = list(dict.fromkeys(map(_column, jobs)))
    domains = [column for column in columns if column != OPEN]
    if not domains:
        raise SamError(f"{jobs[0].folder} leaves out no domain; give sweeps of experiment=loo_news,loo_social,… too")
    cells: dict[tuple[Key, Key], Cell] = {}
    for values, by_column in settings.items():
        if left := [column for column in columns if column not in by_column]:
            name = ", ".join(f"{axis}={value}" for axis, value in zip(axes, values, strict=True))
            raise SamError(f"no job leaves out {left[0]} with {name}; run the sweep's command with it")
        f1 = {column: 100 * _f1(job) for column, job in by_column.items()}
        f1[MEAN] = sum(f1[d] for d in domains) / len(domains)
        if OPEN in f1:
            f1[BOTH] = (f1[MEAN] + f1[OPEN]) / 2
        cells |= {(values, (column,)): Cell((value,), "done") for column, value in f1.items()}
    shown = [*domains, MEAN, *([OPEN, BOTH] if OPEN in columns else [])]
    rows = sorted(settings, key=lambda s: (-cells[s, (shown[-1],)].mean, [natural_key(value) for value in s]))
    return Table(tuple(axes), ("domain",), rows, [(c,) for c in shown], cells, _caption(jobs, domains))


def _column(job: Job) -> str:
    """The domain that a job leaves out, or the open types."""
    if job.config.get(DOMAIN):
        return label(job.config[DOMAIN])
    if all(target.startswith("open_") for target in job.targets):
        return OPEN
    raise SamError(f"{job.folder} leaves out no expert; give sweeps of experiment=loo_news,loo_social,…,loo_open")


def main(argv: Sequence[str] | None = None) -> int:
    """Write table.md, table.csv and table.tex, print the Markdown; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m experiments.leave_one_out", description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="sweeps of experiment=loo_…")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the tables go (the first DIR)")
    args = parser.parse_args(argv)
    try:
        table = build(load_finished(*args.folders))
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or args.folders[0]
    texts = render.files([table], best=False)
    for file, text in texts.values():
        write_text(out / file, text)
    print(texts["markdown"][1], end="")
    return 0


def _f1(job: Job) -> float:
    found = score(job, MEAN, COMBINED, "f1")
    if found is None:
        raise SamError(f"{job.folder} has no F1; its targets have no gold")
    return found


def _caption(jobs: Sequence[Job], domains: Sequence[str]) -> str:
    closed, opened = ([job for job in jobs if (_column(job) == OPEN) == is_open] for is_open in (False, True))
    commits = sorted({short_commit(job.git_commit) for job in jobs})
    parts = [
        f"F1 (%) on {len(target_names(closed))} datasets of {len(domains)} source domains, each with its own expert "
        f"left out, at most {_most(closed)} sentences a dataset; mean: of domains"
    ]
    if opened:
        parts.append(
            f"open types: all experts, at most {_most(opened)} sentences of each held-out file; both: of the two"
        )
    return "; ".join([*parts, f"commit {', '.join(commits)}"])


def _most(jobs: Sequence[Job]) -> int:
    return max(job.targets[t]["combined"]["scores"]["n"] for job in jobs for t in job.targets)


if __name__ == "__main__":
    raise SystemExit(main())
