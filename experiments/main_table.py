"""The paper's main comparison from a sweep of ``experiment=main_table``.

``python -m experiments.main_table outputs/sweeps/main_table --out experiments/results/main_table`` writes the table as
Markdown, CSV, LaTeX and JSON, what was selected, and the predictions without the corpora's text.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import lzma
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import bootstrap
from experiments.bootstrap import Interval
from experiments.collect import MEAN, Job, read_predictions
from experiments.comparison import (
    BASELINE,
    FAULTS,
    METHOD,
    NAMES,
    RATIOS,
    Comparison,
    Row,
    compare,
    kind_of,
    training_of,
)
from experiments.render import escape, markdown_table, records_csv
from sam.errors import SamError
from sam.ner.alignment import align
from sam.results import write_json, write_text

PAIRS = (
    *(("sam", "none"), ("unified", "none"), ("unified_small", "none"), ("mean", "none")),
    *(("all", "mean"), ("random", "domain"), ("random", "sampling"), ("random", "all"), ("oracle", "random")),
    *(("sam", "unified_small"), ("sam", "domain"), ("sam", "sampling"), ("sam", "random"), ("sam", "random_pair")),
    ("sam", "each"),
    *(("random_pair", "random"), ("random_pair", "each"), ("all_each, vote", "sam")),
)
"""Kinds of rows whose differences say what merging, the selection and the union are worth."""


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
    head = ["P", "R", "F1", "span F1", *(f"{fault} %" for fault in FAULTS), "seconds"]
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
    base = comparison.jobs[0].config.get("base.name")
    count = len({run[0] for row in rows for run in row.runs})
    trainings = "one training of each model, whose spread they do not hold," if count == 1 else f"{count} trainings"
    parts = [
        f"F1 (%) over (type, text) pairs, zero-shot, base {base}; sentences: {sizes}. "
        f"In brackets 95 % bootstrap intervals over sentences, trainings and seeds ({bootstrap.ROUNDS} resamples; "
        f"{trainings} and few seeds understate their spread). † chose by gold labels: for reference, "
        "no method, and no upper bound. "
        f"Commit {', '.join(comparison.commits)}.",
        markdown_table(["system", *targets], first),
        "Means over the targets; silent: sentences with mentions in which nothing was found; seconds of merging and "
        "generating for a target, all models of the system, without those of the selection.",
        markdown_table(["system", *head], second),
        "Recall (%) of all pairs whose types have a name that the sources have too, and of the others.",
        markdown_table(["system", *_sizes(comparison)], [[_name(r), *_recalls(comparison, r)] for r in rows]),
        "F1 minus that of the unified model, mean over the targets: in points, and in % of the unified model's.",
        markdown_table(["system", "points", "%"], third),
        *_pairs(comparison),
        f"{METHOD} minus the unified model, by target.",
        markdown_table([METHOD, *targets], fourth),
        "Published zero-shot F1, by models of other sizes that were trained on other data: to place the numbers, not "
        "to compare with.",
        _published_table(targets),
    ]
    return "\n\n".join(parts) + "\n"


def _pairs(comparison: Comparison) -> list[str]:
    """The table of PAIRS that are there, with what it says."""
    kinds = {row.kind: row for row in comparison.rows.values()}
    found = [(kinds[a], kinds[b]) for a, b in PAIRS if {a, b} <= set(kinds)]
    lines = [[f"{_name(a)} minus {_name(b)}", _percent(comparison.against(a, b, MEAN)[0])] for a, b in found]
    said = "F1 of one system minus that of another, mean over the targets, in points."
    return [said, markdown_table(["systems", "points"], lines)] if lines else []


def _sizes(comparison: Comparison) -> list[str]:
    """The heads of the columns by types' names, with how many gold pairs there are."""
    unified = comparison.rows[BASELINE]
    gold = {n: sum(unified.at(t).mean(f"gold {n}") for t in comparison.targets) for n in NAMES}
    return [f"{name} ({count:,.0f} pairs)" for name, count in gold.items()]


def _recalls(comparison: Comparison, row: Row) -> list[str]:
    found = [comparison.recall(row, name) for name in NAMES]
    return ["–" if math.isnan(value) else f"{100 * value:.1f}" for value in found]


def _published_table(targets: Sequence[str]) -> str:
    columns = ["model", "size", *targets, "source"]
    return markdown_table(columns, [[line.get(column) or "–" for column in columns] for line in published()])


def _pooled(comparison: Comparison, row: Row) -> list[str]:
    figures = {name: comparison.figure(row, MEAN, name) for name in (*RATIOS, *FAULTS, "seconds")}
    f1 = comparison.f1(row, MEAN).value
    shown = [
        figures["precision"],
        figures["recall"],
        f1,
        figures["span_f1"],
        *(figures[fault] for fault in FAULTS),
    ]
    return [
        *(f"{100 * value:.1f}" for value in shown),
        "–" if math.isnan(figures["seconds"]) else f"{figures['seconds']:.0f}",
    ]


def _name(row: Row) -> str:
    return f"{row.label} †" if row.gold else row.label


def _percent(found: Interval, spread: bool = True) -> str:
    if math.isnan(found.value):
        return "–"
    text = f"{100 * found.value:.1f}"
    return f"{text} [{100 * found.low:.1f}, {100 * found.high:.1f}]" if spread and not math.isnan(found.low) else text


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
                    **{n: comparison.figure(row, target, n) for n in ("span_f1", *FAULTS, "seconds")},
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
    """A job's predictions without the corpus's text: a pair is ``[type, start, end]`` of its first occurrence.

    Where the sentence does not hold it, it is ``[type, hash]``: even such text can be most of a sentence, altered.
    """
    for line in read_predictions(job):
        text = line["text"]
        models = {name: {"pairs": [_place(text, *p) for p in m["pairs"]]} for name, m in line["models"].items()}
        combined = [_place(text, *pair) for pair in line["combined"]["pairs"]]
        yield {"target": line["target"], "id": line["id"], "models": models, "combined": combined}


def _place(text: str, name: str, surface: str) -> list[Any]:
    found = align(text, [(name, surface)])
    if found:
        return [name, found[0].start, found[0].end]
    return [name, hashlib.sha256(surface.encode()).hexdigest()[:16]]


def selections(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """What each job selected on each target: a row a model."""
    for job in comparison.jobs:
        for target, result in job.targets.items():
            for model, selection in result["selections"].items():
                details = selection.get("details") or {}
                yield {
                    "job": job.folder.name,
                    "target": target,
                    "model": model,
                    "experts": "+".join(selection["experts"]),
                    "scores": "; ".join(f"{name} {s:.3f}" for name, s in (selection.get("scores") or {}).items()),
                    "ranked_by": details.get("by", ""),
                    "pseudo_labels": details.get("pseudo_labels", ""),
                }


def write(folder: Path, out: Path) -> Comparison:
    """Make all files of the comparison of ``folder`` in ``out``."""
    comparison = compare(folder)
    found = records(comparison)
    rows = [{k: f"{v:.6f}" if isinstance(v, float) else v for k, v in record.items()} for record in found]
    write_text(out / "main_table.csv", records_csv(rows))
    write_text(out / "selections.csv", records_csv(list(selections(comparison))))
    write_text(out / "main_table.md", markdown(comparison))
    write_text(out / "main_table.tex", latex(comparison))
    files: dict[bytes, str] = {}  # a system that no seed changes is kept once
    (out / "predictions").mkdir(parents=True, exist_ok=True)
    for old in (out / "predictions").glob("*.jsonl.xz"):
        old.unlink()
    kept = []
    trainings = sorted({training_of(job) for job in comparison.jobs})
    for job in comparison.jobs:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in textless(job)).encode()
        if text not in files:
            files[text] = f"predictions/{job.folder.name}.jsonl.xz"
            (out / files[text]).write_bytes(lzma.compress(text))
        said = {"job": job.folder.name, "system": kind_of(job), "seed": int(job.config["seed"])}
        said["training"] = trainings.index(training_of(job))
        kept.append({**said, "file": files[text]})
    head = {"commits": comparison.commits, "sentences": comparison.sentences, "rounds": bootstrap.ROUNDS}
    head["predictions"] = kept
    write_json(out / "main_table.json", {**head, "records": [{k: _plain(v) for k, v in r.items()} for r in found]})
    return comparison


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 6)


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
