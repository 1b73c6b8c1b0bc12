"""Linear layers in the form that the processor multiplies fastest, for the time of decoding.

``exact`` lays the weights out for oneDNN in the model's own precision: fp32 then runs up to twice as fast as in the
plain layout. ``fast`` multiplies an fp32 model in fewer bits, as :func:`products` says:

- in bf16 where the processor does so itself, and what lies between the products of one block stays in it, keys and
  values too (but for attention with AMX); the sum over the layers stays in fp32, and so do the logits: the largest,
  which are all that free greedy decoding looks at, or all of them;
- on another x86 processor with AVX2 in int8 (see :mod:`sam.decoding.int8`). All that is not a product stays in fp32,
  and so do the logits, as above. It pays from some tens of tokens a pass on;
- :mod:`sam.decoding.compiled` stands in for that where the processor has AMX (in bf16) or VNNI alone (in int8) and can
  compile the model; only the output layer stays, in the same of the two.

Layers that read the same input (q, k, v; gate, up) are multiplied as one. Either way what is packed gives a token the
same result to the bit whatever else is in the batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor, nn

from sam import prompts
from sam.base import SIBLINGS, Base, cores, has_amx, has_vnni, multiplies_bf16
from sam.decoding.int8 import AT_ONCE, divisors, packed_int8, packs_int8, quantized
from sam.merging import MergedWeights

Linear = Callable[[Tensor], Tensor]

BLOCKS = {frozenset({*names, last}): names for names, last in zip(SIBLINGS, ("o_proj", "down_proj"), strict=True)}
"""The linear layers of transformers' attention and feed-forward blocks, and those of them whose results stay inside."""

HALF, INT8 = "bfloat16 products, logits bounded", "int8 products, logits bounded, balanced"
GROUPS = "int8 by groups of at most 128, balanced"
"""What ``fast`` makes of fp32 ones, the last by OpenVINO, as an answer's key has it: to be renamed when it changes."""
RANGE = 128  # neighbouring logits of which the largest is looked at first
ALIGNED = 8
"""What int8 rounds off a logit's input, or its weights, is taken to have at most this many times the cosine with what
that is multiplied with that random vectors have: an outlier so large that nearly all else rounds to 0 may break that.
In bf16, which rounds off less, any cosine is allowed."""
SHORT = 2**-8  # by what share the rest of a rough product may err: given in bf16, or summed up in another order
ROWS = 64
"""Tokens that a processor with AMX multiplies at a time: oneDNN adds up in another order for few than for many, so that
a token's result would hang on its company; larger blocks are a tenth faster, and cost more when they are not full."""
LEAST = 2
"""Cores that OpenVINO is used from on, and threads that it has with AMX at least: with one thread and AMX its 2026.4
divides by zero, as it fuses feed-forward blocks."""
PICKS = 4096  # logits that are computed in fp32 at a time


class PackedWeights(MergedWeights):
    """As :class:`MergedWeights`, with all linear layers packed while a merge is applied; the base stays as it is.

    In ``fast`` mode queries, keys and values may differ in dtype, which :func:`~sam.decoding.ragged.ragged` takes.
    Where there is no oneDNN (on a GPU), and for layers that are not ``nn.Linear``, merges are added in place.
    """

    def __init__(self, model: nn.Module, mode: str, *, all_logits: bool, sample: Sequence[int] = ()) -> None:
        """``all_logits``: whether ``fast`` gives all logits in fp32 or, enough for a free choice, the largest.

        ``sample``: token ids of a text like those to come, from which int8 learns how large a layer's inputs are; with
        none it takes them as they come, and errs more. It is run once, by the base alone, in the first :meth:`apply`.
        """
        super().__init__(model)
        lead = next(model.parameters())
        self._on_cpu = lead.device.type == "cpu"
        self._head = cast(Any, model).get_output_embeddings()
        found = products(mode, str(lead.dtype).removeprefix("torch."), lead.device.type)
        self._half, self._int8 = found.startswith(HALF), found.startswith(INT8)
        self._all_logits, self._sample = all_logits, sample
        self._divisors: dict[nn.Module, Tensor] | None = None  # layer -> what int8 divides its inputs by
        self._merged: dict[nn.Module, Tensor] = {}  # weights that wait for the layers they are multiplied with
        # Teams that no expert touches, packed once, by what their results are.
        self._unmerged: dict[tuple[tuple[nn.Module, ...], torch.dtype], list[Linear]] = {}
        self._packed: dict[nn.Module, None] = {}
        self._team: dict[nn.Module, tuple[nn.Module, ...]] = {}  # packable layer -> all that are multiplied with it
        self._parent: dict[nn.Module, nn.Module] = {}  # packable layer -> the module that calls it
        self._inner: set[nn.Module] = set()  # layers whose results may stay as they were multiplied

    @classmethod
    def of(cls, base: Base, mode: str, *, constrained: bool) -> PackedWeights:
        """For answers of ``base``; all of its logits are needed where not any answer may be written."""
        return cls(base.model, mode, all_logits=constrained, sample=base.tokenizer(prompts.SAMPLE).input_ids)

    def apply(self, modules: Iterable[tuple[str, Tensor]]) -> None:
        """As :meth:`MergedWeights.apply`; no module at all gives the base model itself, packed."""
        teams = list(self._teams())
        self._team = {layer: team for _, team in teams for layer in team}
        self._parent = {layer: parent for parent, team in teams for layer in team}
        self._inner = set(self._blocks())
        super().apply(self._after_a_look(modules))
        try:
            for layer, team in self._team.items():
                if layer is team[0] and layer not in self._packed:
                    self._pack(team)
        except BaseException:
            self._restore()
            raise

    def _after_a_look(self, modules: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """``modules``, the first of them after a look at the base, now that no other merge can be applied."""
        self._look()
        yield from modules

    def _look(self) -> None:
        """Let the base show what it makes of the sample, if it has not yet."""
        if self._int8 and self._divisors is None:
            self._divisors = divisors(self.model, self._sample)

    def _set(self, module: nn.Module, weight: Tensor, merged: Tensor) -> None:
        team = self._team.get(module)
        if team is None:
            super()._set(module, weight, merged)
            return
        # A stream may have o between k and q; but from another parent on, what one waits for has no expert.
        for other in [layer for layer in self._merged if self._parent[layer] is not self._parent[module]]:
            if other in self._merged:
                self._pack(self._team[other])
        self._merged[module] = merged.to(self._dtype(module))
        if team[0] in self._packed:  # late: the others go on with their parts
            self._pack((module,))
        elif all(layer in self._merged for layer in team):
            self._pack(team)

    def _teams(self) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
        """(parent, layers) of all layers that can be packed, those that are multiplied as one together."""
        seen: set[nn.Module] = set()
        for parent in self.model.modules():
            layers = {n: child for n, child in parent.named_children() if child not in seen and self._can_pack(child)}
            seen.update(layers.values())
            for names in SIBLINGS:
                found = [cast(Any, layers[name]) for name in names if name in layers]
                kinds = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in found}
                if len(set(found)) == len(names) and len(kinds) == 1:
                    yield parent, tuple(layers.pop(name) for name in names)
            yield from ((parent, (layer,)) for layer in dict.fromkeys(layers.values()))

    def _blocks(self) -> Iterator[nn.Module]:
        """The layers within blocks that are packed whole: only attention, activations and packed layers follow them."""
        for parent in dict.fromkeys(self._parent.values()):
            layers = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
            if all(child in self._team for child in layers.values()):
                yield from (layers[name] for name in BLOCKS.get(frozenset(layers), ()))

    def _can_pack(self, module: nn.Module) -> bool:
        """Whether it is a plain linear layer, with no ``forward`` of somebody else's, of a kind that oneDNN packs."""
        plain = self._on_cpu and type(module) is nn.Linear and "forward" not in vars(module)
        return plain and packs(cast(Tensor, module.weight).dtype)

    def _dtype(self, module: nn.Module) -> torch.dtype:
        """What its weight is multiplied in."""
        return torch.bfloat16 if self._half and self._shrinks(module) else cast(Tensor, module.weight).dtype

    def _shrinks(self, module: nn.Module) -> bool:
        """Whether ``fast`` multiplies it in fewer bits."""
        return module is not self._head and cast(Tensor, module.weight).dtype == torch.float32

    def _pack(self, team: tuple[nn.Module, ...]) -> None:
        """Let the layers of ``team`` work with their merged weights, or their own where no expert touches them."""
        merged = [self._merged.pop(layer, None) for layer in team]
        untouched = all(weight is None for weight in merged)
        lead = team[0]
        result = self._dtype(lead) if lead in self._inner else cast(Tensor, lead.weight).dtype
        forwards = self._unmerged.get((team, result)) if untouched else None
        if forwards is None:
            weights = [
                cast(Tensor, layer.weight).detach().to(self._dtype(layer)) if weight is None else weight
                for layer, weight in zip(team, merged, strict=True)
            ]
            biases = [cast(Any, layer).bias for layer in team]
            if lead is self._head and self._short(weights[0], biases[0]):
                forwards = [self._short_head(weights[0])]
            else:
                pack = _packed
                if self._int8 and self._shrinks(lead):
                    pack = partial(packed_int8, divisor=(self._divisors or {}).get(lead))
                forwards = _forwards(weights, biases, result, pack)
            if untouched:
                self._unmerged[team, result] = forwards
        for layer, forward in zip(team, forwards, strict=True):
            self._packed[layer] = None  # first, so that an interrupt leaves nothing behind
            layer.forward = forward  # type: ignore[method-assign]

    def _short(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether only the largest results of the output layer need be fp32, and can be."""
        fits = bias is None and weight.dtype == torch.float32 and len(weight) % RANGE == 0
        return (self._half or self._int8) and not self._all_logits and fits

    def _short_head(self, weight: Tensor) -> Linear:
        if self._int8:
            rough, errors = packed_int8(weight, None, torch.float32), _errors(weight, partial(quantized, weights=True))
            return _largest(weight, rough, errors, quantized, min(1, ALIGNED / math.sqrt(weight.shape[1])))
        rough = _packed(weight.to(torch.bfloat16), None, torch.float32)
        return _largest(weight, rough, _errors(weight, _halved), _halved, 1)

    def _restore(self) -> None:
        for module in self._packed:
            vars(module).pop("forward", None)
        self._packed.clear()
        self._merged.clear()
        super()._restore()


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch, on this processor, has oneDNN's packed linear layers in ``dtype``."""
    try:
        return bool(_packed(torch.ones(16, 16, dtype=dtype), None, dtype)(torch.ones(1, 16, dtype=dtype)).sum() == 256)
    except (AttributeError, RuntimeError):
        return False


@cache
def compiled_in() -> str | None:
    """What OpenVINO multiplies in, ``bf16`` or ``int8``, where ``fast`` uses it for the models that
    :mod:`sam.decoding.compiled` can compile: with AMX in bf16, with VNNI alone in int8."""
    try:
        version("openvino")
    except PackageNotFoundError:
        return None
    found = "bf16" if has_amx() else "int8" if has_vnni() and packs_int8() else None
    return found if cores() >= LEAST else None


def products(mode: str, dtype: str, device: str) -> str:
    """What the linear layers of a model in ``dtype`` are multiplied in, and by what if it can be compiled: of all that
    decides a token's rounding, what hangs on the machine. ``device``: its kind, as ``cpu``."""
    if device != "cpu":
        return dtype
    found = dtype
    if mode == "fast" and dtype == "float32" and packs(torch.float32):
        if packs(torch.bfloat16) and multiplies_bf16():
            found = HALF
        elif packs_int8():
            found = INT8
    compiled = found != dtype and compiled_in()
    if found.startswith(("bfloat16", "float16")) and has_amx():
        found = f"{found} in blocks"
    if compiled:
        found = f"{found}, OpenVINO {version('openvino')}" + (f" {GROUPS}" if compiled == "int8" else "")
    return found


class _Held(threading.local):
    """An input, and those parts of its result that are yet to be taken."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type[_Held], tuple[()]]:
        return _Held, ()  # a copy of the model has none


class _Together:
    """Layers of one input, multiplied as one when the first of them is asked; each takes its own part of the result.

    The input must not be changed in place before all have: decoders call them one after the other on one tensor, each
    thread for itself.
    """

    def __init__(self, linear: Linear, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        self._held = _Held()

    def part(self, number: int, x: Tensor) -> Tensor:
        held = self._held
        if x is not held.input or number not in held.parts:
            held.input = x
            held.parts = dict(enumerate(self.linear(x).split(self.sizes, -1)))
        found = held.parts.pop(number)
        if not held.parts:
            held.input = None
        return found


def _forwards(
    weights: list[Tensor], biases: list[Tensor | None], result: torch.dtype, pack: Callable[..., Linear]
) -> list[Linear]:
    """What computes each of the layers, which share their input."""
    offsets = [bias.detach() for bias in biases if bias is not None]
    linear = pack(torch.cat(weights), torch.cat(offsets) if offsets else None, result)
    if len(weights) == 1:
        return [linear]
    together = _Together(linear, [len(weight) for weight in weights])
    return [partial(together.part, number) for number in range(len(weights))]


def _halved(rows: Tensor) -> Tensor:
    """Tokens, or the weights of outputs, rounded to bf16."""
    return rows.bfloat16().float()


def _errors(weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """How long what ``rounded`` leaves out of each output's weights is: [outputs]."""
    return torch.cat([(part - rounded(part)).norm(dim=-1) for part in weight.split(AT_ONCE)])


def _largest(
    weight: Tensor, rough: Linear, errors: Tensor, rounded: Callable[[Tensor], Tensor], parallel: float
) -> Linear:
    """``x -> x Wᵀ``, as ``rough`` multiplies; the results that may be the largest of their row again, in fp32.

    ``rough`` multiplies what ``rounded`` makes of ``x`` with weights that are off by ``errors``. ``parallel``: the
    largest cosine between what that leaves out and what it is multiplied with.
    """
    lengths, errors = (parallel * x.view(-1, RANGE) for x in (weight.norm(dim=-1), errors))
    longest, worst = lengths.amax(-1), errors.amax(-1)

    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        logits = rough(flat)
        near = rounded(flat)
        error, length = (part.norm(dim=-1, keepdim=True) for part in (flat - near, near))
        ranges = logits.view(len(logits), *lengths.shape)
        tops = ranges.amax(-1)
        margins = error * longest + length * worst + SHORT * tops.abs()
        least = (tops - margins).amax(-1, keepdim=True)
        row, where = (tops + margins >= least).nonzero(as_tuple=True)
        found = ranges[row, where]
        margins = error[row] * lengths[where] + length[row] * errors[where] + SHORT * found.abs()
        pick, place = (found + margins >= least[row]).nonzero(as_tuple=True)
        row, token = row[pick], where[pick] * RANGE + place
        for rows, tokens in zip(row.split(PICKS), token.split(PICKS), strict=True):
            logits[rows, tokens] = (flat[rows] * weight[tokens]).sum(-1)
        return logits.view(*x.shape[:-1], len(weight))

    return forward


def _packed(weight: Tensor, bias: Tensor | None, result: torch.dtype) -> Linear:
    """``x -> x Wᵀ + b`` in the dtype of ``weight``, given as ``result``; a row's result is the same to the bit whatever
    the others are."""
    # The number is the tokens to expect; other numbers give the same result.
    dtype, laid = weight.dtype, torch.ops.mkldnn._reorder_linear_weight(weight, 256)
    offset, width = None if bias is None else bias.to(dtype), len(weight)

    def product(rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, laid, offset, "none", [], "")

    def forward(x: Tensor) -> Tensor:
        return product(x.to(dtype)).to(result)

    def in_blocks(x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        count = -(-len(rows) // ROWS) * ROWS
        padded, found = rows.new_zeros(count, x.shape[-1], dtype=dtype), rows.new_empty(len(rows), width, dtype=result)
        padded[: len(rows)] = rows
        for start in range(0, count, ROWS):
            found[start : start + ROWS] = product(padded[start : start + ROWS])[: len(rows) - start]
        return found.view(*x.shape[:-1], width)

    return in_blocks if dtype != torch.float32 and has_amx() else forward
