"""Batched greedy decoding against transformers' own ``generate`` on one unpadded sentence at a time."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
import threading
from collections.abc import Callable, Sequence
from itertools import islice, product

import pytest
import torch

from sam import grammar, prompts
from sam.base import Base
from sam.decoding import DecodeSpec, constrained, greedy, ragged
from sam.decoding.drafts import Drafter, Memory
from sam.decoding.greedy import Answer, decode, decode_prompts, stream
from sam.decoding.packed import PackedWeights
from sam.errors import SamError
from tests.decoding.oracle import TEXTS, TYPES, Silent, lengths, numbers, oracle, passes


@pytest.mark.parametrize("size", [1, 3, 8, 32])
def test_tokens_are_those_of_generate_at_every_batch_size(stopping: Base, size: int) -> None:
    answers = decode(stopping, TYPES, TEXTS, DecodeSpec(30, size))
    assert answers == [oracle(stopping, text, 30) for text in TEXTS]
    assert len(set(lengths(answers))) > 4 and {a.truncated for a in answers} == {True, False}


def test_the_likeliest_token_is_the_first_of_the_largest() -> None:
    torch.manual_seed(0)
    for width in (7, 128, 1024, 1000):
        logits = torch.randn(40, width).round()  # with many equal ones
        logits[3] = -math.inf
        logits[4, 5] = math.nan
        expected = [row.index(max(row)) for row in logits.tolist()]
        expected[4] = 5
        assert greedy._likeliest(logits).tolist() == expected


def test_order_of_texts_and_company_are_irrelevant(stopping: Base) -> None:
    spec = DecodeSpec(30, 4)
    answers = dict(zip(TEXTS, decode(stopping, TYPES, TEXTS, spec), strict=True))
    assert decode(stopping, TYPES, TEXTS[::-1], spec) == [answers[t] for t in TEXTS[::-1]]
    assert decode(stopping, TYPES, TEXTS[3:6] * 3, spec) == [answers[t] for t in TEXTS[3:6]] * 3


def test_types_change_answers(stopping: Base) -> None:
    assert decode(stopping, ["court"], TEXTS, DecodeSpec(30)) == [oracle(stopping, t, 30, ["court"]) for t in TEXTS]
    assert decode(stopping, ["court"], TEXTS, DecodeSpec(30)) != decode(stopping, TYPES, TEXTS, DecodeSpec(30))


def test_text_is_decoded_without_special_tokens(tiny: Base) -> None:
    assert decode(tiny, TYPES, TEXTS[:4], DecodeSpec(20)) == [oracle(tiny, t, 20) for t in TEXTS[:4]]


def test_truncated_means_that_no_stop_token_came(tiny: Base) -> None:
    full = oracle(numbers(tiny), TEXTS[0], 8).text.split()
    last = int(full[-1])
    assert last not in map(int, full[:-1])
    base = numbers(tiny, stop_ids=[last])
    # The eighth token ends the answer: seven are too few to see it, eight suffice.
    assert decode(base, TYPES, TEXTS[:1], DecodeSpec(7)) == [Answer(" ".join(full[:7]), True)]
    assert decode(base, TYPES, TEXTS[:1], DecodeSpec(8)) == [Answer(" ".join(full[:7]), False)]


def test_an_answer_may_be_empty(tiny: Base) -> None:
    first = int(oracle(numbers(tiny), TEXTS[0], 1).text)
    assert decode(numbers(tiny, stop_ids=[first]), TYPES, TEXTS[:1], DecodeSpec(5)) == [Answer("", False)]


def test_nothing_to_decode_asks_nothing(tiny: Base) -> None:
    assert decode(dataclasses.replace(tiny, model=None), TYPES, [], DecodeSpec()) == []


class Fixed(Drafter):
    """Guesses what ``known`` says follows the answer so far, whatever the chance."""

    def __init__(self, known: Callable[[list[int]], list[int]]) -> None:
        super().__init__()
        self.known = known

    def guess(self, memory: Memory, room: int, least: float) -> list[int]:
        memory.sources = []
        return self.known(memory.context)[:room]


def streamed(base: Base, spec: DecodeSpec, drafter: Drafter, texts: Sequence[str] = TEXTS) -> list[Answer]:
    parts = [(prompts.prefix(TYPES), prompts.suffix(text)) for text in texts]
    found = dict(stream(base, parts, spec, drafter))
    return [found[i] for i in range(len(texts))]


@pytest.mark.usefixtures("one_thread")
def test_rows_leave_when_they_end_and_others_take_their_place(stopping: Base) -> None:
    with passes(stopping) as tokens:
        answers = streamed(stopping, DecodeSpec(30, 4), Silent())
    left = [n + (not a.truncated) for n, a in zip(lengths(answers), answers, strict=True)]
    # Longest prompt first; a row that has ended makes room for the next one at once.
    suffixes = [len(stopping.tokenizer(prompts.suffix(t), add_special_tokens=False).input_ids) for t in TEXTS]
    waiting = sorted(range(len(TEXTS)), key=lambda i: (-suffixes[i], i))
    rows: list[int] = []
    expected: list[int] = []
    while waiting or rows:
        count = len(rows)
        while waiting and len(rows) < 4:
            rows.append(waiting.pop(0))
            count += suffixes[rows[-1]]
        expected.append(-(-count // 16) * 16)  # filled up to multiples of 16
        for i in rows:
            left[i] -= 1
        rows = [i for i in rows if left[i]]
    assert tokens[1:] == expected  # the first is the prefix
    assert len(expected) > 3


def test_prefixes_are_run_together_as_far_as_a_pass_holds_them(stopping: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [TYPES, ["court"], [f"kind {n}" for n in range(9)]]
    parts = [(prompts.prefix(kind), prompts.suffix(text)) for kind in kinds for text in TEXTS[:2]]
    sizes = [len(stopping.tokenizer(prompts.prefix(kind)).input_ids) for kind in kinds]
    expected = [oracle(stopping, text, 9, kind) for kind in kinds for text in TEXTS[:2]]
    with passes(stopping) as tokens:
        assert decode_prompts(stopping, parts, DecodeSpec(9, 6)) == expected
    assert tokens[0] == ragged.rounded(sum(sizes))
    monkeypatch.setattr(greedy, "ADMIT", 2 * max(sizes[:2]))
    with passes(stopping) as tokens:
        assert decode_prompts(stopping, parts, DecodeSpec(9, 1)) == expected
    assert tokens[0] == ragged.rounded(sum(sizes[:2])) and ragged.rounded(sizes[2]) in tokens[1:]


def test_guesses_change_no_answer_and_right_ones_save_passes(stopping: Base) -> None:
    spec = DecodeSpec(30, 10)
    with passes(stopping) as without:
        expected = streamed(stopping, spec, Silent())
    known: dict[tuple[int, ...], list[int]] = {}
    for text, answer in zip(TEXTS, expected, strict=True):
        prompt = stopping.tokenizer(prompts.suffix(text), add_special_tokens=False).input_ids
        known[tuple(prompt)] = list(map(int, answer.text.split()))

    def right(context: list[int]) -> list[int]:
        start = next(n for n in range(len(context), -1, -1) if tuple(context[:n]) in known)
        return known[tuple(context[:start])][len(context) - start :][:7]

    draw = random.Random(0)
    with passes(stopping) as few:
        assert streamed(stopping, spec, Fixed(right)) == expected
    assert len(few) < len(without) / 4
    assert streamed(stopping, spec, Fixed(lambda context: [draw.randrange(300) for _ in range(5)])) == expected
    half = Fixed(lambda context: [*right(context)[:2], draw.randrange(300), *right(context)[3:]])
    assert streamed(stopping, spec, half) == expected
    assert streamed(stopping, spec, Drafter()) == expected


@pytest.mark.parametrize("size", [1, 2, 10])
def test_what_is_known_by_its_turn_is_left_out(stopping: Base, size: int) -> None:
    """Some of the prompts, or all: from either end the answers are the same, and whose turn it is is asked in time."""
    parts = [(prompts.prefix(kind), prompts.suffix(text)) for kind in (TYPES, ["court"]) for text in TEXTS]
    spec = DecodeSpec(12, size)
    expected = dict(stream(stopping, parts, spec))
    for backwards in (False, True):
        for known in ({0, 3, len(parts) - 1}, set(range(len(parts))), set()):
            found = dict(stream(stopping, parts, spec, known=known.__contains__, backwards=backwards))
            assert found == {index: answer for index, answer in expected.items() if index not in known}


@pytest.mark.usefixtures("one_thread")
def test_two_that_share_answers_meet(stopping: Base) -> None:
    """Each decodes its half: nothing is answered twice but what both have under way."""
    parts = [(prompts.prefix(kind), prompts.suffix(text)) for kind in (TYPES, ["court"]) for text in TEXTS]
    expected, found, took = dict(stream(stopping, parts, DecodeSpec(6, 1))), {}, [0, 0]
    runs = [stream(stopping, parts, DecodeSpec(6, 1), known=found.__contains__, backwards=b) for b in (False, True)]
    for number in (0, 1) * len(parts):
        for index, answer in islice(runs[number], 1):
            assert answer == found.get(index, answer)
            found[index] = answer
            took[number] += 1
    assert found == expected
    assert sum(took) <= len(parts) + 1 and abs(took[0] - took[1]) <= 1


def test_earlier_answers_are_guesses(stopping: Base, tiny: Base) -> None:
    parts = [(prompts.prefix(TYPES), prompts.suffix(text)) for text in TEXTS]
    spec = DecodeSpec(30, 10)
    plain = dict(stream(tiny, parts, spec))
    with passes(tiny) as before:
        assert dict(stream(tiny, parts, spec, Drafter())) == plain
    with passes(tiny) as after:
        assert dict(stream(tiny, parts, spec, Drafter(), [plain[i].text for i in range(len(parts))])) == plain
    assert len(after) < len(before)
    assert dict(stream(tiny, parts, spec, Drafter(), ["nonsense"] * len(parts))) == plain


def test_an_empty_prompt_is_refused(tiny: Base) -> None:
    for part in (("", "x"), ("x", "")):
        with pytest.raises(SamError, match="no tokens"):
            decode_prompts(tiny, [("a", "b"), part], DecodeSpec(4))


@pytest.mark.parametrize("size", [1, 3, 32])
def test_prompts_of_several_types_share_a_batch(stopping: Base, size: int) -> None:
    asked = [TYPES, ["court"], ["person", "location", "organization", "disease", "drug"]]
    rows = [(types, text) for text in TEXTS for types in asked]
    parts = [(prompts.prefix(types), prompts.suffix(text)) for types, text in rows]
    answers = decode_prompts(stopping, parts, DecodeSpec(30, size))
    assert answers == [oracle(stopping, text, 30, types) for types, text in rows]


@pytest.mark.slow
def test_smollm2_answers_are_those_of_generate_at_every_batch_size(smollm: Base) -> None:
    texts = TEXTS[:6]
    expected = [oracle(smollm, text, 24) for text in texts]
    for size in (1, 6):
        assert decode(smollm, TYPES, texts, DecodeSpec(24, size)) == expected
    assert len({a.text for a in expected}) > 3


PARTS = [(prompts.prefix(kind), prompts.suffix(text)) for kind in (TYPES, ["court"]) for text in TEXTS]


@pytest.fixture
def lanes(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The threads that passes were run in; neither lane begins before both do."""
    both, seen, step = threading.Barrier(2, timeout=60), set(), greedy._Lane.step

    def watched(self: greedy._Lane) -> list[tuple[int, Answer]]:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            both.wait()
        assert torch.get_num_threads() == 1
        return step(self)

    monkeypatch.setattr(greedy._Lane, "step", watched)
    return seen


@pytest.mark.parametrize("size", [1, 3, 19])
def test_two_lanes_answer_as_one(stopping: Base, lanes: set[int], size: int) -> None:
    expected = {
        i: oracle(stopping, text, 12, kind) for i, (kind, text) in enumerate(product((TYPES, ["court"]), TEXTS))
    }
    found = list(stream(stopping, PARTS, DecodeSpec(12, size)))
    assert len(found) == len(PARTS) and dict(found) == expected
    assert len(lanes) == 2 and torch.get_num_threads() == 2
    later: list[int] = []
    worker = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert later == [2]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_packed_layers_and_automata_in_two_lanes(tiny: Base, threads: Callable[[int], None], mode: str) -> None:
    spec = DecodeSpec(40, 3, mode, constrained=True)
    texts = [f"{text} {number}" for text in TEXTS for number in range(4)]
    parts = [(prompts.prefix(TYPES), prompts.suffix(text)) for text in texts]
    found, lanes = [], []
    with PackedWeights(tiny.model, mode, all_logits=True) as weights:
        weights.apply([])
        for count in (1, 2):
            threads(count)
            lanes.append(greedy._lanes(tiny, spec, len(parts)))
            constrained._vocabulary.cache_clear()  # the lanes grow its trie together
            found.append(decode_prompts(tiny, parts, spec, grammar.automata((TYPES, text) for text in texts)))
    assert lanes == [1, 2]
    assert found[0] == found[1] and len({answer.text for answer in found[0]}) > 3


def test_what_is_known_is_asked_once_by_two_lanes(stopping: Base, lanes: set[int]) -> None:
    asked: list[int] = []

    def known(index: int) -> bool:
        asked.append(index)
        return index % 3 == 0

    found = dict(stream(stopping, PARTS, DecodeSpec(12, 2), known=known))
    assert sorted(asked) == list(range(len(PARTS))) and sorted(found) == [i for i in range(len(PARTS)) if i % 3]
    assert len(lanes) == 2


def test_an_error_in_a_lane_is_the_callers_and_ends_both(stopping: Base, lanes: set[int]) -> None:
    before = stopping.model.config._attn_implementation

    def known(index: int) -> bool:
        if index == 5:
            raise OSError("the disk is full")
        return False

    with pytest.raises(OSError, match="the disk is full"):
        dict(stream(stopping, PARTS, DecodeSpec(12, 2), known=known))
    assert stopping.model.config._attn_implementation == before
    assert not lanes & {thread.ident for thread in threading.enumerate()}


def test_lanes_end_with_their_iterator(stopping: Base, lanes: set[int]) -> None:
    before = stopping.model.config._attn_implementation
    asked: list[int] = []
    run = stream(stopping, PARTS * 20, DecodeSpec(12, 2), known=lambda index: bool(asked.append(index)))
    next(run)
    run.close()
    assert stopping.model.config._attn_implementation == before
    assert not lanes & {thread.ident for thread in threading.enumerate()}
    assert len(asked) < 20 * len(PARTS)


def test_a_model_in_lanes_is_not_decoded_with_twice(stopping: Base, lanes: set[int]) -> None:
    before = stopping.model.config._attn_implementation
    first, second = (stream(stopping, PARTS, DecodeSpec(12, 2)) for _ in range(2))
    next(first)
    with pytest.raises(SamError, match="is decoding already"):
        next(second)
    first.close()
    assert stopping.model.config._attn_implementation == before


def test_a_lane_that_cannot_start_ends_the_other(
    stopping: Base, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, running, start = (
        stopping.model.config._attn_implementation,
        set(threading.enumerate()),
        threading.Thread.start,
    )
    started: list[threading.Thread] = []

    def once(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", once)
        with pytest.raises(RuntimeError, match="start new thread"):
            dict(stream(stopping, PARTS * 20, DecodeSpec(12, 2)))
    assert len(started) == 1 and not set(threading.enumerate()) - running
    assert stopping.model.config._attn_implementation == before


def test_interrupts_wait_for_the_pass_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often; and then the last one is the caller's."""
    go, interrupts, join = threading.Event(), [1, 2], threading.Thread.join
    worker = threading.Thread(target=go.wait)
    worker.start()

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if interrupts:
            raise KeyboardInterrupt(interrupts.pop(0))
        go.set()
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt, match="2"):
        greedy._await([worker, threading.Thread(target=go.wait)])  # the second was never started
    assert go.is_set() and not worker.is_alive()


def test_one_lane_where_two_do_not_pay(
    stopping: Base, tiny: Base, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one batch; where rounding may hang on a prompt's company; on one thread or core."""
    spec = DecodeSpec(12, 4)
    assert greedy._lanes(stopping, spec, 5) == 2
    assert greedy._lanes(stopping, spec, 4) == 1
    half = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model).to(torch.bfloat16))
    assert greedy._lanes(half, spec, 5) == 1
    assert greedy._lanes(dataclasses.replace(tiny, device="cuda"), spec, 5) == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
        assert greedy._lanes(stopping, spec, 5) == 1
    with monkeypatch.context() as patch:
        patch.setattr(greedy, "packs", lambda dtype: False)
        assert greedy._lanes(stopping, spec, 5) == 1
    torch.set_num_threads(1)
    assert greedy._lanes(stopping, spec, 5) == 1
