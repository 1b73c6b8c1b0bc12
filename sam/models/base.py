"""A base model, loaded: with its tokenizer, and its warm start baked in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam.errors import SamError, first_line
from sam.models.device import device_of
from sam.models.identity import fold_hash, identity
from sam.models.sources import folder
from sam.models.spec import BaseSpec

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that transformers' decoders call on the same input."""


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
    """The content hash of the warm start."""
    stop_ids: tuple[int, ...] = field(default=())


def config_of(spec: BaseSpec) -> Any:
    """The model's config, as transformers reads it. Raises SamError where it cannot."""
    from transformers import AutoConfig

    path = folder(spec)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SamError(
            f"base={spec.name}: {path} has no config that transformers reads ({first_line(error)})"
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
    fingerprint = identity(spec)
    device = device_of("auto") if device == "auto" else device
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, spec.dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise SamError(
            f"base={spec.name}: {path} is not a causal language model with its tokenizer ({first_line(error)})"
        ) from None
    model.requires_grad_(False)
    if spec.fold is not None:
        _fold(model, spec.fold)
    model.eval().to(device)
    ends = stop_ids(tokenizer, model.generation_config.eos_token_id, path)
    return Base(spec.name, model, tokenizer, fingerprint, device, spec.dtype, fold_hash(spec), stop_ids=ends)


def _fold(model: Any, adapter: str) -> None:
    """Add the adapter to the weights of ``model``."""
    from sam.merging import AdapterDeltas, Merge, fold, linear, merge_modules

    fold(model, merge_modules([AdapterDeltas.open(Path(adapter).expanduser())], ["fold"], Merge(linear)))


def stop_ids(tokenizer: Any, configured: int | list[int] | None, path: Path) -> tuple[int, ...]:
    """The tokens that end a completion; the first is the one that training teaches. ``configured``: the generation
    config's, of the model in ``path``."""
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    known = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not known:
        raise SamError(f"{path} has no end-of-text token; set eos_token in its tokenizer_config.json")
    return known
