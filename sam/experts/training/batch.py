"""A training batch as token ids, and as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100
"""The label of a token that the loss is not on."""


@dataclass(frozen=True)
class Example:
    """Token ids of one sentence, as the part of the prompt that is its own, and its target completion: the loss is on
    the last ``completion`` of them."""

    ids: tuple[int, ...]
    completion: int

    @property
    def labels(self) -> list[int]:
        """The ids where the loss is, :data:`IGNORED` elsewhere."""
        prompt = len(self.ids) - self.completion
        return [IGNORED] * prompt + list(self.ids[prompt:])


@dataclass(frozen=True)
class Batch:
    """Examples, and the token ids of the part of the prompt that they share: the ``prefix`` of sentences that are asked
    for the same types, nothing where each has types of its own."""

    prefix: tuple[int, ...]
    examples: tuple[Example, ...]


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """A right-padded row for each example, the prefix before it: ``input_ids``, ``attention_mask`` (1 where there is a
    token) and ``labels`` [batch, length]."""
    rows = [[*batch.prefix, *e.ids] for e in batch.examples]
    length = -(-max(map(len, rows)) // 8) * 8
    labels = [[IGNORED] * len(batch.prefix) + e.labels for e in batch.examples]
    return {
        "input_ids": torch.tensor([filled(row, length, 0) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row), length, 0) for row in rows]),
        "labels": torch.tensor([filled(row, length, IGNORED) for row in labels]),
    }


def filled(row: Sequence[int], length: int, value: int) -> list[int]:
    """``row`` with ``value`` after it up to ``length``."""
    return [*row, *[value] * (length - len(row))]
