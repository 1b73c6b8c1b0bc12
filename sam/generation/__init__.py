"""Completions of a base model and its merges: one file per backend, and a cache."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sam.errors import SamError, one_line
from sam.generation.api import Completion, Generator, Request
from sam.generation.cache import CompletionCache
from sam.models.base import BaseSpec, folder
from sam.options import options

__all__ = ["Completion", "CompletionCache", "DecodeSpec", "Generator", "Request", "auto", "build"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeSpec:
    """``max_new_tokens`` limits a completion. ``constrained``: only completions in the prompt's own syntax, of the
    requested types and of texts of the sentence, can be generated (:mod:`sam.ner.grammar`)."""

    max_new_tokens: int = 160
    constrained: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecodeSpec:
        """From the plain mapping of a ``conf/decode`` file."""
        spec = options(cls, config, "decode")
        if spec.max_new_tokens < 1:
            raise SamError(f"decode.max_new_tokens={spec.max_new_tokens} must be at least 1")
        return spec


def build(config: Mapping[str, Any], spec: BaseSpec, device: str, max_new_tokens: int) -> Generator:
    """The generator of a ``conf/generator`` file: ``_target_`` is called with ``spec``, ``device``,
    ``max_new_tokens`` and the file's other options."""
    from hydra.utils import get_method

    given = {str(k): v for k, v in config.items() if k != "_target_"}
    if "_target_" not in config:
        raise SamError("generator._target_ is missing; it names what makes the generator, such as sam.generation.auto")
    size = given.get("batch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise SamError(f"generator.batch_size={size} must be a whole number, at least 1")
    try:
        make = get_method(str(config["_target_"]))
    except Exception as error:
        raise SamError(f"generator._target_={config['_target_']} cannot be imported ({one_line(error)})") from None
    try:
        return make(spec=spec, device=device, max_new_tokens=max_new_tokens, **given)  # type: ignore[no-any-return]
    except TypeError as error:
        raise SamError(f"generator: {one_line(error)}") from None


def auto(spec: BaseSpec, device: str, max_new_tokens: int, batch_size: int, precision: str) -> Generator:
    """OpenVINO on a CPU where it is installed and takes the base model, else transformers."""
    from sam.generation.transformers import TransformersGenerator

    if torch.device(device).type == "cpu" and importlib.util.find_spec("openvino_genai"):
        from transformers import AutoConfig

        from sam.generation import openvino_ir
        from sam.generation.openvino import OpenVINOGenerator

        why = openvino_ir.unsupported(AutoConfig.from_pretrained(folder(spec), trust_remote_code=False))
        if why is None:
            return OpenVINOGenerator(spec, device, max_new_tokens, batch_size, precision)
        _report(f"base={spec.name}: {why}; generating with transformers, which is slower")
    return TransformersGenerator(spec, device, max_new_tokens, batch_size, precision)


@lru_cache
def _report(message: str) -> None:
    """Log a message once per process."""
    log.info(message)
