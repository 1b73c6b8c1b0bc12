"""The paper's main comparison from a sweep of ``experiment=main_table``.

``python -m experiments.main_table outputs/sweeps/main_table --out experiments/results/main_table`` writes the table as
Markdown, CSV, LaTeX and JSON, and the predictions without the corpora's text.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import lzma
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import bootstrap
from experiments.bootstrap import Counts, Interval
from experiments.collect import MEAN, Job, finished, load_jobs, target_names
from experiments.render import escape
from sam.errors import SamError
from sam.prompts import fold
from sam.results import PREDICTIONS, write_json, write_text

BASELINE, METHOD = "unified", "SaM"
MEAN_EXPERT, BEST_EXPERT = "experts, mean", "experts, best"
RATIOS = ("precision", "recall", "span_f1")
LABELS = {
    "unified_small": "unified, one expert's budget",
    "each": "experts, union of all",
    "all": "all merged",
    "random": "random",
    "domain": "SaM, domain only",
    "sampling": "SaM, sampling only",
    "sam": METHOD,
    "sameco": "SaMeco",
    "oracle": "top k by gold F1",
}
ORDER = ("unified", "unified_small", "expert", "mean", "best", "each", "random", "all", "domain", "sampling", "sam")


@dataclass
class Outcome:
    """One system on one target: ``counts`` of each seed's run, and its figures, means over seeds."""

    counts: list[Counts] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, counts: Counts, figures: Mapping[str, float]) -> None:
        """One seed's run."""
        self.counts.append(counts)
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def mean(self, figure: str) -> float:
        """Mean over seeds; NaN where it was not measured."""
        values = self.figures.get(figure, [])
        return statistics.fmean(values) if values else float("nan")


@dataclass
class Row:
    """One system: its outcomes by target. ``gold`` marks those that looked at gold labels."""

    label: str
    kind: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    gold: bool = False

    def at(self, target: str) -> Outcome:
        """Its outcome on ``target``, empty at first."""
        return self.outcomes.setdefault(target, Outcome())


@dataclass
class Comparison:
    """All rows, with the targets and the resamples that they share."""

    rows: dict[str, Row]
    targets: list[str]
    sentences: dict[str, list[str]]
    commits: set[str]
    configs: list[dict[str, Any]]

    def f1(self, row: Row, target: str) -> Interval:
        """F1 (0 to 1) of a row on a target, or its mean over targets, with its interval."""
        return bootstrap.interval(self._value(row, target), self._replicates(row, target))

    def against(self, row: Row, other: Row, target: str) -> tuple[Interval, Interval]:
        """F1 of ``row`` minus that of ``other``, and as a share of ``other``'s, each with its paired interval."""
        ours, theirs = self._value(row, target), self._value(other, target)
        a, b = self._replicates(row, target), self._replicates(other, target)
        share = np.divide(a - b, b, out=np.full_like(a, np.nan), where=b > 0)
        relative = bootstrap.interval((ours - theirs) / theirs if theirs else float("nan"), share)
        return bootstrap.interval(ours - theirs, a - b), relative

    def figure(self, row: Row, target: str, name: str) -> float:
        """Any other figure of a row, for ``mean`` the unweighted mean over targets."""
        names = self.targets if target == MEAN else [target]
        return statistics.fmean(row.at(t).mean(name) for t in names)

    def _value(self, row: Row, target: str) -> float:
        names = self.targets if target == MEAN else [target]
        return statistics.fmean(bootstrap.f1(c) for t in names for c in row.at(t).counts)

    def _replicates(self, row: Row, target: str) -> Any:
        if target == MEAN:
            return bootstrap.mean([self._replicates(row, t) for t in self.targets])
        weights = bootstrap.resamples(len(self.sentences[target]), target)
        return bootstrap.mean([bootstrap.f1_of(c, weights) for c in row.at(target).counts])


def compare(folder: Path) -> Comparison:
    """Read a sweep of ``experiment=main_table``. Raises SamError for unfinished jobs or jobs of other sentences."""
    jobs = load_jobs(folder)
    done = finished(jobs)
    if len(done) < len(jobs):
        left = next(job for job in jobs if job.state != "done")
        raise SamError(f"{left.folder} is {left.state}; run the sweep's command again until all jobs are done")
    comparison = Comparison({}, target_names(done), {}, {job.git_commit for job in done}, [j.config for j in done])
    for job in done:
        _read(job, comparison, _seconds(done))
    for needed in (BASELINE, METHOD):
        if needed not in comparison.rows:
            raise SamError(f"{folder} has no job of {needed}; it is made by `python run.py experiment=main_table`")
    _add_expert_rows(comparison)
    comparison.rows = dict(sorted(comparison.rows.items(), key=lambda item: _rank(item[1])))
    return comparison


def _rank(row: Row) -> tuple[int, int]:
    return (ORDER.index(row.kind) if row.kind in ORDER else len(ORDER), int(row.gold))


def _seconds(jobs: Sequence[Job]) -> dict[tuple[str, str], float]:
    """Of each model on each target, the seconds of its answers: from the job that decoded most, scaled to all."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for job in jobs:
        for target, result in job.targets.items():
            for model in result["models"].values():
                key = (target, model["model_key"])
                found = (model["decoded"], model["seconds"])
                best[key] = max(best.get(key, (0.0, 0.0)), found)
    return {key: seconds / share for key, (share, seconds) in best.items() if share > 0}


def _read(job: Job, comparison: Comparison, seconds: Mapping[tuple[str, str], float]) -> None:
    """Add a job's systems to the rows: its combination, and for the selector ``each`` every expert too."""
    selector, rows = str(job.config["selector.name"]), list(_predictions(job))
    for target, result in job.targets.items():
        lines = [line for line in rows if line["target"] == target]
        ids = [line["id"] for line in lines]
        if comparison.sentences.setdefault(target, ids) != ids:
            raise SamError(f"{job.folder} scored other sentences of {target}; all rows need the same")
        costs = {name: seconds.get((target, m["model_key"]), float("nan")) for name, m in result["models"].items()}
        if selector == "each":
            for name, model in result["models"].items():
                figures = _figures(model["scores"], costs[name])
                _row(comparison, f"expert {name}", "expert").at(target).add(_counts(lines, name), figures)
        if selector == "named":
            label = "+".join(next(iter(result["models"].values()))["experts"])
            row = _row(comparison, LABELS.get(label, label), label)
        else:
            many = f" {job.config['k']}" if selector == "random" else ""
            row = _row(comparison, LABELS.get(selector, selector) + many, selector)
        row.gold = result["labels_used_for_selection"]
        row.at(target).add(_counts(lines, None), _figures(result["combined"]["scores"], sum(costs.values())))


def _row(comparison: Comparison, label: str, kind: str) -> Row:
    return comparison.rows.setdefault(label, Row(label, kind))


def _figures(scores: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {
        **{name: scores[name] for name in RATIOS},
        "unparsable": scores["unparsable"] / scores["n"],
        "hallucinated": scores["not_in_sentence"] / scores["predicted"] if scores["predicted"] else 0.0,
        "seconds": seconds,
    }


def _predictions(job: Job) -> Iterator[dict[str, Any]]:
    with (job.folder / PREDICTIONS).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _counts(lines: Sequence[Mapping[str, Any]], model: str | None) -> Counts:
    """Counts of one model, or of the combination (``model`` None), as :mod:`sam.scoring` counts pairs."""
    found = []
    for line in lines:
        gold = {(name, fold(line["text"][start:end])) for name, start, end in line["gold"]}
        holder = line["combined"] if model is None else line["models"][model]
        predicted = {tuple(pair) for pair in holder["pairs"]}
        found.append((len(gold & predicted), len(predicted), len(gold)))
    return np.array(found, dtype=np.float64).T


def _add_expert_rows(comparison: Comparison) -> None:
    """The experts' mean, and on each target the one with the best gold F1."""
    experts = [row for row in comparison.rows.values() if row.kind == "expert"]
    if not experts:
        return
    mean, best = Row(MEAN_EXPERT, "mean"), Row(BEST_EXPERT, "best", gold=True)
    for target in comparison.targets:
        for row in experts:
            mean.at(target).counts += row.at(target).counts
            for name, values in row.at(target).figures.items():
                mean.at(target).figures.setdefault(name, []).extend(values)
        best.outcomes[target] = max(experts, key=lambda r: bootstrap.f1(r.at(target).counts[0])).at(target)
    comparison.rows |= {mean.label: mean, best.label: best}


def published() -> list[dict[str, str]]:
    """Published zero-shot results on the same targets, with the model's size and the source."""
    with (Path(__file__).parent / "published.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(comparison: Comparison) -> str:
    """All tables, as Markdown."""
    targets = [*comparison.targets, MEAN]
    rows = list(comparison.rows.values())
    unified, ours = comparison.rows[BASELINE], comparison.rows[METHOD]
    sizes = ", ".join(f"{t} {len(comparison.sentences[t])}" for t in comparison.targets)
    first = [[_name(r), *(_percent(comparison.f1(r, t), t == MEAN) for t in targets)] for r in rows]
    head = ["P", "R", "F1", "span F1", "unparsable %", "hallucinated %", "seconds"]
    second = [[_name(r), *_pooled(comparison, r)] for r in rows]
    third = []
    for row in rows:
        if row is not unified:
            absolute, relative = comparison.against(row, unified, MEAN)
            third.append([_name(row), _percent(absolute), _percent(relative)])
    fourth = [["absolute"], ["relative %"]]
    for target in targets:
        for line, part in zip(fourth, comparison.against(ours, unified, target), strict=True):
            line.append(_percent(part))
    parts = [
        f"F1 (%) over (type, text) pairs, zero-shot, base {_base(comparison)}; sentences: {sizes}. In brackets 95 % "
        f"bootstrap intervals over sentences ({bootstrap.ROUNDS} resamples); † looked at gold labels: a bound, no "
        f"method. Commit {', '.join(sorted(comparison.commits))}.",
        _table(["system", *targets], first),
        "Means over the targets; seconds of merging and decoding a target, all models of the system, where it was "
        "decoded (beside the answers of its siblings, which make it cheaper).",
        _table(["system", *head], second),
        "F1 minus that of the unified model, mean over the targets: in points, and in % of the unified model's.",
        _table(["system", "points", "%"], third),
        f"{METHOD} minus the unified model, by target.",
        _table([METHOD, *targets], fourth),
        "Published zero-shot F1, by models of other sizes that were trained on other data: to place the numbers, not "
        "to compare with.",
        _published_table(targets),
    ]
    return "\n\n".join(parts) + "\n"


def _published_table(targets: Sequence[str]) -> str:
    columns = ["model", "size", *targets, "source"]
    return _table(columns, [[line.get(column) or "–" for column in columns] for line in published()])


def _base(comparison: Comparison) -> str:
    return str(comparison.configs[0].get("base.name"))


def _pooled(comparison: Comparison, row: Row) -> list[str]:
    figures = {name: comparison.figure(row, MEAN, name) for name in (*RATIOS, "unparsable", "hallucinated", "seconds")}
    f1 = comparison.f1(row, MEAN).value
    shown = [
        figures["precision"],
        figures["recall"],
        f1,
        figures["span_f1"],
        figures["unparsable"],
        figures["hallucinated"],
    ]
    return [
        *(f"{100 * value:.1f}" for value in shown),
        f"{figures['seconds']:.0f}" if figures["seconds"] == figures["seconds"] else "–",
    ]


def _name(row: Row) -> str:
    return f"{row.label} †" if row.gold else row.label


def _percent(found: Interval, spread: bool = True) -> str:
    text = f"{100 * found.value:.1f}"
    return f"{text} [{100 * found.low:.1f}, {100 * found.high:.1f}]" if spread else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def latex(comparison: Comparison) -> str:
    """F1 by target with the mean's interval, as a booktabs table."""
    targets = [*comparison.targets, MEAN]
    body = [[_name(r), *(_percent(comparison.f1(r, t), t == MEAN) for t in targets)] for r in comparison.rows.values()]
    lines = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * len(targets)}}}",
        r"\toprule",
        " & ".join(map(escape, ["system", *targets])) + r" \\",
        r"\midrule",
        *(" & ".join(map(escape, row)) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """A record a system and target (``mean`` too): fractions from 0 to 1, seconds."""
    found = []
    unified = comparison.rows[BASELINE]
    for row in comparison.rows.values():
        for target in [*comparison.targets, MEAN]:
            f1 = comparison.f1(row, target)
            absolute, relative = comparison.against(row, unified, target)
            found.append(
                {
                    "system": row.label,
                    "target": target,
                    "uses_gold": row.gold,
                    "n": sum(len(comparison.sentences[t]) for t in comparison.targets if target in (t, MEAN)),
                    **{name: comparison.figure(row, target, name) for name in ("precision", "recall")},
                    "f1": f1.value,
                    "f1_low": f1.low,
                    "f1_high": f1.high,
                    **{
                        n: comparison.figure(row, target, n)
                        for n in ("span_f1", "unparsable", "hallucinated", "seconds")
                    },
                    "minus_unified": absolute.value,
                    "minus_unified_low": absolute.low,
                    "minus_unified_high": absolute.high,
                    "relative": relative.value,
                    "relative_low": relative.low,
                    "relative_high": relative.high,
                }
            )
    return found


def textless(job: Job) -> Iterator[dict[str, Any]]:
    """A job's predictions without the corpus's text: a pair is ``[type, start, end]`` of its first occurrence, or
    ``[type, text]`` where the sentence does not hold it."""
    for line in _predictions(job):
        text = line["text"]
        models = {name: {"pairs": [_place(text, *p) for p in m["pairs"]]} for name, m in line["models"].items()}
        combined = [_place(text, *pair) for pair in line["combined"]["pairs"]]
        yield {"target": line["target"], "id": line["id"], "models": models, "combined": combined}


def _place(text: str, name: str, surface: str) -> list[Any]:
    start = text.find(surface)
    return [name, surface] if start < 0 else [name, start, start + len(surface)]


def write(folder: Path, out: Path) -> Comparison:
    """Make all files of the comparison of ``folder`` in ``out``."""
    comparison = compare(folder)
    found = records(comparison)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in record.items()} for record in found)
    write_text(out / "main_table.csv", buffer.getvalue())
    write_text(out / "main_table.md", markdown(comparison))
    write_text(out / "main_table.tex", latex(comparison))
    head = {"commits": sorted(comparison.commits), "sentences": comparison.sentences, "rounds": bootstrap.ROUNDS}
    write_json(out / "main_table.json", {**head, "records": [{k: _plain(v) for k, v in r.items()} for r in found]})
    for job in finished(load_jobs(folder)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in textless(job))
        target = out / "predictions" / f"{job.folder.name}.jsonl.xz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(lzma.compress(text.encode("utf-8")))
    return comparison


def _plain(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) and value == value else None if value != value else value


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.main_table", description=__doc__)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    parser.add_argument("--out", type=Path, help="write all files there; default: print the Markdown")
    args = parser.parse_args(argv)
    try:
        if args.out:
            write(args.folder, args.out)
            print(args.out / "main_table.md")
        else:
            print(markdown(compare(args.folder)))
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
