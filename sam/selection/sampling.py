"""Sampling evaluation: experts ranked against the majority vote of all on a few unlabelled sentences.

Source: the paper, section 3.2 (10 sampled instances, ensemble pseudo-labels, F1 of each expert against them).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from sam.ner import Pair, Prediction
from sam.ner.scoring import pair_f1
from sam.seeding import rng
from sam.selection.types import Ranking

log = logging.getLogger(__name__)

Ask = Callable[[str, Sequence[str]], list[Prediction]]
"""``ask(expert, texts)``: what one expert finds in each text."""


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

    A pair is a pseudo-label if more than half of the experts answered it. Where no pair of any sentence is, experts
    are ranked by their mean pairwise F1 with the others, and ``details["by"]`` says so. Equal experts are in an order
    drawn by ``seeds``; with a warning where all are 0.
    """
    sample = [texts[i] for i in ids]
    pairs = {name: [frozenset(p.pairs) for p in ask(name, sample)] for name in names}
    votes = [Counter(pair for name in names for pair in pairs[name][row]) for row in range(len(sample))]
    pseudo = [frozenset(p for p, n in count.items() if 2 * n > len(names)) for count in votes]
    found = any(pseudo)
    scores = {n: pair_f1(pseudo, pairs[n]) for n in names} if found else agreement(pairs)
    if len(names) > 1 and not any(scores.values()):
        log.warning(
            "sampling: no two of %s agree on a mention in the %d sampled sentences, so their order says nothing; "
            "raise sample_size",
            ", ".join(names),
            len(sample),
        )
    details = {
        "by": "f1 against majority pseudo-labels" if found else "mean pairwise agreement (no mention has a majority)",
        "sampled": list(ids),
        "votes": [[[*pair, n] for pair, n in sorted(c.items(), key=lambda i: (-i[1], i[0]))] for c in votes],
        "pseudo_labels": sum(map(len, pseudo)),
    }
    return Ranking.by({name: round(score, 6) for name, score in scores.items()}, details, seeds)


def agreement(pairs: Mapping[str, Sequence[frozenset[Pair]]]) -> dict[str, float]:
    """Each expert's mean F1 with each other one (0 for a single expert)."""
    sums = dict.fromkeys(pairs, 0.0)
    for a, b in combinations(pairs, 2):
        f1 = pair_f1(pairs[a], pairs[b])
        sums[a] += f1
        sums[b] += f1
    return {name: total / max(1, len(pairs) - 1) for name, total in sums.items()}
