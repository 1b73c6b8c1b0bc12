"""Tables of a sweep's scores: ``python -m experiments.tables DIR [--rows merge.name] [--columns k] …``.

Rows and columns are dotted config paths (``k``, ``merge.name``, ``merge.density``) or the words ``target`` and
``model``; rows that are not given are what the sweep varies. Jobs that differ only in their seeds share a cell: mean ±
sample standard deviation.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import render
from experiments.collect import (
    COMBINED,
    MEAN,
    RIM,
    Job,
    config_path,
    finished,
    label,
    load_jobs,
    metric_names,
    model_names,
    natural_key,
    score,
    short_commit,
    target_names,
    uses_labels,
)
from experiments.render import Cell, Key, Table
from sam.errors import SamError
from sam.results import SCHEMA, write_text

FRACTIONS = ("precision", "recall", "f1", "span_precision", "span_recall", "span_f1")
"""Scores stored from 0 to 1 and printed in percent; all others are counts."""
FAULTS = ("unparsable", "truncated", "not_in_sentence", "not_asked")
"""Counts of which fewer are better."""


@dataclass(frozen=True)
class Spec:
    """What a table shows.

    ``target`` and ``model`` hold where they are not an axis, and are None there. The jobs of a cell are averaged over
    the config paths of ``over``; a word there stands for all paths that end in it (``seed`` is also ``merge.seed``).
    """

    rows: tuple[str, ...] = ("merge.name",)
    columns: tuple[str, ...] = ("k",)
    metric: str = "f1"
    target: str | None = None
    model: str | None = None
    over: tuple[str, ...] = ("seed",)

    @property
    def axes(self) -> tuple[str, ...]:
        """Rows, then columns."""
        return self.rows + self.columns


@dataclass(frozen=True)
class _Place:
    """One job's part of one cell."""

    key: tuple[Key, Key]
    job: Job
    target: str
    model: str


def build_table(jobs: Sequence[Job], spec: Spec) -> Table:
    """The table of ``spec``: scores in percent, counts as they are.

    Raises ``SamError`` for a path, metric, target or model that no job has, and where jobs of one cell differ in
    something else than ``spec.over``.
    """
    spec = _checked(spec, jobs)
    grouped: dict[tuple[Key, Key], list[_Place]] = {}
    for place in (place for job in jobs for place in _places(job, spec, jobs)):
        grouped.setdefault(place.key, []).append(place)
    for (row, column), places in grouped.items():
        _check_cell(" x ".join(row + column), [p.job for p in places if p.job.state == "done"], spec)
    cells = {key: _cell(places, spec.metric) for key, places in grouped.items()}
    shown = [key for key, cell in cells.items() if cell.state != "absent"]
    values = max((len(cell.values) for cell in cells.values()), default=0)
    return Table(
        row_names=spec.rows,
        column_names=spec.columns,
        rows=_ordered({row for row, _ in shown}, spec.rows, jobs),
        columns=_ordered({column for _, column in shown}, spec.columns, jobs),
        cells=cells,
        caption=_caption(jobs, spec, values),
        failures=tuple(f"{job.folder.name}: {job.error or '(no error kept)'}" for job in jobs if job.state == "failed"),
        better="max" if spec.metric in FRACTIONS else "min" if spec.metric in FAULTS else None,
    )


def tables_per_target(jobs: Sequence[Job], spec: Spec) -> list[Table]:
    """The table of ``spec`` for each target, then for their mean; raises as ``build_table``."""
    if spec.target or "target" in spec.axes:
        raise SamError("--per-target makes a table of every target; leave out --target and the axis target")
    targets = _targets_and_mean(jobs)
    return [replace(build_table(jobs, replace(spec, target=target)), target=target) for target in targets]


def varied(jobs: Sequence[Job], columns: Sequence[str], over: Sequence[str]) -> tuple[str, ...]:
    """The config paths that tell ``jobs`` apart beside ``columns``, ``over`` and the target; merge.name if none does.

    What a group's name decides (``merge.density``, where each merge has one) is left out. Of jobs that are not finished
    counts what is known of them.
    """
    values: dict[str, list[tuple[Job, str]]] = {}
    for job in jobs:
        for path, value in job.config.items():
            if path.split(".")[0] not in (*RIM, "target"):
                values.setdefault(path, []).append((job, label(value)))
    differing = [path for path, found in values.items() if len({value for _, value in found}) > 1]

    def decided(path: str) -> bool:
        name = f"{path.partition('.')[0]}.name"
        both = {(label(job.config.get(name)), value) for job, value in values[path]}
        return path != name and name in differing and len(both) == len({first for first, _ in both})

    known = _paths(jobs)
    taken = {config_path(column, known) for column in columns}
    rows = (path for path in differing if path not in taken and not _is_over(path, over) and not decided(path))
    return tuple(rows) or Spec.rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table files, print the Markdown, and return the exit code (2 for a user's mistake)."""
    args = _parser().parse_args(argv)
    try:
        jobs = load_jobs(args.folder)
        rows = varied(jobs, args.columns, args.over) if args.rows is None else args.rows
        spec = Spec(rows, args.columns, args.metric, args.target, args.model, args.over)
        tables = tables_per_target(jobs, spec) if args.per_target else [build_table(jobs, spec)]
        texts = render.files(tables, args.best)
        out = args.out or args.folder
        _make_folder(out)
        for name in texts if args.format == "all" else [args.format]:
            file, text = texts[name]
            write_text(out / file, text)
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(texts["markdown"][1], end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables", description="Make tables of a sweep's scores."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the sweep: a folder that holds a folder per job")
    add("--rows", type=_words, help="config paths, target or model, comma-separated (what the sweep varies)")
    add("--columns", type=_words, default=Spec.columns, help="likewise (k)")
    add("--metric", default=Spec.metric, help="f1, precision, recall, span_f1, unparsable, … (f1)")
    add("--model", help="combined, or the ranking of a single model (combined)")
    add("--target", help="one target, or mean (mean)")
    add("--per-target", action="store_true", help="a table for each target and one for their mean")
    add("--over", type=_words, default=Spec.over, help="what jobs of a cell may differ in: paths or last words (seed)")
    add("--best", action=argparse.BooleanOptionalAction, default=True, help="the best cells of each row in bold")
    add("--format", choices=("markdown", "csv", "latex", "all"), default="all", help="files to write (all)")
    add("--out", type=Path, metavar="FOLDER", help="where table.md, table.csv and table.tex go (DIR)")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SamError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from None


def _checked(spec: Spec, jobs: Sequence[Job]) -> Spec:
    """``spec`` with full paths, default target and model filled in, and every name known to some job."""
    known = _paths(jobs)
    if not spec.rows or not spec.columns:
        raise SamError("rows and columns need one path each at least, such as merge.name and k")
    full = {axis: axis if axis in ("target", "model") else config_path(axis, known) for axis in spec.axes}
    for axis, path in full.items():
        if path is None:
            raise SamError(f"unknown path {axis!r}; allowed: target, model, {', '.join(known)}")
    for word, given in (("target", spec.target), ("model", spec.model)):
        if given and word in spec.axes:
            raise SamError(f"--{word} {given} has no meaning where {word} is an axis; leave one of them out")
    spec = replace(
        spec,
        rows=tuple(full[axis] or axis for axis in spec.rows),
        columns=tuple(full[axis] or axis for axis in spec.columns),
        target=None if "target" in spec.axes else spec.target or MEAN,
        model=None if "model" in spec.axes else spec.model or COMBINED,
    )
    _check_known("metric", spec.metric, metric_names(jobs))
    _check_known("model", spec.model, model_names(jobs))
    _check_known("target", spec.target, [*target_names(jobs), MEAN])
    if spec.target == MEAN and not _same_targets(jobs):
        raise SamError(
            "jobs score different targets, so their means do not compare; give --target, or target as an axis"
        )
    return spec


def _paths(jobs: Sequence[Job]) -> list[str]:
    """The config paths of the finished jobs."""
    return list(dict.fromkeys(path for job in finished(jobs) for path in job.config))


def _check_known(what: str, given: str | None, allowed: Sequence[str]) -> None:
    if given is not None and given not in allowed:
        raise SamError(f"unknown {what} {given!r}; allowed: {', '.join(allowed)}")


def _same_targets(jobs: Sequence[Job]) -> bool:
    return len({frozenset(job.targets) for job in finished(jobs)}) == 1


def _targets_and_mean(jobs: Sequence[Job]) -> list[str]:
    names = target_names(jobs)
    return [*names, MEAN] if len(names) > 1 and _same_targets(jobs) else names


def _places(job: Job, spec: Spec, jobs: Sequence[Job]) -> Iterator[_Place]:
    """The cells that ``job`` belongs to; none where its value of an axis is not known (some failed jobs), or of
    another job's target."""
    targets = [spec.target] if spec.target else _targets_and_mean(jobs)
    models = [spec.model] if spec.model else model_names(jobs)
    for target, model in itertools.product(targets, models):
        values = {**job.config, "target": target, "model": model}
        if job.state == "done" and target != MEAN and target not in job.targets:
            continue
        if job.state == "done" or all(axis in values for axis in spec.axes):
            row, column = (tuple(label(values.get(axis)) for axis in axes) for axes in (spec.rows, spec.columns))
            yield _Place((row, column), job, target, model)


def _is_over(path: str, over: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in over)


def _check_cell(cell: str, jobs: Sequence[Job], spec: Spec) -> None:
    """Raise where the jobs of one cell are no repetitions of each other."""
    differing = _varying(jobs)
    others = [path for path in differing if not _is_over(path, spec.over)]
    if others:
        names = ", ".join(others)
        raise SamError(f"{len(jobs)} jobs in the cell {cell} differ in {names}; add it to --rows, --columns or --over")
    seen: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        twin = seen.setdefault(tuple(label(job.config.get(path)) for path in differing), job)
        if twin is not job:
            raise SamError(f"{twin.folder} and {job.folder} are the same job in the cell {cell}; move one of them away")


def _cell(places: Sequence[_Place], metric: str) -> Cell:
    found = [(p, score(p.job, p.target, p.model, metric)) for p in places]
    scale = 100 if metric in FRACTIONS else 1
    values = tuple(scale * value for _, value in found if value is not None)
    states = {p.job.state for p in places}
    state = "done" if values else next((s for s in ("failed", "running") if s in states), "absent")
    return Cell(values, state, any(uses_labels(p.job, p.target) for p, value in found if value is not None))


def _ordered(keys: Iterable[Key], axes: Sequence[str], jobs: Sequence[Job]) -> list[Key]:
    """Targets and models in order of appearance (mean and combined last), all else in natural order."""
    fixed = {"target": _targets_and_mean(jobs), "model": model_names(jobs)}

    def rank(key: Key) -> list[tuple[int, list[tuple[int, float, str]]]]:
        return [
            (fixed[axis].index(value), []) if axis in fixed else (0, natural_key(value))
            for axis, value in zip(axes, key, strict=True)
        ]

    return sorted(keys, key=rank)


def _caption(jobs: Sequence[Job], spec: Spec, values: int) -> str:
    """What the numbers are, and of what: one line."""
    done = finished(jobs)
    names = target_names(jobs) if spec.target in (None, MEAN) else [str(spec.target)]
    title = spec.metric.replace("_", " ").replace("f1", "F1")
    parts = [
        f"{title[0].upper()}{title[1:]}{' (%)' if spec.metric in FRACTIONS else ''}",
        "by model" if spec.model is None else f"model {spec.model}",
        _targets_text(spec, names),
        f"{_one(_sentences(job, names) for job in done)} sentences",
        *(f"{word} {_one(label(job.config.get(f'{word}.name')) for job in done)}" for word in ("base", "selector")),
        f"commit {_one(short_commit(job.git_commit) for job in done)}",
        f"result schema {SCHEMA}",
    ]
    if values > 1:
        over = [path for path in _varying(done) if _is_over(path, spec.over) and path not in spec.axes]
        parts.append(f"mean ± sample standard deviation over {', '.join(over)} (n={values})")
    return ", ".join(parts)


def _targets_text(spec: Spec, names: Sequence[str]) -> str:
    if spec.target is None:
        return "by target"
    return f"mean of {len(names)} targets ({', '.join(names)})" if len(names) > 1 else f"target {names[0]}"


def _sentences(job: Job, targets: Iterable[str]) -> int:
    return sum(job.targets[name]["combined"]["scores"]["n"] for name in targets if name in job.targets)


def _varying(jobs: Sequence[Job]) -> list[str]:
    """The config paths in which ``jobs`` differ, of those that can change a result."""
    paths = dict.fromkeys(path for job in jobs for path in job.config if path.split(".")[0] not in RIM)
    return [path for path in paths if len({label(job.config.get(path)) for job in jobs}) > 1]


def _one(values: Iterable[object]) -> str:
    """The only one of ``values``, or ``several``."""
    distinct = {str(value) for value in values}
    return distinct.pop() if len(distinct) == 1 else "several"


if __name__ == "__main__":
    raise SystemExit(main())
