"""Combine several models' predictions on one sentence into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sam.errors import SamError
from sam.ner.alignment import locate
from sam.task import Rule
from sam.types import Pair, Prediction

NEEDED = 2
"""The votes that a pair needs under the rule ``vote``."""


def union(predictions: Sequence[Prediction], voices: Sequence[int]) -> tuple[Pair, ...]:
    """The SaM paper's: the pairs of the first model, then what each further one adds."""
    return tuple(dict.fromkeys(pair for prediction in predictions for pair in prediction.pairs))


def intersection(predictions: Sequence[Prediction], voices: Sequence[int]) -> tuple[Pair, ...]:
    """The pairs that all models predict."""
    common = set.intersection(*(set(prediction.pairs) for prediction in predictions))
    return tuple(pair for pair in dict.fromkeys(predictions[0].pairs) if pair in common)


def vote(predictions: Sequence[Prediction], voices: Sequence[int]) -> tuple[Pair, ...]:
    """The pairs with at least :data:`NEEDED` votes; a merged model votes for each of its experts."""
    heard: Counter[Pair] = Counter()
    for prediction, count in zip(predictions, voices, strict=True):
        heard.update(dict.fromkeys(prediction.pairs, count))
    needed = min(NEEDED, sum(voices))
    return tuple(pair for pair in union(predictions, voices) if heard[pair] >= needed)


def combine(
    predictions: Sequence[Prediction],
    text: str,
    rule: Rule,
    types: Sequence[str],
    voices: Sequence[int] | None = None,
) -> Prediction:
    """One prediction out of several models' ``predictions`` on the sentence ``text``, asked for ``types``.

    ``rule`` chooses the (type, text) pairs; ``voices`` is the number of experts per model, by default 1. The spans and
    counts are then made anew from the combined pairs: longest text first, and a text that two models give two types
    keeps both pairs while its span goes to the type of the model listed first.
    ``unparsable`` means that all completions were, ``truncated`` that any was; ``completion`` is empty.

    Raises SamError for no predictions, and for a rule that returns something else.
    """
    if not predictions:
        raise SamError("no predictions to combine: give those of at least one model")
    pairs = rule(predictions, [1] * len(predictions) if voices is None else voices)
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        shown = getattr(rule, "shown", "the rule")
        raise SamError(f"combine: {shown} returned {pairs!r}; it must return a list of (type, text) pairs")
    mentions, not_in_sentence, not_asked = locate(pairs, text, types)
    return Prediction(
        pairs=tuple(pairs),
        mentions=mentions,
        completion="",
        unparsable=all(prediction.unparsable for prediction in predictions),
        truncated=any(prediction.truncated for prediction in predictions),
        not_in_sentence=not_in_sentence,
        not_asked=not_asked,
    )
