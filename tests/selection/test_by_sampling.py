"""Sampling evaluation on predictions made by hand: which texts are drawn, votes, pseudo-labels and scores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam.selection import by_sampling as sampling
from sam.selection.by_sampling import Ask, agreement, draw, pair_f1, rank
from sam.types import Pair, Prediction

A, B, C, D = ("person", "Ada"), ("place", "Bath"), ("place", "Cork"), ("person", "Dee")


def answers(found: dict[str, list[list[Pair]]]) -> Ask:
    """``found``: expert -> the pairs of each text, in the order of the texts that it is asked about."""

    def ask(expert: str, texts: Sequence[str]) -> list[Prediction]:
        assert list(texts) == ["one", "two"]
        return [Prediction(tuple(pairs), (), "") for pairs in found[expert]]

    return ask


def test_votes_pseudo_labels_and_scores_by_hand() -> None:
    found = {"x": [[A, B], [C]], "y": [[A], [C, D]], "z": [[B], []]}
    ranking = rank(["zero", "one", "two"], [1, 2], ["x", "y", "z"], answers(found))
    # Text one: A 2 of 3, B 2 of 3; text two: C 2 of 3, D 1 of 3: the pseudo-labels are A, B and C.
    assert ranking.details["pseudo_labels"] == 3
    assert ranking.details["votes"] == [[[*A, 2], [*B, 2]], [[*C, 2], [*D, 1]]]
    assert ranking.details["sampled"] == [1, 2]
    assert ranking.details["by"] == "f1 against majority pseudo-labels"
    # x finds the 3 and no other; y finds 2 of them and one more; z finds 1.
    assert ranking.experts == ("x", "y", "z")
    assert ranking.scores == pytest.approx({"x": 1.0, "y": 4 / 6, "z": 2 / 4}, abs=1e-6)


def test_half_of_the_votes_is_no_majority() -> None:
    found = {"w": [[A], [C]], "x": [[A], [C]], "y": [[B], [C]], "z": [[B], []]}
    ranking = rank(["one", "two"], [0, 1], list(found), answers(found))
    # A and B have 2 of 4 votes; only C, with 3, is a pseudo-label.
    assert ranking.details["pseudo_labels"] == 1
    assert ranking.scores == pytest.approx({"w": 2 / 3, "x": 2 / 3, "y": 2 / 3, "z": 0.0}, abs=1e-6)
    assert set(ranking.experts[:3]) == {"w", "x", "y"}


def test_the_same_pair_in_another_text_is_another_vote() -> None:
    found = {"x": [[A], []], "y": [[], [A]], "z": [[], []]}
    ranking = rank(["one", "two"], [0, 1], list(found), answers(found))
    assert ranking.details["pseudo_labels"] == 0
    assert "no mention has a majority" in ranking.details["by"]


def test_a_pair_that_an_expert_repeats_is_one_vote() -> None:
    found = {"x": [[A, A], []], "y": [[], [C]], "z": [[], [C]]}
    ranking = rank(["one", "two"], [0, 1], list(found), answers(found))
    assert ranking.details["votes"][0] == [[*A, 1]]
    assert ranking.details["pseudo_labels"] == 1


def test_without_a_majority_experts_are_ranked_by_pairwise_agreement() -> None:
    found = {"w": [[A, B], []], "x": [[A], [D]], "y": [[C], []], "z": [[B], [C]]}
    ranking = rank(["one", "two"], [0, 1], list(found), answers(found))
    assert ranking.details["by"] == "mean pairwise agreement (no mention has a majority)"
    assert ranking.details["pseudo_labels"] == 0
    # F1 of w and x: 2 * 1 / 4; of w and z: 2 * 1 / 4; all other pairs of experts share nothing.
    assert ranking.scores == pytest.approx({"w": 1 / 3, "x": 0.5 / 3, "z": 0.5 / 3, "y": 0.0}, abs=1e-6)
    assert (ranking.experts[0], ranking.experts[3]) == ("w", "y")


def test_an_order_that_says_nothing_comes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    silent: dict[str, list[list[Pair]]] = {"x": [[A], []], "y": [[], []]}
    assert set(rank(["one", "two"], [0, 1], list(silent), answers(silent)).experts) == {"x", "y"}
    assert "no two of x, y agree on a mention in the 2 sampled sentences" in caplog.text
    caplog.clear()
    alike = {"x": [[A], []], "y": [[A], []]}
    rank(["one", "two"], [0, 1], list(alike), answers(alike))
    rank(["one", "two"], [0, 1], ["y"], answers(silent))
    assert not caplog.text


def test_agreement_by_hand_and_of_a_single_expert() -> None:
    pairs = {"x": [frozenset({A, B})], "y": [frozenset({A})], "z": [frozenset({A})]}
    two_thirds = 2 * 1 / 3
    assert agreement(pairs) == pytest.approx(
        {"x": two_thirds, "y": (two_thirds + 1) / 2, "z": (two_thirds + 1) / 2}, abs=1e-12
    )
    assert agreement({"x": [frozenset({A})]}) == {"x": 0.0}


def test_a_pool_of_one_agrees_with_itself() -> None:
    ranking = rank(["one", "two"], [0, 1], ["x"], answers({"x": [[A], []]}))
    assert ranking.scores == {"x": 1.0}


def test_experts_that_find_nothing_are_in_an_order_drawn_by_the_seeds() -> None:
    nothing = answers({"a": [[], []], "b": [[], []]})
    orders = {rank(["one", "two"], [0, 1], ["b", "a"], nothing, (seed, "t")).experts for seed in range(12)}
    assert orders == {("a", "b"), ("b", "a")}
    drawn = [rank(["one", "two"], [0, 1], names, nothing, (3, "t")) for names in (["a", "b"], ["b", "a"])]
    assert drawn[0].experts == drawn[1].experts and drawn[0].scores == {"a": 0.0, "b": 0.0}
    assert drawn[0].ranks == {"a": 1.5, "b": 1.5}


def test_blanks_and_repeated_texts_are_not_drawn() -> None:
    texts = ["one", "", "two", "one", "  \t", "three", "two"]
    assert draw(texts, 10, 0, "t") == [0, 2, 5]
    assert draw(["", " "], 3, 0, "t") == []


@given(size=st.integers(1, 12), seed=st.integers(0, 50))
def test_drawn_ids_are_distinct_sorted_and_as_many_as_there_are(size: int, seed: int) -> None:
    texts = [f"text {i}" for i in range(8)]
    ids = draw(texts, size, seed, "t")
    assert ids == sorted(set(ids))
    assert len(ids) == min(size, 8)
    assert set(ids) <= set(range(8))
    assert ids == draw(texts, size, seed, "t")


def test_drawn_ids_depend_on_seed_and_target() -> None:
    texts = [f"text {i}" for i in range(100)]
    drawn = {tuple(draw(texts, 10, seed, target)) for seed in range(5) for target in ("a", "b")}
    assert len(drawn) == 10


def test_drawn_ids_are_the_same_in_another_process() -> None:
    code = "from sam.selection.by_sampling import draw; print(draw([f't{i}' for i in range(50)], 5, 3, 'target'))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == str(sampling.draw([f"t{i}" for i in range(50)], 5, 3, "target"))


def test_pair_f1() -> None:
    gold = [[("a", "x"), ("a", "x"), ("b", "y")], [], [("a", "z")]]
    guess = [{("a", "x")}, {("b", "q")}, {("a", "z"), ("b", "z")}]
    assert pair_f1(gold, guess) == pytest.approx(2 * 2 / (3 + 4))
    assert pair_f1(guess, gold) == pair_f1(gold, guess)
    assert pair_f1([[], []], [[], []]) == 0.0
    assert pair_f1([[("a", "x")], []], [[], [("a", "x")]]) == 0.0  # a pair counts in its own sentence only
