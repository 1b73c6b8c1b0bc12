"""The store of answers: what its keys tell apart, and what several processes find in it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sam.decoding import AnswerStore, DecodeSpec
from sam.errors import SamError
from sam.prompts import render
from tests.tiny import one_line

CANONICAL = DecodeSpec(20, 4).canonical("float32", "cpu")


def test_keys_differ_by_everything_that_can_change_an_answer() -> None:
    prompt = render(["person"], "Ada")
    keys = [
        AnswerStore.key("model", prompt, CANONICAL),
        AnswerStore.key("other", prompt, CANONICAL),
        AnswerStore.key("model", render(["person"], "Alan"), CANONICAL),
        AnswerStore.key("model", render(["person", "place"], "Ada"), CANONICAL),
        AnswerStore.key("model", render(["place", "person"], "Ada"), CANONICAL),
        AnswerStore.key("model", prompt, DecodeSpec(21, 4).canonical("float32", "cpu")),
        AnswerStore.key("model", prompt, DecodeSpec(20, 4).canonical("bfloat16", "cpu")),
        AnswerStore.key("model", prompt, DecodeSpec(20, 4).canonical("float32", "cuda")),
        AnswerStore.key("model", prompt, {**CANONICAL, "versions": ["0", "0"]}),
        AnswerStore.key("model", prompt, {**CANONICAL, "prompt": "2"}),
    ]
    assert len(set(keys)) == len(keys)


def test_keys_are_the_same_for_the_rest() -> None:
    key = AnswerStore.key("model", render(["person"], "Ada  Lovelace"), CANONICAL)
    assert key == AnswerStore.key("model", render(["person"], "Ada\nLovelace"), dict(reversed(CANONICAL.items())))
    assert key == AnswerStore.key(
        "model", render(["person"], "Ada Lovelace"), DecodeSpec(20, 32).canonical("float32", "cpu")
    )


def test_answers_are_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.sqlite"
    store = AnswerStore(path)
    assert store.get(["a"]) == {} and store.get([]) == {}
    store.put("a", ' {"person": ["Zoë"]}\n', True)
    store.put("b", "", False)
    store.put("b", "new", False)
    store.close()
    again = AnswerStore(path)
    assert again.get(["b", "a", "absent", "a"]) == {"a": (' {"person": ["Zoë"]}\n', True), "b": ("new", False)}
    again.close()


def test_the_nearest_experts_answer_is_found_by_its_prompt(tmp_path: Path) -> None:
    """Of equals the latest; an answer that is gone, another prompt and another base model give none."""
    store, other = AnswerStore(tmp_path / "answers.sqlite"), AnswerStore(tmp_path / "answers.sqlite")
    ada, bath = AnswerStore.prompt_key("base", "Ada"), AnswerStore.prompt_key("base", "Bath")
    for key, experts in (("one", ["a"]), ("two", ["b", "a"]), ("three", ["c"]), ("four", ["a", "b", "c"])):
        store.put(key, f"answer {key}", False)
        store.relate(key, ada, experts)
    store.relate("gone", bath, ["a"])
    for experts, answer in ((["a"], "one"), (["a", "b"], "two"), (["a", "c"], "four"), (["b"], "two"), ([], "four")):
        assert other.nearest([bath, ada], experts) == {ada: f"answer {answer}"}, experts
    store.put("five", "answer five", False)
    store.relate("five", ada, ["b", "a"])
    assert other.nearest([ada], ["a", "b"]) == {ada: "answer five"}
    assert other.nearest([AnswerStore.prompt_key("other", "Ada")], ["a"]) == {} == other.nearest([], ["a"])
    many = [AnswerStore.prompt_key("base", str(i)) for i in range(1203)]
    for prompt in many[::7]:
        store.relate("one", prompt, ["a"])
    assert set(other.nearest(many, ["c"])) == set(many[::7])
    store.close()
    other.close()


def test_more_keys_than_one_query_takes(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    answers = {f"key {i}": (f"answer {i}", i % 7 == 0) for i in range(1203)}
    for key, answer in answers.items():
        store.put(key, *answer)
    assert store.get([*answers, "absent"]) == answers
    store.close()


def test_a_failed_put_keeps_nothing_and_blocks_nobody(tmp_path: Path) -> None:
    store, other = AnswerStore(tmp_path / "answers.sqlite"), AnswerStore(tmp_path / "answers.sqlite")
    with pytest.raises(sqlite3.Error):
        store.put("a", object(), False)  # type: ignore[arg-type]
    other.put("b", "yes", False)
    store.put("c", "yes", False)
    assert set(other.get(["a", "b", "c"])) == {"b", "c"}
    store.close()
    other.close()


def _write(path: Path, worker: int, barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait(30)
    store = AnswerStore(path)
    for i in range(40):
        for j in range(5):
            store.put(f"{worker} {i} {j}", f"answer {j}", False)
        store.put("shared", "same", False)
        assert store.get([f"{worker} {i} 4", "shared"]).keys() == {f"{worker} {i} 4", "shared"}
    store.close()


def test_processes_write_at_once_from_the_first_opening_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    path = tmp_path / "answers.sqlite"
    workers = [context.Process(target=_write, args=(path, n, barrier)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * 4
    store = AnswerStore(path)
    assert len(store.get([f"{w} {i} {j}" for w in range(4) for i in range(40) for j in range(5)])) == 800
    store.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_text("junk " * 500)
    with pytest.raises(SamError) as error:
        AnswerStore(path)
    assert one_line(error) == f"{path} cannot be opened (file is not a database); delete it, or set answers=fresh"


def test_threads_share_a_store_beside_another_process(tmp_path: Path) -> None:
    """One reads what is there while another writes, and what a third has written in between is no error."""
    store, other = AnswerStore(tmp_path / "answers.sqlite"), AnswerStore(tmp_path / "answers.sqlite")
    for number in range(50):
        store.put(f"old {number}", "answer", False)
    stop, errors = threading.Event(), []

    def until_stopped(step: Callable[[int], object]) -> None:
        number = 0
        while not stop.is_set():
            try:
                step(number)
            except Exception as error:
                errors.append(error)
            number += 1

    steps = (lambda n: store.get([f"old {n % 50}"]), lambda n: other.put(f"their {n % 50}", "answer", False))
    threads = [threading.Thread(target=until_stopped, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        for number in range(2000):
            store.put(f"own {number}", "answer", False)
            store.relate(f"own {number}", b"prompt", ["news"])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert len(other.get([f"own {number}" for number in range(2000)])) == 2000
    store.close()
    other.close()
