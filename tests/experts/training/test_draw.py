"""Which sentences are drawn for training, and which types they are asked for in vain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sam import data as corpora
from sam.errors import SamError
from sam.experts.training.draw import SCIENTIFIC, draw_open, draw_sentences, foreign_types
from sam.experts.training.recipe import OPEN
from sam.types import Sentence
from tests.tiny import one_line
from tests.toy_training import opened_toys, recipe, toy, use_sized, use_toys


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    use_sized(monkeypatch)


def anything(sentence: Sentence, types: Sequence[str]) -> bool:
    return True


def counts(drawn: dict[str, tuple[list[Sentence], list[str]]]) -> dict[str, int]:
    return {name: len(sentences) for name, (sentences, _) in drawn.items()}


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (30, {"large": 10, "small": 10, "middle": 10}),
        (31, {"large": 11, "small": 10, "middle": 10}),
        (90, {"large": 40, "small": 10, "middle": 40}),  # small lacks 20: the others share them
        (150, {"large": 90, "small": 10, "middle": 50}),
        (500, {"large": 200, "small": 10, "middle": 50}),
    ],
)
def test_equal_shares_and_what_one_lacks_the_others_fill(budget: int, expected: dict[str, int]) -> None:
    drawn = draw_sentences(["large", "small", "middle"], recipe(sentences=budget), anything)
    assert counts(drawn) == expected
    assert list(drawn) == ["large", "small", "middle"]
    assert all(types == ["location", "person"] for _, types in drawn.values())


@pytest.mark.usefixtures("sized")
def test_draw_is_by_the_seed_alone() -> None:
    def ids(seed: int, *datasets: str) -> list[str]:
        drawn = draw_sentences(datasets, recipe(sentences=20, seed=seed), anything)
        return [s.id for s in drawn["large"][0]]

    assert ids(1, "large") == ids(1, "large") != ids(2, "large")
    assert ids(1, "large", "middle") == ids(1, "middle", "large") == ids(1, "large")[:10]
    assert len(set(ids(1, "large"))) == 20


@pytest.mark.usefixtures("sized")
def test_refused_sentences_are_not_drawn_and_too_few_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    drawn = draw_sentences(["small"], recipe(sentences=8), lambda s, types: int(s.id[-1]) % 2 == 0)
    assert {int(s.id[-1]) % 2 for s in drawn["small"][0]} == {0} and counts(drawn) == {"small": 5}
    assert "only 5 of 8 sentences could be drawn" in caplog.text


def test_repeated_texts_are_drawn_once_and_few_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(dataset: str, split: str) -> list[Sentence]:
        full = toy(dataset, split, 30)
        empty = [Sentence(f"empty/{i}", f"nothing {i}", ()) for i in range(60)]
        return [*full, *(replace(s, id=f"again/{s.id}") for s in full), *empty]

    use_toys(monkeypatch, load)
    drawn = draw_sentences(["x"], recipe(sentences=30, max_empty=0.2), anything)["x"][0]
    assert len({s.text for s in drawn}) == len(drawn) == 30
    assert sum(not s.mentions for s in drawn) == 6  # 0.2 of 30
    # A share that the dataset does not fill: the empty ones are a fifth of what it has.
    short = draw_sentences(["x"], recipe(sentences=300, max_empty=0.2), anything)["x"][0]
    assert (len(short), sum(not s.mentions for s in short)) == (37, 7)
    assert not [s for s in draw_sentences(["x"], recipe(sentences=30, max_empty=0), anything)["x"][0] if not s.mentions]


SOURCES = [name for name in corpora.datasets() if corpora.spec(name).role == "source"]


@pytest.mark.parametrize("dataset", SOURCES)
def test_foreign_types_contradict_no_source_of_a_domain(dataset: str) -> None:
    """Types of the other side of everyday and scientific text, that no dataset of its own side marks."""
    foreign = set(foreign_types(dataset))
    domain = corpora.spec(dataset).domain
    for other in SOURCES:
        if corpora.spec(other).domain == domain:
            assert not foreign & set(corpora.spec(other).types)
    general = {"person", "location", "date", "city"}
    assert foreign >= (general if domain in SCIENTIFIC else {"gene or protein", "chemical", "material"})
    assert not foreign & ({"organization"} | (set() if domain in SCIENTIFIC else general))
    assert not foreign & {"restaurant name", "political party", "astronomical object"}  # of targets alone


def test_fewer_open_sentences_are_among_more_and_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch, opened_toys)

    def ids(n: int, seed: int = 0) -> list[str]:
        return [s.id for s in draw_open(recipe(open_sentences=n, seed=seed), lambda s, types: not s.id.endswith("/3"))]

    assert ids(0) == [] and ids(4) == ids(9)[:4] and ids(9) != ids(9, seed=1)
    assert f"{OPEN}/train/3" not in ids(11) and len(set(ids(11))) == 11
    with pytest.raises(SamError) as error:
        ids(12)
    assert one_line(error) == "train.open_sentences=12: open_types has 11 that fit; ask for fewer"
