"""Sampling evaluation: experts ranked against the majority vote of all on a few unlabelled sentences.

Source: the paper, section 3.2 (10 sampled instances, ensemble pseudo-labels, F1 of each expert against them).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations

from sam.seeding import rng
from sam.selection.types import Ranking
from sam.types import Pair, Prediction

log = logging.getLogger(__name__)

BY_VOTE = "f1 against majority pseudo-labels"
BY_AGREEMENT = "mean pairwise agreement (no mention has a majority)"

Ask = Callable[[str, Sequence[str]], list[Prediction]]
"""``ask(expert, texts)``: the predictions of one expert alone."""


def draw(texts: Sequence[str], size: int, *seeds: object) -> list[int]:
    """The ids (positions in ``texts``) of at most ``size`` distinct, non-empty texts, drawn by ``seeds``, sorted."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text.strip():
            first.setdefault(text, index)
    ids = list(first.values())
    return sorted(rng("sampling", *seeds).sample(ids, min(size, len(ids))))


def rank(
    texts: Sequence[str], ids: Sequence[int], names: Sequence[str], ask: Ask, seeds: Sequence[object] = ()
) -> Ranking:
    """Rank experts ``names`` by micro-F1 of their pairs against the majority's on the sentences ``ids``.

    A pair is a pseudo-label if more than half of the experts predict it. Where no pair of any sentence is, experts
    are ranked by their mean pairwise F1 with the others, as ``details["by"]`` records. Equal experts are in an order
    drawn by ``seeds``; with a warning where all are 0.
    """
    sample = [texts[i] for i in ids]
    pairs = {name: [frozenset(p.pairs) for p in ask(name, sample)] for name in names}
    votes = [Counter(pair for name in names for pair in pairs[name][row]) for row in range(len(sample))]
    pseudo = [frozenset(p for p, n in count.items() if 2 * n > len(names)) for count in votes]
    has_majority = any(pseudo)
    scores = {n: pair_f1(pseudo, pairs[n]) for n in names} if has_majority else agreement(pairs)
    if len(names) > 1 and not any(scores.values()):
        log.warning(
            "sampling: no two of %s agree on a mention in the %d sampled sentences, so their order means nothing; "
            "raise sample_size",
            ", ".join(names),
            len(sample),
        )
    details = {
        "by": BY_VOTE if has_majority else BY_AGREEMENT,
        "sampled": list(ids),
        "votes": [[[*pair, n] for pair, n in sorted(c.items(), key=lambda i: (-i[1], i[0]))] for c in votes],
        "pseudo_labels": sum(map(len, pseudo)),
    }
    return Ranking.by({name: round(score, 6) for name, score in scores.items()}, details, seeds)


def pair_f1(gold: Sequence[Collection[Pair]], predicted: Sequence[Collection[Pair]]) -> float:
    """Micro F1 over the distinct pairs of each sentence, from 0 to 1; 0.0 if there is no pair at all."""
    tp = sum(len(set(g) & set(p)) for g, p in zip(gold, predicted, strict=True))
    total = sum(len(set(pairs)) for pairs in (*gold, *predicted))
    return 2 * tp / total if total else 0.0


def agreement(pairs: Mapping[str, Sequence[frozenset[Pair]]]) -> dict[str, float]:
    """Each expert's mean F1 with each other one (0 for a single expert)."""
    sums = dict.fromkeys(pairs, 0.0)
    for a, b in combinations(pairs, 2):
        f1 = pair_f1(pairs[a], pairs[b])
        sums[a] += f1
        sums[b] += f1
    return {name: total / max(1, len(pairs) - 1) for name, total in sums.items()}
