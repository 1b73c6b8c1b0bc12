"""What a run is given of its task; named entity recognition is the one in :mod:`sam.ner.task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sam.generation.api import Request
from sam.types import Pair, Prediction, Sentence

Rule = Callable[[Sequence[Prediction], Sequence[int]], tuple[Pair, ...]]
"""``rule(predictions, sizes)``: the combined pairs; ``sizes`` are the numbers of experts in the models."""


class Scores(Protocol):
    """The scores of one model on the sentences of a target."""

    @property
    def f1(self) -> float:
        """From 0 to 1."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``precision``, ``recall``, ``f1``, ``span_f1`` and what else the task counts."""
        ...


@dataclass(frozen=True)
class Task:
    """From sentences to requests, and from completions to scored predictions.

    ``version``: of the prompt, part of each completion's key and each expert's card.
    ``request(types, text, constrained)``: what a model is asked about a text.
    ``parse(text, completion, types, truncated)``: the prediction that a completion holds.
    ``combine(predictions, text, rule, types, sizes)``: one prediction of several models' on one text.
    ``score(sentences, predictions)``: against the sentences' gold.
    """

    version: str
    request: Callable[[Sequence[str], str, bool], Request]
    parse: Callable[[str, str, Sequence[str], bool], Prediction]
    combine: Callable[[Sequence[Prediction], str, Rule, Sequence[str], Sequence[int]], Prediction]
    score: Callable[[Sequence[Sentence], Sequence[Prediction]], Scores]
