"""The completion cache: what its keys distinguish, and what several processes find in it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sam.generation import Completion, CompletionCache, Request
from sam.generation.cache import request_key

ADA, ALAN = Request("Entity types: person\nText:", " Ada\nEntities:"), Request("Entity types: person\nText:", " Alan")
DONE = Completion(' {" Zoë":" person"}\n', True, (-0.5, -0.25), (3, 20))
MODEL = CompletionCache.model("weights", {"generator": "x"})


def kept(folder: Path, *requests: Request, model: str = MODEL) -> dict[int, Completion]:
    """What a new process would find."""
    return CompletionCache(folder).get(model, requests)


def test_keys_differ_by_everything_that_can_change_a_completion() -> None:
    requests = [ADA, ALAN, Request("Entity types: place\nText:", ADA.suffix), Request(ADA.prefix, ADA.suffix, "root")]
    requests.append(Request(ADA.prefix + " ", "Ada\nEntities:"))  # the parts are tokenised separately
    assert len({request_key(r) for r in requests}) == len(requests)
    models = [MODEL, CompletionCache.model("other", {"generator": "x"}), CompletionCache.model("weights", {})]
    assert len(set(models)) == 3
    assert CompletionCache.model("w", {"a": 1, "b": 2}) == CompletionCache.model("w", {"b": 2, "a": 1})


def test_completions_are_kept_and_found_again(tmp_path: Path) -> None:
    cache = CompletionCache(tmp_path / "deep")
    assert cache.get(MODEL, [ADA]) == {} == cache.get(MODEL, [])
    cache.put(MODEL, ADA, DONE)
    assert cache.get(MODEL, [ALAN, ADA]) == {1: DONE} == kept(tmp_path / "deep", ALAN, ADA)
    assert kept(tmp_path / "deep", ADA, model="other") == {}


def test_the_first_completion_of_a_request_stays(tmp_path: Path) -> None:
    cache = CompletionCache(tmp_path)
    cache.put(MODEL, ADA, DONE)
    cache.put(MODEL, ADA, Completion("other"))
    assert cache.get(MODEL, [ADA]) == {0: DONE} == kept(tmp_path, ADA)


def write_line(folder: Path, file: str, written: float, text: str) -> None:
    line = {"key": request_key(ADA), "time": written, "text": text, "truncated": False, "logprobs": [], "ends": []}
    path = folder / MODEL / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("first", ["a.jsonl", "b.jsonl"])
def test_the_first_completion_of_several_processes_stays_in_whatever_order_files_are_read(
    tmp_path: Path, first: str
) -> None:
    other = {"a.jsonl": "b.jsonl", "b.jsonl": "a.jsonl"}[first]
    caches = {file: CompletionCache(tmp_path) for file in (first, other)}
    write_line(tmp_path, first, 1.0, "first")
    caches[first].get(MODEL, [ADA])
    write_line(tmp_path, other, 2.0, "second")
    assert [c.get(MODEL, [ADA])[0].text for c in caches.values()] == ["first", "first"]
    late = CompletionCache(tmp_path)
    (tmp_path / MODEL / first).rename(tmp_path / "kept")
    assert late.get(MODEL, [ADA])[0].text == "second"
    (tmp_path / "kept").rename(tmp_path / MODEL / first)
    assert late.get(MODEL, [ADA])[0].text == "first"


def test_without_a_folder_completions_last_as_long_as_the_cache() -> None:
    cache = CompletionCache(None)
    cache.put(MODEL, ADA, DONE)
    assert cache.get(MODEL, [ADA]) == {0: DONE}
    assert CompletionCache(None).get(MODEL, [ADA]) == {}


def test_what_another_process_adds_later_is_found(tmp_path: Path) -> None:
    one, other = CompletionCache(tmp_path), CompletionCache(tmp_path)
    assert one.get(MODEL, [ADA, ALAN]) == {}
    other.put(MODEL, ADA, DONE)
    assert one.get(MODEL, [ADA, ALAN]) == {0: DONE}
    other.put(MODEL, ALAN, DONE)
    assert one.get(MODEL, [ADA, ALAN]) == {0: DONE, 1: DONE}


def test_a_line_that_was_cut_is_generated_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = CompletionCache(tmp_path)
    cache.put(MODEL, ADA, DONE)
    cache.put(MODEL, ALAN, DONE)
    cache.close()
    (file,) = tmp_path.glob("*/*.jsonl")
    file.write_bytes(file.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path, ADA, ALAN) == {0: DONE}
    assert caplog.messages == []  # it may still be being written


def test_damage_is_reported_in_one_line_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = CompletionCache(tmp_path)
    cache.put(MODEL, ADA, DONE)
    cache.put(MODEL, ALAN, DONE)
    cache.close()
    (file,) = tmp_path.glob("*/*.jsonl")
    first, second = file.read_bytes().splitlines(keepends=True)
    wrong = json.dumps({"key": request_key(ADA), "text": 3, "truncated": False, "logprobs": [], "ends": []}).encode()
    file.write_bytes(b"\xff\x00" + first + b'"text"\n' + wrong + b"\n" + second)
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path, ADA, ALAN) == {1: DONE}
    assert caplog.messages == [f"{file}: 3 damaged line(s) ignored; their completions are generated again"]


def test_a_file_that_cannot_be_read_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / MODEL / "a.jsonl").mkdir(parents=True)
    CompletionCache(tmp_path).put(MODEL, ADA, DONE)
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path, ADA) == {0: DONE}
    assert len(caplog.messages) == 1 and "cannot be read" in caplog.messages[0]


def _write(folder: Path, worker: int) -> None:
    cache = CompletionCache(folder)
    for i in range(200):
        cache.put(MODEL, Request(f"{worker}", f"{i}"), DONE)
        assert cache.get(MODEL, [Request(f"{worker}", f"{i}")]) == {0: DONE}


def test_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(tmp_path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * 3
    assert len(kept(tmp_path, *(Request(f"{w}", f"{i}") for w in range(3) for i in range(200)))) == 600


def _write_until_killed(folder: Path) -> None:
    cache = CompletionCache(folder)
    for i in range(1_000_000):
        cache.put(MODEL, Request("p", str(i)), DONE)


def test_a_killed_process_loses_at_most_what_it_was_writing(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(tmp_path,))
    worker.start()
    deadline = time.monotonic() + 30
    while sum(f.stat().st_size for f in tmp_path.glob("*/*")) < 100_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    (file,) = tmp_path.glob("*/*.jsonl")
    lines = file.read_bytes().count(b"\n")
    assert lines > 100
    assert len(kept(tmp_path, *(Request("p", str(i)) for i in range(lines)))) == lines
