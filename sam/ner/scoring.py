"""Precision, recall and F1 of predictions: over sets of (type, text) pairs, and over strict spans.

Pairs are what the field's generative NER papers score: micro over the distinct pairs of each sentence. Unlike UniNER
and GNER, case and punctuation count; unlike GoLLIE, pairs that are not in the sentence or not of a type asked for stay
in and are false positives; unlike InstructUIE, an empty prediction for an empty sentence is no true positive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sam.errors import SamError
from sam.ner.prompts import normalised
from sam.types import Mention, Pair, Prediction, Sentence


@dataclass(frozen=True)
class Scores:
    """The scores of one model, or of a combination, on the sentences of a target.

    ``gold``, ``predicted``, ``tp`` count (type, text) pairs, distinct in their sentence; ``precision``, ``recall``,
    ``f1`` are micro over them, fractions from 0 to 1, 0.0 where undefined. ``span_*`` are over aligned spans; there
    ``nested_gold`` gold mentions were left out because they overlap a longer one. ``per_type`` has the six pair figures
    of each type, gold or predicted. ``unparsable`` and ``truncated`` count completions, ``not_in_sentence`` and
    ``not_asked`` predicted pairs.
    """

    n: int
    gold: int
    predicted: int
    tp: int
    precision: float
    recall: float
    f1: float
    span_precision: float
    span_recall: float
    span_f1: float
    nested_gold: int
    per_type: dict[str, dict[str, float]]
    unparsable: int
    truncated: int
    not_in_sentence: int
    not_asked: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def score(sentences: Sequence[Sentence], predictions: Sequence[Prediction]) -> Scores:
    """Score ``predictions[i]`` against the gold mentions of ``sentences[i]``.

    Raises SamError if the two differ in length, if a sentence has no gold (``mentions`` is None) or a gold mention
    that covers no text of its sentence, or if the spans of a prediction overlap.
    """
    if len(sentences) != len(predictions):
        raise SamError(
            f"{len(predictions)} predictions for {len(sentences)} sentences: give one for each, in the same order"
        )
    for sentence in sentences:
        _check_gold(sentence)
    gold = [gold_pairs(sentence) for sentence in sentences]
    predicted = [set(prediction.pairs) for prediction in predictions]
    gold_by_type, predicted_by_type, tp_by_type = _count(gold), _count(predicted), _count(_both(gold, predicted))
    return Scores(
        n=len(sentences),
        **_figures(gold_by_type.total(), predicted_by_type.total(), tp_by_type.total()),
        **_span_scores(sentences, predictions),
        per_type={
            entity_type: _figures(gold_by_type[entity_type], predicted_by_type[entity_type], tp_by_type[entity_type])
            for entity_type in sorted(gold_by_type | predicted_by_type)
        },
        unparsable=sum(prediction.unparsable for prediction in predictions),
        truncated=sum(prediction.truncated for prediction in predictions),
        not_in_sentence=sum(prediction.not_in_sentence for prediction in predictions),
        not_asked=sum(prediction.not_asked for prediction in predictions),
    )


def gold_pairs(sentence: Sentence) -> set[Pair]:
    """The distinct gold pairs of ``sentence``, their texts as they are compared with predicted ones."""
    return {(entity_type, normalised(text)) for entity_type, text in sentence.pairs}


def _check_gold(sentence: Sentence) -> None:
    if sentence.mentions is None:
        raise SamError(f"sentence {sentence.id!r} has no gold mentions: score labelled sentences only")
    for mention in sentence.mentions:
        if mention.start < 0 or mention.end > len(sentence.text) or not sentence.surface(mention).strip():
            raise SamError(
                f"gold mention {mention.start}:{mention.end} of sentence {sentence.id!r} covers no text of it "
                f"({len(sentence.text)} characters): mend its offsets"
            )


def _both(gold: Sequence[Collection[Pair]], predicted: Sequence[Collection[Pair]]) -> list[set[Pair]]:
    """The true positives of each sentence."""
    return [set(g) & set(p) for g, p in zip(gold, predicted, strict=True)]


def _count(pairs: Sequence[Collection[Pair]]) -> Counter[str]:
    """How many pairs each type has, over all sentences."""
    return Counter(entity_type for sentence_pairs in pairs for entity_type, _ in sentence_pairs)


def _figures(gold: int, predicted: int, tp: int) -> dict[str, Any]:
    return {
        "gold": gold,
        "predicted": predicted,
        "tp": tp,
        "precision": tp / predicted if predicted else 0.0,
        "recall": tp / gold if gold else 0.0,
        "f1": 2 * tp / (gold + predicted) if gold + predicted else 0.0,
    }


def _span_scores(sentences: Sequence[Sentence], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Strict span precision, recall and F1 by seqeval, and the number of gold mentions left out as nested."""
    gold_tags: list[list[str]] = []
    predicted_tags: list[list[str]] = []
    numbers: dict[str, int] = {}  # seqeval strips hyphens off a type's ends, so it gets numbers instead
    nested = 0
    for sentence, prediction in zip(sentences, predictions, strict=True):
        gold, predicted = flatten(sentence.mentions or ()), flatten(prediction.mentions)
        if len(predicted) < len(set(prediction.mentions)):
            raise SamError(
                f"predicted spans of sentence {sentence.id!r} overlap: make them with sam.ner.alignment.align"
            )
        nested += len(set(sentence.mentions or ())) - len(gold)
        borders = _borders(gold + predicted)
        gold_tags.append(_bio(gold, borders, numbers))
        predicted_tags.append(_bio(predicted, borders, numbers))
    precision, recall, f1 = _seqeval(gold_tags, predicted_tags)
    return {"span_precision": precision, "span_recall": recall, "span_f1": f1, "nested_gold": nested}


def flatten(mentions: Collection[Mention]) -> list[Mention]:
    """The mentions without overlaps, sorted by start: longest first, then the leftmost, then by type."""
    kept: list[Mention] = []
    for mention in sorted(set(mentions), key=lambda m: (m.start - m.end, m.start, m.type)):
        if all(mention.end <= other.start or other.end <= mention.start for other in kept):
            kept.append(mention)
    return sorted(kept)


def _borders(mentions: Collection[Mention]) -> dict[int, int]:
    """Each character offset at which a mention starts or ends, numbered from left to right.

    A sentence is cut there, rather than at tokens, as a predicted text can start and end anywhere.
    """
    offsets = sorted({offset for mention in mentions for offset in (mention.start, mention.end)})
    return {offset: number for number, offset in enumerate(offsets)}


def _bio(mentions: Collection[Mention], borders: dict[int, int], numbers: dict[str, int]) -> list[str]:
    """The IOB2 tag of each segment between two borders; adds the types that it meets to ``numbers``."""
    tags = ["O"] * max(len(borders) - 1, 0)
    for mention in mentions:
        number = numbers.setdefault(mention.type, len(numbers))
        first, last = borders[mention.start], borders[mention.end]
        tags[first:last] = [f"B-{number}"] + [f"I-{number}"] * (last - first - 1)
    return tags


def _seqeval(gold: list[list[str]], predicted: list[list[str]]) -> tuple[float, float, float]:
    """Micro (precision, recall, F1) of the tag sequences, as by seqeval's ``mode="strict", scheme=IOB2``."""
    if not any(gold) and not any(predicted):  # no mention anywhere: seqeval cannot take this
        return 0.0, 0.0, 0.0
    from seqeval.metrics import v1
    from seqeval.scheme import IOB2

    # v1 is what mode="strict" runs; called by its name it gives the three in one pass.
    precision, recall, f1, _ = v1.precision_recall_fscore_support(
        gold, predicted, average="micro", scheme=IOB2, zero_division=0
    )
    return float(precision), float(recall), float(f1)
