"""How near the type names of each target are to those in training: ``python -m experiments.overlap --out FOLDER``.

Zero-shot scores rise with such overlap (Golde et al., Familiarity, arXiv 2412.10121). For every target, over its gold
pairs: the share whose type name stands in training, and the mean over pairs of the largest cosine similarity of the
name with any in training, by the sentence encoder; for the source datasets alone, and with the open types.
``overlap.csv`` names the nearest training type of each.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.comparison import known_types
from experiments.render import markdown_table
from sam import data as corpora
from sam.data.targets import Target, load_targets
from sam.errors import SamError
from sam.launch import compose, quiet
from sam.models.encoder import Encoder, EncoderSpec
from sam.results import write_text


def training_names() -> dict[str, list[str]]:
    """The type names of each kind of training data, sorted."""
    opened = corpora.type_names(["open_types"])
    return {"sources": sorted(known_types()), "with open types": sorted(known_types() | opened)}


def nearest(names: Sequence[str], known: Sequence[str], encoder: Any) -> pd.DataFrame:
    """Of each of ``names`` (the index) the nearest of ``known`` by cosine: columns nearest, similarity."""
    similarity = encoder.embed(list(names)) @ encoder.embed(list(known)).T
    best = similarity.argmax(axis=1)
    values = similarity[range(len(names)), best]
    return pd.DataFrame({"nearest": [known[i] for i in best], "similarity": values}, index=pd.Index(names, name="type"))


def overlap(targets: Sequence[Target], training: dict[str, list[str]], encoder: Any) -> pd.DataFrame:
    """A row per target, its type and kind of training data: pairs, exact, nearest, similarity."""
    names = sorted({t for target in targets for t in target.types})
    near = {kind: nearest(names, known, encoder) for kind, known in training.items()}
    rows = []
    for target in targets:
        pairs = Counter(kind for s in target.scored for kind, _ in s.pairs)
        for kind, known in training.items():
            for name in target.types:
                best = near[kind].loc[name]
                rows.append(
                    {"target": target.name, "type": name, "training": kind, "pairs": pairs[name]}
                    | {"exact": name in known, "nearest": best["nearest"], "similarity": float(best["similarity"])}
                )
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per target and kind of training data, weighted by gold pairs: the exact share (%), and the mean similarity."""
    weighted = frame.assign(
        exact=100 * frame["exact"] * frame["pairs"], similarity=frame["similarity"] * frame["pairs"]
    )
    sums = weighted.groupby(["target", "training"], sort=False)[["pairs", "exact", "similarity"]].sum()
    return sums.assign(exact=sums["exact"] / sums["pairs"], similarity=sums["similarity"] / sums["pairs"])


def markdown(frame: pd.DataFrame) -> str:
    """The summary as a table: a row per target, two columns per kind of training data."""
    kinds = list(dict.fromkeys(frame["training"]))
    table = summary(frame)
    head = ["target", "pairs", *(f"{what}, {kind}" for kind in kinds for what in ("exact name %", "similarity"))]
    lines = []
    for target in dict.fromkeys(frame["target"]):
        figures = [table.loc[(target, kind)] for kind in kinds]
        cells = [cell for f in figures for cell in (f"{f['exact']:.1f}", f"{f['similarity']:.2f}")]
        lines.append([target, f"{figures[0]['pairs']:.0f}", *cells])
    return markdown_table(head, lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.overlap", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write overlap.csv and overlap.md there")
    args = parser.parse_args(argv)
    quiet()
    try:
        names = [name for name in corpora.datasets() if corpora.spec(name).role == "target"]
        config = compose(f"target=[{','.join(names)}]")
        targets = load_targets(config["target"])
        frame = overlap(targets, training_names(), Encoder(EncoderSpec.from_config(config["encoder"])))
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(frame), end="")
    if args.out:
        write_text(args.out / "overlap.csv", frame.to_csv(index=False, float_format="%.3f"))
        write_text(args.out / "overlap.md", markdown(frame))
    return 0


if __name__ == "__main__":
    sys.exit(main())
