"""Batched greedy decoding against transformers' own ``generate`` on one unpadded sentence at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from sam import prompts
from sam.base import Base
from sam.decoding import DecodeSpec, greedy
from sam.decoding.greedy import Answer, decode, decode_prompts
from sam.errors import SamError

TYPES = ["person", "location"]
TEXTS = [
    "Ada Lovelace wrote the first program.",
    "x",
    "Alan Turing worked at Bletchley Park, near Milton Keynes, from 1939 until the end of the war in 1945.",
    "The court in Strasbourg held that Article 8 was violated.",
    "Aspirin",
    "A mutation in BRCA1 raises the risk of breast cancer; aspirin may lower it, but nobody knows by how much. " * 2,
    "In London it rains.",
    "A b c d e f g h i j k l m n o p.",
    "Bletchley",
    "Zürich, 東京 and São Paulo",
]


class Numbers:
    """A tokenizer whose ``decode`` gives the token ids themselves, so that answers compare token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, **options)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def numbers(base: Base, stop_ids: Sequence[int] | None = None, model: Any = None) -> Base:
    """``base`` with its answers as token ids, and other stop tokens or another model if given."""
    return dataclasses.replace(
        base,
        tokenizer=Numbers(base.tokenizer),
        stop_ids=tuple(stop_ids or base.stop_ids),
        model=base.model if model is None else model,
    )


def oracle(base: Base, text: str, limit: int, types: Sequence[str] = TYPES) -> Answer:
    """What ``generate`` gives for the whole prompt of one sentence, in one piece."""
    prompt = base.tokenizer(prompts.prefix(types), add_special_tokens=True).input_ids
    prompt = prompt + base.tokenizer(prompts.suffix(text), add_special_tokens=False).input_ids
    ids = torch.tensor([prompt])
    out = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=base.stop_ids[0],
    )
    new = out[0, len(prompt) :].tolist()
    ended = new[-1] in base.stop_ids
    return Answer(base.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True), not ended)


@pytest.fixture
def stopping(tiny: Base) -> Base:
    """The tiny base model with stop tokens at which the answers to TEXTS end after different numbers of tokens."""
    free = [list(map(int, oracle(numbers(tiny), text, 30).text.split())) for text in TEXTS[:6]]
    return numbers(tiny, stop_ids=[row[n] for row, n in zip(free, (4, 11, 20, 7, 15, 25), strict=True)])


def lengths(answers: Sequence[Answer]) -> list[int]:
    return [len(a.text.split()) for a in answers]


@pytest.mark.parametrize("size", [1, 3, 8, 32])
def test_tokens_are_those_of_generate_at_every_batch_size(stopping: Base, size: int) -> None:
    answers = decode(stopping, TYPES, TEXTS, DecodeSpec(30, size))
    assert answers == [oracle(stopping, text, 30) for text in TEXTS]
    assert len(set(lengths(answers))) > 4 and {a.truncated for a in answers} == {True, False}


def test_order_of_texts_and_company_are_irrelevant(stopping: Base) -> None:
    spec = DecodeSpec(30, 4)
    answers = dict(zip(TEXTS, decode(stopping, TYPES, TEXTS, spec), strict=True))
    assert decode(stopping, TYPES, TEXTS[::-1], spec) == [answers[t] for t in TEXTS[::-1]]
    assert decode(stopping, TYPES, TEXTS[3:6] * 3, spec) == [answers[t] for t in TEXTS[3:6]] * 3


def test_types_change_answers(stopping: Base) -> None:
    assert decode(stopping, ["court"], TEXTS, DecodeSpec(30)) == [oracle(stopping, t, 30, ["court"]) for t in TEXTS]
    assert decode(stopping, ["court"], TEXTS, DecodeSpec(30)) != decode(stopping, TYPES, TEXTS, DecodeSpec(30))


def test_text_is_decoded_without_special_tokens(tiny: Base) -> None:
    assert decode(tiny, TYPES, TEXTS[:4], DecodeSpec(20)) == [oracle(tiny, t, 20) for t in TEXTS[:4]]


def test_truncated_means_that_no_stop_token_came(tiny: Base) -> None:
    full = oracle(numbers(tiny), TEXTS[0], 8).text.split()
    last = int(full[-1])
    assert last not in map(int, full[:-1])
    base = numbers(tiny, stop_ids=[last])
    # The eighth token ends the answer: seven are too few to see it, eight suffice.
    assert decode(base, TYPES, TEXTS[:1], DecodeSpec(7)) == [Answer(" ".join(full[:7]), True)]
    assert decode(base, TYPES, TEXTS[:1], DecodeSpec(8)) == [Answer(" ".join(full[:7]), False)]


def test_an_answer_may_be_empty(tiny: Base) -> None:
    first = int(oracle(numbers(tiny), TEXTS[0], 1).text)
    assert decode(numbers(tiny, stop_ids=[first]), TYPES, TEXTS[:1], DecodeSpec(5)) == [Answer("", False)]


def test_nothing_to_decode_asks_nothing(tiny: Base) -> None:
    assert decode(dataclasses.replace(tiny, model=None), TYPES, [], DecodeSpec()) == []


def test_rows_leave_the_batch_when_they_end_and_progress_counts_them(stopping: Base) -> None:
    rows: list[int] = []
    done: list[int] = []
    hook = stopping.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        answers = decode(stopping, TYPES, TEXTS, DecodeSpec(30, 10), done.append)
    finally:
        hook.remove()
    steps = [n + (not a.truncated) for n, a in zip(lengths(answers), answers, strict=True)]
    assert rows[0] == 1  # the prefix
    assert rows[1:] == [sum(s > step for s in steps) for step in range(max(steps))]
    assert done == [10]
    decode(stopping, TYPES, TEXTS, DecodeSpec(2, 4), done.append)
    assert done == [10, 4, 4, 2]


def sliding_models(vocab: int) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    gemma = Gemma3TextConfig(**common, head_dim=16, layer_types=["sliding_attention", "full_attention"])
    return {"gemma3": Gemma3ForCausalLM(gemma).eval(), "mistral": MistralForCausalLM(MistralConfig(**common)).eval()}


@pytest.fixture(params=["gemma3", "mistral"])
def sliding(request: pytest.FixtureRequest, tiny: Base) -> Base:
    """A model with a sliding window of 8 tokens: less than the prefix holds."""
    return numbers(tiny, model=sliding_models(len(tiny.tokenizer))[request.param])


@pytest.mark.parametrize("size", [1, 8])
def test_sliding_window_answers_are_those_of_generate(sliding: Base, size: int) -> None:
    texts = [*TEXTS, "y", "Another", *TEXTS[:2]]
    assert decode(sliding, TYPES, texts, DecodeSpec(20, size)) == [oracle(sliding, t, 20) for t in texts]


def test_sliding_window_would_not_bear_padding(sliding: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "_bears_padding", lambda cache, most: True)
    assert decode(sliding, TYPES, TEXTS, DecodeSpec(20, 8)) != [oracle(sliding, t, 20) for t in TEXTS]


def test_sliding_window_that_is_never_full_is_padded(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sliding_models(len(tiny.tokenizer))["gemma3"]
    model.config.sliding_window = 1024
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 1024
    base = numbers(tiny, model=model)
    done: list[int] = []
    answers = decode(base, TYPES, TEXTS, DecodeSpec(20, 10), done.append)
    assert done == [10] and answers == [oracle(base, t, 20) for t in TEXTS]


@pytest.mark.parametrize(
    ("shapes", "padding", "expected"),
    [
        # (tokens of the suffix, number of the prefix), in the order of decoding
        ([(9, 0), (7, 0), (7, 0), (7, 0), (2, 0)], True, [[0, 1], [2, 3], [4]]),
        ([(9, 0), (7, 0), (7, 0), (7, 0), (2, 0)], False, [[0], [1, 2], [3], [4]]),
        ([(5, 1), (5, 0), (5, 1), (5, 0)], True, [[0, 1], [2, 3]]),
        ([(5, 1), (5, 0), (5, 1), (5, 0)], False, [[0, 2], [1, 3]]),
    ],
)
def test_batches_by_hand(shapes: list[tuple[int, int]], padding: bool, expected: list[list[int]]) -> None:
    rows = [greedy._Row(prefix, [0] * length) for length, prefix in shapes]
    assert list(greedy._cut(range(len(rows)), rows, 2, padding)) == expected


@pytest.mark.parametrize("size", [1, 3, 32])
def test_prompts_of_several_types_share_a_batch(stopping: Base, size: int) -> None:
    asked = [TYPES, ["court"], ["person", "location", "organization", "disease", "drug"]]
    rows = [(types, text) for text in TEXTS for types in asked]
    parts = [(prompts.prefix(types), prompts.suffix(text)) for types, text in rows]
    answers = decode_prompts(stopping, parts, DecodeSpec(30, size))
    assert answers == [oracle(stopping, text, 30, types) for types, text in rows]


def test_prompts_of_several_types_with_a_sliding_window(sliding: Base) -> None:
    rows = [(types, text) for text in TEXTS[:4] * 2 for types in (TYPES, ["court"])]
    parts = [(prompts.prefix(types), prompts.suffix(text)) for types, text in rows]
    answers = decode_prompts(sliding, parts, DecodeSpec(12, 8))
    assert answers == [oracle(sliding, text, 12, types) for types, text in rows]


def test_answers_longer_than_a_caches_spare_room(tiny: Base) -> None:
    limit = 2 * greedy._GrowingLayer.ROOM + 5
    free = [oracle(numbers(tiny), text, limit).text.split() for text in TEXTS[:3]]
    # A token that only the second row comes to, late: then its batch is cut down in the midst of a room.
    late = next(t for n, t in enumerate(free[1]) if n > 80 and t not in free[0] + free[2] + free[1][:n])
    base = numbers(tiny, stop_ids=[int(late)])
    answers = decode(base, TYPES, TEXTS[:3], DecodeSpec(limit, 3))
    assert answers == [oracle(base, text, limit) for text in TEXTS[:3]]
    assert [a.truncated for a in answers] == [True, False, True] and lengths(answers)[1] > 80


def test_smollm2_answers_are_those_of_generate_at_every_batch_size(smollm: Base) -> None:
    texts = TEXTS[:6]
    expected = [oracle(smollm, text, 24) for text in texts]
    for size in (1, 6):
        assert decode(smollm, TYPES, texts, DecodeSpec(24, size)) == expected
    assert len({a.text for a in expected}) > 3


def test_spec_from_config() -> None:
    assert DecodeSpec.from_config({"max_new_tokens": 5, "batch_size": 2}) == DecodeSpec(5, 2)
    for bad in ({"max_new_tokens": 0}, {"batch_size": -1}):
        with pytest.raises(SamError, match="must be at least 1"):
            DecodeSpec.from_config(bad)


def test_canonical_decoding_leaves_out_the_batch_size() -> None:
    one: Callable[..., dict[str, Any]] = DecodeSpec(5, 2).canonical
    assert one("float32", "cpu") == DecodeSpec(5, 9).canonical("float32", "cpu")
    others = [one("float32", "cpu"), one("bfloat16", "cpu"), one("float32", "cuda:0")]
    assert DecodeSpec(6, 2).canonical("float32", "cpu") not in others
    assert one("float32", "cuda:1") == others[2] and others[0] != others[1] != others[2] != others[0]
