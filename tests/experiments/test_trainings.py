"""The table of trainings says what its cards say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.trainings import curve, main, markdown, rows
from sam.errors import SamError
from sam.experts import Card
from tests import toy_training
from tests.tiny import make_card


def card(name: str, f1: float, open_f1: float | None, **recipe: Any) -> Card:
    plain = make_card(name, "f" * 64)
    opened = {} if open_f1 is None else {"dev": {"f1": open_f1, "unseen_recall": open_f1 / 2, "unseen_gold": 7}}
    return replace(
        plain,
        recipe={**toy_training.recipe(**recipe).to_dict(), "hash": name},
        sentences=900,
        training={"steps": 10, "seconds": 90.0},
        scores={"datasets": {"toy": {}}, "mean_f1": f1, "open": opened},
    )


@pytest.fixture
def trainings(tmp_path: Path) -> Path:
    cards = {"lr=1": card("news", 0.5, 0.25, lr=1.0, open_sentences=3), "lr=2": card("news", 0.25, None, lr=2.0)}
    for folder, one in cards.items():
        (tmp_path / folder / "news").mkdir(parents=True)
        one.write(tmp_path / folder / "news")
    return tmp_path


def test_rows_are_cards_and_columns_what_differs(trainings: Path) -> None:
    frame = rows(trainings)
    assert list(frame["training"]) == ["lr=1/news", "lr=2/news"] and list(frame["lr"]) == [1.0, 2.0]
    assert list(frame["held-out F1"]) == [0.5, 0.25] and frame["open dev F1"][0] == 0.25
    assert list(frame["open dev unseen recall"].isna()) == [False, True]
    assert list(frame["sentences"]) == [900, 900] and list(frame["minutes"]) == [1.5, 1.5]
    assert not {"epochs", "hash"} & set(frame)  # the same in both, and of no meaning
    assert "lr" not in rows(trainings, "lr=1")  # of one there is no other
    text = markdown(frame).splitlines()
    assert len(text) == 4 and "| 50.0 | 25.0 | 12.5 |" in text[2] and "| 25.0 | – | – |" in text[3]


def test_files_and_a_selection_of_them(trainings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trainings), "--only", "lr=1", "--out", str(tmp_path / "out"), "--curve"]) == 0
    assert list(pd.read_csv(tmp_path / "out" / "trainings.csv")["training"]) == ["lr=1/news"]
    assert capsys.readouterr().out == (tmp_path / "out" / "trainings.md").read_text()
    assert (tmp_path / "out" / "curve.svg").read_text().count("<svg") == 1
    assert main([str(trainings), "--only", "lr=3"]) == 2
    assert capsys.readouterr().err == f"error: --only=lr=3 leaves no training of {trainings}\n"


def test_a_curve_joins_means_over_seeds(trainings: Path) -> None:
    frame = rows(trainings).assign(open_sentences=[0, 0])
    (axes,) = curve(frame).axes
    lines = {
        line.get_label(): list(line.get_ydata()) for line in axes.get_lines() if not line.get_label().startswith("_")
    }
    assert lines == {"held-out": [37.5], "open dev": [25.0]}


def test_an_expert_itself_and_a_pool_are_tables_too(trainings: Path) -> None:
    assert list(rows(trainings / "lr=1")["training"]) == list(rows(trainings / "lr=1" / "news")["training"]) == ["news"]
    (trainings / "lr=1" / ".news-staged").mkdir()
    card("news", 0.5, None).write(trainings / "lr=1" / ".news-staged")
    assert len(rows(trainings)) == 2


def test_recall_of_unseen_types_that_does_not_compare_is_shown(trainings: Path) -> None:
    other = card("news", 0.25, 0.5, lr=2.0)
    other.scores["open"]["dev"]["unseen_gold"] = 8
    other.write(trainings / "lr=2" / "news")
    assert list(rows(trainings)["open dev unseen pairs"]) == [7, 8]


def test_what_has_no_curve_is_refused(trainings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(trainings), "--curve"])
    old = card("news", 0.5, None)
    del old.recipe["open_sentences"]
    old.write(trainings / "lr=1" / "news")
    capsys.readouterr()
    assert main([str(trainings), "--only", "lr=1", "--curve", "--out", str(trainings / "out")]) == 2
    assert "a curve needs some" in capsys.readouterr().err and not (trainings / "out").exists()


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SamError, match="holds no expert; train some into it"):
        rows(tmp_path)
