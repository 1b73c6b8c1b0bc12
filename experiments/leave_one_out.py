"""The table of sweeps over ``experiment=loo_…``: ``python -m experiments.leave_one_out DIR [DIR …] --out FOLDER``.

A row a setting, a column a source domain that was left out (mean F1 of its datasets, in percent), then the mean over
domains, by which settings are chosen.
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
from sam.results import RIM, write_text

DOMAIN = "experts.exclude"
PLACE = ("target.", "experiment")
"""What differs between domains, whatever the setting."""


def build(jobs: Sequence[Job]) -> Table:
    """The table, best setting first.

    Raises ``SamError`` for jobs that leave out no domain, or that do not cover all domains in every setting.
    """
    if whole := [job for job in jobs if not job.config.get(DOMAIN)]:
        raise SamError(f"{whole[0].folder} leaves out no expert; give sweeps of experiment=loo_news,loo_social,…")
    paths = dict.fromkeys(path for job in jobs for path in job.config)
    axes = [p for p in paths if p != DOMAIN and p.split(".")[0] not in RIM and not p.startswith(PLACE)]
    axes = [p for p in axes if len({label(job.config.get(p)) for job in jobs}) > 1] or ["merge.name"]
    found: dict[Key, dict[str, Job]] = {}
    for job in jobs:
        setting = found.setdefault(tuple(label(job.config.get(p)) for p in axes), {})
        domain = label(job.config[DOMAIN])
        if _f1(setting.get(domain, job)) != _f1(job):
            raise SamError(f"{setting[domain].folder} and {job.folder} are one setting with different scores")
        setting[domain] = job
    domains = list(dict.fromkeys(label(job.config[DOMAIN]) for job in jobs))
    cells: dict[tuple[Key, Key], Cell] = {}
    for values, by_domain in found.items():
        if left := [d for d in domains if d not in by_domain]:
            name = ", ".join(f"{axis}={value}" for axis, value in zip(axes, values, strict=True))
            raise SamError(f"no job leaves out {left[0]} with {name}; run the sweep's command with it")
        f1 = [100 * _f1(by_domain[d]) for d in domains]
        for domain, value in zip([*domains, MEAN], [*f1, sum(f1) / len(f1)], strict=True):
            cells[values, (domain,)] = Cell((value,), "done")
    rows = sorted(found, key=lambda s: (-cells[s, (MEAN,)].mean, [natural_key(value) for value in s]))
    return Table(tuple(axes), ("domain",), rows, [(d,) for d in [*domains, MEAN]], cells, _caption(jobs, domains))


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
    sizes = {job.targets[t]["combined"]["scores"]["n"] for job in jobs for t in job.targets}
    commits = sorted({short_commit(job.git_commit) for job in jobs})
    return (
        f"F1 (%) on {len(target_names(jobs))} datasets of {len(domains)} source domains, "
        f"each with its own expert left out, at most {max(sizes)} sentences a dataset; mean: of domains; "
        f"commit {', '.join(commits)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
