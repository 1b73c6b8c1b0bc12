"""One merge of experts from their adapters: the stream of merged deltas, and the key that names the merged model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sam.errors import SamError
from sam.merging import streams
from sam.merging.checks import raw_weights
from sam.merging.deltas import AdapterDeltas
from sam.merging.factors import factor_linear, factor_ties
from sam.merging.spec import CustomMerge, Merge

MERGE_VERSION = 2
"""Part of every model key; to be raised when a change of this package changes merged values."""


def merge_modules(adapters: Sequence[AdapterDeltas], names: Sequence[str], spec: Merge) -> Iterator[tuple[str, Tensor]]:
    """Stream (module, merged ΔW in fp32), modules in order of name; at a time, one module's deltas are held.

    ``names`` are the experts' names, one an adapter. The experts are put in an order of their own first (content hash,
    then name), weights along, so the result is the same bits for every order in which they were selected. One expert
    gives its own ΔW, untouched, whatever ``spec`` is; none gives nothing. A global trim reads all deltas twice before
    the first module comes.

    Raises SamError at the call for a bad ``spec``, the same expert twice, a wrong number of weights, and adapters
    that do not fit together.
    """
    spec.validate()
    _check_names(adapters, names)
    if not adapters:
        return iter(())
    raw_weights(spec.weights, len(adapters), signed=spec.signed_weights)
    if len(adapters) == 1:
        return ((module, adapters[0].delta(module)) for module in adapters[0].modules())
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].content_hash, names[i]))
    weights = None if spec.weights is None else tuple(spec.weights[i] for i in order)
    spec = spec if isinstance(spec, CustomMerge) else replace(spec, weights=weights)
    adapters, names = [adapters[i] for i in order], [names[i] for i in order]
    _check_shapes(adapters, names)
    return _dispatch(adapters, names, spec)


def model_key(base_fingerprint: str, adapters: Sequence[AdapterDeltas], names: Sequence[str], spec: Merge) -> str:
    """SHA-256 (hex) of all that decides the merged model's weights, and of nothing else.

    That is the base model, each expert's content and weight in any order, the canonical spec, and the experts' names
    only where the merge draws random numbers by them. For one expert the spec and the weight are left out; for none
    the base alone counts. Raises SamError as :func:`merge_modules` for a bad spec or list of experts.
    """
    spec.validate()
    _check_names(adapters, names)
    key: dict[str, Any] = {"version": MERGE_VERSION, "base": base_fingerprint}
    if adapters:
        raw_weights(spec.weights, len(adapters), signed=spec.signed_weights)
    if len(adapters) == 1:
        key["experts"] = [[adapters[0].content_hash]]
    elif adapters:
        options = spec.canonical()
        weights = options.pop("weights", [1.0] * len(adapters))
        shown = list(names) if spec.is_random else [""] * len(adapters)
        hashes = [adapter.content_hash for adapter in adapters]
        key["experts"] = sorted([h, n, w] for h, n, w in zip(hashes, shown, weights, strict=True))
        key["merge"] = options
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _dispatch(adapters: list[AdapterDeltas], names: list[str], spec: Merge) -> Iterator[tuple[str, Tensor]]:
    if isinstance(spec, CustomMerge):
        return spec.stream(adapters)
    given: dict[str, Any] = {"lam": spec.lam, "weights": spec.weights}
    if spec.name == "linear":
        return streams.linear_stream(adapters, **given)
    if spec.name == "task_arithmetic":
        return streams.task_arithmetic_stream(adapters, **given)
    if spec.name == "factor_linear":
        return factor_linear(adapters, names, **given)
    given["density"] = spec.density
    if spec.name == "dare":
        return streams.dare_stream(adapters, seed=spec.seed or 0, names=names, **given)
    given["sign"] = spec.sign
    if spec.name == "factor_ties":
        return factor_ties(adapters, names, **given)
    given["aggregate"] = spec.aggregate
    if spec.name == "dare_ties":
        return streams.dare_ties_stream(adapters, seed=spec.seed or 0, names=names, **given)
    if spec.name == "ties":
        return streams.ties_stream(adapters, trim_scope=str(spec.trim_scope), **given)
    raise NotImplementedError(f"merge={spec.name} has options in USES and no stream here")


def _check_names(adapters: Sequence[AdapterDeltas], names: Sequence[str]) -> None:
    if len(names) != len(adapters):
        raise SamError(f"{len(names)} names for {len(adapters)} experts; give one name an expert")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise SamError(f"expert {twice[0]!r} is selected twice; a merge takes each expert once")


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
