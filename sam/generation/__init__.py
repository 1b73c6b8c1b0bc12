"""Completions of a base model and its merges: one file per backend, and a cache."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from sam.errors import SamError, one_line
from sam.extend import TARGET, function_of
from sam.generation.api import Completion, Generator, Request, check_precision
from sam.generation.cache import CompletionCache
from sam.models.base import config_of
from sam.models.spec import BaseSpec
from sam.options import options

__all__ = ["Auto", "Completion", "CompletionCache", "DecodeSpec", "Generator", "Request", "build", "check_constrained"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeSpec:
    """``max_new_tokens`` limits a completion. ``constrained``: only completions in the prompt's own syntax, of the
    requested types and of texts of the sentence, can be generated (:mod:`sam.ner.grammar`)."""

    max_new_tokens: int
    constrained: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecodeSpec:
        """From the plain mapping of a ``conf/decode`` file."""
        spec = options(cls, config, "decode")
        if spec.max_new_tokens < 1:
            raise SamError(f"decode.max_new_tokens={spec.max_new_tokens} must be at least 1")
        return spec


def build(config: Mapping[str, Any], spec: BaseSpec, device: str, decode: DecodeSpec) -> Generator:
    """The generator of a ``conf/generator`` file: ``_target_`` is called with ``spec``, ``device``,
    ``max_new_tokens`` and the file's other options."""
    given = {str(k): v for k, v in config.items() if k != TARGET}
    if TARGET not in config:
        raise SamError("generator._target_ is missing; it names what makes the generator, such as sam.generation.Auto")
    size = given.get("batch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise SamError(f"generator.batch_size={size} must be a whole number, at least 1")
    make = function_of(config, "generator")
    try:
        generator: Generator = make(spec=spec, device=device, max_new_tokens=decode.max_new_tokens, **given)
    except TypeError as error:
        raise SamError(f"generator: {one_line(error)}") from None
    if decode.constrained and not isinstance(generator, Auto):  # whose choice may need a download
        check_constrained(generator)
    return generator


def check_constrained(generator: Generator) -> None:
    """Raise SamError where ``generator`` lacks what holds completions to a grammar. Makes the choice of ``Auto``."""
    from sam.generation.transformers import TransformersGenerator, check_grammars

    if isinstance(generator.chosen if isinstance(generator, Auto) else generator, TransformersGenerator):
        check_grammars()


class Auto:
    """vLLM on a GPU where it is installed beside sam; OpenVINO on a CPU where it is installed and takes the base model;
    else transformers. Chosen when the base model's config is first needed, which may have to be converted or
    downloaded."""

    def __init__(self, spec: BaseSpec, device: str, max_new_tokens: int, batch_size: int, precision: str) -> None:
        check_precision(precision)
        self.spec, self.device, self.max_new_tokens = spec, device, max_new_tokens
        self.batch_size, self.precision = batch_size, precision

    @cached_property
    def chosen(self) -> Generator:
        """The generator that does the work."""
        from sam.generation.transformers import TransformersGenerator

        given = (self.spec, self.device, self.max_new_tokens, self.batch_size, self.precision)
        kind = torch.device(self.device).type
        if kind == "cuda" and _installed("vllm"):
            from sam.generation.vllm import VLLMGenerator

            return VLLMGenerator(*given)
        if kind == "cpu" and _installed("openvino_genai"):
            from sam.generation import openvino_ir
            from sam.generation.openvino import OpenVINOGenerator

            why = openvino_ir.unsupported(config_of(self.spec))
            if why is None:
                return OpenVINOGenerator(*given)
            _report(f"base={self.spec.name}: {why}; generating with transformers, which is slower")
        return TransformersGenerator(*given)

    def key(self) -> dict[str, Any]:
        """See :class:`~sam.generation.api.Generator`."""
        return self.chosen.key()

    def load(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        self.chosen.load(deltas)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """See :class:`~sam.generation.api.Generator`."""
        return self.chosen.generate(requests)

    def close(self) -> None:
        """See :class:`~sam.generation.api.Generator`."""
        if "chosen" in vars(self):
            self.chosen.close()


def _installed(package: str) -> bool:
    """Whether a package can be imported. A folder of its name that is none has no origin, such as ``vllm``'s
    environment in the working directory."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@lru_cache
def _report(message: str) -> None:
    """Log a message once per process."""
    log.info(message)
