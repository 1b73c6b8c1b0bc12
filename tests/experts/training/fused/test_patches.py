"""Fused training computes what PEFT and transformers compute, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sam.experts.training.batch import Batch, Example, padded
from sam.experts.training.fused.module import FusedExpertModule
from sam.experts.training.fused.packing import additive, collate
from sam.experts.training.fused.patches import ATTENTION, fused, groups, page_out
from sam.models.base import Base
from tests.toy_training import recipe

EXAMPLES = (Example(tuple(range(3, 25)), 6), Example(tuple(range(40, 51)), 4), Example((7, 8, 9), 1))
PREFIX = (1, 30, 31, 2)
BATCH = padded(Batch(PREFIX, EXAMPLES))
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LAYERS = 2
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=24, sliding_window=12)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0)),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads add up in another order, beyond these bounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expert(kind: str = "llama") -> FusedExpertModule:
    """On a small random model; biases and B drawn so that they do something."""
    torch.manual_seed(0)
    model = MODELS[kind]().requires_grad_(False)
    module = FusedExpertModule(Base(kind, model, None, ""), recipe(r=4, alpha=8))
    module.configure_model()
    for name, p in module.net.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    module.net.train()
    for part in module.net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return module


def learn(
    module: FusedExpertModule, dtype: torch.dtype | None = None, autocast: bool = False, batch: Any = BATCH
) -> dict[str, torch.Tensor]:
    """The loss and the gradients, fused in ``dtype`` or as PEFT has it."""
    way = nullcontext() if dtype is None else fused(module.net, dtype)
    with way, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module.loss(batch)
    # Backward is called outside of autocast, as Lightning does.
    named = {name: p for name, p in module.net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **dict(zip(named, grads, strict=True))}


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        # Relative to the largest gradient of the tensor.
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=2e-6 * max(1, float(value.abs().max()))), name
        assert value.abs().sum() > 0, name


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_pefts_in_fp32(kind: str) -> None:
    module = expert(kind)
    assert_close(learn(module, torch.float32), learn(module))


@pytest.mark.parametrize("rows", ["apart", "packed"])
@pytest.mark.parametrize("kind", ["llama", "biased", "qwen2", "mistral", "gemma3"])
def test_layers_multiplied_together_have_the_same_gradients(kind: str, rows: str) -> None:
    module = expert(kind)
    batch = BATCH if rows == "apart" else collate(Batch(PREFIX, EXAMPLES), 512)
    if rows == "packed" and kind in ("mistral", "gemma3"):
        pytest.skip("its window is shorter than the row")
    bases = [layer.get_base_layer() for group in groups(module.net, torch.float32) for layer in group]
    for base in bases:
        base.weight.data = base.weight.data.bfloat16().float()
    expected = learn(module, batch=batch)
    for base in bases:  # the same weights in another dtype than is computed in: they have to be cast, so are stacked
        base.weight.data = base.weight.data.bfloat16()
    sizes = sorted(len(group) for group in groups(module.net, torch.float32))
    assert sizes == sorted([1, 1, 2, 3] * LAYERS)
    assert_close(learn(module, torch.float32, batch=batch), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_is_as_near_to_fp32_as_autocast_is(kind: str) -> None:
    module = expert(kind)
    exact, theirs = learn(module), learn(module, autocast=True)
    ours = learn(module, torch.bfloat16, autocast=True)
    assert ours["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.01)

    def error(of: dict[str, torch.Tensor]) -> float:
        wrong = sum(float((of[name] - exact[name]).square().sum()) for name in exact if name != "loss")
        return (wrong / sum(float(g.square().sum()) for name, g in exact.items() if name != "loss")) ** 0.5

    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert error(ours) < 2 * error(theirs) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_as_before_also_after_an_error(dtype: torch.dtype) -> None:
    module = expert()
    model = module.base.model
    before = {name: p.clone() for name, p in module.net.state_dict().items()}
    expected = learn(module)
    with pytest.raises(RuntimeError), fused(module.net, dtype):
        assert model.config._attn_implementation == ATTENTION
        raise RuntimeError
    after = module.net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(part) for part in module.net.modules())
    again = learn(module)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_siblings_called_out_of_turn_on_other_inputs_and_twice() -> None:
    module = expert()
    block = module.net.base_model.model.model.layers[0].self_attn
    torch.manual_seed(3)
    one, two = torch.randn(2, 5, 64), torch.randn(1, 3, 64)
    calls = [("k_proj", one), ("q_proj", two), ("v_proj", two), ("v_proj", one), ("v_proj", one), ("q_proj", one)]
    expected = [getattr(block, name)(x) for name, x in calls]
    for part in block.children():
        if hasattr(part, "base_layer"):
            part.base_layer.weight.data = part.base_layer.weight.data.double()  # so that they are put together
    with fused(module.net, torch.float32):
        ours = [getattr(block, name)(x) for name, x in calls]
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_attention_and_feed_forward_are_steps_of_their_own_where_their_layers_are_multiplied_together() -> None:
    module = expert()
    block = module.net.base_model.model.model.layers[0]
    torch.manual_seed(3)
    x, ids = torch.randn(2, 5, 64), torch.arange(5)[None]
    angles = module.net.base_model.model.model.rotary_emb(x, ids)
    allowed = torch.ones(1, 1, 5, 5).tril().bool()
    parts = (block.self_attn, block.mlp)
    expected = [block.self_attn(x, angles, allowed)[0], block.mlp(x)]
    with fused(module.net, torch.float32):  # the weights need no cast, so are not put together
        assert not any("forward" in vars(part) for part in parts)
    for part in block.modules():
        if hasattr(part, "base_layer"):
            part.base_layer.weight.data = part.base_layer.weight.data.double()
    with fused(module.net, torch.float32):
        assert all("forward" in vars(part) for part in parts)
        ours = [block.self_attn(x, angles, additive(allowed))[0], block.mlp(x), block.self_attn(x, angles, None)[0]]
    for a, b in zip(ours, [*expected, expected[0]], strict=True):  # no mask: causal, left to transformers
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_other_kinds_of_lora_are_left_to_peft(options: dict[str, Any]) -> None:
    net = get_peft_model(MODELS["biased"](), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
    assert list(groups(net, torch.float32)) == []


def test_paged_out_weights_come_back(tmp_path: Path) -> None:
    values = {"w": torch.randn(300, 1000), "odd": torch.randn(7)}
    save_file(values, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")
    mapped["w"][3, 5] = 42.0  # a page that differs from the file
    for tensor in [*mapped.values(), *values.values()]:
        page_out(tensor)
    assert mapped["w"][3, 5] == 42.0
    mapped["w"][3, 5] = values["w"][3, 5]
    assert all(torch.equal(mapped[name], values[name]) for name in values)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_bf16_trains(kind: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are in bf16 too, as the larger base models have them."""
    half = MODELS[kind]
    monkeypatch.setitem(MODELS, kind, lambda: half().to(torch.bfloat16))
    expected = learn(expert(kind), None, autocast)
    ours = learn(expert(kind), torch.bfloat16, autocast)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        difference = (gradient.float() - expected[name].float()).norm() / expected[name].float().norm()
        assert difference < 0.1, name
