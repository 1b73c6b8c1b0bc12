"""Every dataset's counts as read and as expected, with what was repaired or dropped.

Expected are the published counts, or those of the folds that we cut where nothing is published.

    python -m experiments.counts [--out FILE]

Needs the corpora (downloaded on first use, or from SAM_MIRROR). Exit status 1 if a count differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sam import data as corpora
from sam.errors import SamError
from sam.results import write_text

HEAD = ["dataset", "split", "sentences", "expected", "mentions", "expected", "kept sentences", "kept mentions", "note"]


def rows() -> list[list[str]]:
    """One row a dataset and split."""
    found = []
    for dataset in corpora.datasets():
        spec = corpora.spec(dataset)
        for name in spec.splits:
            split, loaded = spec.split(name), corpora.load_report(dataset, name)
            kept = sum(len(s.mentions or ()) for s in loaded.sentences)
            numbers = [
                loaded.read_sentences,
                split.sentences,
                loaded.read_mentions,
                split.mentions,
                len(loaded.sentences),
                kept,
            ]
            note = ", ".join(f"{counter} {n:,}" for counter, n in loaded.counts.items() if n)
            found.append([dataset, name, *(f"{n:,}" for n in numbers), note])
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table as Markdown; returns 1 if a count differs from the expected one."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.counts", description="Counts of every dataset beside the expected ones."
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    try:
        table = rows()
    except SamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = [f"| {' | '.join(r)} |" for r in [HEAD, ["---"] * len(HEAD), *table]]
    wrong = [f"{r[0]}/{r[1]}" for r in table if r[2] != r[3] or r[4] != r[5]]
    lines += ["", f"{len(table)} splits, {len(wrong)} with other counts than expected {' '.join(wrong)}".strip()]
    print("\n".join(lines))
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
