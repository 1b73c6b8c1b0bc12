"""How answers are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sam.errors import SamError
from sam.grammar import GRAMMAR_VERSION
from sam.options import options

MODES = ("exact", "fast")

DECODER_VERSION = 6
"""Part of every answer's key: to be raised when a change of the decoder changes how answers are rounded."""


@dataclass(frozen=True)
class DecodeSpec:
    """``max_new_tokens`` bounds an answer; ``batch_size`` sentences are decoded at a time, in fp32 on a CPU
    in each of two lanes (see :func:`~sam.decoding.greedy.stream`), and to no effect on an answer.

    ``mode``: ``exact`` multiplies in the base model's precision, ``fast`` on a CPU in bf16 or int8, as it has them,
    compiled where that is faster (see :mod:`sam.decoding.compiled`).
    ``constrained`` lets only answers be written that are in :mod:`sam.grammar`'s language.
    """

    max_new_tokens: int = 160
    batch_size: int = 64
    mode: str = "fast"
    constrained: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecodeSpec:
        """From the plain mapping of a ``conf/decode`` file."""
        spec = options(cls, config, "decode")
        if spec.mode not in MODES:
            raise SamError(f"decode.mode={spec.mode} is unknown; allowed: {', '.join(MODES)}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(spec, name) < 1:
                raise SamError(f"decode.{name}={getattr(spec, name)} must be at least 1")
        return spec

    def canonical(self, dtype: str, device: str) -> dict[str, Any]:
        """All of decoding that can change an answer."""
        import torch
        import transformers

        from sam.decoding.packed import products

        versions = [torch.__version__.split("+")[0], transformers.__version__]
        # On a GPU, or with a model in half precision, rounding depends on what else is in a batch, and can change the
        # choice of a token.
        kind = torch.device(device).type
        batch = {} if dtype == "float32" and kind == "cpu" else {"batch_size": self.batch_size}
        language = {"constrained": GRAMMAR_VERSION} if self.constrained else {}
        return {
            **batch,
            **language,
            "method": "greedy",
            "decoder": DECODER_VERSION,
            "max_new_tokens": self.max_new_tokens,
            "dtype": products(self.mode, dtype, kind),
            "device": kind,
            "versions": versions,
        }
