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
from sam.errors import SamError
from sam.experts.card import CARD_FILE, Card
from sam.experts.train import MEASURES
from sam.results import write_text

ALWAYS = ("domain", "start", "sentences", "open_sentences", "seed")
"""What every table shows of a training, beside what differs between its rows."""

UNSHOWN = ("hash", *MEASURES)


def rows(folder: Path) -> pd.DataFrame:
    """A row per expert under ``folder``, sorted by its path. Raises SamError where there is none."""
    found = [_row(path.parent, folder) for path in sorted(folder.rglob(CARD_FILE))]
    if not found:
        raise SamError(f"{folder} holds no expert; train some into it: run.py task=train task.out={folder}/NAME")
    frame = pd.DataFrame(found)
    recipe = [c for c in frame.columns if c.startswith("recipe.")]
    same = [c for c in recipe if frame[c].nunique(dropna=False) == 1 and c.removeprefix("recipe.") not in ALWAYS]
    return frame.drop(columns=same).rename(columns=lambda c: c.removeprefix("recipe."))


def _row(expert: Path, root: Path) -> dict[str, Any]:
    card = Card.read(expert)
    scores = card.scores
    measured: dict[str, Any] = {"held-out F1": scores["mean_f1"] if scores.get("datasets") else None}
    for split, found in (scores.get("open") or {}).items():
        measured |= {f"open {split} F1": found["f1"], f"open {split} unseen recall": found["unseen_recall"]}
    return {
        "training": str(expert.relative_to(root).parent if expert != root else expert.name),
        "domain": card.domain,
        "start": (card.base_fold or "none")[:8],
        **{f"recipe.{k}": v for k, v in card.recipe.items() if k not in UNSHOWN},
        "recipe.sentences": card.sentences,
        "steps": card.training["steps"],
        "minutes": round(card.training["seconds"] / 60, 1),
        **measured,
    }


def markdown(frame: pd.DataFrame) -> str:
    """The table, scores in percent."""
    scores = [c for c in frame.columns if c.endswith(("F1", "recall"))]
    shown = frame.assign(**{c: [f"{100 * v:.1f}" if pd.notna(v) else "–" for v in frame[c]] for c in scores})
    left = {"training", "domain", "start"}
    lines = [list(shown.columns), ["---" if c in left else "---:" for c in shown.columns]]
    lines += [[str(v) for v in row] for row in shown.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def curve(frame: pd.DataFrame) -> Figure:
    """F1 (%) against the number of open-type sentences, a line per held-out set; points of several seeds one each."""
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
    try:
        frame = rows(args.folder)
        frame = frame[frame["training"].str.contains(args.only, regex=False)]
        if frame.empty:
            raise SamError(f"--only={args.only} leaves no training of {args.folder}")
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(frame), end="")
    if args.out:
        write_text(args.out / "trainings.csv", frame.to_csv(index=False, float_format="%.4f"))
        write_text(args.out / "trainings.md", markdown(frame))
        if args.curve:
            curve(frame).savefig(args.out / "curve.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
