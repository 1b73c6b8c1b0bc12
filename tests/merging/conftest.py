"""A tiny random Llama and adapters trained on nothing: PEFT writes them, so their folders are the real format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sam.merging import AdapterDeltas

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def base() -> LlamaForCausalLM:
    """2 layers, hidden size 64, 4 query and 2 key-value heads, fp32. Not to be changed: copy it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(base: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(base)


MakePeft = Callable[..., tuple[PeftModel, Path]]
MakeAdapter = Callable[..., AdapterDeltas]


@pytest.fixture
def make_peft(base: LlamaForCausalLM, tmp_path: Path) -> MakePeft:
    """``make_peft(name, seed, **lora options)``: a PEFT model with random A and B, and its folder."""

    def make(name: str, seed: int = 0, **options: Any) -> tuple[PeftModel, Path]:
        torch.manual_seed(seed)
        defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "init_lora_weights": False}
        config = LoraConfig(**(defaults | options))
        peft_model = get_peft_model(copy.deepcopy(base), config)
        peft_model.save_pretrained(str(tmp_path / name))
        return peft_model, tmp_path / name

    return make


@pytest.fixture
def make_adapter(make_peft: MakePeft) -> MakeAdapter:
    def make(name: str, seed: int = 0, **options: Any) -> AdapterDeltas:
        return AdapterDeltas.open(make_peft(name, seed, **options)[1])

    return make


@pytest.fixture
def three(make_adapter: MakeAdapter) -> tuple[list[AdapterDeltas], list[str]]:
    """Three experts of different ranks, alphas and target modules, and their names."""
    adapters = [
        make_adapter("alpha", 1),
        make_adapter("beta", 2, r=8, use_rslora=True),
        make_adapter("gamma", 3, lora_alpha=4, target_modules=ATTENTION),
    ]
    return adapters, ["alpha", "beta", "gamma"]


@pytest.fixture
def peft_delta() -> Callable[[PeftModel, str, str], Tensor]:
    """``peft_delta(peft model, module, adapter)``: the ΔW that PEFT itself computes."""

    def delta(peft_model: PeftModel, module: str, adapter: str = "default") -> Tensor:
        layer: Any = peft_model.get_base_model().get_submodule(module)
        return layer.get_delta_weight(adapter).detach()

    return delta
