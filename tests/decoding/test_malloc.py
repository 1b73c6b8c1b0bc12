"""Memory that is freed stays with the process."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc only")
@pytest.mark.parametrize("set_by_user", [False, True])
def test_memory_that_is_freed_is_kept_unless_the_user_says_otherwise(set_by_user: bool) -> None:
    """In processes of their own, as it holds for the whole of one, without the system's huge pages. What glibc does
    without settings is not asked: it hangs on what else lies at the end of the heap."""
    script = """if True:
    import ctypes, resource, torch
    from sam.decoding.malloc import keep_freed
    torch.set_num_threads(1)
    keep_freed()
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        large = [torch.ones(1 << 20) for _ in range(30)]
        large.clear()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
    """
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }
    environment = {**clean, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if set_by_user else {})}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    pages = 30 * (4 << 20) // resource.getpagesize()
    assert int(done.stdout) > 0.9 * pages if set_by_user else int(done.stdout) < 0.3 * pages
