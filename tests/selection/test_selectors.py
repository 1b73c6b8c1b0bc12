"""From rankings to selections: each selector with an encoder and answers made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam.data.targets import Target
from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.encoder import SHIPPED, Encoder, EncoderSpec
from sam.ner.task import NER
from sam.selection import Query, Selector, selectors
from sam.types import Mention, Pair, Prediction, Sentence
from tests.tiny import make_card, one_line

NAMES = ("ant", "bee", "cat", "dog")
AXES = {name: tuple(float(i == j) for j in range(4)) for i, name in enumerate(NAMES)}
ADA, BATH = ("person", "Ada"), ("place", "Bath")
GOLD = Sentence("g", "Ada in Bath", (Mention(0, 3, "person"), Mention(7, 11, "place")))
TARGET = Target("t", ("person", "place"), (GOLD,), ("first", "second"))

# In the unlabelled texts ant, bee and cat agree; in the gold sentence dog alone is right.
UNLABELLED: dict[str, list[Pair]] = {"ant": [ADA], "bee": [ADA], "cat": [ADA, BATH], "dog": []}
LABELLED: dict[str, list[Pair]] = {"ant": [], "bee": [ADA], "cat": [("place", "Ada")], "dog": [ADA, BATH]}


class FixedEncoder(Encoder):
    """Every text lies nearest to dog, then cat, bee, ant."""

    def __init__(self) -> None:
        super().__init__(EncoderSpec("minilm", "local", "nowhere", SHIPPED[1], None, None))

    def embed(self, texts: Sequence[str]) -> Any:
        return np.array([[0.1, 0.2, 0.3, 0.4]] * len(texts)) / np.sqrt(0.3)


class Unused(Encoder):
    """Fails if it is looked at."""

    def __init__(self) -> None:
        super().__init__(EncoderSpec("minilm", "local", "nowhere", SHIPPED[1], None, None))

    def embed(self, texts: Sequence[str]) -> Any:
        raise AssertionError("this selector has no use for the encoder")


def answer(expert: str, texts: Sequence[str]) -> list[Prediction]:
    """What an expert predicts in the gold sentence, and in any other text."""
    return [Prediction(tuple((LABELLED if t == GOLD.text else UNLABELLED)[expert]), (), "") for t in texts]


def silent(expert: str, texts: Sequence[str]) -> list[Prediction]:
    raise AssertionError("this selector asks no expert")


def unlabelled_only(expert: str, texts: Sequence[str]) -> list[Prediction]:
    assert set(texts) <= {"first", "second"}, "a selector that is no oracle asked about the sentences to be scored"
    return answer(expert, texts)


SELECTORS = [name for name, f in vars(selectors).items() if hasattr(f, "uses") and f.__module__ == selectors.__name__]


def selector(name: str, experts: Sequence[str] = ("ant",)) -> Selector:
    return Selector(getattr(selectors, name), {"experts": experts} if name == "named" else {})


MakeQuery = Callable[..., Query]


@pytest.fixture
def query(tmp_path: Path) -> MakeQuery:
    for name in NAMES:
        (tmp_path / name).mkdir()
        make_card(name, "f", centroid=AXES[name]).write(tmp_path / name)
    pool = Pool(tmp_path)

    def make(ask: Any = unlabelled_only, encoder: Encoder | None = None, **options: Any) -> Query:
        settings: dict[str, Any] = {"target": TARGET, "names": NAMES, "k": 2, "sample_size": 2, "seed": 0, **options}
        return Query(pool=pool, encoder=encoder or FixedEncoder(), task=NER, ask=ask, **settings)

    return make


def test_sam_makes_one_selection_a_ranking(query: MakeQuery) -> None:
    chosen = selector("sam").choose(query())
    assert list(chosen) == ["domain", "sampling"]
    assert chosen["domain"].experts == ("dog", "cat")
    assert chosen["domain"].scores == pytest.approx(
        {name: x / 0.3**0.5 for name, x in zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True)}, abs=1e-6
    )
    # ADA has 3 of 4 votes in both texts, BATH 1: ant and bee score 1, cat 4 / 6, dog 0.
    assert set(chosen["sampling"].experts) == {"ant", "bee"}
    assert chosen["sampling"].scores == pytest.approx({"ant": 1, "bee": 1, "cat": 4 / 6, "dog": 0}, abs=1e-6)
    assert chosen["sampling"].details["sampled"] == [0, 1]


def test_domain_asks_no_expert_and_sampling_needs_no_encoder(query: MakeQuery) -> None:
    assert selector("domain").choose(query(silent))["domain"].experts == ("dog", "cat")
    assert set(selector("sampling").choose(query(encoder=Unused()))["sampling"].experts) == {"ant", "bee"}


def test_equal_experts_of_the_sample_are_drawn_anew_by_each_seed(query: MakeQuery) -> None:
    first = {selector("sampling").choose(query(seed=seed, k=1))["sampling"].experts for seed in range(12)}
    assert first == {("ant",), ("bee",)}


def test_sameco_ranks_by_mean_rank_and_ties_go_to_the_domain(query: MakeQuery) -> None:
    # domain: dog cat bee ant; sampling: ant and bee share ranks 1 and 2, then cat, dog.
    chosen = selector("sameco").choose(query(k=3))["sameco"]
    assert chosen.experts == ("bee", "dog", "cat")
    assert chosen.scores == {"bee": -2.25, "dog": -2.5, "cat": -2.5, "ant": -2.75}
    liked = {"ant": [BATH], "bee": [ADA], "cat": [ADA], "dog": [ADA, BATH]}

    def ask(expert: str, texts: Sequence[str]) -> list[Prediction]:
        return [Prediction(tuple(liked[expert]), (), "") for _ in texts]

    # ADA is the pseudo-label: bee and cat 1, dog 2/3, ant 0. So bee and cat share rank 1.5.
    chosen = selector("sameco").choose(query(ask, k=4))["sameco"]
    assert chosen.experts == ("cat", "dog", "bee", "ant")
    assert chosen.scores == {"cat": -1.75, "dog": -2.0, "bee": -2.25, "ant": -4.0}
    assert chosen.details["by"] == "mean rank"
    assert set(chosen.details["domain"]) == set(chosen.details["sampling"]) == set(NAMES)


@pytest.mark.parametrize("name", ["sam", "sameco", "domain", "sampling", "random", "oracle"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_k_is_respected_without_repeats(query: MakeQuery, name: str, k: int) -> None:
    chosen = selector(name).choose(query(answer, k=k))
    assert tuple(chosen) == (("domain", "sampling") if name == "sam" else (name,))
    for selection in chosen.values():
        assert len(selection.experts) == len(set(selection.experts)) == k


def test_the_top_of_k_plus_one_begins_with_the_top_of_k(query: MakeQuery) -> None:
    for name in ("domain", "sampling", "sameco", "oracle"):
        tops = [selector(name).choose(query(answer, k=k))[name].experts for k in (1, 2, 3, 4)]
        assert [top[:i] for i, top in enumerate(tops[1:], start=1)] == tops[:-1]


def test_random_depends_on_seed_and_target_alone(query: MakeQuery) -> None:
    def drawn(seed: int, name: str = "t", names: Sequence[str] = NAMES) -> tuple[str, ...]:
        target = Target(name, TARGET.types, TARGET.sentences, ())
        return (
            selector("random").choose(query(silent, Unused(), target=target, seed=seed, names=names))["random"].experts
        )

    assert drawn(0) == drawn(0) == drawn(0, names=NAMES[::-1])
    assert len({drawn(seed) for seed in range(20)}) > 5
    assert len({drawn(0, name) for name in "abcdefghij"}) > 3


def test_a_random_pair_is_the_random_draw_and_another(query: MakeQuery) -> None:
    def drawn(seed: int, k: int = 2) -> dict[str, tuple[str, ...]]:
        chosen = selector("random_pair").choose(query(silent, Unused(), seed=seed, k=k))
        return {name: selection.experts for name, selection in chosen.items()}

    for seed in range(5):
        assert list(drawn(seed)) == ["random", "random_second"]
        assert (
            drawn(seed)["random"]
            == selector("random").choose(query(silent, Unused(), seed=seed, k=2))["random"].experts
        )
        assert all(len(set(experts)) == 3 for experts in drawn(seed, k=3).values())
    assert sum(set(a) != set(b) for a, b in (drawn(seed).values() for seed in range(20))) > 10
    assert len({drawn(seed)["random_second"] for seed in range(20)}) > 5


def test_all_and_named_take_what_they_are_given(query: MakeQuery) -> None:
    assert selector("all").choose(query(silent, Unused(), k=1))["all"].experts == NAMES
    each = selector("each").choose(query(silent, Unused(), k=1))
    assert {name: selection.experts for name, selection in each.items()} == {name: (name,) for name in NAMES}
    both = selector("all_each").choose(query(silent, Unused(), k=1))
    assert {name: s.experts for name, s in both.items()} == {"all": NAMES} | {name: (name,) for name in NAMES}
    named = selector("named", ("cat", "ant")).choose(query(silent, Unused(), k=1))
    assert named["named"].experts == ("cat", "ant")


def test_the_oracle_sees_gold_and_no_other_does(query: MakeQuery) -> None:
    chosen = selector("oracle").choose(query(answer, Unused()))["oracle"]
    # F1 on the gold sentence: dog 1, bee 2/3, ant and cat 0.
    assert chosen.experts == ("dog", "bee")
    assert chosen.scores == pytest.approx({"dog": 1, "bee": 2 / 3, "ant": 0, "cat": 0}, abs=1e-6)
    assert "gold" in chosen.details["by"]
    assert [name for name in SELECTORS if "gold" in selector(name).uses] == ["oracle"]


@pytest.mark.parametrize("name", [n for n in SELECTORS if n != "oracle"])
def test_gold_does_not_change_a_selection(query: MakeQuery, name: str) -> None:
    blind = Target("t", TARGET.types, (Sentence("g", GOLD.text),), TARGET.unlabelled)
    wrong = Target("t", TARGET.types, (Sentence("g", GOLD.text, (Mention(0, 3, "place"),)),), TARGET.unlabelled)
    chosen = [selector(name).choose(query(target=t)) for t in (TARGET, blind, wrong)]
    assert chosen[0] == chosen[1] == chosen[2]


def test_the_oracle_refuses_a_target_without_gold(query: MakeQuery) -> None:
    blind = Target("t", TARGET.types, (Sentence("g", "text"),), TARGET.unlabelled)
    with pytest.raises(SamError, match="gold labels"):
        selector("oracle").choose(query(answer, target=blind))


def test_sampling_refuses_a_target_of_blanks(query: MakeQuery) -> None:
    with pytest.raises(SamError, match="no unlabelled sentence"):
        selector("sampling").choose(query(target=Target("t", TARGET.types, TARGET.sentences, (" ",))))


def test_selections_go_into_json(query: MakeQuery) -> None:
    for name in SELECTORS:
        for selection in selector(name).choose(query(answer)).values():
            kept = json.loads(json.dumps(selection.to_dict()))
            assert kept["experts"] == list(selection.experts)
            assert kept["selector"] == selection.selector


@pytest.mark.parametrize(
    ("name", "k", "sample_size", "experts", "named"),
    [
        ("sam", 0, 2, (), ("k=0", "1..4", "ant, bee, cat, dog")),
        ("random", 5, 2, (), ("k=5", "1..4")),
        ("domain", "two", 2, (), ("k=two",)),
        ("sampling", 2, 0, (), ("sample_size=0",)),
        ("named", 2, 2, (), ("selector.experts", "ant")),
        ("named", 2, 2, ("ant", "emu"), ("'emu'", "ant, bee, cat, dog")),
    ],
)
def test_what_cannot_be_selected_is_refused(
    query: MakeQuery, name: str, k: Any, sample_size: int, experts: tuple[str, ...], named: tuple[str, ...]
) -> None:
    with pytest.raises(SamError) as error:
        selector(name, experts).check(k, sample_size, NAMES, query().pool)
    message = one_line(error)
    assert all(part in message for part in named)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selection_depends_on_nothing_but_what_its_selector_uses(query: MakeQuery, name: str) -> None:
    """What is not used is left out of a result's hash."""
    usual: dict[str, Any] = {"k": 2, "sample_size": 2, "seed": 0, "names": NAMES}
    other = {"k": 1, "sample_size": 1, "seed": 5, "names": NAMES[1:]}
    used = selector(name).uses
    unused = {option: value for option, value in other.items() if option not in used}
    encoder = FixedEncoder() if "encoder" in used else Unused()
    choose = selector(name).choose
    assert choose(query(answer, encoder, **usual)) == choose(query(answer, encoder, **usual | unused))
    for option in used & {"k", "names"}:
        changed = {**usual, option: other[option]}
        assert choose(query(answer, encoder, **usual)) != choose(query(answer, encoder, **changed)), option


def test_what_a_selector_does_not_use_is_not_checked(query: MakeQuery) -> None:
    selector("all").check(99, 0, NAMES, query().pool)
    selector("named").check(99, 0, NAMES, query().pool)
    selector("domain").check(1, 0, NAMES, query().pool)
