"""The files that leave a run, and the hash that says which run they are of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import sam
from sam import results
from sam.console import console, print_table, say
from sam.results import RESULT, SCHEMA, config_hash, git_commit, read_done, versions, write_json, write_lines

CONFIG = {"k": 3, "merge": {"name": "ties", "density": 0.5}, "logger": {"name": "none"}}


def test_hash_leaves_out_what_cannot_change_a_result() -> None:
    found = config_hash(CONFIG, base="f")
    assert len(found) == 16
    for section in ("logger", "trainer", "answers", "cache", "sweep"):
        assert config_hash({**CONFIG, section: "other"}, base="f") == found
    assert config_hash(dict(reversed(CONFIG.items())), base="f") == found


def test_hash_tells_every_other_value_and_fact() -> None:
    others = [
        config_hash(CONFIG, base="f"),
        config_hash({**CONFIG, "k": 2}, base="f"),
        config_hash({**CONFIG, "merge": {"name": "ties", "density": 0.6}}, base="f"),
        config_hash(CONFIG, base="g"),
        config_hash(CONFIG, other="f"),
        config_hash(CONFIG),
    ]
    assert len(set(others)) == len(others)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n "é": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"é": 1}


def test_lines(tmp_path: Path) -> None:
    write_lines(tmp_path / "p.jsonl", [{"text": "a\nb"}, {"text": "\u2028"}])
    assert (tmp_path / "p.jsonl").read_text(encoding="utf-8").count("\n") == 2


def test_only_a_whole_result_of_the_same_config_is_done(tmp_path: Path) -> None:
    assert read_done(tmp_path, "abc") is None
    result = {"schema": SCHEMA, "config_hash": "abc", "overall": None}
    write_json(tmp_path / RESULT, result)
    assert read_done(tmp_path, "abc") == result
    assert read_done(tmp_path, "abd") is None
    write_json(tmp_path / RESULT, {**result, "schema": SCHEMA + 1})
    assert read_done(tmp_path, "abc") is None
    for broken in ("", "[]", '{"schema": 1,'):
        (tmp_path / RESULT).write_text(broken)
        assert read_done(tmp_path, "abc") is None


def test_versions_name_this_package_and_its_libraries() -> None:
    found = versions()
    assert found["sam"] == sam.__version__
    assert "not installed" not in found.values()
    assert found["torch"].startswith("2.") and set(results.PACKAGES) < set(found)


def test_commit_is_this_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *identity, "-C", str(tmp_path), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    file = tmp_path / "sam" / "results.py"
    monkeypatch.setattr(results, "__file__", str(file))
    file.parent.mkdir()
    file.touch()
    assert git_commit() is None
    git("init")
    git("commit", "--allow-empty", "-m", "another project's")
    assert git_commit() is None
    git("add", ".")
    git("commit", "-m", "ours")
    commit = git("rev-parse", "HEAD")
    assert git_commit() == commit and len(commit) == 40
    file.write_text("changed")
    assert git_commit() == f"{commit}+dirty"


def test_table_prints_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[bold]x[/foo]", ["job", "F1"], [["selector.experts=[news,stem]", "12.5"], ["a", "-1.0"], ["b", "–"]])
    out = capsys.readouterr().out
    assert "[bold]x[/foo]" in out and "selector.experts=[news,stem]" in out
    for cell in ("12.5", "-1.0", "   –"):
        assert f" {cell} │\n" in out  # numbers end at the right


def test_say_prints_on_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.cache_clear()
    say("x=[news] " + "y" * 300)
    console.cache_clear()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "x=[news] " + "y" * 300 + "\n"
