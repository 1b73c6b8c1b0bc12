"""Batched greedy decoding of one prompt a sentence, with the prefix they share run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sam import prompts
from sam.base import Base
from sam.decoding.spec import DecodeSpec


@dataclass(frozen=True)
class Answer:
    """A raw answer; ``truncated`` if it reached ``max_new_tokens`` before it ended."""

    text: str
    truncated: bool


def decode(
    base: Base,
    types: Sequence[str],
    texts: Sequence[str],
    spec: DecodeSpec,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The model's greedy answer for each text, asked for ``types``, in the order of ``texts``.

    An answer does not depend on the other texts of its batch (fp32: padding changes rounding by about 1e-6, never the
    choice of a token in our tests; half precision gives no such promise). ``progress`` is called with the number of
    answers done.
    """
    prefix = prompts.prefix(types)
    return decode_prompts(base, [(prefix, prompts.suffix(text)) for text in texts], spec, progress)


@torch.inference_mode()
def decode_prompts(
    base: Base,
    parts: Sequence[tuple[str, str]],
    spec: DecodeSpec,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """As :func:`decode`, for prompts given as (prefix, suffix); each distinct prefix is run once."""
    if not parts:
        return []
    heads = {prefix: number for number, prefix in enumerate(dict.fromkeys(prefix for prefix, _ in parts))}
    prefixes = [_ids(base, prefix, special=True) for prefix in heads]
    rows = [_Row(heads[prefix], _ids(base, suffix)) for prefix, suffix in parts]
    longest = max(map(len, prefixes)) + max(len(row.suffix) for row in rows)
    padding = _bears_padding(DynamicCache(config=base.model.config), longest + spec.max_new_tokens)
    answers: dict[int, Answer] = {}
    # The longest first: the peak of memory is met at once, not at the end of a long run.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].suffix), i))
    for part in _cut(order, rows, spec.batch_size, padding):
        answers.update(zip(part, _batch(base, prefixes, [rows[i] for i in part], spec), strict=True))
        if progress:
            progress(len(part))
    return [answers[i] for i in range(len(rows))]


@dataclass(frozen=True)
class _Row:
    """One prompt: the number of its prefix, and the token ids of its suffix."""

    prefix: int
    suffix: list[int]


class _GrowingLayer(DynamicLayer):
    """A cache layer that writes new tokens into spare room, where DynamicLayer copies all it holds at each token."""

    ROOM = 64
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, heads, new, dim] keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        if not self._fits(past + new):
            self._rooms = (self._room(self.keys, key_states, past), self._room(self.values, value_states, past))
        rooms = self._rooms or ()
        for room, states in zip(rooms, (key_states, value_states), strict=True):
            room[:, :, past : past + new] = states
        self.keys, self.values = (room[:, :, : past + new] for room in rooms)
        return self.keys, self.values

    def _fits(self, length: int) -> bool:
        """Whether the held keys still lie in their room (batch selection moves them out), and ``length`` fits it."""
        room = self._rooms[0] if self._rooms else None
        if room is None or self.keys is None or room.shape[-2] < length:
            return False
        return room.data_ptr() == self.keys.data_ptr() and room.shape[0] == self.keys.shape[0]

    def _room(self, held: torch.Tensor | None, new: torch.Tensor, past: int) -> torch.Tensor:
        batch, heads, count, dim = new.shape
        room = new.new_empty(batch, heads, past + count + self.ROOM, dim)
        if past and held is not None:
            room[:, :, :past] = held
        return room


def _bears_padding(cache: DynamicCache, most: int) -> bool:
    """Whether padding leaves answers as they are, in a model with this cache and at ``most`` tokens a row.

    A sliding window counts slots, padding too: once it slides, a padded row sees fewer tokens than it would alone.
    Layers of other kinds (chunked, recurrent) are not trusted with padding either.
    """

    def bears(layer: Any) -> bool:
        fits = type(layer) is DynamicSlidingWindowLayer and most <= layer.sliding_window
        return type(layer) is DynamicLayer or fits

    return all(map(bears, cache.layers))


def _cut(order: Sequence[int], rows: Sequence[_Row], size: int, padding: bool) -> Iterator[list[int]]:
    """``order`` (by falling length) in batches of at most ``size``; without ``padding``, of rows of one shape each."""

    def shape(i: int) -> tuple[int, int]:
        return len(rows[i].suffix), rows[i].prefix

    groups = [list(order)] if padding else [list(g) for _, g in groupby(sorted(order, key=shape, reverse=True), shape)]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _ids(base: Base, text: str, special: bool = False) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=special).input_ids)


def _left_padded(base: Base, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [rows, longest], padded on the left."""
    width, pad = max(map(len, ids)), base.stop_ids[0]
    padded = [[pad] * (width - len(row)) + list(row) for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(padded, device=base.device), torch.tensor(mask, device=base.device)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _prefill(base: Base, prefixes: Sequence[Sequence[int]], rows: Sequence[_Row]) -> tuple[DynamicCache, torch.Tensor]:
    """The cache of the rows' prefixes, each distinct one run once, and its attention mask [rows, width]."""
    used = sorted({row.prefix for row in rows})
    ids, mask = _left_padded(base, [prefixes[number] for number in used])
    cache = DynamicCache(config=base.model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    base.model(
        input_ids=ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache, logits_to_keep=1
    )
    places = torch.tensor([used.index(row.prefix) for row in rows], device=base.device)
    cache.batch_select_indices(places)
    return cache, mask[places]


def _batch(base: Base, prefixes: Sequence[Sequence[int]], rows: Sequence[_Row], spec: DecodeSpec) -> Iterator[Answer]:
    cache, before = _prefill(base, prefixes, rows)
    ids, real = _left_padded(base, [row.suffix for row in rows])
    mask = torch.cat([before, real], dim=1)
    positions = _positions(mask)[:, before.shape[1] :]
    stops = torch.tensor(base.stop_ids, device=base.device)
    alive = torch.arange(len(rows), device=base.device)
    generated: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    for _ in range(spec.max_new_tokens):
        out = base.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        token = out.logits[:, -1].argmax(-1)
        stopped = torch.isin(token, stops)
        for row, t, stop in zip(alive.tolist(), token.tolist(), stopped.tolist(), strict=True):
            ended[row] = stop
            if not stop:
                generated[row].append(t)
        if stopped.any():
            keep = (~stopped).nonzero().squeeze(1)
            if not len(keep):
                break
            # Rows that have ended leave the batch, so that a long answer does not hold up the others.
            cache.batch_select_indices(keep)
            alive, token, mask, positions = alive[keep], token[keep], mask[keep], positions[keep]
        ids = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    for made, end in zip(generated, ended, strict=True):
        yield Answer(base.tokenizer.decode(made, skip_special_tokens=True), truncated=not end)
