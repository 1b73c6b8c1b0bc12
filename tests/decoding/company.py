"""Whether a sentence's attention depends on what else is in the pass.

``python -m tests.decoding.company`` prints in what cases it does, after whether products need care.

A program of its own, as MKL reads but once what instructions it may use (``MKL_ENABLE_INSTRUCTIONS``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from sam.decoding.ragged import KeyValues, Pass, Row, _sums_by_blocks

COMPANY = [Row(4, 30), Row(1, 40), Row(70, 0)]


def depends_on_company(heads: int, share: int, dim: int, watched: Row, said: int) -> bool:
    """Whether the bits of ``watched``'s attention differ alone, before others, after them and between them.

    ``heads``: of keys, with ``share`` of queries each, of which the pass is told ``said``.
    """
    draw = torch.Generator().manual_seed(0)
    past, own = (_drawn(count, heads, share, dim, draw) for count in (watched.past, watched.count))
    found = []
    for before, after in ([], []), ([], COMPANY), (COMPANY, []), (COMPANY[:2], COMPANY[2:]):
        rows = [*before, watched, *after]
        cache = KeyValues(len(rows), 256)
        others = torch.Generator().manual_seed(len(before))
        for part in (0, 1):  # what is past, then what is new
            parts = [
                (past, own)[part] if row is watched else _drawn((row.past, row.count)[part], heads, share, dim, others)
                for row in rows
            ]
            now = [Row((row.past, row.count)[part], (0, row.past)[part]) for row in rows]
            out = _attend(cache, now, parts, said)
        at = sum(row.count for row in before)
        found.append(out[at : at + watched.count])
    return not all(torch.equal(found[0], other) for other in found[1:])


def _drawn(count: int, heads: int, share: int, dim: int, draw: torch.Generator) -> list[torch.Tensor]:
    """Queries, keys and values of ``count`` tokens."""
    return [torch.randn(number, count, dim, generator=draw) for number in (share * heads, heads, heads)]


def _attend(cache: KeyValues, rows: list[Row], parts: list[list[torch.Tensor]], share: int) -> torch.Tensor:
    now = Pass(cache, rows, share, "cpu")
    whole = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    query, key, value = (torch.nn.functional.pad(part, (0, 0, 0, now.spare)) for part in whole)
    return now.attend(0, query, key, value, key.shape[-1] ** -0.5, None, None)


def cases() -> Iterator[tuple[int, int, int, int, Row, int]]:
    """(threads, key heads, share, dim, row, the share that the pass is told), for models of several shapes."""
    for heads, share, dim, count in product((1, 2), (1, 3, 4), (64, 128), (1, 3, 5, 33, 60)):
        yield 2 if heads == 2 else 4, heads, share, dim, Row(count, 16), share
    for count in (2, 33):
        yield 1, 2, 7, 80, Row(count, 150), 7
    for count, share in ((21, 3), (63, 1)):  # a few queries more than a product has at most
        yield 1, 2, share, 64, Row(count, 16), share
    yield 8, 3, 3, 64, Row(20, 16), 3
    for count in (1, 3, 4, 50):
        yield 1, 2, 8, 64, Row(count, 16), 6


if __name__ == "__main__":
    print(f"by blocks: {_sums_by_blocks()}")
    for threads, *case in cases():
        torch.set_num_threads(threads)
        if depends_on_company(*case):
            print(threads, *case)
