"""Whether a sentence's attention hangs on what else is in the pass: ``python -m tests.decoding.company`` prints where.

A program of its own, as MKL reads but once what instructions it may use (``MKL_ENABLE_INSTRUCTIONS``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from sam.decoding.ragged import KeyValues, Pass, Row

HEADS = 2  # of keys
COMPANY = [Row(4, 30), Row(1, 40), Row(70, 0)]


def hangs(share: int, dim: int, watched: Row) -> bool:
    """Whether the bits of ``watched``'s attention differ alone, first among others and last among them."""
    draw = torch.Generator().manual_seed(0)
    past, own = (_drawn(count, share, dim, draw) for count in (watched.past, watched.count))
    found = []
    for before, after in ([], []), ([], COMPANY), (COMPANY, []), (COMPANY[:2], COMPANY[2:]):
        rows = [*before, watched, *after]
        cache = KeyValues(len(rows), 256)
        others = torch.Generator().manual_seed(len(before))
        for part in (0, 1):  # what is past, then what is new
            parts = [
                (past, own)[part] if row is watched else _drawn((row.past, row.count)[part], share, dim, others)
                for row in rows
            ]
            now = [Row((row.past, row.count)[part], (0, row.past)[part]) for row in rows]
            out = _attend(cache, now, parts, share)
        at = sum(row.count for row in before)
        found.append(out[at : at + watched.count])
    return not all(torch.equal(found[0], other) for other in found[1:])


def _drawn(count: int, share: int, dim: int, draw: torch.Generator) -> list[torch.Tensor]:
    """Queries, keys and values of ``count`` tokens."""
    return [torch.randn(heads, count, dim, generator=draw) for heads in (share * HEADS, HEADS, HEADS)]


def _attend(cache: KeyValues, rows: list[Row], parts: list[list[torch.Tensor]], share: int) -> torch.Tensor:
    now = Pass(cache, rows, share, "cpu")
    whole = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    query, key, value = (torch.nn.functional.pad(part, (0, 0, 0, now.spare)) for part in whole)
    return now.attend(0, query, key, value, key.shape[-1] ** -0.5, None, None)


def all_that_hang() -> Iterator[tuple[int, int, Row]]:
    """(share, dim, row) of those that do, for models of several shapes."""
    for share, dim, count, past in product((1, 3, 7), (64, 80, 128), (1, 2, 3, 5, 33), (16, 150)):
        if hangs(share, dim, Row(count, past)):
            yield share, dim, Row(count, past)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*all_that_hang())
