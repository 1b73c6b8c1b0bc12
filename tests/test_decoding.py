"""Batched greedy decoding against transformers' own ``generate`` on one unpadded sentence at a time."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LagunaConfig,
    LagunaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
)

from sam import prompts
from sam.base import Base
from sam.decoding import DecodeSpec, greedy, ragged
from sam.decoding.drafts import Drafter, Memory
from sam.decoding.greedy import Answer, decode, decode_prompts, stream
from sam.decoding.packed import PackedWeights
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

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        return self._tokenizer(text, **options)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(token)

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


def oracle(
    base: Base, text: str, limit: int, types: Sequence[str] = TYPES, processor: LogitsProcessor | None = None
) -> Answer:
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
        logits_processor=[processor] if processor else [],
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


class Silent(Drafter):
    """Guesses nothing."""

    def guess(self, memory: Memory, room: int, least: float) -> list[int]:
        return []


class Fixed(Drafter):
    """Guesses what ``known`` says follows the answer so far, whatever the chance."""

    def __init__(self, known: Callable[[list[int]], list[int]]) -> None:
        super().__init__()
        self.known = known

    def guess(self, memory: Memory, room: int, least: float) -> list[int]:
        memory.sources = []
        return self.known(memory.context)[:room]


def passes(base: Base) -> AbstractContextManager[list[int]]:
    """The numbers of tokens of each forward pass inside."""

    @contextmanager
    def watch() -> Iterator[list[int]]:
        found: list[int] = []
        hook = base.model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            yield found
        finally:
            hook.remove()

    return watch()


def streamed(base: Base, spec: DecodeSpec, drafter: Drafter, texts: Sequence[str] = TEXTS) -> list[Answer]:
    parts = [(prompts.prefix(TYPES), prompts.suffix(text)) for text in texts]
    found = dict(stream(base, parts, spec, drafter))
    return [found[i] for i in range(len(texts))]


def test_rows_leave_when_they_end_and_others_take_their_place(stopping: Base) -> None:
    with passes(stopping) as tokens:
        answers = streamed(stopping, DecodeSpec(30, 4), Silent())
    left = [n + (not a.truncated) for n, a in zip(lengths(answers), answers, strict=True)]
    # Longest prompt first; a row that has ended makes room for the next one at once.
    suffixes = [len(stopping.tokenizer(prompts.suffix(t), add_special_tokens=False).input_ids) for t in TEXTS]
    waiting = sorted(range(len(TEXTS)), key=lambda i: (-suffixes[i], i))
    rows: list[int] = []
    expected: list[int] = []
    while waiting or rows:
        count = len(rows)
        while waiting and len(rows) < 4:
            rows.append(waiting.pop(0))
            count += suffixes[rows[-1]]
        expected.append(-(-count // 16) * 16)  # filled up to multiples of 16
        for i in rows:
            left[i] -= 1
        rows = [i for i in rows if left[i]]
    assert tokens[1:] == expected  # the first is the prefix
    assert len(expected) > 3


def test_prefixes_are_run_together_as_far_as_a_pass_holds_them(stopping: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [TYPES, ["court"], [f"kind {n}" for n in range(9)]]
    parts = [(prompts.prefix(kind), prompts.suffix(text)) for kind in kinds for text in TEXTS[:2]]
    sizes = [len(stopping.tokenizer(prompts.prefix(kind)).input_ids) for kind in kinds]
    expected = [oracle(stopping, text, 9, kind) for kind in kinds for text in TEXTS[:2]]
    with passes(stopping) as tokens:
        assert decode_prompts(stopping, parts, DecodeSpec(9, 6)) == expected
    assert tokens[0] == ragged.rounded(sum(sizes))
    monkeypatch.setattr(greedy, "ADMIT", sum(sizes[:2]))
    with passes(stopping) as tokens:
        assert decode_prompts(stopping, parts, DecodeSpec(9, 1)) == expected
    assert tokens[0] == ragged.rounded(sum(sizes[:2])) and ragged.rounded(sizes[2]) in tokens[1:]


class Penalty(LogitsProcessor):
    """Takes ``size`` off the logits of ``tokens``."""

    def __init__(self, tokens: Sequence[int], size: float) -> None:
        self.tokens, self.size = list(tokens), size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.tokens] -= self.size
        return scores


def test_tokens_that_end_an_answer_or_a_list(smollm: Base) -> None:
    ends = set(greedy.endings(smollm.tokenizer))
    texts = {" {}": [" {}"], ' {"a": ["b", "c."], "d": ["e"]}': ['"]', "}"], ' {"a": ["b."]}': ["]}"]}
    for answer, last in texts.items():
        ids = smollm.tokenizer(answer).input_ids
        assert [smollm.tokenizer.decode([i]) for i in ids if i in ends] == last
    assert not ends & set(smollm.stop_ids)


@pytest.mark.parametrize("penalty", [2.0, -2.0])
def test_a_penalty_on_ends_is_that_of_generate(tiny: Base, monkeypatch: pytest.MonkeyPatch, penalty: float) -> None:
    free = [list(map(int, oracle(numbers(tiny), text, 20).text.split())) for text in TEXTS]
    usual = sorted({row[n] for row in free for n in (0, 3, 7)})
    monkeypatch.setattr(greedy, "endings", lambda tokenizer: usual)
    spec = DecodeSpec(20, 4, "exact", end_penalty=penalty)
    found = decode(numbers(tiny), TYPES, TEXTS, spec)
    assert found == [oracle(numbers(tiny), t, 20, processor=Penalty(usual, penalty)) for t in TEXTS]
    assert found != decode(numbers(tiny), TYPES, TEXTS, DecodeSpec(20, 4, "exact"))


def test_progress_counts_answers(stopping: Base) -> None:
    done: list[int] = []
    decode(stopping, TYPES, TEXTS, DecodeSpec(2, 4), done.append)
    assert done == [1] * len(TEXTS)


def test_guesses_change_no_answer_and_right_ones_save_passes(stopping: Base) -> None:
    spec = DecodeSpec(30, 10)
    with passes(stopping) as without:
        expected = streamed(stopping, spec, Silent())
    known: dict[tuple[int, ...], list[int]] = {}
    for text, answer in zip(TEXTS, expected, strict=True):
        prompt = stopping.tokenizer(prompts.suffix(text), add_special_tokens=False).input_ids
        known[tuple(prompt)] = list(map(int, answer.text.split()))

    def right(context: list[int]) -> list[int]:
        start = next(n for n in range(len(context), -1, -1) if tuple(context[:n]) in known)
        return known[tuple(context[:start])][len(context) - start :][:7]

    draw = random.Random(0)
    with passes(stopping) as few:
        assert streamed(stopping, spec, Fixed(right)) == expected
    assert len(few) < len(without) / 4
    assert streamed(stopping, spec, Fixed(lambda context: [draw.randrange(300) for _ in range(5)])) == expected
    half = Fixed(lambda context: [*right(context)[:2], draw.randrange(300), *right(context)[3:]])
    assert streamed(stopping, spec, half) == expected
    assert streamed(stopping, spec, Drafter()) == expected


def test_earlier_answers_are_guesses(stopping: Base, tiny: Base) -> None:
    parts = [(prompts.prefix(TYPES), prompts.suffix(text)) for text in TEXTS]
    spec = DecodeSpec(30, 10)
    plain = dict(stream(tiny, parts, spec))
    with passes(tiny) as before:
        assert dict(stream(tiny, parts, spec, Drafter())) == plain
    with passes(tiny) as after:
        assert dict(stream(tiny, parts, spec, Drafter(), [plain[i].text for i in range(len(parts))])) == plain
    assert len(after) < len(before)
    assert dict(stream(tiny, parts, spec, Drafter(), ["nonsense"] * len(parts))) == plain


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


def test_a_packed_model_with_norms_between_its_products(sliding: Base) -> None:
    """In bf16 where the processor has it: Gemma 3 norms queries, keys, and what a block gives."""
    texts = [*TEXTS, "y", "Another"]
    with PackedWeights(sliding.model, "fast", all_logits=False) as weights:
        weights.apply([])
        alone = [decode(sliding, TYPES, [text], DecodeSpec(12, 1, "fast"))[0] for text in texts]
        assert decode(sliding, TYPES, texts, DecodeSpec(12, 8, "fast")) == alone
    assert len({answer.text for answer in alone}) > 1


def test_layers_with_different_numbers_of_heads(tiny: Base) -> None:
    torch.manual_seed(0)
    config = LagunaConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_attention_heads_per_layer=[4, 8],
        num_key_value_heads=2,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    base = numbers(tiny, model=LagunaForCausalLM(config).eval())
    assert decode(base, TYPES, TEXTS[:6], DecodeSpec(12, 4)) == [oracle(base, t, 12) for t in TEXTS[:6]]


def test_layers_of_other_kinds_are_refused(sliding: Base) -> None:
    kinds = sliding.model.config.layer_types if hasattr(sliding.model.config, "layer_types") else None
    sliding.model.config.layer_types = ["chunked_attention", "full_attention"]
    try:
        with pytest.raises(SamError, match="chunked_attention"):
            decode(sliding, TYPES, TEXTS, DecodeSpec(4))
    finally:
        sliding.model.config.layer_types = kinds


def test_an_empty_prompt_is_refused(tiny: Base) -> None:
    for part in (("", "x"), ("x", "")):
        with pytest.raises(SamError, match="no tokens"):
            decode_prompts(tiny, [("a", "b"), part], DecodeSpec(4))


def test_a_model_without_shared_key_heads(tiny: Base) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tiny.tokenizer), n_embd=64, n_layer=2, n_head=4, initializer_range=0.3)
    )
    base = numbers(tiny, model=model.eval())
    assert decode(base, TYPES, TEXTS[:6], DecodeSpec(12, 4)) == [oracle(base, t, 12) for t in TEXTS[:6]]


def test_attention_sinks_are_refused(tiny: Base) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = GptOssForCausalLM(
        GptOssConfig(vocab_size=len(tiny.tokenizer), num_hidden_layers=2, head_dim=16, num_local_experts=2, **sizes)
    )
    with pytest.raises(SamError, match="s_aux"):
        decode(numbers(tiny, model=model.eval()), TYPES, TEXTS[:2], DecodeSpec(4))


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_logits_are_the_same_to_the_bit_in_any_company(
    smollm: Base, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The sum of a product's terms must not depend on what else is in the pass (LEAST, STRIDE and CHUNK see to it)."""
    prefixes = [prompts.prefix(TYPES), prompts.prefix([f"kind {n}" for n in range(30)])]
    parts = [(p, prompts.suffix(t)) for t in (*TEXTS[:3], TEXTS[3] * 9) for p in prefixes]
    forward, seen = greedy._Run._forward, {}

    def watched(self: Any, cache: Any, rows: Any, ids: Any, keep: Any) -> torch.Tensor:
        logits = forward(self, cache, rows, ids, keep)
        if cache is self.cache:
            places = [(row.index, *row.made, *row.draft[:n]) for row in self.rows for n in range(1 + len(row.draft))]
            seen.update({place: logits[n].clone() for n, place in enumerate(places)})
        return logits

    monkeypatch.setattr(greedy._Run, "_forward", watched)
    found = []
    with PackedWeights(smollm.model, mode, all_logits=False) as weights:
        weights.apply([])
        for size, drafter in ((1, Silent()), (8, Drafter()), (3, Drafter())):  # by 3, rows join those under way
            dict(stream(smollm, parts, DecodeSpec(8, size, mode), drafter))
            found.append(dict(seen))
            seen.clear()
        for start in (0, 1):  # each prefix by itself; the rows' places in ``parts`` are other ones then
            dict(stream(smollm, parts[start::2], DecodeSpec(8, 3, mode), Drafter()))
            found.append({(2 * index + start, *made): logits for (index, *made), logits in seen.items()})
            seen.clear()
    for other in found[1:]:
        shared = set(found[0]) & set(other)
        assert len(shared) > 30
        assert all(torch.equal(found[0][place], other[place]) for place in shared)


def test_attention_is_given_back(tiny: Base) -> None:
    before = tiny.model.config._attn_implementation
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny.model(ids).logits
    steps = stream(tiny, [(prompts.prefix(TYPES), prompts.suffix(t)) for t in TEXTS], DecodeSpec(4, 2))
    next(steps)  # the stream is open still
    assert tiny.model.config._attn_implementation == before
    assert torch.equal(tiny.model(ids).logits, expected)


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


def test_long_answers(tiny: Base) -> None:
    limit = ragged.CHUNK + 5
    free = [oracle(numbers(tiny), text, limit).text.split() for text in TEXTS[:3]]
    # A token that only the second row comes to, late: then a row moves.
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
    assert DecodeSpec.from_config({"max_new_tokens": 5, "batch_size": 2, "mode": "exact"}) == DecodeSpec(5, 2, "exact")
    with pytest.raises(SamError, match=r"decode.mode=slow is unknown; allowed: exact, fast"):
        DecodeSpec.from_config({"mode": "slow"})
    for penalty in (True, math.inf, "much"):
        with pytest.raises(SamError, match=f"decode.end_penalty={penalty} must be a finite number"):
            DecodeSpec.from_config({"end_penalty": penalty})
    for bad in ({"max_new_tokens": 0}, {"batch_size": -1}):
        with pytest.raises(SamError, match="must be at least 1"):
            DecodeSpec.from_config(bad)


def test_canonical_decoding_tells_modes_apart_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, exact = DecodeSpec(5, 2, "fast"), DecodeSpec(5, 2, "exact")
    monkeypatch.setattr("sam.decoding.packed.halves", lambda: True)
    assert fast.canonical("float32", "cpu") != exact.canonical("float32", "cpu")
    for dtype, device in (("bfloat16", "cpu"), ("float32", "cuda")):
        assert fast.canonical(dtype, device) == exact.canonical(dtype, device)
    monkeypatch.setattr("sam.decoding.packed.halves", lambda: False)
    assert fast.canonical("float32", "cpu") == exact.canonical("float32", "cpu")


def test_canonical_decoding_holds_the_batch_size_where_rounding_depends_on_it() -> None:
    for dtype, device in (("bfloat16", "cpu"), ("float32", "cuda")):
        assert DecodeSpec(5, 2).canonical(dtype, device) != DecodeSpec(5, 9).canonical(dtype, device)


def test_canonical_decoding_leaves_out_the_batch_size() -> None:
    one: Callable[..., dict[str, Any]] = DecodeSpec(5, 2).canonical
    assert one("float32", "cpu") == DecodeSpec(5, 9).canonical("float32", "cpu")
    others = [one("float32", "cpu"), one("bfloat16", "cpu"), one("float32", "cuda:0")]
    assert DecodeSpec(6, 2).canonical("float32", "cpu") not in others
    assert one("float32", "cuda:1") == others[2] and others[0] != others[1] != others[2] != others[0]
