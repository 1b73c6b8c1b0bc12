"""What the task ``train`` refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sam.errors import SamError
from sam.launch import compose
from sam.runs import train as task
from tests.tiny import make_card, one_line


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


@pytest.mark.parametrize(
    ("taught", "wanted"), [(None, "by_mention"), ("by_type", "by_mention"), ("by_mention", "by_type")]
)
def test_a_start_that_answers_in_another_form_is_refused(tmp_path: Path, taught: str | None, wanted: str) -> None:
    make_card("start", "f", role="start", recipe={"answer": taught} if taught else {}).write(tmp_path)
    with pytest.raises(SamError) as error:
        run(tmp_path, "domain=news", f"base.fold={tmp_path}", f"train.answer={wanted}")
    told = taught or "by_type"
    assert one_line(error) == (
        f"base.fold={tmp_path} answers {told}, not train.answer={wanted}: fold in a start that was trained so "
        f"(task=train domain=start base.fold=null train.answer={wanted}), or take train.answer={told}"
    )
    for fold, answer in ((str(tmp_path), told), ("null", wanted), (str(tmp_path / "no_card"), wanted)):
        with pytest.raises(AssertionError, match="loaded"):
            run(tmp_path, "domain=news", f"base.fold={fold}", f"train.answer={answer}")
