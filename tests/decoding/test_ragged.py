"""Attention of many sentences in one pass: every kind of model, and the same to the bit in any company."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LagunaConfig,
    LagunaForCausalLM,
)

from sam import prompts
from sam.base import Base
from sam.decoding import DecodeSpec, greedy, ragged
from sam.decoding.compiled import weights_of
from sam.decoding.drafts import Drafter
from sam.decoding.greedy import decode, decode_prompts, stream
from sam.decoding.packed import PackedWeights
from sam.errors import SamError
from tests.decoding.oracle import TEXTS, TYPES, Silent, lengths, numbers, oracle

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 8])
def test_sliding_window_answers_are_those_of_generate(sliding: Base, size: int) -> None:
    texts = [*TEXTS, "y", "Another", *TEXTS[:2]]
    assert decode(sliding, TYPES, texts, DecodeSpec(20, size)) == [oracle(sliding, t, 20) for t in texts]


def test_a_packed_model_with_norms_between_its_products(sliding: Base) -> None:
    """In bf16 or int8, as the processor has it: Gemma 3 norms queries, keys, and what a block gives."""
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
    forward, seen = greedy._Lane._forward, {}

    def watched(self: Any, cache: Any, rows: Any, ids: Any, keep: Any) -> torch.Tensor:
        logits = forward(self, cache, rows, ids, keep)
        if cache is self.cache:
            places = [(row.index, *row.made, *row.draft[:n]) for row in self.rows for n in range(1 + len(row.draft))]
            seen.update({place: logits[n].clone() for n, place in enumerate(places)})
        return logits

    monkeypatch.setattr(greedy._Lane, "_forward", watched)
    found = []
    with weights_of(smollm, mode, constrained=False) as weights:
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


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_attention_is_the_same_to_the_bit_in_any_company(instructions: str) -> None:
    """MKL has other kernels for Intel's processors without AVX-512, whose sums depend on how many queries there are."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions}
    command = [sys.executable, "-m", "tests.decoding.company"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    by_blocks, *found = done.stdout.splitlines()
    assert not found
    if instructions == "AVX2" and by_blocks != "by blocks: True":
        pytest.skip("MKL has no kernels here that sum by blocks")


def test_attention_in_fp32_between_layers_in_bf16(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is computed where small products in bf16 depend on their company."""
    monkeypatch.setattr(ragged, "has_amx", lambda: True)
    half = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model).to(torch.bfloat16))
    kept: set[torch.dtype] = set()
    layer = ragged.KeyValues.layer

    def watched(self: Any, index: int, key: torch.Tensor, value: torch.Tensor) -> Any:
        found = layer(self, index, key, value)
        kept.update(part.dtype for part in found)
        return found

    monkeypatch.setattr(ragged.KeyValues, "layer", watched)
    with PackedWeights(half.model, "exact", all_logits=False) as weights:
        weights.apply([])
        alone = [decode(half, TYPES, [text], DecodeSpec(8, 1))[0] for text in TEXTS]
        assert decode(half, TYPES, TEXTS, DecodeSpec(8, 3)) == alone
    assert kept == {torch.float32}


@pytest.mark.usefixtures("one_thread")
def test_attention_is_given_back(tiny: Base) -> None:
    before = tiny.model.config._attn_implementation
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny.model(ids).logits
    steps = stream(tiny, [(prompts.prefix(TYPES), prompts.suffix(t)) for t in TEXTS], DecodeSpec(4, 2))
    next(steps)  # the stream is open still
    assert tiny.model.config._attn_implementation == before
    assert torch.equal(tiny.model(ids).logits, expected)


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
