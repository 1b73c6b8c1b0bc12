"""The goals of the startup benchmark, judged by medians of made-up figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench.harness import Case, Report
from experiments.bench.startup import GOALS, any_kept, goal_met
from sam.generation import Completion, CompletionCache, Request


@pytest.mark.parametrize(("seconds", "verdict"), [(0.1, "0.3 s, met (0.10 s)"), (0.9, "0.3 s, missed (0.90 s)")])
def test_goal_is_judged_by_the_median(seconds: float, verdict: str) -> None:
    rounds = {"import sam": [{"seconds": s} for s in (seconds, 0.01, 5.0)]}
    assert "import sam" in GOALS
    report = Report((Case("import sam", "seconds", False, rounds, "import sam"),), machine={"slug": "none"})
    assert goal_met(report) == verdict


def test_first_answer_is_seen_once_it_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "completions"
    assert not any_kept(path)
    cache = CompletionCache(path)
    cache.get("model", [])
    assert not any_kept(path)
    cache.put("model", Request("a", "b"), Completion("[]"))
    assert any_kept(path)
