"""Figures of a sweep's scores and selections, and one sentence's predictions as HTML: what the notebook shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.collect import COMBINED, MEAN, natural_key

# Okabe and Ito's palette without yellow: told apart by colour-blind readers and on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_lines(frame: pd.DataFrame, x: str = "k", lines: str = "merge.name", metric: str = "f1") -> Figure:
    """``x`` against ``metric`` (%) of the combined prediction: a line per ``lines``, a panel per target, the mean last.

    ``frame`` is that of ``collect.score_frame``; bars are sample standard deviations where a point has several jobs.
    """
    frame = frame[frame["model"] == COMBINED]
    figure, panels = _panels(frame)
    names, ticks = _natural(frame[lines]), sorted(frame[x].unique())
    for target, axes in panels.items():
        for i, name in enumerate(names):
            part = frame[(frame["target"] == target) & (frame[lines] == name)]
            points = part.groupby(x)[metric].agg(["mean", "std"]) * 100
            places = [ticks.index(value) for value in points.index]
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 4.5,
            }
            axes.errorbar(places, points["mean"], points["std"].fillna(0), label=name, capsize=2, lw=1.6, **style)
        axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axes.margins(x=0.1)
    _finish(figure, panels, x, f"{metric.replace('f1', 'F1')} (%)")
    return figure


def plot_models(frame: pd.DataFrame) -> Figure:
    """Precision against recall (%) of each single model and of their combination: a point per job, a panel per target.

    Grey curves join points of equal F1; the large marker is the mean of a model's points.
    """
    figure, panels = _panels(frame)
    names = [*(name for name in frame["model"].unique() if name != COMBINED), COMBINED]
    limit = min(100.0, 100 * frame[["precision", "recall"]].max().max() * 1.12 + 1)
    for target, axes in panels.items():
        _equal_f1(axes, limit)
        for i, name in enumerate(names):
            part = frame[(frame["target"] == target) & (frame["model"] == name)]
            recall, precision = 100 * part["recall"], 100 * part["precision"]
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.scatter(recall, precision, s=14, alpha=0.45, linewidths=0, **style)
            axes.scatter(recall.mean(), precision.mean(), s=60, edgecolor="white", label=name, zorder=3, **style)
        steps = range(0, int(limit) + 1, 20)
        axes.set(xlim=(0, limit), ylim=(0, limit), xticks=steps, yticks=steps, aspect="equal")
    _finish(figure, panels, "recall (%)", "precision (%)")
    return figure


def plot_selected(selections: pd.DataFrame) -> Figure:
    """In how many jobs each expert was selected: a heat map of target x expert for each ranking.

    ``selections`` is the frame of ``collect.selection_frame``.
    """
    rankings = list(selections["ranking"].unique())
    experts, targets = _natural(selections["expert"]), list(selections["target"].unique())
    jobs = selections["job"].nunique()
    size = (1.2 + len(rankings) * (0.5 * len(experts) + 0.6), 1.5 + 0.42 * len(targets))
    figure, grid = plt.subplots(1, len(rankings), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, ranking in zip(grid[0], rankings, strict=True):
        part = selections[selections["ranking"] == ranking]
        counts = pd.crosstab(part["target"], part["expert"]).reindex(index=targets, columns=experts, fill_value=0)
        axes.imshow(counts, cmap="Blues", vmin=0, vmax=jobs, aspect="auto")
        for (y, x), count in np.ndenumerate(counts.to_numpy()):
            axes.text(x, y, count, ha="center", va="center", fontsize=8, color="white" if count > 0.6 * jobs else "0.2")
        axes.set_xticks(range(len(experts)), experts, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(targets)), targets)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(ranking, fontsize=10)
    figure.suptitle(f"number of jobs (of {jobs}) that selected each expert", fontsize=10)
    return figure


def telling_sentence(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first line with gold mentions whose models disagree, else the first line, None without lines."""
    for line in lines:
        if line["gold"] and len({tuple(map(tuple, model["mentions"])) for model in line["models"].values()}) > 1:
            return line
    return lines[0] if lines else None


def sentence_html(line: dict[str, Any]) -> str:
    """A line of ``predictions.jsonl`` from prompt to gold: raw answers, and mentions highlighted in the sentence."""
    found = [mentions for m in line["models"].values() for mentions in m["mentions"]]
    types = list(dict.fromkeys(mention[0] for mention in [*line["gold"], *found]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(types)}
    raw = "<pre style='white-space:pre-wrap;margin:0;text-align:left'>{}</pre>"
    rows = [("prompt", raw.format(escape(line["prompt"])))]
    for name, model in line["models"].items():
        rows.append((f"{name}: answer", raw.format(escape(model["answer"]))))
        rows.append((f"{name}: mentions", highlight(line["text"], model["mentions"], colours)))
    rows.append((COMBINED, highlight(line["text"], line["combined"]["mentions"], colours)))
    rows.append(("gold", highlight(line["text"], line["gold"], colours)))
    left = "text-align:left;vertical-align:top"
    cells = f"<tr><th style='{left};white-space:nowrap'>{{}}</th><td style='{left}'>{{}}</td></tr>"
    return f"<table>{''.join(cells.format(escape(head), body) for head, body in rows)}</table>"


def highlight(text: str, mentions: Sequence[Sequence[Any]], colours: dict[str, str]) -> str:
    """``text`` as HTML, each [type, start, end] marked in its type's colour; overlapping mentions are all named.

    ``colours`` maps types to ``#rrggbb``; a type without one is grey.
    """
    cuts = sorted({0, len(text), *(cut for _, start, end in mentions for cut in (start, end))})
    html = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        inside = [m for m in mentions if m[1] <= start and m[2] >= end]
        piece = escape(text[start:end])
        if inside:
            colour = colours.get(inside[0][0], "#888888")
            piece = f"<mark style='background:{colour}33;color:inherit;border-bottom:2px solid {colour}'>{piece}</mark>"
        labels = ", ".join(dict.fromkeys(escape(m[0]) for m in inside if m[2] == end))
        html.append(piece + (f"<sub style='color:#555'>{labels}</sub>" if labels else ""))
    return "".join(html)


def _panels(frame: pd.DataFrame) -> tuple[Figure, dict[str, Axes]]:
    """An empty panel per target, the mean last (a single target is its own mean)."""
    targets = [name for name in frame["target"].unique() if name != MEAN]
    targets += [MEAN] if len(targets) > 1 else []
    columns = min(4, len(targets))
    rows = math.ceil(len(targets) / columns)
    size = (2.5 * columns + 0.4, 2.4 * rows + 0.5)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(targets) :]:
        axes.set_visible(False)
    for axes in grid.flat[len(targets) - columns : len(targets)]:
        axes.tick_params(labelbottom=True)  # also above a hidden panel
    for axes, target in zip(grid.flat, targets, strict=False):
        axes.set_title(target, fontsize=10, fontweight="bold" if target == MEAN else "normal")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, dict(zip(targets, grid.flat, strict=False))


def _finish(figure: Figure, panels: dict[str, Axes], x: str, y: str) -> None:
    """Axis titles and one legend for all panels."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(7, len(labels)), frameon=False, fontsize=9)


def _equal_f1(axes: Axes, limit: float) -> None:
    """Faint curves of equal F1, each named at its right end."""
    for f1 in (value for value in range(20, 100, 20) if value < limit):
        recall = np.linspace(f1 / 2 + 0.1, limit, 200)
        precision = f1 * recall / (2 * recall - f1)
        inside = precision <= limit
        axes.plot(recall[inside], precision[inside], color="0.85", linewidth=0.8, zorder=0)
        axes.text(limit, precision[-1], f"{f1}", fontsize=7, color="0.6", ha="right", va="bottom")


def _natural(values: pd.Series) -> list[str]:
    return sorted(map(str, values.unique()), key=natural_key)
