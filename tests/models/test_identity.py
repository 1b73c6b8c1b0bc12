"""The hashes that identify a base model: what they depend on, and what they do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sam.errors import SamError
from sam.models import identity as identities
from sam.models.base import Base
from sam.models.identity import fingerprint, identity, settings_hash
from sam.models.spec import BaseSpec
from tests.tiny import make_card, one_line, write_adapter


def local(path: Path, **options: object) -> BaseSpec:
    return BaseSpec("mine", "local", location=str(path), **options)  # type: ignore[arg-type]


def copied(tiny_base: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny_base, target))


def test_a_warm_start_of_another_base_is_refused(tiny: Base, tiny_base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, tiny.model, seed=1)
    spec = local(tiny_base, fold=str(tmp_path))
    make_card("start", tiny.fingerprint, role="start").write(tmp_path)
    assert identity(spec) == identity(spec)
    make_card("news", "f" * 64).write(tmp_path)  # such as an expert of a base with a warm start
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
    monkeypatch.setattr(identities, "_hash_weights", counting)
    path = copied(tiny_base, tmp_path / "m")
    assert [fingerprint(path), fingerprint(path)] == ["hash 1", "hash 1"]
    tensors = load_file(path / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, path / "model.safetensors")
    assert fingerprint(path) == "hash 2"
    assert all(not p.name.startswith(".") for p in (tmp_path / "cache" / "fingerprints").iterdir())


def test_settings_are_those_of_the_vocabulary_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen = {settings_hash(tmp_path)}
    for name in ("tokenizer.model", "merges.txt", "chat_template.jinja"):
        (tmp_path / name).write_text("a")
        seen.add(settings_hash(tmp_path))
    (tmp_path / "merges.txt").write_text("b")
    assert len(seen | {settings_hash(tmp_path)}) == 5
