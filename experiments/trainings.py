"""A table of trainings: ``python -m experiments.trainings DIR --out FOLDER``.

Reads the card of every expert under DIR, one row each: what its recipe has that others have not, and its F1 on held-out
sentences of its source datasets (mean over datasets) and of the open types (all pairs; recall of the pairs whose type
no training set has). So a pilot is a training: ``python run.py -m task=train domain=news train.lr=1e-3,2e-3
'task.out=outputs/pilots/lr=${train.lr}'``, then this. No target is touched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.figures import COLOURS, MARKERS
from experiments.render import markdown_table
from sam.errors import SamError
from sam.experts.card import CARD_FILE, Card
from sam.experts.training.recipe import MEASURES
from sam.results import write_text

ALWAYS = ("domain", "start", "sentences", "open_sentences", "seed")
"""What every table shows of a training, beside what differs between its rows."""

UNSHOWN = ("hash", *MEASURES)


def rows(folder: Path, only: str = "") -> pd.DataFrame:
    """A row per expert under ``folder`` whose path in it contains ``only``, sorted by path. Raises SamError if there is
    none. Folders whose name starts with a dot belong to trainings that have not ended."""
    cards = (path for path in folder.rglob(CARD_FILE) if "/." not in f"/{path.relative_to(folder)}")
    lines = [_row(path.parent, folder) for path in sorted(cards)]
    if not lines:
        raise SamError(f"{folder} holds no expert; train some into it: run.py task=train task.out={folder}/NAME")
    frame = pd.DataFrame([line for line in lines if only in line["training"]])
    if frame.empty:
        raise SamError(f"--only={only} leaves no training of {folder}")
    varied = [c for c in frame.columns if c.startswith("recipe.") or c.endswith("unseen pairs")]
    same = [c for c in varied if frame[c].nunique(dropna=False) == 1 and c.removeprefix("recipe.") not in ALWAYS]
    return frame.drop(columns=same).rename(columns=lambda c: c.removeprefix("recipe."))


def _row(expert: Path, root: Path) -> dict[str, Any]:
    card = Card.read(expert)
    measured: dict[str, Any] = {"held-out F1": card.scores["mean_f1"] if card.scores.get("datasets") else None}
    for split, scores in (card.scores.get("open") or {}).items():
        measured |= {f"open {split} F1": scores["f1"], f"open {split} unseen recall": scores["unseen_recall"]}
        measured[f"open {split} unseen pairs"] = scores["unseen_gold"]  # shown where rows differ, and do not compare
    return {
        "training": expert.name if expert == root else str(expert.relative_to(root)),
        "domain": card.domain,
        "start": (card.base_fold or "none")[:8],
        **{f"recipe.{k}": v for k, v in card.recipe.items() if k not in UNSHOWN},
        "recipe.sentences": card.sentences,
        "steps": card.training.get("steps"),
        "minutes": round(card.training.get("seconds", 0.0) / 60, 1),
        **measured,
    }


def markdown(frame: pd.DataFrame) -> str:
    """The table, scores in percent."""
    scores = [c for c in frame.columns if c.endswith(("F1", "recall"))]
    shown = frame.assign(**{c: [f"{100 * v:.1f}" if pd.notna(v) else "–" for v in frame[c]] for c in scores})
    counts = [c for c in frame.columns if c.endswith("pairs")]
    shown = shown.assign(**{c: [f"{v:.0f}" if pd.notna(v) else "–" for v in frame[c]] for c in counts})
    lines = [[str(v) for v in row] for row in shown.itertuples(index=False)]
    return markdown_table(list(shown.columns), lines, left=3) + "\n"


def curve(frame: pd.DataFrame) -> Figure:
    """F1 (%) against the number of open-type sentences, a line per held-out set through the means of its points."""
    if "open_sentences" not in frame:
        raise SamError("no training has open sentences; a curve needs some")
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for i, name in enumerate(c for c in frame.columns if c.endswith("F1")):
        points = frame.dropna(subset=[name]).sort_values("open_sentences")
        means = 100 * points.groupby("open_sentences")[name].mean()
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4.5}
        axes.plot(points["open_sentences"], 100 * points[name], ls="", alpha=0.4, **style)
        axes.plot(means.index, means, lw=1.6, label=name.removesuffix(" F1"), **style)
    axes.set_xlabel("open-type sentences in training")
    axes.set_ylabel("F1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Write trainings.csv, trainings.md and, with --curve, curve.svg; print the table; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.trainings", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder with experts at any depth")
    parser.add_argument("--only", default="", metavar="TEXT", help="only trainings whose path contains TEXT")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: printed only)")
    parser.add_argument("--curve", action="store_true", help="draw the scores against the number of open sentences")
    args = parser.parse_args(argv)
    if args.curve and not args.out:
        parser.error("--curve needs --out")
    try:
        frame = rows(args.folder, args.only)
        figure = curve(frame) if args.curve else None
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(frame), end="")
    if args.out:
        write_text(args.out / "trainings.csv", frame.to_csv(index=False, float_format="%.4f"))
        write_text(args.out / "trainings.md", markdown(frame))
        if figure is not None:
            figure.savefig(args.out / "curve.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
