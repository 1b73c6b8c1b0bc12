"""The sentences that a finished expert is scored on, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sam import data as corpora
from sam.experts.training import heldout
from sam.experts.training.heldout import Heldout, draw_heldout, score_heldout
from sam.merging import AdapterDeltas
from sam.models.base import Base
from sam.ner.prompts import answer
from sam.types import Mention, Sentence
from tests.fakes import FakeGenerator
from tests.tiny import write_adapter
from tests.toy_training import recipe, toy, use_toys


def test_heldout_sentences_come_from_dev_or_test_never_from_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(*splits: str) -> Any:
        return type("Spec", (), {"splits": dict.fromkeys(splits)})()

    few = recipe(heldout=2, heldout_open=0)
    monkeypatch.setattr(corpora, "load", lambda dataset, split: toy(dataset, split, 10))
    for splits, expected in [(("train", "dev", "test"), "test"), (("dev", "train"), "dev")]:
        monkeypatch.setattr(corpora, "spec", lambda dataset, splits=splits: spec(*splits))
        drawn = draw_heldout(["toy"], few, ()).datasets["toy"]
        assert len(drawn) == 2 and {s.id.split("/")[1] for s in drawn} == {expected}
        assert drawn == draw_heldout(["toy"], few, ()).datasets["toy"]
        again = draw_heldout(["toy"], few, {drawn[0].text}).datasets["toy"]
        assert len(again) == 2 and drawn[0] not in again
    monkeypatch.setattr(corpora, "spec", lambda dataset: spec("train"))
    assert draw_heldout(["toy"], few, ()) == Heldout({"toy": []}, {})


@pytest.fixture
def adapter(tiny: Base, tmp_path: Path) -> Path:
    """The folder of a random adapter."""
    write_adapter(tmp_path / "adapter", tiny.model, seed=0)
    return tmp_path / "adapter"


def test_scores_are_those_of_the_saved_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that name what is there score 1, and they are those of the saved weights."""
    use_toys(monkeypatch)
    sentences = toy("toy", "dev", 4)
    monkeypatch.setattr(corpora, "load", lambda dataset, split: sentences)
    types, by_text = ["location", "person"], {s.text: s for s in sentences}

    def perfect(number: int, asked: Sequence[str], text: str) -> str:
        assert list(asked) == types
        return answer(by_text[text], types)

    generator = FakeGenerator(perfect)
    scores = score_heldout(Heldout({"toy": sentences, "none": []}, {}), generator, False, adapter)
    assert scores["mean_f1"] == 1.0 and set(scores["datasets"]) == {"toy"}
    toys = scores["datasets"]["toy"]
    assert (toys["split"], toys["n"], toys["precision"], toys["recall"], toys["unparsable"]) == ("dev", 4, 1.0, 1.0, 0)
    other = FakeGenerator(perfect)
    deltas = AdapterDeltas.open(adapter)
    other.load((name, deltas.delta(name)) for name in deltas)
    assert generator.loads == other.loads != [0] and generator.closed == 1


def test_open_sentences_are_scored_on_their_own_types_and_unseen_ones_apart(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Ada keeps bees and a parrot"
    mentions = (Mention(0, 3, "person"), Mention(10, 14, "insect"), Mention(21, 27, "bird"))
    first = Sentence("a", text, mentions, ("person", "insect", "bird", "fish"))
    second = Sentence("b", "Rome again", (Mention(0, 4, "capital"),), ("capital",))
    monkeypatch.setattr(heldout, "training_types", lambda: frozenset({"person", "bird"}))

    def reply(number: int, types: Sequence[str], of: str) -> str:
        assert (of, tuple(types)) in {(first.text, first.types), (second.text, second.types)}
        return ' {" Ada":" person"," bees":" insect"," parrot":" fish"}' if of == text else " {}"

    scores = score_heldout(Heldout({}, {"dev": [first, second]}), FakeGenerator(reply), False, adapter)
    opened = scores["open"]["dev"]
    assert (opened["n"], opened["precision"], opened["recall"]) == (2, 2 / 3, 2 / 4)
    # insect and capital stand in no training set; one of their two pairs is predicted.
    assert (opened["unseen_types"], opened["unseen_gold"], opened["unseen_recall"]) == (2, 2, 0.5)
    assert scores["datasets"] == {} and scores["mean_f1"] == 0.0
