"""Which sentences an expert is trained on, drawn by the recipe's seed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice

from sam import data as corpora
from sam.errors import SamError
from sam.experts.training.recipe import OPEN, Recipe
from sam.seeding import rng
from sam.types import Sentence, entity_types

log = logging.getLogger(__name__)

SCIENTIFIC = ("biomedical", "stem")
"""Domains of scientific text; all others are everyday text."""

Fits = Callable[[Sentence, Sequence[str]], bool]
"""Whether a sentence that is asked for these types may be trained on."""


def draw_sentences(datasets: Sequence[str], recipe: Recipe, fits: Fits) -> dict[str, tuple[list[Sentence], list[str]]]:
    """``recipe.sentences`` training sentences over ``datasets`` in equal shares (what one lacks, the next ones fill).

    Returns dataset -> (sentences, all its entity types).
    """
    chosen: dict[str, tuple[list[Sentence], list[str]]] = {}
    loaded = {name: corpora.load(name, "train") for name in datasets}
    left = recipe.sentences
    for done, name in enumerate(sorted(datasets, key=lambda d: (len(loaded[d]), d))):
        share = left // (len(datasets) - done)
        types = entity_types(loaded[name])
        picked = _pick(loaded[name], share, recipe, types, fits)
        chosen[name] = (picked, types)
        left -= len(picked)
    if left > 0:
        log.warning("%s: only %d of %d sentences could be drawn", datasets, recipe.sentences - left, recipe.sentences)
    return {name: chosen[name] for name in datasets}


def _pick(
    sentences: Sequence[Sentence], share: int, recipe: Recipe, types: Sequence[str], fits: Fits
) -> list[Sentence]:
    """``share`` sentences in an order drawn by the seed: each text once, at most ``max_empty`` without a mention."""
    picked: list[Sentence] = []
    seen: set[str] = set()
    empty = 0
    for index in rng(recipe.seed, "sentences").sample(range(len(sentences)), len(sentences)):
        if len(picked) >= share:
            break
        sentence = sentences[index]
        if sentence.text in seen or (not sentence.mentions and empty >= recipe.max_empty * share):
            continue
        if fits(sentence, types):
            picked.append(sentence)
            seen.add(sentence.text)
            empty += not sentence.mentions
    if len(picked) == share:
        return picked
    # The dataset has less than its share, of which so many might have been empty.
    most = int(recipe.max_empty * (len(picked) - empty) / (1 - recipe.max_empty))
    surplus = {s.id for s in [s for s in picked if not s.mentions][most:]}
    return [s for s in picked if s.id not in surplus]


def draw_open(recipe: Recipe, fits: Fits) -> list[Sentence]:
    """``recipe.open_sentences`` of the open-type sentences; with one seed, fewer are among more.

    Raises SamError if there are not so many that ``fits``.
    """
    if not recipe.open_sentences:
        return []
    sentences = corpora.load(OPEN, "train")
    order = rng(recipe.seed, "open").sample(sentences, len(sentences))
    drawn = list(islice((s for s in order if fits(s, s.types or ())), recipe.open_sentences))
    if len(drawn) < recipe.open_sentences:
        raise SamError(f"train.open_sentences={recipe.open_sentences}: {OPEN} has {len(drawn)} that fit; ask for fewer")
    return drawn


@cache
def foreign_types(dataset: str) -> list[str]:
    """Types that the sentences of ``dataset`` do not hold: those of scientific sources for a dataset of everyday text,
    and the other way round; none that a source on its own side has too. Sorted.

    Nearer domains do not serve: nobody has marked the persons of TopRes19th or the sports teams of CoNLL-2003.
    """
    sources = [s for s in map(corpora.spec, corpora.datasets()) if s.role == "source"]
    side = corpora.spec(dataset).domain in SCIENTIFIC
    own = {t for s in sources if (s.domain in SCIENTIFIC) == side for t in s.types}
    return sorted({t for s in sources for t in s.types} - own)
