"""The decoding benchmark's arithmetic; no timing."""

from __future__ import annotations

import pytest

from experiments.bench.decode import DTYPES, _generate, _name, agreement, near, sample, scout
from sam import prompts
from sam.base import Base
from sam.decoding import DecodeSpec
from sam.decoding.greedy import Answer, decode_prompts
from sam.ner import Mention, Sentence


def test_without_the_corpora_the_sentences_are_the_mini_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_MIRROR", "/nowhere")
    asked, source = sample(20)
    assert source == "mini benchmark" and len(asked) == 20
    assert len({types for types, _ in asked}) > 5


@pytest.mark.parametrize(
    ("bf16", "tried"),
    [(0.1, [16]), (1.6, [16, 8, 32]), (9.0, [16, 8, 32])],
)
def test_a_dtype_that_is_far_behind_is_tried_at_one_size(bf16: float, tried: list[int]) -> None:
    """At fp32's best; one that is far behind only at another size is tried at all."""
    asked: list[str] = []

    def rate(name: str) -> float:
        asked.append(name)
        dtype, _, size = name.split()[1:]
        fp32 = {"8": 1.0, "16": 3.0, "32": 2.0}[size]
        return fp32 if dtype == DTYPES[0] else bf16 if size == "16" else 0.1

    scout(rate, (8, 16, 32))
    assert asked[:3] == [_name("float32", size) for size in (8, 16, 32)]
    assert asked[3:] == [_name("bfloat16", size) for size in tried]


def test_agreement_is_with_fp32_generate() -> None:
    asked = [(("person",), Sentence(str(n), "Ada sang.", (Mention(0, 3, "person"),))) for n in range(4)]
    right, wrong = Answer(' {"person": ["Ada"]}', False), Answer(" {}", False)
    notes = agreement({"sam fast": [right, right, wrong, wrong], "generate float32 batch 8": [right] * 4}, asked)
    assert notes["sam fast"] == "50.0 % of answers as fp32 generate, F1 66.7 (-33.3, -100.0 to +0.0)"
    assert notes["generate float32 batch 8"] == "100.0 % of answers as fp32 generate, F1 100.0"


def test_differences_in_f1_are_paired() -> None:
    """Answers that score alike differ by nothing, whatever sentences are drawn."""
    asked = [(("person",), Sentence(str(n), "Ada sang.", (Mention(0, 3, "person"),))) for n in range(4)]
    one, other, none = (Answer(text, False) for text in (' {"person": ["Ada"]}', ' {"person":["Ada"]}', " {}"))
    notes = agreement({"sam fast": [other, none] * 2, "generate float32 batch 8": [one, none] * 2}, asked)
    assert notes["sam fast"] == "50.0 % of answers as fp32 generate, F1 66.7 (+0.0, +0.0 to +0.0)"


def test_the_peer_answers_as_we_do(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.bench.decode.LIMIT", 12)
    parts = [
        (prompts.prefix(["person"]), prompts.suffix(text)) for text in ("Ada sang.", "x", "A longer one, in London.")
    ]
    rows = [[t for part in both for t in tiny.tokenizer(part).input_ids] for both in parts]
    assert _generate(tiny, tiny.model, rows) == decode_prompts(tiny, parts, DecodeSpec(12, 4))


def test_all_settings_meet_ours_that_scouting_does_not_tell_from_the_best() -> None:
    assert near({"a": 0.89, "b": 0.91, "c": 1.0, "d": 0.3}) == ["c", "b"]
