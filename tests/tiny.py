"""What the fixtures are made of: a tiny random Llama, its tokenizer, random adapters, cards and an encoder."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sam.errors import SamError
from sam.experts.card import Card, Pool
from sam.models.base import Base
from sam.models.encoder import SHIPPED, Encoder, EncoderSpec
from sam.ner.prompts import PROMPT_VERSION
from sam.paths import conf_dir

DOMAINS = ("news", "social", "biomedical", "stem", "legal", "traffic")
DIM = 384
CORPUS = [
    "Ada Lovelace wrote the first program for the Analytical Engine in London.",
    "Entity types: person, location, organization\nText: Alan Turing worked at Bletchley Park.\nEntities:",
    ' {"person": ["Alan Turing"], "location": ["Bletchley Park", "Manchester"]}',
    "A mutation in BRCA1 raises the risk of breast cancer; aspirin may lower it.",
    "The court in Strasbourg held that Article 8 was violated.",
]


def config(group: str, name: str) -> dict[str, Any]:
    """The plain mapping of a file under ``conf``."""
    found = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


class HashEncoder(Encoder):
    """An encoder without a model: a unit vector of 384 values drawn by the text's hash. It calls itself ``minilm``."""

    def __init__(self) -> None:
        super().__init__(EncoderSpec("minilm", "local", "nowhere", SHIPPED[1], None, None))

    def embed(self, texts: Sequence[str]) -> Any:
        """Shape [len(texts), 384], float32."""
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            row = np.random.default_rng(seed).normal(size=DIM)
            rows.append(row / np.linalg.norm(row))
        return np.array(rows, dtype="float32").reshape(len(texts), DIM)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens at most, trained on :data:`CORPUS`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def write_base(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A random Llama with its tokenizer: 2 layers, hidden 64, 4 query and 2 key-value heads, tied embeddings, fp32."""
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        # Wide enough that greedy answers vary from prompt to prompt.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | options))).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def make_card(name: str, fingerprint: str, **options: Any) -> Card:
    """A card of an expert of the tiny base model, its centroid drawn by its name."""
    draw = random.Random(name)
    values = [draw.gauss(0, 1) for _ in range(DIM)]
    norm = math.sqrt(sum(x * x for x in values))
    defaults: dict[str, Any] = {
        "name": name,
        "role": "expert",
        "domain": name,
        "datasets": (f"{name}_one", f"{name}_two"),
        "types": ("location", "person"),
        "base": "tiny",
        "base_fingerprint": fingerprint,
        "prompt_version": PROMPT_VERSION,
        "encoder": "minilm",
        "centroid": tuple(x / norm for x in values),
        "recipe": {"r": 4, "seed": 0, "hash": f"hash of {name}"},
        "sentences": 10,
        "scores": {"datasets": {}, "mean_f1": 0.0},
        "training": {
            "seconds": 61.4,
            "steps": 5,
            "parameters": 1200,
            "18HrL": 1300,
            "device": "cpu",
            "curve": [[5, 2.5]],
        },
        "licences": {f"{name}_one": "CC-BY-4.0"},
        "versions": {"python": "3.11"},
    }
    return Card(**(defaults | options))


def write_adapter(folder: Path, model: Any, seed: int, r: int = 4) -> None:
    """A LoRA adapter of random A and B on all linear layers of ``model`` (left as it is), bf16, written by PEFT."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", init_lora_weights=False)
    peft_model: Any = get_peft_model(copy.deepcopy(model), lora, autocast_adapter_dtype=False)
    peft_model.to(torch.bfloat16).save_pretrained(str(folder))


def write_pool(folder: Path, base: Base, n: int, unified: bool) -> Pool:
    """``n`` random experts of ``base``, ranks 4 and 8 in turn, with their cards, and a unified one if asked for."""
    for i, name in enumerate([*DOMAINS[:n], *(["unified"] if unified else [])]):
        write_adapter(folder / name, base.model, seed=i, r=(4, 8)[i % 2])
        role = "unified" if name == "unified" else "expert"
        make_card(name, base.fingerprint, role=role).write(folder / name)
    return Pool(folder)


def written(texts: Mapping[str, Sequence[str]]) -> str:
    """The completion that gives each entity type its ``texts``."""
    pairs = (f"{json.dumps(' ' + text)}:{json.dumps(' ' + kind)}" for kind, of in texts.items() for text in of)
    return " {" + ",".join(pairs) + "}"


def one_line(error: pytest.ExceptionInfo[SamError]) -> str:
    """The message of a user's mistake, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message
