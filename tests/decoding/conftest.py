"""Models whose answers end at different lengths, and models with a sliding window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from sam.base import Base
from tests.decoding.oracle import TEXTS, numbers, oracle


@pytest.fixture
def stopping(tiny: Base) -> Base:
    """The tiny base model with stop tokens at which the answers to TEXTS end after different numbers of tokens."""
    free = [list(map(int, oracle(numbers(tiny), text, 30).text.split())) for text in TEXTS[:6]]
    return numbers(tiny, stop_ids=[row[n] for row, n in zip(free, (4, 11, 20, 7, 15, 25), strict=True)])


def sizes(vocab: int) -> dict[str, Any]:
    """The options of a tiny model's config that all kinds of models have."""
    return {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


def sliding_models(vocab: int) -> dict[str, Any]:
    common = {**sizes(vocab), "sliding_window": 8}
    torch.manual_seed(0)
    gemma = Gemma3TextConfig(**common, head_dim=16, layer_types=["sliding_attention", "full_attention"])
    return {"gemma3": Gemma3ForCausalLM(gemma).eval(), "mistral": MistralForCausalLM(MistralConfig(**common)).eval()}


@pytest.fixture(params=["gemma3", "mistral"])
def sliding(request: pytest.FixtureRequest, tiny: Base) -> Base:
    """A model with a sliding window of 8 tokens: less than the prefix holds."""
    return numbers(tiny, model=sliding_models(len(tiny.tokenizer))[request.param])
