"""Guesses ahead: copies of the sentence, what followed in other answers, how sure each kind of guess is."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from sam.decoding.drafts import Drafter, Language, Memory

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
    assert guess(Drafter(), words, known, 0.0) == f" {{}}{STOP}"


def test_how_sure_a_guess_is_depends_on_its_kind(words: Words) -> None:
    drafter = Drafter()
    for _ in range(10):  # words are copied to their end, but names never go on
        known = memory(words, " when Ada Lovelace sang in Bonn", answer=' {"person": ["A')
        assert guess(drafter, words, known, 0.01).startswith("da Lovelace")
        drafter.learn(known, 1, [])
    known = memory(words, " if Bob Dylan sings", answer=' {"person": ["B')
    assert guess(drafter, words, known, 0.5) == "ob"


def test_an_earlier_answer_and_the_prompt_are_told_apart(words: Words) -> None:
    drafter = Drafter()
    for _ in range(10):
        known = memory(words, " Ada Bonn", earlier=" Carl went Carl", answer=" Carl")
        assert guess(drafter, words, known, 0.01).startswith(" went")
        drafter.learn(known, 0, [])
    assert guess(drafter, words, memory(words, " Ada Bonn", earlier=" Carl went Carl", answer=" Carl"), 0.5) == ""
    assert guess(drafter, words, memory(words, " Ada Bonn sings", answer=" Ada"), 0.5) == " Bonn"


def test_syntax_of_other_answers_is_guessed_after_one_token(words: Words) -> None:
    drafter = Drafter()
    for name in ("Ada", "Bob", "Carl"):
        known = memory(words, "", answer=f" {name}")
        known.sources = []
        drafter.learn(known, 0, words.ids(f'", "{name}'))
    known = memory(words, "", answer=' Eve",')
    assert guess(drafter, words, known, 0.5) == ' "'
    assert guess(Drafter(), words, known, 0.5) == ""
