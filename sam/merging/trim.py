"""Keeping exactly the k largest entries by magnitude, over one tensor or over many that are seen one at a time.

The k-th largest magnitude is found without sorting and without a concatenation: the bit pattern of a non-negative
fp32, read as an integer, is monotone in its value, so a histogram over the upper 16 bits of all entries names the
bucket that holds the k-th largest, and one over the lower 16 bits of that bucket's entries names the value itself.
Memory beyond the tensor in hand: two histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

BLOCK = 1 << 16  # entries worked on at a time, so that a dozen fp32 temporaries stay in the processor's cache

_HALF = 1 << 16  # values of 16 bits
_UPPER = 0x7FFF  # the upper 16 bits less the sign


def kept_count(density: float, entries: int) -> int:
    """How many of ``entries`` a ``density`` in (0, 1] keeps: ``round`` (halves to even), at least 1 if any."""
    return min(entries, max(1, round(density * entries)))


@dataclass(frozen=True)
class Cut:
    """Where to trim: entries with a magnitude above ``threshold`` are kept, and the first ``equal`` that are equal."""

    threshold: float
    equal: int


def find_cut(tensors: Callable[[], Iterable[Tensor]], density: float) -> Cut:
    """The cut that keeps exactly ``kept_count(density, n)`` of the n entries of all tensors together.

    ``tensors`` is called twice and must give the same finite fp32 tensors, any shapes, both times. Where fewer than
    that many entries are nonzero, all those are kept (threshold 0).
    """
    upper = torch.zeros(_UPPER + 1, dtype=torch.int64)
    for tensor in tensors():
        upper += torch.bincount(_upper_bits(_bits(tensor)), minlength=_UPPER + 1).cpu()
    wanted = kept_count(density, int(upper.sum()))
    if wanted == 0:
        return Cut(0.0, 0)
    bucket, above = _holder(upper, wanted)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for tensor in tensors():
        inside = torch.cat([bits[_upper_bits(bits) == bucket] for bits in _bits(tensor).split(BLOCK)])
        lower += torch.bincount(inside.bitwise_and_(_HALF - 1), minlength=_HALF).cpu()
    low, above_inside = _holder(lower, wanted - above)
    threshold = torch.tensor([(bucket << 16) | low], dtype=torch.int32).view(torch.float32)
    return Cut(float(threshold), wanted - above - above_inside)


class Trimmer:
    """Applies one cut to the entries that it was found on, block by block, in order; equals are kept first come,
    first served."""

    def __init__(self, cut: Cut) -> None:
        self._threshold = cut.threshold
        self._equal_left = cut.equal

    def __call__(self, flat: Tensor) -> Tensor:
        """A trimmed copy of ``flat`` (fp32 [n]): the next entries, in order, of those that the cut was found on."""
        kept = hardshrink(flat, self._threshold)
        if self._equal_left and self._threshold > 0:
            equal = (flat.abs() == self._threshold).nonzero().squeeze(1)[: self._equal_left]
            kept[equal] = flat[equal]
            self._equal_left -= len(equal)
        return kept


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.int32)


def _upper_bits(bits: Tensor) -> Tensor:
    return (bits >> 16).bitwise_and_(_UPPER)


def _holder(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest entry (from 1), and how many entries lie in the bins above it."""
    at_least = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, rank))
    above = int(at_least[place - 1]) if place else 0
    return len(histogram) - 1 - place, above
