"""The language of constrained completions, read by the library that generators use."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam.data.targets import load_targets
from sam.launch import compose
from sam.ner import grammar, parsing, prompts

xgrammar = pytest.importorskip("xgrammar")

Accepts = Callable[[str], bool]


@lru_cache
def compiler() -> Any:
    """For a vocabulary of single bytes and an end token."""
    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)]
    info = xgrammar.TokenizerInfo([*vocabulary, "<end>"], xgrammar.VocabType.BYTE_FALLBACK, stop_token_ids=[256])
    return xgrammar.GrammarCompiler(info)


def language(types: Sequence[str], text: str) -> Accepts:
    """Whether a whole completion is in the language of ``types`` and ``text``."""
    compiled = compiler().compile_grammar(grammar.ebnf(types, text))

    def accepts(completion: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return bool(matcher.accept_string(completion) and matcher.accept_token(256))

    return accepts


@pytest.mark.parametrize("target", ["ai", "literature", "music", "politics", "science", "movie", "restaurant"])
def test_gold_of_the_mini_benchmark_is_in_the_language(target: str) -> None:
    (one,) = load_targets(compose(f"target=mini_{target}")["target"])
    for sentence in one.scored:
        gold = prompts.answer(sentence, one.types)
        accepts = language(one.types, sentence.text)
        assert accepts(gold), gold
        assert not any(accepts(gold[:end]) for end in range(len(gold)))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ('He said "C:\\temp" twice', ['"C:\\temp"', "C", "\\", '"', "temp", "He said"]),
        ("Zürich, 東京 and\u00a0São\n Paulo 🙂", ["Zürich", "東京", "東", "京", "São Paulo", "🙂", "and São"]),
        ("a\x01b \x7f", ["a", "\x01b", "\x01", "\x7f", "b"]),
        ("IL-2 [human] {x}: a, b.", ["IL-2 [human]", "IL", "2", "{x}", "b.", ": a,"]),
        ("Cafe\u0301 x", ["Cafe\u0301", "x"]),
    ],
)
def test_texts_that_are_accepted(text: str, pieces: list[str]) -> None:
    for piece in pieces:
        for types in (["place"], ["place", "person"], ["person", "place"], ['a "b"\\', "place"]):
            completion = f' {{{json.dumps(" " + piece, ensure_ascii=False)}:" place"}}'
            assert language(types, text)(completion), completion


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "{}",
        " {} ",
        " { }",
        " {}{}",
        ' {"person": ["Ada"]}',
        ' {"Ada":" person"}',
        ' {" Ada":"person"}',
        ' {" Ada": " person"}',
        ' {" Ada":" person", " Bath":" person"}',
        ' {" Ada":" person",}',
        ' {" Ada":[" person"]}',
        ' {" Ada":" city"}',
        ' {" Ada":" pers"}',
        ' {" Ad":" person"}',
        ' {" da":" person"}',
        ' {" ada":" person"}',
        ' {" Alan":" person"}',
        ' {" ":" person"}',
        ' {"  Ada":" person"}',
        ' {" Ada ":" person"}',
        ' {" Ada to":" person"}',
        ' {" Ada\\u0020went":" person"}',
        ' {" Ada":" person"," Ada":" personal name"}',
        ' {" Ada went":" person"," went":" person"}',
        ' {" Bath":" person"," Ada":" person"}',
        ' {" Ada":" person"',
        ' {" Ada"}',
    ],
)
def test_completions_that_are_refused(completion: str) -> None:
    accepts = language(["person", "personal name"], "Ada went to Bath.")
    assert accepts(' {" Ada":" personal name"," Bath.":" person"}')
    assert not accepts(completion)


def test_texts_follow_one_another() -> None:
    accepts = language(["a", "b"], "Ada saw Ada Byron, then Ada")
    pairs = ['" Ada":" a"', '" Ada":" b"', '" Ada Byron":" a"', '" Byron":" b"', '" Ada":" a"']
    for some, inside in [
        ((0, 1, 2), False),  # the second "Ada" is that of "Ada Byron"
        ((0, 1, 3, 4), True),
        ((0, 2, 4), True),
        ((2, 3, 0), False),
        ((2, 0), True),
        ((0, 0, 0), True),
        ((0, 0, 0, 0), False),
    ]:
        assert accepts(" {" + ",".join(pairs[i] for i in some) + "}") is inside, some


def test_nothing_can_be_named_without_types_or_without_words() -> None:
    for types, text in (([], "Ada"), (["person"], " \n")):
        accepts = language(types, text)
        assert accepts(" {}") and not accepts(' {" Ada":" person"}')


@settings(deadline=None, max_examples=40)
@given(st.text('aB1" .\\東é\u0301-', min_size=1, max_size=8), st.data())
def test_every_completion_parses_to_requested_types_and_texts_of_the_sentence(text: str, data: st.DataObject) -> None:
    """A random walk through the language ends, and what it has written is read without a fault."""
    types = ["a", "b b"]
    matcher = xgrammar.GrammarMatcher(compiler().compile_grammar(grammar.ebnf(types, text)))
    mask = xgrammar.allocate_token_bitmask(1, 257)
    written: list[int] = []
    for _ in itertools.count():
        matcher.fill_next_token_bitmask(mask)
        allowed = [t for t in range(257) if mask[0, t // 32] >> (t % 32) & 1]
        assert allowed
        token = data.draw(st.sampled_from(allowed))
        assert matcher.accept_token(token)
        if token == 256:
            break
        written.append(token)
    prediction = parsing.predict(text, bytes(written).decode(), types)
    faults = (prediction.unparsable, prediction.not_in_sentence, prediction.not_asked)
    assert faults == (False, 0, 0), prediction


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("Ada went.", [(False, "Ada"), (True, "went"), (False, ".")]),
        ("e\u0301te\u0301", [(False, "e\u0301te\u0301")]),
        ("東京 IL-2", [(False, "東"), (False, "京"), (True, "IL"), (False, "-"), (False, "2")]),
    ],
)
def test_pieces_by_hand(text: str, pieces: list[tuple[bool, str]]) -> None:
    assert grammar.pieces(text) == pieces
