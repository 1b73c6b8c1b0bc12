"""The analysis notebook runs on any sweep and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from experiments import bootstrap
from experiments.comparison import _counts
from tests.sweeps import make_sweep

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "analysis.ipynb"


def run_notebook(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> list[nbformat.NotebookNode]:
    """All outputs of the notebook for ``sweep``, in order; raises where a cell does."""
    monkeypatch.setenv("SAM_RESULTS", str(sweep))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(outputs: list[nbformat.NotebookNode], kind: str) -> list[str]:
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def test_runs_on_a_sweep_with_failed_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(tmp_path, merges=("linear", "ties"), ks=(1, 3), failed=[("ties", 3)])
    outputs = run_notebook(sweep, monkeypatch)
    table = next(text for text in texts(outputs, "text/markdown") if "| merge |" in text)
    assert "| linear | 48.0 | **50.0** |" in table
    assert "| ties | 44.0 | failed |" in table
    assert "failed: k=3,merge=ties: CUDA out of memory" in table
    assert len(texts(outputs, "image/png")) == 3
    assert "<mark" in texts(outputs, "text/html")[-1]


def test_runs_on_a_single_job_without_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(tmp_path, merges=("ties",), ks=(1,))
    (sweep / "k=1,merge=ties" / "predictions.jsonl").unlink()
    outputs = run_notebook(sweep, monkeypatch)
    assert "| ties | 44.0 |" in texts(outputs, "text/markdown")[0]
    assert "without its predictions" in texts(outputs, "text/markdown")[-1]


def test_is_committed_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) >= 7
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_the_committed_predictions_are_those_of_their_result() -> None:
    """The notebook shows one of them beside the sweep's figures."""
    (path,) = (NOTEBOOK.parents[1] / "experiments" / "results" / "k_by_merge").glob("*/predictions.jsonl")
    result = json.loads((path.parent / "result.json").read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for target, found in result["targets"].items():
        counts = _counts([line for line in lines if line["target"] == target], None)
        assert bootstrap.f1(counts) == pytest.approx(found["combined"]["scores"]["f1"]), target
