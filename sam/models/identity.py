"""What identifies a base model: hashes of its weights, of its warm start, and of its tokenizer and config."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from sam.errors import SamError
from sam.models.sources import MANIFEST, SETTINGS, folder, sha256_of
from sam.models.spec import BaseSpec
from sam.paths import cache_dir
from sam.results import write_text

CARD_FILE = "expert.json"


@dataclass(frozen=True)
class Identity:
    """What a base model is: the ``fingerprint`` of its weights with its warm start, and the hash of the ``settings``
    of its tokenizer and config."""

    fingerprint: str
    settings: str


def identify(spec: BaseSpec) -> Identity:
    """The identity of the base model of ``spec``, which is converted or downloaded first if it is not here yet."""
    return Identity(identity(spec), settings_hash(folder(spec)))


def identity(spec: BaseSpec) -> str:
    """The fingerprint of the base model that ``spec`` loads: of its weights, and of its warm start.

    Raises SamError for a warm start that is no adapter, or whose card names another base model.
    """
    bare = fingerprint(folder(spec))
    if spec.fold is None:
        return bare
    card = Path(spec.fold).expanduser() / CARD_FILE
    trained_on = json.loads(card.read_text(encoding="utf-8")).get("base_fingerprint") if card.is_file() else bare
    if trained_on != bare:
        raise SamError(
            f"base.fold={spec.fold} was trained on another base ({str(trained_on)[:12]}, this is {bare[:12]}); "
            "name an adapter that was trained on the bare base (domain=start), or none: base.fold=null"
        )
    return hashlib.sha256(f"{bare} {fold_hash(spec)}".encode()).hexdigest()


def fold_hash(spec: BaseSpec) -> str | None:
    """The content hash of the warm start, None without one. Raises SamError for what is no adapter."""
    from sam.merging import AdapterDeltas

    return None if spec.fold is None else AdapterDeltas.open(Path(spec.fold).expanduser()).content_hash


def fingerprint(path: Path) -> str:
    """The hash over the weights (names, dtypes, shapes, bytes) in a model folder's safetensors files.

    Kept in the cache directory under the files' paths, sizes and times, so that it is computed once.
    """
    files = sorted(path.glob("*.safetensors"))
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    memo = cache_dir() / "fingerprints" / hashlib.sha256(repr(state).encode()).hexdigest()
    if not memo.is_file():
        write_text(memo, _hash_weights(path))
    return memo.read_text()


def settings_hash(path: Path) -> str:
    """The hash of a model folder's tokenizer and config files: they change completions, though not the weights."""
    matching = {f.name for pattern in SETTINGS for f in path.glob(pattern)}
    names = sorted(name for name in matching if name != MANIFEST and not name.endswith(".index.json"))
    return sha256_of(*(path / name for name in names))


def _hash_weights(path: Path) -> str:
    import torch
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    tensors: dict[str, Path] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                tensors.update(dict.fromkeys(handle.keys(), file))
        for name in sorted(tensors):
            with safe_open(tensors[name], framework="pt") as handle:
                tensor = handle.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    except SafetensorError as error:
        raise SamError(f"{path} holds a corrupt safetensors file ({error}); fetch the model again") from None
    return digest.hexdigest()
