"""What there is to compute with: the device, its processors, and what they can do."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from sam.errors import SamError

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def device_of(accelerator: str) -> str:
    """The torch device for a Lightning ``accelerator``: cpu, gpu, or auto (a GPU if there is one).

    Raises SamError for a GPU that torch does not see.
    """
    import torch

    there = torch.cuda.is_available()
    known = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "auto": "cuda" if there else "cpu"}
    if accelerator not in known:
        raise SamError(f"trainer.accelerator={accelerator} is unknown; allowed: {', '.join(known)}")
    if known[accelerator] == "cuda" and not there:
        raise SamError(f"trainer.accelerator={accelerator}: torch sees no CUDA GPU here; choose cpu or auto")
    return known[accelerator]


def cores() -> int:
    """How many processors this thread may use: by its affinity, and by the quota of its container (cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return max(1, min(allowed, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        return allowed


def threads() -> int:
    """How many threads to compute with on a CPU: ``OMP_NUM_THREADS`` if that is set, else :func:`cores`."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else cores()


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers itself (elsewhere bf16 is slower than fp32)."""
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


@cache
def _cpuinfo() -> str:
    """Linux's description of the processors, empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""
