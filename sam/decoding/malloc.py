"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache

MALLOC = {-3: 1 << 25, -1: (1 << 31) - 1}
"""``mallopt``'s numbers and what they are set to, in bytes: blocks up to M_MMAP_THRESHOLD (-3; at most 32 MiB) come
from the heap, which shrinks only if more than M_TRIM_THRESHOLD (-1) are free at its end."""


@cache
def keep_freed() -> None:
    """Let glibc keep what is freed, in this process from now on, for what comes next: what passes take and give back,
    up to 32 MiB at a time, would come from the system anew, which costs time, many times more in a virtual machine.

    A lane's thread keeps it in part only, as glibc gives back a thread's heaps of 64 MiB that are empty. Nothing
    happens where there is another C library, or the user has set this.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        for name, size in MALLOC.items():
            library.mallopt(name, size)
