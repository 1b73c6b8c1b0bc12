"""The sentences that a finished expert is scored on, and its scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam import data as corpora
from sam.experts.card import HELDOUT_CHARACTERS
from sam.experts.training.recipe import OPEN, Recipe
from sam.generation import Generator
from sam.ner import grammar, parsing
from sam.ner.scoring import Scores, score
from sam.seeding import rng
from sam.types import Sentence, entity_types

KEPT = ("n", "precision", "recall", "f1", "span_f1", "unparsable", "truncated", "not_in_sentence")
"""The scores that a card holds of each dataset."""


@dataclass(frozen=True)
class Heldout:
    """Sentences by source dataset, and open-type sentences by their held-out split."""

    datasets: Mapping[str, Sequence[Sentence]]
    opened: Mapping[str, Sequence[Sentence]]


def draw_heldout(datasets: Iterable[str], recipe: Recipe, seen: Collection[str]) -> Heldout:
    """``recipe.heldout`` sentences of each dataset, of no text that is ``seen``, and ``recipe.heldout_open`` of each
    held-out split of the open types; all of a smaller one, drawn by the seed."""
    splits = [split for split in corpora.spec(OPEN).splits if split != "train"] if recipe.heldout_open else []
    return Heldout(
        {dataset: _of_dataset(dataset, recipe, seen) for dataset in datasets},
        {split: _drawn(corpora.load(OPEN, split), recipe.heldout_open, recipe, split) for split in splits},
    )


def heldout_split(dataset: str) -> str | None:
    """The split of a source dataset that finished experts are scored on: test, else dev, else none."""
    return next((s for s in ("test", "dev") if s in corpora.spec(dataset).splits), None)


def _of_dataset(dataset: str, recipe: Recipe, seen: Collection[str]) -> list[Sentence]:
    """With and without mentions, as they come; empty for a dataset that has nothing but what is trained on."""
    split = heldout_split(dataset)
    if not recipe.heldout or split is None:
        return []
    sentences = [s for s in corpora.load(dataset, split) if len(s.text) <= HELDOUT_CHARACTERS and s.text not in seen]
    return _drawn(sentences, recipe.heldout, recipe, dataset)


def _drawn(sentences: Sequence[Sentence], n: int, recipe: Recipe, name: str) -> list[Sentence]:
    return rng(recipe.seed, "held out", name).sample(sentences, min(n, len(sentences)))


def score_heldout(heldout: Heldout, generator: Generator, constrained: bool, folder: Path) -> dict[str, Any]:
    """Scores of the adapter in ``folder``: on each dataset, asked for all its types, and their mean F1; on each split
    of the open types, each sentence asked for its own. Closes the generator."""
    from sam.merging import AdapterDeltas, Merge, linear, merge_modules

    try:
        generator.load(merge_modules([AdapterDeltas.open(folder)], [folder.name], Merge(linear)))
        datasets = {d: _on_dataset(d, held, generator, constrained) for d, held in heldout.datasets.items() if held}
        opened = {split: _on_open(held, generator, constrained) for split, held in heldout.opened.items()}
    finally:
        generator.close()
    mean = sum(d["f1"] for d in datasets.values()) / len(datasets) if datasets else 0.0
    return {"datasets": datasets, "mean_f1": mean, "open": opened}


def _on_dataset(dataset: str, sentences: Sequence[Sentence], generator: Generator, constrained: bool) -> dict[str, Any]:
    split = str(heldout_split(dataset))
    types = entity_types(corpora.load(dataset, split))
    scores = _score(sentences, [types] * len(sentences), generator, constrained)
    return {"split": split, **_kept(scores)}


def _on_open(sentences: Sequence[Sentence], generator: Generator, constrained: bool) -> dict[str, Any]:
    """Also the recall of the gold pairs whose type no training set has."""
    scores = _score(sentences, [s.types or () for s in sentences], generator, constrained)
    known = training_types()
    figures = [f for name, f in scores.per_type.items() if name not in known and f["gold"]]
    gold, tp = (int(sum(f[key] for f in figures)) for key in ("gold", "tp"))
    unseen = {"unseen_types": len(figures), "unseen_gold": gold, "unseen_recall": tp / gold if gold else 0.0}
    return _kept(scores) | unseen


def _score(
    sentences: Sequence[Sentence], asked: Sequence[Sequence[str]], generator: Generator, constrained: bool
) -> Scores:
    """The scores on ``sentences``, each asked for the types of the same place in ``asked``."""
    requests = [grammar.request(types, s.text, constrained) for types, s in zip(asked, sentences, strict=True)]
    completions = dict(generator.generate(requests))
    predicted = [
        parsing.predict(s.text, completions[i].text, types, completions[i].truncated)
        for i, (s, types) in enumerate(zip(sentences, asked, strict=True))
    ]
    return score(sentences, predicted)


def _kept(scores: Scores) -> dict[str, Any]:
    return {name: value for name, value in scores.to_dict().items() if name in KEPT}


def training_types() -> frozenset[str]:
    """The entity types of all source datasets and of all open-type sentences that experts may be trained on."""
    return corpora.type_names(d for d in corpora.datasets() if corpora.spec(d).role in ("source", "open"))
