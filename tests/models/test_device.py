"""The device and the processors to compute with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam.errors import SamError
from sam.models import device
from sam.models.device import device_of
from tests.tiny import one_line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_refused(accelerator: str) -> None:
    with pytest.raises(SamError) as error:
        device_of(accelerator)
    assert f"trainer.accelerator={accelerator}: torch sees no CUDA GPU" in one_line(error)


@pytest.mark.parametrize(
    ("text", "count"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)]
)
def test_cores_are_those_of_the_affinity_and_the_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5})
    monkeypatch.setattr(device, "CPU_MAX", tmp_path / "cpu.max")
    assert device.cores() == 4
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert device.cores() == count
    for given, expected in (("3", 3), ("0", count), ("two", count), ("", count)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert device.threads() == expected


def test_waiting_threads_spin_for_a_short_while_unless_the_user_says_otherwise() -> None:
    for given, expected in ((None, "1000"), ("7", "7")):
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
        code = "import sam, os; print(os.environ['GOMP_SPINCOUNT'])"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
