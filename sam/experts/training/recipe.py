"""The recipe of an expert (``conf/train``), and the hash by which a training is recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sam import data as corpora
from sam.errors import SamError
from sam.ner import prompts
from sam.options import options

if TYPE_CHECKING:
    from sam.models.base import Base

DATA_VERSION = 4
"""Raise it with every change to which sentences are drawn for a recipe, or to how they are shown."""

OPEN = "open_types"
"""The dataset whose sentences each have entity types of their own."""

MEASURES = ("heldout", "heldout_open")
"""The parts of a recipe that do not change what is learnt."""


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; ``conf/train`` has the defaults.

    ``sentences`` is the budget of a domain, ``epochs`` the passes over them. ``label_drop`` is the chance that a type
    is left out of a prompt (its mentions too), ``negatives`` the most
    :func:`~sam.experts.training.draw.foreign_types` that a prompt asks for beside its own, ``max_types`` the most types
    in a prompt, ``max_empty`` the largest share of sentences without a mention, ``detokenise`` the chance that a
    sentence is shown with ordinary spacing (``C++ (a language).``) instead of its corpus's tokens, ``max_length`` the
    most tokens of a sentence and its target completion (beside those of the prompt's types). ``open_sentences`` of the
    dataset :data:`OPEN` are mixed in (0: none), in batches of ``open_batch_size``; label drop, negatives, ``max_types``
    and detokenising do not apply to them. ``heldout`` (per dataset) and ``heldout_open`` (per split) sentences are for
    scoring the finished expert. ``fused``: train by :mod:`sam.experts.training.fused`.
    """

    sentences: int
    open_sentences: int
    epochs: int
    batch_size: int
    open_batch_size: int
    lr: float
    warmup: float
    weight_decay: float
    clip: float
    r: int
    alpha: int
    label_drop: float
    negatives: int
    max_types: int
    max_empty: float
    detokenise: float
    max_length: int
    heldout: int
    heldout_open: int
    seed: int
    fused: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """From the plain mapping of ``conf/train``; refuses unknown and missing keys, values of another type or out of
        range."""
        recipe = options(cls, config, "train")
        for name in ("sentences", "epochs", "batch_size", "open_batch_size", "r", "alpha", "max_types", "max_length"):
            if getattr(recipe, name) < 1:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be at least 1")
        if not recipe.lr > 0:
            raise SamError(f"train.lr={recipe.lr} must be above 0")
        for name in ("weight_decay", "clip", "heldout", "heldout_open", "negatives", "open_sentences"):
            if not getattr(recipe, name) >= 0:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be at least 0")
        for name in ("warmup", "label_drop", "max_empty"):
            if not 0 <= getattr(recipe, name) < 1:
                raise SamError(f"train.{name}={getattr(recipe, name)} must lie in [0, 1)")
        if not 0 <= recipe.detokenise <= 1:
            raise SamError(f"train.detokenise={recipe.detokenise} must lie in [0, 1]")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping that cards and hashes have: ``fused`` only if false, as it learns the same."""
        return {name: value for name, value in asdict(self).items() if name != "fused" or not value}


def recipe_hash(base: Base, domains: Sequence[Sequence[str]], recipe: Recipe, precision: str) -> str:
    """The hash of all that decides what is learnt; what only measures (:data:`MEASURES`) is left out."""
    unused = () if recipe.open_sentences else ("open_sentences", "open_batch_size")
    learnt = {k: v for k, v in recipe.to_dict().items() if k not in (*MEASURES, *unused)}
    parts = [base.fingerprint, prompts.PROMPT_VERSION, DATA_VERSION, [list(d) for d in domains], learnt, precision]
    parts += [] if base.dtype == "float32" else [base.dtype]
    if recipe.open_sentences:
        files = corpora.spec(OPEN)
        parts.append([files.files[path].mirror for path in files.paths("train")])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
