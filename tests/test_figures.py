"""What the figures hold: points, counts and highlighted spans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from experiments.collect import load_jobs, read_predictions, score_frame, selection_frame
from experiments.figures import highlight, plot_lines, plot_models, plot_selected, sentence_html, telling_sentence
from tests.sweeps import make_sweep


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_lines_pass_through_the_means(tmp_path: Path) -> None:
    jobs = load_jobs(make_sweep(tmp_path, merges=("linear", "ties"), ks=(1, 10), seeds=(0, 1), failed=[("ties", 10)]))
    figure: Any = plot_lines(score_frame(jobs))
    assert [axes.get_title() for axes in figure.axes] == ["mini_ai", "mini_music", "mean"]
    linear, ties = figure.axes[2].containers
    assert linear.lines[0].get_ydata().tolist() == pytest.approx([49.0, 58.0])  # 48 and 50, 57 and 59
    assert ties.lines[0].get_ydata().tolist() == pytest.approx([45.0])


def test_models_panel_holds_recall_and_precision(tmp_path: Path) -> None:
    jobs = load_jobs(make_sweep(tmp_path, merges=("ties",), ks=(1,)))
    axes: Any = plot_models(score_frame(jobs)).axes[0]
    means = [points.get_offsets().tolist()[0] for points in axes.collections[1::2]]
    expected = [[24.0, 44.0], [19.0, 39.0], [44.0, 34.0]]  # domain, sampling, combined: (recall, precision)
    assert means == [pytest.approx(point) for point in expected]


def test_heat_map_counts_jobs(tmp_path: Path) -> None:
    jobs = load_jobs(make_sweep(tmp_path, merges=("linear", "ties"), ks=(1, 2)))
    figure: Any = plot_selected(selection_frame(jobs))
    domain, sampling = figure.axes
    assert [label.get_text() for label in domain.get_xticklabels()] == ["legal", "news", "social", "stem"]
    assert domain.images[0].get_array().tolist() == [[0, 2, 0, 4]] * 2
    assert sampling.images[0].get_array().tolist() == [[4, 0, 2, 0]] * 2


def test_highlight_marks_overlaps_and_escapes() -> None:
    html = highlight("a<b c", [["x", 0, 3], ["y", 2, 5]], {"x": "#111111", "y": "#222222"})
    plain = "<mark style='background:{0}33;color:inherit;border-bottom:2px solid {0}'>{1}</mark>".format
    label = "<sub style='color:#555'>{}</sub>".format
    assert html == plain("#111111", "a&lt;") + plain("#111111", "b") + label("x") + plain("#222222", " c") + label("y")


def test_sentence_shows_every_step(tmp_path: Path) -> None:
    (job,) = load_jobs(make_sweep(tmp_path, merges=("ties",), ks=(1,)))
    line = telling_sentence(read_predictions(job))
    assert line is not None
    html = sentence_html(line)
    heads = [
        "prompt",
        "domain: answer",
        "domain: mentions",
        "sampling: answer",
        "sampling: mentions",
        "combined",
        "gold",
    ]
    places = [html.index(f">{head}</th>") for head in heads]
    assert places == sorted(places)
    assert telling_sentence([]) is None
