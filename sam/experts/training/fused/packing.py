"""A training batch as tensors: many sentences in a row where the model reads that rightly, else a row for each.

In one row the prompt's shared part is computed once and nothing is padding, so a step costs a quarter less.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from sam.experts.training.batch import IGNORED, Batch, Example, filled, padded

log = logging.getLogger(__name__)

MOST = 512
"""Tokens of one row: attention is over all of it, and in a longer one would cost more than is saved."""


def collate(batch: Batch, most: int) -> dict[str, torch.Tensor]:
    """``batch`` in rows of at most ``most`` tokens, or in a row for each example if one alone is longer."""
    rows: list[list[Example]] = []
    room = 0
    for example in batch.examples:
        if len(batch.prefix) + len(example.ids) > most:
            return padded(batch)
        if len(example.ids) > room:
            rows.append([])
            room = most - len(batch.prefix)
        rows[-1].append(example)
        room -= len(example.ids)
    return packed(batch.prefix, rows)


def packed(prefix: Sequence[int], rows: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """In each row the prefix, then each of its examples as if it alone came after it.

    ``input_ids``, ``position_ids`` and ``labels`` [rows, length] (labels are -100 outside of target completions) and
    ``attention_mask`` [rows, 1, length, length], true where a token may look: at the prefix, and at what comes before
    it in its own example.
    """
    lengths = [len(prefix) + sum(len(e.ids) for e in row) for row in rows]
    length = -(-max(lengths) // 16) * 16  # few distinct shapes: CPU and GPU libraries prepare a kernel for each
    ids, owners, positions, labels = [], [], [], []
    for row in rows:
        parts = [prefix, *(e.ids for e in row)]
        starts = [0] + [len(prefix)] * len(row)
        places = [start + i for start, part in zip(starts, parts, strict=True) for i in range(len(part))]
        ids.append(filled([token for part in parts for token in part], length, 0))
        owners.append(filled([i for i, part in enumerate(parts) for _ in part], length, -1))
        positions.append(filled(places, length, 0))
        labels.append(filled([IGNORED] * len(prefix) + [x for e in row for x in e.labels], length, IGNORED))
    owner = torch.tensor(owners)
    allowed = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "attention_mask": allowed.tril_()[:, None],
        "labels": torch.tensor(labels),
    }


def additive(allowed: torch.Tensor) -> torch.Tensor:
    """A boolean mask as numbers to add to the scores, fp32: 0 where a token may look, else the least number."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def read(causal: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch as :func:`collate` lays it out, the hidden states from which the tokens of target completions are
    predicted, [tokens, width], and these tokens, [tokens]."""
    mask, decoder = batch["attention_mask"], causal.get_decoder()
    if mask.dtype == torch.bool and decoder.config._attn_implementation != "sdpa":  # all others add it to the scores
        mask = additive(mask)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"} | {"attention_mask": mask}
    hidden = decoder(**inputs, use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    asked = targets != IGNORED
    return hidden[:, :-1][asked], targets[asked]


@torch.no_grad()
def most_packed(causal: Any) -> int:
    """How many tokens a packed row may have for the model: none if it reads a small one otherwise than apart.

    So do models with recurrent layers, and those that take positions from the mask. A window beyond which a model does
    not look would not be seen in a row.
    """
    probe = Batch((1, 2, 3), (Example((4, 5, 6, 3, 2), 2), Example((5, 4, 2), 1), Example((1, 6, 5, 4), 2)))
    device = causal.get_decoder().device
    try:
        laid = (collate(probe, 0), collate(probe, MOST))
        apart, one = (read(causal, {k: t.to(device) for k, t in tensors.items()})[0].float() for tensors in laid)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        log.info("%s reads no packed rows: %s", type(causal).__name__, error)
        return 0
    gap = ((apart - one).norm(dim=-1) / apart.norm(dim=-1)).max()
    if not gap < torch.finfo(causal.dtype).eps ** 0.5:  # so that NaN is refused too
        log.info("%s reads packed rows otherwise than apart: each sentence has a row of its own", type(causal).__name__)
        return 0
    return min(MOST, getattr(causal.config, "sliding_window", None) or MOST)
