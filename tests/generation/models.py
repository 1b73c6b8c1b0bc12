"""What tests of generators share: prompts, tiny models of several architectures, and ``generate`` on one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sam.generation import Completion, Generator, Request
from sam.models.base import Base
from sam.ner import prompts
from tests.tiny import make_tokenizer

TYPES = ["person", "location"]
TEXTS = [
    "Ada Lovelace wrote the first program.",
    "x",
    "Alan Turing worked at Bletchley Park, near Milton Keynes, from 1939 until the end of the war in 1945.",
    "The court in Strasbourg held that Article 8 was violated.",
    "Aspirin",
    "In London it rains.",
    "Zürich, 東京 and São Paulo",
]
LIMIT = 16


def requests(texts: Sequence[str] = TEXTS, types: Sequence[str] = TYPES) -> list[Request]:
    return [Request(prompts.prefix(types), prompts.suffix(text)) for text in texts]


def completions(generator: Generator, asked: Sequence[Request], deltas: Iterable[Any] = ()) -> list[Completion]:
    generator.load(deltas)
    done = dict(generator.generate(asked))
    assert set(done) == set(range(len(asked)))
    return [done[i] for i in range(len(asked))]


def generated(base: Base, request: Request, limit: int) -> list[int]:
    """The token ids of the prompt of one sentence, and those that ``generate`` adds without padding."""
    ids = torch.tensor([prompt(base, request)])
    made = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=base.stop_ids[0],
    )
    return list(map(int, made[0]))


def prompt(base: Base, request: Request) -> list[int]:
    ids = list(base.tokenizer(request.prefix).input_ids)
    return ids + list(base.tokenizer(request.suffix, add_special_tokens=False).input_ids)


def oracle(base: Base, request: Request, limit: int = LIMIT) -> tuple[str, bool]:
    """The text that ``generate`` gives for the prompt of one sentence, and whether it was cut."""
    made = generated(base, request, limit)[len(prompt(base, request)) :]
    ended = made[-1] in base.stop_ids
    return base.tokenizer.decode(made[:-1] if ended else made, skip_special_tokens=True), not ended


def write_model(folder: Path, kind: str, **options: Any) -> Path:
    """A random model of architecture ``kind`` with the tiny tokenizer."""
    tokenizer = make_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    made: dict[str, tuple[Any, Any]] = {
        "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
        "mistral": (MistralForCausalLM, MistralConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }
    model, config = made[kind]
    if kind in ("gemma3", "qwen3"):
        common["head_dim"] = 16
    torch.manual_seed(0)
    model(config(**common)).eval().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
