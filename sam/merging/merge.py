"""One merge of experts from their adapters: the stream of merged deltas, and the key that names the merged model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam.errors import SamError
from sam.extend import Configured
from sam.merging.checks import check_count
from sam.merging.deltas import AdapterDeltas
from sam.merging.stream import DeltaSet, Merged, Method, module_names

MERGE_VERSION = 2
"""Part of every model key; to be raised when a change of this package changes merged values."""


@dataclass(frozen=True)
class Merge(Configured):
    """A merge method and its options: one of :mod:`sam.merging.methods`, or any function that takes the list of ΔW of
    one module (fp32, an expert without the module as zeros) and the options, and returns the merged ΔW.

    The option ``weights`` has one number per expert, in the order of the experts.
    """

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Merge:
        """From a ``conf/merge`` file: ``_target_`` names the function, all but ``name`` are options of it.

        Raises SamError for an option that it does not take, one that it needs, and a value out of range.
        """
        merge = cls.read(config, "merge", 1, ["name"])
        merge.check()
        return merge

    def check(self) -> None:
        """Raise SamError for a value that a method of ours refuses: it is called with experts that have no module."""
        if not isinstance(self.function, Method):
            return
        count = len(self.weights) if isinstance(self.weights, list | tuple) else 1
        try:
            self.stream([AdapterDeltas(Path(), {})] * count, [str(index) for index in range(count)])
        except SamError as error:
            raise SamError(f"merge.{error}") from None
        except TypeError as error:
            raise SamError(f"merge={self.name}: {error}") from None

    @property
    def weights(self) -> Sequence[float] | None:
        """The experts' weights, if some are given."""
        return self.options.get("weights")

    @property
    def is_random(self) -> bool:
        """Whether random numbers are drawn, by the experts' names: where a method of another's is given them, it is
        taken to do so."""
        takes_names = isinstance(self.function, Method) and self.function.takes_names
        return takes_names and ("seed" in self.options or not self.ours)

    def stream(self, sets: Sequence[DeltaSet], names: Sequence[str]) -> Merged:
        """(module, merged ΔW in fp32), modules in order of name."""
        if not isinstance(self.function, Method):
            return self._module_by_module(sets)
        named = {"names": names} if self.function.takes_names else {}
        return self.function.stream(sets, **self.options, **named)

    def _module_by_module(self, sets: Sequence[DeltaSet]) -> Merged:
        for module in module_names(sets):
            known = {index: one[module].to(torch.float32) for index, one in enumerate(sets) if module in one}
            shape = next(iter(known.values())).shape
            deltas = [known.get(index, torch.zeros(shape)) for index in range(len(sets))]
            merged = self.function(deltas, **self.options)
            if not isinstance(merged, Tensor) or merged.shape != shape:
                got = f"shape {list(merged.shape)}" if isinstance(merged, Tensor) else f"a {type(merged).__name__}"
                raise SamError(f"merge: {self.shown} returned {got} for {module}; it must return a ΔW of {list(shape)}")
            yield module, merged.float()

    def reordered(self, order: Sequence[int]) -> Merge:
        """The same merge of the experts in another order."""
        if self.weights is None:
            return self
        return replace(self, options={**self.options, "weights": [self.weights[i] for i in order]})

    def content(self) -> dict[str, Any]:
        """What the merged values depend on besides the experts and their weights, as plain values for JSON."""
        options = {name: value for name, value in self.options.items() if name != "weights"}
        return Configured(self.function, {n: _plain(n, v) for n, v in options.items()}, self.target).content()


def _plain(name: str, value: Any) -> Any:
    """Whole numbers as floats, so that 1 is 1.0; seeds as they are."""
    return float(value) if type(value) is int and name != "seed" else value


def merge_modules(
    adapters: Sequence[AdapterDeltas], names: Sequence[str], merge: Merge
) -> Iterator[tuple[str, Tensor]]:
    """Stream (module, merged ΔW in fp32), modules in order of name; at a time, one module's deltas are in memory.

    ``names`` are the experts' names, one per adapter. The experts are put in an order of their own first (content hash,
    then name), weights along, so the result is the same bits for every order in which they were selected. One expert
    gives its own ΔW, untouched, whatever ``merge`` is; none gives nothing. A global trim reads all deltas twice before
    the first module comes.

    Raises SamError at the call for bad options, the same expert twice, a wrong number of weights, and adapters that do
    not fit together.
    """
    _check(adapters, names, merge)
    if len(adapters) < 2:
        return ((module, adapter.delta(module)) for adapter in adapters for module in adapter.modules())
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].content_hash, names[i]))
    adapters, names = [adapters[i] for i in order], [names[i] for i in order]
    _check_shapes(adapters, names)
    return merge.reordered(order).stream(adapters, names)


def model_key(base_fingerprint: str, adapters: Sequence[AdapterDeltas], names: Sequence[str], merge: Merge) -> str:
    """SHA-256 (hex) of all that decides the merged model's weights, and of nothing else.

    That is the base model, each expert's content and weight in any order, the merge, and the experts' names only where
    the merge draws random numbers by them. For one expert the merge and the weight are left out; for none the base
    alone counts. Raises SamError as :func:`merge_modules` for a bad list of experts.
    """
    _check(adapters, names, merge)
    key: dict[str, Any] = {"version": MERGE_VERSION, "base": base_fingerprint}
    if len(adapters) == 1:
        key["experts"] = [[adapters[0].content_hash]]
    elif adapters:
        weights = [1.0] * len(adapters) if merge.weights is None else [float(w) for w in merge.weights]
        shown = list(names) if merge.is_random else [""] * len(adapters)
        hashes = [adapter.content_hash for adapter in adapters]
        key["experts"] = sorted([h, n, w] for h, n, w in zip(hashes, shown, weights, strict=True))
        key["merge"] = merge.content()
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _check(adapters: Sequence[AdapterDeltas], names: Sequence[str], merge: Merge) -> None:
    merge.check()
    if len(names) != len(adapters):
        raise SamError(f"{len(names)} names for {len(adapters)} experts; give one name per expert")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise SamError(f"expert {twice[0]!r} is selected twice; a merge takes each expert once")
    if adapters and merge.weights is not None:
        check_count(merge.weights, len(adapters))


def _check_shapes(adapters: Sequence[AdapterDeltas], names: Sequence[str]) -> None:
    """All shapes before any work, so that a misfit is not found in the midst of a merge."""
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for adapter, name in zip(adapters, names, strict=True):
        for module in adapter.modules():
            shape, other = seen.setdefault(module, (adapter.shape(module), name))
            if shape != adapter.shape(module):
                raise SamError(
                    f"experts {other} and {name} differ in the shape of {module} ({shape} and "
                    f"{adapter.shape(module)}); merge experts of the same base model"
                )
