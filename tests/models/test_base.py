"""A base model as it is loaded: its precision, its stop tokens, its warm start, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sam.errors import SamError
from sam.merging import AdapterDeltas, merged
from sam.models.base import Base, load
from sam.models.identity import fingerprint, identity
from sam.models.spec import BaseSpec
from tests.tiny import one_line, write_adapter


def local(path: Path, **options: object) -> BaseSpec:
    return BaseSpec("mine", "local", location=str(path), **options)  # type: ignore[arg-type]


def copied(tiny_base: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny_base, target))


def test_local_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SamError) as error:
            load(local(path))
        assert one_line(error) == (f"base.location={path} has no config.json; name a folder with a transformers model")


def test_pickled_weights_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    path = copied(tiny_base, tmp_path / "m")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(SamError, match="no .*safetensors .pickled weights are not loaded"):
        load(local(path))


@pytest.mark.parametrize("keep", [3, 100, -7])
def test_truncated_safetensors_is_refused(tiny_base: Path, tmp_path: Path, keep: int) -> None:
    path = copied(tiny_base, tmp_path / "m")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(SamError) as error:
        load(local(path))
    assert f"{path} holds a corrupt safetensors file" in one_line(error)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_unreadable_config_or_tokenizer_is_refused(tiny_base: Path, tmp_path: Path, file: str) -> None:
    path = copied(tiny_base, tmp_path / "m")
    (path / file).write_text('{"model_type": "no_such_model"}' if file == "config.json" else "")
    with pytest.raises(SamError, match="is not a causal language model with its tokenizer") as error:
        load(local(path))
    one_line(error)


def test_loaded_base(tiny: Base, tiny_base: Path) -> None:
    assert (tiny.name, tiny.device, tiny.dtype) == ("tiny", "cpu", "float32")
    assert not tiny.model.training and not any(p.requires_grad for p in tiny.model.parameters())
    assert tiny.fingerprint == fingerprint(tiny_base)
    assert tiny.stop_ids == (tiny.tokenizer.eos_token_id,)


def test_dtype_and_further_stop_tokens(tiny_base: Path, tmp_path: Path) -> None:
    path = copied(tiny_base, tmp_path / "m")
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [7, 0]}))
    base = load(local(path, dtype="bfloat16"), "cpu")
    assert base.stop_ids == (0, 7)  # the tokenizer's own first: it is the one that training teaches
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.fingerprint == fingerprint(tiny_base)


def test_the_warm_start_is_part_of_the_base(tiny: Base, tiny_base: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_adapter(tmp_path / str(seed), tiny.model, seed=seed)
    plain, folded, other = (local(tiny_base, fold=f and str(tmp_path / f)) for f in (None, "1", "2"))
    base = load(folded, "cpu")
    deltas = AdapterDeltas.open(tmp_path / "1")
    for name, module in tiny.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = module.weight + deltas.delta(name) if name in deltas else module.weight
            assert torch.equal(base.model.get_submodule(name).weight, expected)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert identity(plain) == fingerprint(tiny_base) and base.fingerprint == identity(folded)
    assert len({identity(plain), identity(folded), identity(other)}) == 3
    # It holds nothing to be undone: the next merge comes on top.
    layer = base.model.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    with merged(base.model, [("model.layers.0.mlp.up_proj", torch.ones(before.shape))]):
        assert torch.equal(layer.weight, before + 1)
    assert torch.equal(layer.weight, before)
    assert (load(plain, "cpu").fold, base.fold) == (None, deltas.content_hash)
    with pytest.raises(SamError, match=r"adapter_config\.json"):
        identity(local(tiny_base, fold=str(tmp_path / "none")))
