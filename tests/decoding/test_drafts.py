"""Guesses ahead: copies of the sentence, what followed in other answers, how sure each kind of guess is."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from sam.decoding.drafts import COPIED, Drafter, Language, Memory

STOP = "<stop>"


class Words:
    """A tokenizer of words, each with the space before it; without one, a word falls into its first letter and the
    rest."""

    def __init__(self) -> None:
        self.pieces = [STOP]

    def ids(self, text: str) -> list[int]:
        found = re.findall(rf"{STOP}|▁\w+|(?<![\w▁])\w|\w+|▁?[^\w▁<]+", text.replace(" ", "▁"))
        self.pieces += [piece for piece in dict.fromkeys(found) if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in found]

    def __call__(self, text: list[str], add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=[self.ids(one) for one in text])

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None


@pytest.fixture
def words() -> Words:
    return Words()


def memory(words: Words, text: str, earlier: str = "", answer: str = "") -> Memory:
    """Of the prompt ``text``, whose answer has come as far as ``answer``."""
    found = Memory(Language(words, [0]), text, words.ids(text), words.ids(earlier))
    for token in words.ids(answer):
        found.append(token)
    return found


def guess(drafter: Drafter, words: Words, known: Memory, least: float, room: int = 20) -> str:
    return "".join(words.pieces[token] for token in drafter.guess(known, room, least)).replace("▁", " ")


def test_the_tokenizer_of_these_tests(words: Words) -> None:
    pieces = [words.pieces[token] for token in words.ids(' Ada sang "Ada", I<stop>')]
    assert pieces == ["▁Ada", "▁sang", '▁"', "A", "da", '",', "▁I", STOP]


def test_a_word_is_guessed_as_it_is_written_after_a_quote(words: Words) -> None:
    known = memory(words, " when Ada Lovelace sang in Bonn", answer=' {"person": ["A')
    assert guess(Drafter(), words, known, 0.1) == "da Lovelace sang"
    assert guess(Drafter(), words, known, 0.3) == "da"
    assert guess(Drafter(), words, known, 0.1, room=1) == "da"


def test_nothing_is_guessed_past_the_end_of_an_answer(words: Words) -> None:
    known = memory(words, " Ada sang", earlier=" {}<stop> Ada {}")
    assert guess(Drafter(), words, known, 0.01) == f" {{}}{STOP}"


def test_a_word_that_the_copy_cuts_is_not_guessed(words: Words) -> None:
    known = memory(words, " Bo " + "x" * COPIED, answer=' "Bo')
    assert guess(Drafter(), words, known, 0.01) == ""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(" so Ada", " sang", id="more tokens match"),
        pytest.param(" x Carl", " went", id="from an earlier answer"),
        pytest.param(" Eve left x Eve", " left", id="from this answer"),
        pytest.param(' "A', "da", id="inside a word"),
        pytest.param(" x in", " Bonn", id="a capital"),
    ],
)
def test_a_kind_of_guess_that_was_wrong_says_nothing_of_others(words: Words, answer: str, expected: str) -> None:
    drafter = Drafter()

    def known(answer: str) -> Memory:
        return memory(words, " so Ada sang in Bonn", earlier=" Carl went", answer=answer)

    for _ in range(10):
        wrong = known(" x Ada")
        assert guess(drafter, words, wrong, 0.01, room=1) == " sang"
        drafter.learn(wrong, 0, [])
    assert guess(drafter, words, known(" x Ada"), 0.45) == ""
    assert guess(drafter, words, known(answer), 0.45, room=1) == expected


def test_syntax_of_other_answers_is_guessed_from_the_surest_context(words: Words) -> None:
    drafter = Drafter()
    for name in ("Ada", "Bob", "Carl"):
        known = memory(words, "", answer=f" {name}")
        known.sources = []
        drafter.learn(known, 0, words.ids(f'", "{name}'))
    for seen in ("Eve", "Carl"):  # one comma of three tells more than the one after Carl
        known = memory(words, "", answer=f' {seen}",')
        assert guess(drafter, words, known, 0.6, room=1) == ' "'
        assert guess(Drafter(), words, known, 0.6) == ""
