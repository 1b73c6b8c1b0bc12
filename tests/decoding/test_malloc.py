"""Memory that is freed stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc only")
@pytest.mark.parametrize("set_by_user", [False, True])
def test_memory_that_is_freed_is_kept_unless_the_user_says_otherwise(set_by_user: bool) -> None:
    """In processes of their own, as it holds for the whole of one, without the system's huge pages."""
    script = """if True:
    import ctypes, resource, sys, torch
    from sam.decoding.malloc import keep_freed
    torch.set_num_threads(1)
    if sys.argv[1] == "kept":
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
    environment = {**clean, **({"MALLOC_TOP_PAD_": "131072"} if set_by_user else {})}
    faults = []
    for how in ("kept", "given back"):
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
        )
        faults.append(int(done.stdout))
    assert faults[1] > 1000
    assert (10 * faults[0] < faults[1]) != set_by_user
