"""The decoding benchmark's arithmetic; no timing."""

from __future__ import annotations

import pytest

from experiments.bench.decode import REFERENCE, agreement, sample
from sam.generation import Completion
from sam.types import Mention, Sentence

ASKED = [(("person",), Sentence(str(n), "Ada sang.", (Mention(0, 3, "person"),))) for n in range(4)]


def test_without_the_corpora_the_sentences_are_the_mini_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_MIRROR", "/nowhere")
    asked, source = sample(20)
    assert source == "mini benchmark" and len(asked) == 20
    assert len({types for types, _ in asked}) > 5


def test_agreement_is_with_the_reference() -> None:
    right, wrong = Completion(' {" Ada":" person"}'), Completion(" {}")
    notes = agreement({"other": [right, right, wrong, wrong], REFERENCE: [right] * 4}, ASKED)
    assert notes["other"] == f"50.0 % of completions as {REFERENCE}, F1 66.7 (-33.3, -100.0 to +0.0)"
    assert notes[REFERENCE] == f"100.0 % of completions as {REFERENCE}, F1 100.0"


def test_differences_in_f1_are_paired() -> None:
    """Completions that score alike differ by nothing, whatever sentences are drawn."""
    one, other, none = (Completion(text) for text in (' {" Ada":" person"}', '{"Ada": "person"}', " {}"))
    notes = agreement({"other": [other, none] * 2, REFERENCE: [one, none] * 2}, ASKED)
    assert notes["other"] == f"50.0 % of completions as {REFERENCE}, F1 66.7 (+0.0, +0.0 to +0.0)"
