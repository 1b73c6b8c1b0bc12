"""What the task ``train`` refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sam.errors import SamError
from sam.launch import compose
from sam.runs import train as task
from tests.tiny import one_line


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(task, "load", load)


def run(tmp_path: Path, *overrides: str) -> None:
    task.train(compose("task=train", "logger=none", *overrides), tmp_path, None)


def test_a_start_on_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SamError) as error:
        run(tmp_path, "domain=start")
    assert one_line(error).endswith("train it on the bare base, base.fold=null")
