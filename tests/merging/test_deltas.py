"""ΔW read from adapter folders against the ΔW of PEFT itself, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sam.errors import SamError
from sam.merging import AdapterDeltas

Q0 = "model.layers.0.self_attn.q_proj"

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank and alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 16},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}},
    "alpha pattern": {"alpha_pattern": {"k_proj": 3, r"model\.layers\.0\.mlp\.up_proj": 5, "proj": 99}},
    "both patterns, rslora": {
        "use_rslora": True,
        "rank_pattern": {"^v_proj": 9, "o_proj": 2},
        "alpha_pattern": {"o_proj": 1},
    },
    "first pattern wins": {"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "q_proj": 5}},
    "few modules": {"target_modules": ["q_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_deltas_equal_peft(
    make_peft: Callable[..., Any], peft_delta: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    peft_model, folder = make_peft("expert", **options)
    adapter = AdapterDeltas.open(folder)
    expected = [n for n, m in peft_model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")]
    assert adapter.modules() == list(adapter) == sorted(expected)
    for module in expected:
        theirs = peft_delta(peft_model, module)
        assert adapter.shape(module) == tuple(theirs.shape)
        torch.testing.assert_close(adapter.delta(module), theirs, rtol=1e-6, atol=1e-7)
        assert torch.equal(adapter[module], adapter.delta(module))
        out = torch.empty(adapter.shape(module))
        assert adapter.delta(module, out) is out and torch.equal(out, adapter.delta(module))


def test_module_names_are_those_of_the_base_model(make_adapter: Callable[..., AdapterDeltas], base: nn.Module) -> None:
    adapter = make_adapter("expert")
    assert Q0 in adapter and len(adapter.modules()) == 14
    for module in adapter.modules():
        assert adapter.shape(module) == tuple(base.get_submodule(module).weight.shape)  # type: ignore[union-attr,arg-type]


def test_bf16_adapter_is_read_in_fp32(make_peft: Callable[..., Any]) -> None:
    _, folder = make_peft("expert")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"].float() for side in "AB")
    delta = AdapterDeltas.open(folder).delta(Q0)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, 2 * b @ a)


def test_fan_in_fan_out_is_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Conv1D(6, 10)))
    config = LoraConfig(r=2, target_modules=["0.0"], fan_in_fan_out=True, init_lora_weights=False)
    peft_model = get_peft_model(net, config)  # type: ignore[arg-type]
    peft_model.save_pretrained(str(tmp_path))
    adapter = AdapterDeltas.open(tmp_path)
    layer: Any = peft_model.get_base_model().get_submodule("0.0")
    assert adapter.shape("0.0") == tuple(layer.weight.shape) == (10, 6)
    torch.testing.assert_close(adapter.delta("0.0"), layer.get_delta_weight("default").detach())
    assert torch.equal(adapter.delta("0.0", torch.empty(10, 6)), adapter.delta("0.0"))


def test_hash_follows_the_content(make_peft: Callable[..., Any], tmp_path: Path) -> None:
    hashes = {
        "same": AdapterDeltas.open(make_peft("a", 1)[1]).content_hash,
        "seed": AdapterDeltas.open(make_peft("b", 2)[1]).content_hash,
        "alpha": AdapterDeltas.open(make_peft("c", 1, lora_alpha=9)[1]).content_hash,
        "pattern": AdapterDeltas.open(make_peft("d", 1, alpha_pattern={"q_proj": 1})[1]).content_hash,
        "rslora": AdapterDeltas.open(make_peft("e", 1, use_rslora=True)[1]).content_hash,
    }
    assert len(set(hashes.values())) == len(hashes)
    _, again = make_peft("elsewhere", 1, lora_dropout=0.5)  # a training option: no part of ΔW
    assert AdapterDeltas.open(again).content_hash == hashes["same"]


def edit(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported; only plain LoRA on linear layers is"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"target_parameters": ["w"]}, "target_parameters is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"bias": "all"}, "bias='all' is not supported; train with bias='none'"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; only 'LORA' is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base weights"),
        ({"lora_alpha": None}, "lora_alpha=None is not a number"),
    ],
)
def test_refused_options(make_peft: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    _, folder = make_peft("expert")
    edit(folder, **options)
    with pytest.raises(SamError, match=re.escape(message)) as caught:
        AdapterDeltas.open(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}],
)
def test_what_peft_writes_for_other_adapters_is_refused(make_peft: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(SamError, match="not supported"):
        AdapterDeltas.open(make_peft("expert", **options)[1])


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = f"base_model.model.{Q0}.lora_%s.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY % "A"), f"module {Q0} has no lora_A"),
        (lambda t: t.update({KEY % "A": torch.ones(4, 1, 1, 1)}), "lora_A has shape [4, 1, 1, 1]; only linear layers"),
        (lambda t: t.update({KEY % "A": torch.ones(3, 64)}), "lora_A [3, 64] and lora_B [64, 4] differ in rank"),
        (lambda t: t[KEY % "B"].fill_(float("nan")), "lora_B holds NaN or infinity; its training diverged"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2)}), "tensor 'lm_head.weight' is not supported"),
        (lambda t: t.clear(), "holds no LoRA tensors"),
    ],
)
def test_bad_tensors(
    make_peft: Callable[..., Any], change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    _, folder = make_peft("expert")
    change_tensors(folder, change)
    with pytest.raises(SamError, match=re.escape(message)):
        AdapterDeltas.open(folder)


def test_missing_and_damaged_files(make_peft: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(SamError, match="cannot read .*adapter_config.json: No such file"):
        AdapterDeltas.open(tmp_path / "nowhere")
    _, folder = make_peft("expert")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SamError, match="adapter_model.safetensors is damaged"):
        AdapterDeltas.open(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        SamError, match=re.escape("is missing; an adapter folder holds adapter_model.safetensors (pickled")
    ):
        AdapterDeltas.open(folder)
    for text, message in (("{", "is not valid JSON"), ("[]", "holds no JSON object")):
        config.write_text(text)
        with pytest.raises(SamError, match=message):
            AdapterDeltas.open(folder)


def test_unknown_module(make_adapter: Callable[..., AdapterDeltas]) -> None:
    with pytest.raises(
        SamError, match=r"no delta for module 'lm_head'; it has model.layers.0.mlp.down_proj, .* \(14 in all"
    ):
        make_adapter("expert").delta("lm_head")


def test_applied_delta_is_the_adapter(make_peft: Callable[..., Any], model: nn.Module) -> None:
    """End to end: base + ΔW computes what PEFT computes."""
    from sam.merging import Merge, linear, merge_modules, merged

    peft_model, folder = make_peft("expert", use_rslora=True, alpha_pattern={"q_proj": 3})
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad(), merged(model, merge_modules([AdapterDeltas.open(folder)], ["expert"], Merge(linear))):
        ours = model(ids).logits
    peft: PeftModel = peft_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, peft(ids).logits, rtol=1e-4, atol=1e-5)
