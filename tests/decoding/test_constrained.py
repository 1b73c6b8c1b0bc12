"""Answers held to the language: what the language is, tokens of every form of vocabulary, and decoding within it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sam import grammar, prompts
from sam.base import Base, BaseSpec
from sam.decoding import DecodeSpec
from sam.decoding.constrained import Vocabulary, Walk, _vocabulary
from sam.decoding.greedy import Answer, decode, decode_prompts, stream
from sam.decoding.packed import PackedWeights
from sam.engine import SINGLE, Engine
from sam.errors import SamError
from sam.experts.card import Pool
from sam.grammar import Answers
from sam.launch import compose
from sam.merging import AdapterDeltas, merge_modules
from sam.targets import load_targets
from tests.tiny import config, make_tokenizer

TYPES = ("person", "personal name", "place", 'a "quoted" type', "Größe")
SPEC = DecodeSpec(60, 8, "exact", constrained=True)
TEXTS = [
    "Ada Lovelace wrote the first program.",
    "x",
    'He said "C:\\temp" and "\\\\server\\x", then \\"left\\".',
    "Zürich, 東京 and São\u00a0 Paulo\n are far 🙂👩‍🚀 away.",
    "Bletchley",
    "东京都に住む",
    "a\x01b \x7f c/d",
    "Cafe\u0301 e\u0301te\u0301 naïve",
    '"',
    "In London it rains, in Londonderry it does not; IL-2 [human] {x}: a, b.",
    "",
    " \n ",
]


def accepted(automaton: Answers, answer: str) -> bool:
    """Whether the whole answer, its end included, is in the language."""
    state: Any = automaton.start
    for byte in answer.encode():
        state = automaton.step(state, byte)
        if state is None:
            return False
    return automaton.final(state)


@pytest.mark.parametrize("form", prompts.FORMS)
@pytest.mark.parametrize("target", ["ai", "literature", "music", "politics", "science", "movie", "restaurant"])
def test_gold_answers_of_the_mini_benchmark_are_in_the_language(target: str, form: str) -> None:
    (one,) = load_targets(compose(f"target=mini_{target}")["target"])
    for sentence in one.scored:
        gold = prompts.answer(sentence, one.types, form)
        automaton = Answers(one.types, sentence.text)
        assert accepted(automaton, gold), gold
        assert not any(accepted(automaton, gold[:end]) for end in range(len(gold)))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ('He said "C:\\temp" twice', ['"C:\\temp"', "C", "\\", '"', "temp", "He said"]),
        ("Zürich, 東京 and\u00a0São\n Paulo 🙂", ["Zürich", "東京", "東", "京", "São Paulo", "🙂", "and São"]),
        ("a\x01b \x7f", ["a\x01b", "\x01", "\x7f", "b"]),
        ("IL-2 [human] {x}: a, b.", ["IL-2 [human]", "IL", "2", "{x}", "b.", ": a,"]),
        ("Cafe\u0301 x", ["Cafe\u0301", "x"]),
    ],
)
def test_texts_that_are_accepted(text: str, pieces: list[str]) -> None:
    for piece in pieces:
        for types in (["place"], ["place", "person"], ["person", "place"]):
            answer = json.dumps({"place": [piece, piece]}, ensure_ascii=False)
            assert accepted(Answers(types, text), " " + answer), answer
            by_mention = f' {{{json.dumps(" " + piece, ensure_ascii=False)}:" place"}}'
            assert accepted(Answers(types, text), by_mention), by_mention


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{}",
        " {} ",
        " { }",
        " {}{}",
        ' {"person": []}',
        ' {"person": [""]}',
        ' {"person": "Ada"}',
        ' {"person": ["Ada"],}',
        ' {"person": ["Ada",]}',
        ' {"person":["Ada"]}',
        ' {"person": ["Ada"] }',
        ' {"person": ["Ada","Bath"]}',
        ' {"person": ["Ada"], "person": ["Bath"]}',
        ' {"city": ["Bath"]}',
        ' {"pers": ["Ada"]}',
        ' {"person": ["Alan"]}',
        ' {"person": ["ada"]}',
        ' {"person": ["Ad"]}',
        ' {"person": ["da"]}',
        ' {"person": ["Ada "]}',
        ' {"person": [" went"]}',
        ' {"person": ["Ada\\u0020went"]}',
        ' {"person": ["Ada went to Bath.x"]}',
        ' {"person": ["Ada"]}}',
        ' {"person": ["Ada"]',
        ' {"person": ["Ada"], "personal name": ["Ada"], }',
        ' {"person": ["Ada"], "personal name": ["Ada"], "x": ["Ada"]}',
        ' {"Ada":" person"}',
        ' {" Ada":"person"}',
        ' {" Ada": " person"}',
        ' {" Ada":" person", " Bath":" person"}',
        ' {" Ada":" person",}',
        ' {" Ada":" person","person": ["Bath"]}',
        ' {"person": ["Ada"]," Bath":" person"}',
        ' {"person": ["Ada"], " Bath":" person"}',
        ' {" Ada":[" person"]}',
        ' {" Ada":" city"}',
        ' {" Ada":" pers"}',
        ' {" Ad":" person"}',
        ' {" ":" person"}',
        ' {"  Ada":" person"}',
        ' {" Ada":" person"," Ada":" personal name"}',
        ' {" Bath":" person"," Ada":" person"}',
        ' {" Ada":" person"',
        ' {" Ada"}',
    ],
)
def test_answers_that_are_refused(answer: str) -> None:
    automaton = Answers(["person", "personal name"], "Ada went to Bath.")
    assert accepted(automaton, ' {"personal name": ["Ada"], "person": ["Bath", "Bath."]}')
    assert accepted(automaton, ' {" Ada":" personal name"," Bath.":" person"}')
    assert not accepted(automaton, answer)


def test_texts_that_are_keys_follow_one_another() -> None:
    automaton = Answers(["a", "b"], "Ada saw Ada Byron, then Ada")
    pairs = ['" Ada":" a"', '" Ada":" b"', '" Ada Byron":" a"', '" Byron":" b"', '" Ada":" a"']
    for some, inside in [
        ((0, 1, 2), False),
        ((0, 1, 3, 4), True),
        ((0, 2, 4), True),
        ((2, 3, 0), True),
        ((2, 0, 3), False),
    ]:
        assert accepted(automaton, " {" + ",".join(pairs[i] for i in some) + "}") is inside
    # The first of a text's places counts: thrice, and not a fourth time.
    assert accepted(automaton, " {" + ",".join(pairs[:1] * 3) + "}")
    assert not accepted(automaton, " {" + ",".join(pairs[:1] * 4) + "}")


@given(st.text('ab" .東', min_size=1), st.data())
def test_every_state_of_the_language_leads_to_a_whole_answer(text: str, data: st.DataObject) -> None:
    automaton = Answers(["a", "b b"], text)
    state: Any = automaton.start
    for _ in range(200):
        after = [s for byte in range(256) if (s := automaton.step(state, byte)) is not None]
        assert bool(after) is not automaton.final(state)
        if not after:
            break
        state = data.draw(st.sampled_from(after))


def test_nothing_can_be_named_without_types_or_without_words() -> None:
    for types, text in (([], "Ada"), (["person"], " \n")):
        automaton = Answers(types, text)
        assert accepted(automaton, " {}") and not accepted(automaton, ' {"person": ["Ada"]}')
        assert automaton.step(automaton.step(automaton.step(automaton.start, 32), 123), ord('"')) is None


def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary of Gemma's form: ▁ for spaces, pieces that bytes stand in for, an added token of plain text."""
    words = [
        '▁{"',
        "person",
        '":',
        '▁["',
        "▁Ada",
        "Ada",
        '"]',
        "}",
        '"',
        "]",
        "▁",
        "Z",
        "rich",
        "{",
        '▁{"person',
        "[",
        ":",
    ]
    names = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    bpe = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", unk_token="<unk>")
    made.add_tokens(["<b>"])
    return made


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
def test_pieces_are_what_the_tokenizer_decodes(make: Any) -> None:
    tokenizer = make()
    vocabulary = _vocabulary(tokenizer, (0,))
    special = {"<eos>", "<pad>", "<unk>"}
    assert {tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer)) if i not in vocabulary.pieces} <= special
    for token in vocabulary.pieces:
        assert vocabulary.text([token]) == tokenizer.decode([token])
    for text in (' {"person": ["Ada"]}', "Zürich 東京 🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert vocabulary.text(ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
@pytest.mark.parametrize("text", ["Ada Lovelace", 'Zürich "東京" 🙂', "x"])
def test_allowed_tokens_are_those_that_pass_one_by_one(make: Any, text: str) -> None:
    vocabulary = _vocabulary(make(), (0,))
    automaton = Answers(["person", "personal name"], text)
    state: Any = automaton.start
    for byte in f' {{"person": ["{text.split()[0]}"]}}'.encode():
        one_by_one = [t for t in vocabulary.pieces if vocabulary.step(automaton, state, t) is not None]
        assert vocabulary.allowed(automaton, state) == sorted(one_by_one) and one_by_one
        state = automaton.step(state, byte)
    assert vocabulary.allowed(automaton, state) == [0]


def test_a_vocabulary_of_another_form_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "Ada": 1}, unk_token="<eos>"))
    with pytest.raises(SamError, match="decode=fast"):
        _vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), (0,))


def test_a_vocabulary_that_cannot_write_the_language_is_named() -> None:
    import torch

    walk = Walk(Vocabulary({1: b"{", 2: b"x"}, [0]), Answers(["a"], "x"))
    with pytest.raises(SamError, match="no token"):
        walk.choose([], [2], torch.zeros(1, 3))


def checked(types: Sequence[str], text: str, answer: Answer) -> None:
    """A whole answer is in the language; a cut one names nothing that it must not."""
    found = prompts.predict(text, answer.text, types, answer.truncated)
    assert found.not_asked == found.not_in_sentence == 0
    if not answer.truncated:
        assert not found.unparsable and accepted(Answers(types, text), answer.text)
        assert json.loads(answer.text) is not None


@pytest.mark.parametrize("types", [TYPES, ("person",), ("person", "personal name"), ()])
def test_a_random_model_answers_in_the_language(tiny: Base, types: tuple[str, ...]) -> None:
    answers = decode(tiny, types, TEXTS, SPEC)
    for text, answer in zip(TEXTS, answers, strict=True):
        checked(types, text, answer)
    free = decode(tiny, types, TEXTS, DecodeSpec(60, 8, "exact"))
    assert not any(accepted(Answers(types, t), a.text) for t, a in zip(TEXTS, free, strict=True))
    if types:
        assert len({a.text for a in answers}) > 3 and not all(a.truncated for a in answers)


@pytest.mark.parametrize("limit", [1, 7, 60])
def test_constrained_answers_do_not_depend_on_their_batch(tiny: Base, limit: int) -> None:
    one, eight = (decode(tiny, TYPES, TEXTS, DecodeSpec(limit, size, "exact", constrained=True)) for size in (1, 8))
    assert one == eight == decode(tiny, TYPES, TEXTS[::-1], DecodeSpec(limit, 8, "exact", constrained=True))[::-1]


def test_guesses_change_no_constrained_answer(tiny: Base) -> None:
    parts = [(prompts.prefix(TYPES), prompts.suffix(text)) for text in TEXTS]
    automata = grammar.automata((TYPES, text) for text in TEXTS)
    expected = decode(tiny, TYPES, TEXTS, SPEC)
    for earlier in ([a.text for a in expected], ["nonsense"] * len(TEXTS)):
        found = dict(stream(tiny, parts, SPEC, earlier=earlier, automata=automata))
        assert [found[i] for i in range(len(parts))] == expected


def test_automata_and_the_option_go_together(tiny: Base) -> None:
    parts = [(prompts.prefix(TYPES), prompts.suffix(TEXTS[0]))]
    with pytest.raises(ValueError, match="automata"):
        decode_prompts(tiny, parts, SPEC)
    with pytest.raises(ValueError, match="automata"):
        decode_prompts(tiny, parts, DecodeSpec(), automata=grammar.automata([(TYPES, TEXTS[0])]))


def test_the_engine_constrains_and_keeps_apart(tiny_spec: BaseSpec, shared_pool: Pool) -> None:
    from sam.decoding import AnswerStore

    store = AnswerStore(None)
    free = Engine(tiny_spec, shared_pool, DecodeSpec(60, 8, "exact"), store, "cpu")
    held = Engine(tiny_spec, shared_pool, SPEC, store, "cpu")
    texts = TEXTS[:6]
    unheld = free.predict(["news"], SINGLE, TYPES, texts)
    assert not any(accepted(Answers(TYPES, t), p.answer) for t, p in zip(texts, unheld, strict=True))
    found = held.predict(["news"], SINGLE, TYPES, texts)
    assert held.counts["decoded"] == len(texts) and held.counts["reused"] == 0
    for text, prediction in zip(texts, found, strict=True):
        checked(TYPES, text, Answer(prediction.answer, prediction.truncated))
    assert held.predict(["news"], SINGLE, TYPES, texts) == found
    store.close()


def test_config_and_key() -> None:
    held, fast = (
        DecodeSpec.from_config(config("decode", "constrained")),
        DecodeSpec.from_config(config("decode", "fast")),
    )
    assert held == DecodeSpec(constrained=True) and fast == DecodeSpec()
    with_it, without = held.canonical("float32", "cpu"), fast.canonical("float32", "cpu")
    assert "constrained" not in without and with_it == {**without, "constrained": grammar.GRAMMAR_VERSION}
    with pytest.raises(SamError, match="decode.constrained=perhaps must be true or false"):
        DecodeSpec.from_config({"constrained": "perhaps"})


def test_smollm2_answers_that_are_in_the_language_stay_as_they_are(smollm: Base) -> None:
    (target,) = load_targets(compose("target=mini_science")["target"], 3)
    texts = [s.text for s in target.sentences]
    adapter = AdapterDeltas.open(Pool(compose("experts=shipped")["experts"]["path"]).folder("start"))
    with PackedWeights(smollm.model, "exact", all_logits=False) as weights:
        weights.apply(merge_modules([adapter], ["start"], SINGLE))
        free, held = (decode(smollm, target.types, texts, DecodeSpec(160, 3, "exact", c)) for c in (False, True))
    inside = [accepted(Answers(target.types, t), a.text) for t, a in zip(texts, free, strict=True)]
    assert any(inside)
    for text, before, after, same in zip(texts, free, held, inside, strict=True):
        assert before == after or not same
        checked(target.types, text, after)
