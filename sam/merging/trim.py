"""Keeping exactly the k largest entries by magnitude, over one tensor or over many that are seen one at a time.

The k-th largest magnitude is found without sorting and without a concatenation: the bit pattern of a non-negative
fp32, read as an integer, is monotone in its value, so a histogram over the upper 16 bits of all entries names the
bucket that holds the k-th largest, and one over the lower 16 bits of that bucket's entries names the value itself.
Memory beyond the tensor in hand: two histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

BLOCK = 1 << 16  # entries worked on at a time, so that a dozen fp32 temporaries stay in the processor's cache

_CHUNK = 1 << 18  # entries counted at a time: many more than there are bins, and still in the cache
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


def find_cut(tensors: Callable[[], Iterable[Tensor]], density: float, work: Tensor | None = None) -> Cut:
    """The cut that keeps exactly ``kept_count(density, n)`` of the n entries of all tensors together.

    ``tensors`` is called twice and must give the same finite fp32 tensors, any shapes, both times; each may be
    overwritten when the next is asked for. Where fewer than that many entries are nonzero, all those are kept
    (threshold 0). Where no entry of the threshold's magnitude has to be left out, the threshold is the next lower
    number, so that nobody has to look for equal entries. ``work`` is memory of :func:`work_memory` to use again.
    """
    work = work_memory() if work is None else work
    upper = torch.zeros(_UPPER + 1, dtype=torch.int64)
    for bits in _chunks(tensors()):
        upper += torch.bincount(_upper_bits(bits, work), minlength=_UPPER + 1).cpu()
    wanted = kept_count(density, int(upper.sum()))
    if wanted == 0:
        return Cut(0.0, 0)
    bucket, above = _holder(upper, wanted)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for bits in _chunks(tensors()):
        lower += torch.bincount(_inside(bits, bucket, work).bitwise_and_(_HALF - 1), minlength=_HALF)
    low, above_inside = _holder(lower, wanted - above)
    threshold, equal = (bucket << 16) | low, wanted - above - above_inside
    if threshold and equal == lower[low]:
        threshold, equal = threshold - 1, 0  # of non-negative floats, the bits less one are the next lower float
    return Cut(float(torch.tensor([threshold], dtype=torch.int32).view(torch.float32)), equal)


def work_memory() -> Tensor:
    """Memory for :func:`find_cut`, on the CPU."""
    return torch.empty(_CHUNK, dtype=torch.int32)


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
            equal = torch.from_numpy((flat.abs().cpu().numpy() == self._threshold).nonzero()[0][: self._equal_left])
            if len(equal):
                kept[equal] = flat[equal]
                self._equal_left -= len(equal)
        return kept


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bits of all entries, as int32, in chunks that keep the temporaries small."""
    for tensor in tensors:
        yield from tensor.reshape(-1).view(torch.int32).split(_CHUNK)


def _upper_bits(bits: Tensor, work: Tensor) -> Tensor:
    out = work[: len(bits)] if work.device == bits.device else torch.empty_like(bits)
    return torch.bitwise_right_shift(bits, 16, out=out).bitwise_and_(_UPPER)


def _inside(bits: Tensor, bucket: int, work: Tensor) -> Tensor:
    """Those of ``bits`` whose upper half is ``bucket``, on the CPU. NumPy selects in a third of torch's time."""
    return torch.from_numpy(bits.cpu().numpy()[_upper_bits(bits, work).cpu().numpy() == bucket])


def _holder(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest entry (from 1), and how many entries lie in the bins above it."""
    at_least = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, rank))
    above = int(at_least[place - 1]) if place else 0
    return len(histogram) - 1 - place, above
