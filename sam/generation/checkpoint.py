"""The weights of a base model's checkpoint, and those that a merge puts in their place, decoder layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sam.errors import SamError
from sam.merging import AdapterDeltas
from sam.merging.apply import check_fit, no_module
from sam.models.base import config_of
from sam.models.sources import folder
from sam.models.spec import BaseSpec

TIED = ("model.embed_tokens.weight", "lm_head.weight")


class Checkpoint:
    """What an engine that has loaded the checkpoint of ``spec`` in ``dtype`` must replace to have a merged model.

    The warm start is not in the checkpoint: it is the first thing that is replaced.
    """

    def __init__(self, spec: BaseSpec, dtype: str) -> None:
        self._own, self._dtype = getattr(torch, spec.dtype), getattr(torch, dtype)
        self._files: dict[str, Path] = {}
        for path in sorted(folder(spec).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        self._tied = TIED if config_of(spec).get_text_config().tie_word_embeddings else ()
        self._fold = None if spec.fold is None else AdapterDeltas.open(Path(spec.fold).expanduser())
        # Layers in which the engine has other weights than it should. The base model's are rounded to its own dtype.
        rounded = self._own not in (torch.float32, self._dtype)
        modules = map(_module, self._files) if rounded else self._fold or ()
        self._stale = {layer_of(module) for module in modules}

    def replaced(self, deltas: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """All weights of each decoder layer that the engine has not as the base model plus ``deltas`` has them.

        Raises SamError for a delta that does not fit, and for a layer whose deltas do not come one after the other.
        """
        before, self._stale = self._stale, set()
        for layer, of in groupby(deltas, lambda pair: layer_of(pair[0])):
            if layer in self._stale:
                raise SamError(f"the deltas of {layer} do not come together; give deltas in the order of module names")
            self._stale.add(layer)
            yield self._layer(layer, of)
        for layer in sorted(before - self._stale):
            yield self._layer(layer, ())

    def _layer(self, layer: str, deltas: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for module, delta in deltas:
            name = f"{module}.weight"
            if name not in self._files:
                raise no_module(module)
            weight = self._base(name)
            check_fit(module, weight, delta, [n.removesuffix(".weight") for n in made], self._owners(name))
            made[name] = _plus(weight, delta)
            del delta  # before the next is made
        rest = (name for name in self._files if layer_of(_module(name)) == layer and name not in made)
        return made | {name: self._base(name) for name in rest}

    def _owners(self, name: str) -> tuple[str, ...]:
        return self._tied if name in self._tied else (name,)

    def _base(self, name: str) -> Tensor:
        """The base model's weight ``name``, with the warm start, rounded to its own dtype before the engine's."""
        with safe_open(self._files[name], framework="pt") as file:
            weight = file.get_tensor(name).to(self._own)
        module = _module(name)
        if self._fold is not None and module in self._fold and name == f"{module}.weight":
            delta = self._fold[module]
            check_fit(module, weight, delta, (), self._owners(name))
            weight = _plus(weight, delta)
        return weight.to(self._dtype)


def layer_of(module: str) -> str:
    """The decoder layer that a module is of, such as ``model.layers.3``; a module outside of them, itself."""
    match = re.match(r"(.*?\.\d+)\.", module)
    return match[1] if match else module


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _plus(weight: Tensor, delta: Tensor) -> Tensor:
    """Added in fp32, rounded once to the weight's dtype."""
    return (weight.float() + delta).to(weight.dtype).contiguous()
