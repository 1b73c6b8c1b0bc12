"""What leaves a run: the hash that says what a result is of, writing by rename, and provenance."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sam.results
from sam.results import (
    RESULT,
    RIM,
    SCHEMA,
    config_hash,
    git_commit,
    read_done,
    versions,
    write_json,
    write_lines,
    write_status,
    write_text,
)

CONFIG: dict[str, Any] = {
    "k": 3,
    "seed": 0,
    "sample_size": 10,
    "limit": None,
    "merge": {"name": "ties", "density": 0.2, "seed": None},
    "decode": {"max_new_tokens": 160},
    "target": {"types": None, "sets": {"a": {"kind": "mini"}}},
    "base": {"name": "tiny", "dtype": "float32"},
    "logger": {"name": "wandb", "mode": "offline"},
    "trainer": {"accelerator": "cpu"},
    "completions": "reuse",
    "cache": None,
    "sweep": "x",
}
FACTS: dict[str, Any] = {"experts": {"news": "a1"}, "base": "b1", "targets": "c1", "versions": {"torch": "1"}}


def test_the_rim_is_what_cannot_change_a_result() -> None:
    assert set(RIM) == {"logger", "trainer", "completions", "cache", "sweep", "task", "train", "domain"}


@pytest.mark.parametrize("key", RIM)
def test_the_hash_ignores_the_rim(key: str) -> None:
    expected = config_hash(CONFIG, **FACTS)
    assert config_hash({**CONFIG, key: "another"}, **FACTS) == expected
    assert config_hash({k: v for k, v in CONFIG.items() if k != key}, **FACTS) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"k": 2},
        {"seed": 1},
        {"sample_size": 11},
        {"limit": 3},
        {"merge": {"name": "ties", "density": 0.3, "seed": None}},
        {"merge": {"name": "linear", "density": 0.2, "seed": None}},
        {"decode": {"max_new_tokens": 161}},
        {"target": {"types": ["a"], "sets": {"a": {"kind": "mini"}}}},
        {"base": {"name": "tiny", "dtype": "bfloat16"}},
        {"anything": "new"},
    ],
)
def test_the_hash_changes_with_all_else(changed: dict[str, Any]) -> None:
    assert config_hash({**CONFIG, **changed}, **FACTS) != config_hash(CONFIG, **FACTS)


@pytest.mark.parametrize("fact", list(FACTS))
def test_the_hash_changes_with_the_facts(fact: str) -> None:
    assert config_hash(CONFIG, **{**FACTS, fact: "another"}) != config_hash(CONFIG, **FACTS)


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    turned = dict(reversed([(k, dict(reversed(v.items())) if isinstance(v, dict) else v) for k, v in CONFIG.items()]))
    assert config_hash(turned, **FACTS) == config_hash(CONFIG, **FACTS)


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
    write_status(tmp_path, "failed", ["k=1"], "bad ‘k’")
    status = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert status == {"state": "failed", "error": "bad ‘k’", "overrides": ["k=1"]}


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
