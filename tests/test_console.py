"""The terminal: tables and lines are printed as they are."""

from __future__ import annotations

import pytest

from sam.console import console, print_table, say


def test_table_prints_brackets_as_they_are_and_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[bold]x[/foo]", ["job", "F1"], [["selector.experts=[news,stem]", "12.5"], ["a", "-1.0"], ["b", "–"]])
    out = capsys.readouterr().out
    assert "[bold]x[/foo]" in out and "selector.experts=[news,stem]" in out
    for cell in ("12.5", "-1.0", "   –"):
        assert f" {cell} │\n" in out


def test_say_prints_on_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.cache_clear()
    say("x=[news] " + "y" * 300)
    console.cache_clear()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "x=[news] " + "y" * 300 + "\n"
