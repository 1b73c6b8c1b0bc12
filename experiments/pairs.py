"""One selector of a main comparison against another, from its predictions as they were kept: no run is needed.

``python -m experiments.pairs experiments/results/main_table sam unified_small``; with the rule of combination where it
is not the union (``"all_each, vote"``), and ``--of FOLDER`` where the second is another comparison's, as one that was
decoded otherwise. The corpora are needed for their gold labels.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.collect import MEAN
from experiments.comparison import Comparison, Row, counts_of
from sam.data.targets import load_targets
from sam.errors import SamError
from sam.launch import compose
from sam.ner.prompts import normalised
from sam.ner.scoring import gold_pairs
from sam.types import Pair, Sentence

Gold = Mapping[str, Mapping[str, Sentence]]
"""Target -> id -> sentence."""


def kept(folder: Path, gold: Gold | None = None) -> Comparison:
    """The rows, by kind, of the predictions that are kept in ``folder``; ``gold`` as the corpora have it, if not given.

    Raises SamError for a folder without them, and for sentences that the corpora do not have.
    """
    path = folder / "main_table.json"
    if not path.is_file():
        raise SamError(f"{path} is missing; it is made by `python -m experiments.main_table SWEEP --out {folder}`")
    head = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(head.get("predictions"), list):
        raise SamError(f"{path} does not say which system its predictions are of; make it anew from its sweep")
    gold = _corpora(head["sentences"]) if gold is None else gold
    files = {file: list(_read(folder / file)) for file in {job["file"] for job in head["predictions"]}}
    rows: dict[str, Row] = {}
    for job in head["predictions"]:
        row = rows.setdefault(job["system"], Row(job["system"], job["system"]))
        run = (str(job.get("training", 0)), job["seed"])
        row.runs.append(run)
        for target, ids in head["sentences"].items():
            combined = {line["id"]: line["combined"] for line in files[job["file"]] if line["target"] == target}
            row.at(target).counts[run] = [counts_of(_pairs(gold[target][i], combined[i]) for i in ids)]
    return Comparison(rows, list(head["sentences"]), head["sentences"], [])


def _corpora(sentences: Mapping[str, Sequence[str]]) -> Gold:
    targets = load_targets(compose(f"target=[{','.join(sentences)}]")["target"])
    gold = {target.name: {s.id: s for s in target.sentences} for target in targets}
    for target, ids in sentences.items():
        if lost := [i for i in ids if i not in gold[target]]:
            raise SamError(
                f"{target} has no sentence {lost[0]}; these predictions are of another version of the corpus"
            )
    return gold


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _pairs(sentence: Sentence, places: Sequence[Sequence[Any]]) -> tuple[set[Pair], set[Any]]:
    """(gold, predicted) pairs; a hash, of what is not in the sentence, is no text and so no gold."""
    return gold_pairs(sentence), {
        (p[0], normalised(sentence.text[p[1] : p[2]])) if len(p) == 3 else tuple(p) for p in places
    }


def chosen(folders: Sequence[Path], systems: Sequence[str], gold: Gold | None = None) -> tuple[Comparison, Row, Row]:
    """The first folder's comparison, and of each folder the system's row.

    Raises SamError for a system that a folder does not have, and where the sentences differ; else as :func:`kept`.
    """
    found = {folder: kept(folder, gold) for folder in dict.fromkeys(folders)}
    rows = []
    for folder, system in zip(folders, systems, strict=True):
        if found[folder].sentences != found[folders[0]].sentences:
            raise SamError(f"{folder} and {folders[0]} hold other targets or sentences; they cannot be paired")
        if system not in found[folder].rows:
            raise SamError(f"{folder} has no {system!r}; it has {', '.join(map(repr, found[folder].rows))}")
        rows.append(found[folder].rows[system])
    return found[folders[0]], rows[0], rows[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where `python -m experiments.main_table` wrote its files")
    parser.add_argument("systems", nargs=2, metavar="SYSTEM", help="a selector, or 'selector, combination'")
    parser.add_argument("--of", type=Path, metavar="FOLDER", help="the second system's folder (the same)")
    args = parser.parse_args(argv)
    try:
        comparison, one, other = chosen((args.folder, args.of or args.folder), args.systems)
        of = f" of {args.of}" if args.of else ""
        for target in (*comparison.targets, MEAN):
            points, _ = comparison.against(one, other, target)
            values = [comparison.f1(row, target).value for row in (one, other)]
            said = f"{one.label} {100 * values[0]:.1f}, {other.label}{of} {100 * values[1]:.1f}"
            print(f"{target}: {said}; {100 * points.value:.1f} [{100 * points.low:.1f}, {100 * points.high:.1f}]")
    except (SamError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
