"""One forward pass over the new tokens of many sentences, packed end to end; each attends to its own past only.

There is no padding in what the linear layers see, and a token's slot in the cache is its place in its own prompt, so
nothing depends on the other sentences of the pass, sliding windows included. Works with every model of transformers
whose attention can be exchanged (``AttentionInterface``).

Libraries choose a kernel, and so an order of summation, by a product's shape. Shapes are kept within bounds (``LEAST``,
``BLOCK``, ``MOST``, ``STRIDE``, ``CHUNK``) in which a token's attention is the same to the bit whatever else is in the
pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from sam.base import has_amx
from sam.errors import SamError

NAME = "sam_ragged"
LEAST = 8  # queries of a key head in one product, at least
BLOCK, MOST = 6, 60
"""On Intel's processors without AVX-512, MKL sums the queries that are left over of blocks of ``BLOCK`` in another
order, and so some products of more than ``MOST`` queries."""
STRIDE = 16  # slots are attended to in multiples of this
CHUNK = 128  # slots summed over in one product, at most

_OTHER_ATTENTION = ("s_aux", "sinks", "position_bias", "head_mask")  # what changes more than query, key and value say
_LAYERS = ("full_attention", "sliding_attention")


class KeyValues:
    """Keys [rows, heads, dim, slots] and values [rows, heads, slots, dim] by layer, made as the first pass shows each
    layer's shape."""

    guesses_at_once = True  # whether a prompt may come with guesses of its answer

    def __init__(self, rows: int, slots: int) -> None:
        self.rows, self.slots = rows, _up(slots, STRIDE)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of layer ``index``, in the dtype of ``value``; ``key`` and ``value`` [tokens, heads, dim]
        say what they hold."""
        if index not in self._layers:
            (_, heads, width), dim = key.shape, value.shape[-1]
            keys = _zeros((self.rows, heads, width, self.slots), value)
            self._layers[index] = (keys, _zeros((self.rows, heads, self.slots, dim), value))
        return self._layers[index]

    def move(self, source: int, to: int, slots: int) -> None:
        """Copy the first ``slots`` of a row over another row."""
        for keys, values in self._layers.values():
            keys[to, :, :, :slots] = keys[source, :, :, :slots]
            values[to, :, :slots] = values[source, :, :slots]

    def copy_from(self, other: KeyValues, source: int, to: int, slots: int) -> None:
        """Copy the first ``slots`` of row ``source`` of ``other`` into a row here."""
        for index, (their_keys, their_values) in other._layers.items():
            keys, values = self.layer(index, their_keys[..., 0], their_values[:, :, 0])
            keys[to, :, :, :slots] = their_keys[source, :, :, :slots]
            values[to, :, :slots] = their_values[source, :, :slots]


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros, as a masked slot must hold a finite number; on a CPU, of memory that is new only where it is written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    raw = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(like.dtype).view(*shape)


@dataclass
class Row:
    """What one sentence brings to a pass: ``count`` new tokens after the ``past`` kept ones; whether they are of its
    answer, with guesses, and not (also) of its prompt."""

    count: int
    past: int
    answers: bool = False


@dataclass
class _Group:
    """Rows of the cache and their new tokens from the ``skip``-th on, padded to [rows, width]."""

    rows: Tensor | slice
    width: int
    slots: int  # how many are attended to
    tokens: Tensor  # of the pass, in the order of the next two
    row: Tensor  # each token's row among ``rows``
    at: Tensor  # and its place in it
    slot: Tensor  # [rows, width]: each query's own slot
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    asked: Tensor | None = None  # [rows, key heads, share, width, dim], zero in padded places


class Pass:
    """What the attention of one forward pass needs to know; the same for all layers."""

    def __init__(self, cache: Any, rows: Sequence[Row], share: int, device: str) -> None:
        """``cache``: a :class:`KeyValues`, if this attends. ``rows``: those of the cache, from the first on; ``share``:
        query heads that a key head has, mostly. The pass's tokens come row by row."""
        self.cache, self.given = cache, rows
        self._least, self._device = -(-LEAST // share), device
        table = [(number, row.past + t) for number, row in enumerate(rows) for t in range(row.count)]
        self.rows, self.slots = torch.tensor(table, device=device).T.contiguous()
        self.spare = rounded(len(table)) - len(table)
        self.positions = torch.nn.functional.pad(self.slots, (0, self.spare)).unsqueeze(0)

    @cached_property
    def groups(self) -> list[_Group]:
        """The rows, by how their attention is computed."""
        rows, least = self.given, self._least
        return [_group(rows, chosen, skip, width, least, self._device) for chosen, skip, width in _tiers(rows, least)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """Keep the new keys and values, and attend: query [heads, tokens, dim] -> [tokens, heads, dim].

        All in the dtype of ``value``: rotated queries and keys may have gained precision that they came without. Where
        small products of bf16 depend on what is beside them, in fp32.
        """
        count, dtype = len(self.rows), value.dtype
        if dtype != torch.float32 and value.device.type == "cpu" and has_amx():
            value = value.float()
        key, value = key[:, :count].transpose(0, 1), value[:, :count].transpose(0, 1)
        keys, values = self.cache.layer(layer, key, value)
        keys[self.rows, :, :, self.slots] = key.to(keys.dtype)
        values[self.rows, :, self.slots] = value
        # Query heads that share a key head stand as further queries of it: no key is copied for them.
        query = (query[:, :count].transpose(0, 1) * scale).to(keys.dtype).unflatten(1, (keys.shape[1], -1))
        found = query.new_zeros(count + self.spare, *query.shape[1:3], values.shape[-1])
        for group in self.groups:
            shape = (len(group.slot), *query.shape[1:3], group.width, query.shape[-1])
            if group.asked is None or group.asked.shape != shape or group.asked.dtype != query.dtype:
                group.asked = query.new_zeros(shape)
            group.asked[group.row, :, :, group.at] = query[group.tokens]
            own = (keys[group.rows, ..., : group.slots], values[group.rows, :, : group.slots])
            out = self._mix(group, group.asked.flatten(2, 3), own, window, cap)
            found[group.tokens] = out.unflatten(2, (-1, group.width))[group.row, :, :, group.at]
        return found.flatten(1, 2).to(dtype)

    def _mix(
        self, group: _Group, asked: Tensor, own: tuple[Tensor, Tensor], window: int | None, cap: float | None
    ) -> Tensor:
        """Attention of ``asked`` [rows, key heads, queries, dim] to the rows' own slots."""
        scores = _product(asked, own[0]).float()
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        scores.view(len(asked), -1, group.width, group.slots).add_(self._mask(group, window))
        return _weighted(torch.softmax(scores, -1).to(asked.dtype), own[1])

    def _mask(self, group: _Group, window: int | None) -> Tensor:
        """Minus infinity where a query must not look, else 0: [rows, 1, width, slots]."""
        if window not in group.masks:
            own = torch.arange(group.slots, device=group.slot.device)
            hidden = own > group.slot[..., None]
            if window is not None:
                hidden = hidden | (group.slot[..., None] - own >= window)
            zeros = torch.zeros(hidden.shape, device=group.slot.device)
            group.masks[window] = zeros.masked_fill_(hidden, -math.inf).unsqueeze(1)
        return group.masks[window]


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """[..., queries, slots] times [..., slots, dim], summed in an order that more slots of weight 0 do not change."""
    if weights.dtype != torch.float32:  # more slots have changed no bit in trials with oneDNN's bf16 products
        return torch.matmul(weights, values)
    out = _product(weights[..., :CHUNK], values[..., :CHUNK, :])
    for start in range(CHUNK, values.shape[-2], CHUNK):
        out += _product(weights[..., start : start + CHUNK], values[..., start : start + CHUNK, :])
    return out


def _product(queries: Tensor, other: Tensor) -> Tensor:
    """[rows, heads, queries, n] times [rows, heads, n, m]."""
    if queries.dtype != torch.float32 or queries.device.type != "cpu" or not _sums_by_blocks():
        return torch.matmul(queries, other)
    rows, _, count, _ = queries.shape
    queries = torch.nn.functional.pad(queries, (0, 0, 0, -count % BLOCK))
    if other.shape[:2].numel() == 1:  # several threads would divide a single matrix's queries, within blocks
        queries, other = queries.expand(2, -1, -1, -1), other.expand(2, -1, -1, -1)
    pieces = -(-queries.shape[-2] // MOST)  # about equal ones, as each has to be of LEAST at least
    size = _up(-(-queries.shape[-2] // pieces), BLOCK)
    found = [torch.matmul(some, other) for some in queries.split(size, -2)]
    return torch.cat(found, -2)[:rows, :, :count].contiguous()


@cache
def _sums_by_blocks() -> bool:
    """Whether a query's sums hang on how many queries a product on the CPU has, if that is no multiple of ``BLOCK``."""
    draw = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(2, 1, count, 64, generator=draw, device="cpu", dtype=torch.float32) for count in (2 * BLOCK, 64)
    )
    whole = torch.matmul(queries, keys)
    return not all(
        torch.equal(torch.matmul(queries[:, :, :count], keys), whole[:, :, :count]) for count in range(LEAST, 2 * BLOCK)
    )


def _tiers(rows: Sequence[Row], least: int) -> Iterator[tuple[list[int], int, int]]:
    """(rows, their first token, how many tokens): all rows' first few tokens; the rest of those that bring more.

    Rows that bring about as many tokens are padded together; a prompt does not pad the rows under way.
    """
    counts = [row.count for row in rows]
    width = min(max(counts), least) if len(rows) > 1 else max(counts)
    yield list(range(len(rows))), 0, width
    left = sorted((i for i, n in enumerate(counts) if n > width), key=lambda i: counts[i])
    while left:
        longest = counts[left[-1]] - width
        together = [i for i in left if 2 * (counts[i] - width) >= longest]
        yield sorted(together), width, longest
        left = left[: -len(together)]


def _group(rows: Sequence[Row], chosen: Sequence[int], skip: int, width: int, least: int, device: str) -> _Group:
    starts = np.cumsum([0, *(row.count for row in rows)])
    counts = [min(rows[number].count - skip, width) for number in chosen]
    table = [
        (int(starts[number]) + skip + t, place, t)
        for place, (number, count) in enumerate(zip(chosen, counts, strict=True))
        for t in range(count)
    ]
    tokens, row, at = torch.tensor(table, device=device).T.contiguous()
    width = max(width, least)
    slot = torch.tensor([rows[n].past + skip for n in chosen], device=device)[:, None]
    together = chosen[-1] - chosen[0] + 1 == len(chosen)
    return _Group(
        # Rows that lie together, as those that have just joined do, are looked at where they are.
        rows=slice(chosen[0], chosen[-1] + 1) if together else torch.tensor(chosen, device=device),
        width=width,
        slots=_up(max(rows[n].past + min(rows[n].count, skip + width) for n in chosen), STRIDE),
        tokens=tokens,
        row=row,
        at=at,
        slot=slot + torch.arange(width, device=device),
    )


def rounded(count: int) -> int:
    """The number of tokens that ``count`` are filled up to: libraries prepare a kernel for each number they meet."""
    return _up(count, 16)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sam_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function under ``NAME``: query [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    if sam_pass is None:
        raise SamError(f"attention {NAME} works only inside sam.decoding")
    if unknown := [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]:
        raise SamError(f"the base model's attention uses {unknown[0]}, which is not supported; choose another base")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = sam_pass.attend(module.layer_idx, query[0], key[0], value[0], scale, sliding_window, softcap)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


@contextmanager
def ragged(model: Any) -> Iterator[None]:
    """``model`` attends by :class:`Pass` inside; as before afterwards. Raises SamError for a model that cannot."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - set(_LAYERS)
    if kinds or not getattr(model, "_supports_attention_backend", False):
        why = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "attention that cannot be exchanged"
        raise SamError(f"{type(model).__name__} has {why}; choose a base model with plain or sliding attention")
    before = model.config._attn_implementation
    if before == NAME:
        raise SamError(f"{type(model).__name__} is decoding already; end that first, or load it once more")
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
