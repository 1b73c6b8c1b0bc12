"""Why the merged experts do or do not beat the unified model: five figures, and F1 (%) on own data as CSV.

``python -m experiments.diagnosis MAIN_TABLE.csv OWN_DATA_SWEEP --out DIR``: are the experts too weak, does merging lose
them (both on the experts' own data, a sweep of ``experiment=own_data``), is the selection wrong, does the union cost
precision, are the models silent (these on the targets, from ``experiments.main_table``)?
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.collect import COMBINED, MEAN, load_finished, score
from experiments.figures import COLOURS, MARKERS
from experiments.render import records_csv
from sam.errors import SamError
from sam.results import write_text

OWN = "the domain's own expert"
Bars = dict[str, dict[str, float]]
"""Series -> group -> F1 (%), groups in order."""


def own_data(folder: Path) -> Bars:
    """F1 (%) on each source domain's own data: of the unified model, the domain's own expert, and merges.

    Raises SamError where a job is missing or unfinished, or where two would share a bar.
    """
    found: Bars = {}
    for job in load_finished(folder):
        selector = str(job.config["selector.name"])
        for target, result in job.targets.items():
            own = selector == "each"
            experts = "+".join(next(iter(result["models"].values())).get("experts", ()))
            names = {"named": experts, "each": OWN, "all": "all merged", "oracle": "top k by gold F1 †"}
            name = names.get(selector, f"top k by {selector}")
            if target in found.get(name, {}):
                raise SamError(f"{folder} has two jobs of {name}; move one of them away")
            value = score(job, target, target if own else COMBINED, "f1")
            if value is None:
                raise SamError(
                    f"{job.folder}: the pool has no expert named {target!r}; targets are named after experts"
                )
            found.setdefault(name, {})[target] = 100 * value
    if missing := {"unified", OWN, "all merged"} - set(found):
        raise SamError(
            f"{folder} lacks {', '.join(sorted(missing))}; it is made by `python run.py experiment=own_data`"
        )
    for series in found.values():
        series[MEAN] = sum(series.values()) / len(series)
    return found


def targets_of(path: Path, metric: str = "f1") -> Bars:
    """A metric (%) of each system on each target, from the CSV of the main comparison. SamError if it is not there."""
    found: Bars = {}
    with path.open(encoding="utf-8") as file:
        for record in csv.DictReader(file):
            if metric not in record:
                raise SamError(f"{path} has no column {metric}; make it anew by `python -m experiments.main_table`")
            name = record["system"] + (" †" if record["uses_gold"] == "True" else "")
            found.setdefault(name, {})[record["target"]] = 100 * float(record[metric])
    return found


def plot_bars(
    bars: Mapping[str, Mapping[str, float]], series: Sequence[str], title: str, label: str = "F1 (%)"
) -> Figure:
    """Grouped bars: a colour a series, in the order given."""
    groups = list(bars[series[0]])
    figure, axes = plt.subplots(figsize=(1.6 + 1.15 * len(groups), 3.4), layout="constrained")
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        places = [i - 0.4 + (number + 0.5) * width for i in range(len(groups))]
        axes.bar(
            places, [bars[name][g] for g in groups], width * 0.92, label=name, color=COLOURS[number % len(COLOURS)]
        )
    axes.set_xticks(range(len(groups)), [g.removeprefix("crossner_") for g in groups])
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(4, len(series)), frameon=False, fontsize=9)
    return figure


def plot_precision_recall(
    precision: Mapping[str, Mapping[str, float]], recall: Mapping[str, Mapping[str, float]], systems: Sequence[str]
) -> Figure:
    """Recall against precision (%), a point a system and target, the mean large."""
    figure, axes = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    for number, name in enumerate(systems):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        small = [t for t in precision[name] if t != MEAN]
        axes.scatter([recall[name][t] for t in small], [precision[name][t] for t in small], s=18, alpha=0.5, **style)
        axes.scatter(recall[name][MEAN], precision[name][MEAN], s=90, edgecolor="white", label=name, zorder=3, **style)
    axes.set(xlabel="recall (%)", ylabel="precision (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw(table: Path, sources: Bars) -> dict[str, Figure]:
    """The five figures by the question that each answers; ``sources``: of :func:`own_data`."""
    targets = targets_of(table)
    merges = [name for name in ("top k by domain", "top k by gold F1 †", "all merged") if name in sources]
    picks = [
        n for n in targets if n.startswith("random") or n in ("experts, best †", "top k by gold F1 †", "all merged")
    ]
    chosen = [n for n in ("SaM, domain only", "SaM, sampling only") if n in targets]
    if "unified" not in targets or len(chosen) < 2:
        raise SamError(f"{table} lacks unified or SaM's two models; it is made by `python -m experiments.main_table`")
    systems = [n for n in ("unified", *chosen, "SaM", "SaMeco") if n in targets]
    quiet = [n for n in ("unified", "experts, mean", "all merged", "SaM", "experts, union of all") if n in targets]
    return {
        "experts": plot_bars(sources, ["unified", OWN], "Are the experts too weak? On their own data"),
        "merge": plot_bars(sources, [OWN, *merges], "Does merging lose them? On their own data († saw gold labels)"),
        "selection": plot_bars(
            targets, [*chosen, *picks], "Is the selection wrong? On the targets († saw gold labels)"
        ),
        "union": plot_precision_recall(targets_of(table, "precision"), targets_of(table, "recall"), systems),
        "silence": plot_bars(
            targets_of(table, "silent"),
            quiet,
            "Are they silent? On the targets",
            "sentences with mentions in which nothing is found (%)",
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.diagnosis", description=__doc__)
    parser.add_argument("table", type=Path, help="main_table.csv")
    parser.add_argument("own", type=Path, help="the folder of a sweep of experiment=own_data")
    parser.add_argument("--out", type=Path, required=True, help="write the figures (SVG) there")
    args = parser.parse_args(argv)
    plt.rcParams["svg.hashsalt"] = "sam"  # the same figure is the same file
    try:
        sources = own_data(args.own)
        figures = draw(args.table, sources)
    except (SamError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / f"diagnosis_{name}.svg", metadata={"Date": None})
        print(args.out / f"diagnosis_{name}.svg")
    jobs = load_finished(args.own)
    stamp = {
        "sentences a set": "+".join(sorted({str(t["n"]) for job in jobs for t in job.targets.values()})),
        "commit": "+".join(sorted({job.git_commit for job in jobs})),
    }
    lines = [
        {"F1 (%) of": name, **{source: f"{f1:.2f}" for source, f1 in row.items()}, **stamp}
        for name, row in sources.items()
    ]
    write_text(args.out / "own_data.csv", records_csv(lines))
    print(args.out / "own_data.csv")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
