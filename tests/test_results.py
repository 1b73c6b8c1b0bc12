"""What leaves a run: writing by rename, and provenance."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sam.results
from sam.results import (
    RESULT,
    SCHEMA,
    git_commit,
    read_done,
    versions,
    write_json,
    write_lines,
    write_status,
    write_text,
)


def test_done_means_a_whole_result_of_this_config(tmp_path: Path) -> None:
    assert read_done(tmp_path, "h") is None
    result = {"schema": SCHEMA, "config_hash": "h", "overall": {"f1": 0.5}}
    write_json(tmp_path / RESULT, result)
    assert read_done(tmp_path, "h") == result
    assert read_done(tmp_path, "another") is None
    write_json(tmp_path / RESULT, {**result, "schema": SCHEMA + 1})
    assert read_done(tmp_path, "h") is None


@pytest.mark.parametrize("content", ["", "{", '{"schema": 1', "[]", "null", "3"])
def test_a_broken_result_is_not_done(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULT).write_text(content)
    assert read_done(tmp_path, "h") is None


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / RESULT
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    real = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        real(self, text[: len(text) // 2], **options)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            write_text(path, "something new")
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert [p.name for p in path.parent.iterdir()] == [RESULT]


def test_lines_and_json_keep_every_character(tmp_path: Path) -> None:
    rows = [{"text": "naïve “quotes”\u2028and a\nbreak 日本"}, {"text": "two"}]
    write_lines(tmp_path / "p.jsonl", rows)
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == rows
    write_status(tmp_path, "failed", ["k=1"], "bad ‘k’", {"k": 1})
    status = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert status == {"state": "failed", "error": "bad ‘k’", "overrides": ["k=1"], "config": {"k": 1}}


def test_versions_name_what_computes() -> None:
    found = versions()
    assert {"python", "sam", "torch", "transformers", "peft", "lightning", "seqeval"} <= set(found)
    assert all(found.values())
    assert found["torch"].startswith("2.")


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "repo" / "sam"
    home.mkdir(parents=True)
    file = home / "results.py"
    file.write_text("one\n")
    monkeypatch.setattr(sam.results, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert git_commit() is None

    def git(*args: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *args], cwd=home.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (home.parent / "other").write_text("x")
    git("add", "other")
    git("commit", "-qm", "another project")
    assert git_commit() is None, "a file that the checkout does not hold is not of its commit"
    git("add", ".")
    git("commit", "-qm", "this project")
    head = git("rev-parse", "HEAD")
    assert git_commit() == head
    file.write_text("two\n")
    assert git_commit() == f"{head}+dirty"


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
