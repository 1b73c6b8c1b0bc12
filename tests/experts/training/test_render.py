"""Sentences as prompts and target completions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sam.experts.training.batch import Batch
from sam.experts.training.render import Renderer
from sam.models.base import Base
from sam.ner import parsing, prompts
from sam.types import Mention, Sentence
from tests.toy_training import recipe

TYPES = [f"type {c}" for c in "abcdefghij"]


SENTENCE = Sentence("s/0", "Ada saw London.", (Mention(0, 3, "type a"), Mention(8, 14, "type b")))


def asked(text: str) -> list[str]:
    """The types that a rendered prompt names."""
    return text.partition("\n")[0].removeprefix("Entity types: ").split(", ")


def texts_of(tokenizer: Any, batch: Batch) -> list[tuple[str, str]]:
    """The (whole prompt, target completion without its end) of each example."""
    prompts_ = [tokenizer.decode([*batch.prefix, *e.ids[: -e.completion]]) for e in batch.examples]
    return [(p, tokenizer.decode(e.ids[-e.completion : -1])) for p, e in zip(prompts_, batch.examples, strict=True)]


def test_batch_is_prompts_and_completions_with_the_types_they_name(tiny: Base) -> None:
    renderer = Renderer(tiny.tokenizer, 0, recipe(label_drop=0.5))
    second = Sentence("s/1", "London saw us.", (Mention(0, 6, "type c"),))
    for epoch in range(40):
        batch = renderer([SENTENCE, second], TYPES, epoch)
        shown = texts_of(tiny.tokenizer, batch)
        names = asked(shown[0][0])
        assert set(names) <= set(TYPES) and len(names) == len(set(names))
        for sentence, (prompt, completion), example in zip((SENTENCE, second), shown, batch.examples, strict=True):
            assert prompt == prompts.prefix(names) + prompts.suffix(sentence.text)
            assert completion == prompts.answer(sentence, names)
            assert {t for t, _ in parsing.parse(completion).pairs} == {t for t, _ in sentence.pairs} & set(names)
            assert example.ids[-1] == 0
            # Tokenised apart, as generators do it.
            ids = tiny.tokenizer(prompts.suffix(sentence.text), add_special_tokens=False).input_ids
            assert list(example.ids[: -example.completion]) == ids
        assert list(batch.prefix) == tiny.tokenizer(prompts.prefix(names), add_special_tokens=False).input_ids


def prompt_of(tiny: Base, renderer: Renderer, sentence: Sentence, epoch: int, foreign: Sequence[str] = ()) -> str:
    """The prompt of a batch of one."""
    return texts_of(tiny.tokenizer, renderer([sentence], TYPES, epoch, foreign))[0][0]


def test_label_drop_is_a_types_chance_to_be_left_out(tiny: Base) -> None:
    renderer = Renderer(tiny.tokenizer, 0, recipe(label_drop=0.3))
    n = 600
    seen: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for i in range(n):
        names = asked(prompt_of(tiny, renderer, replace(SENTENCE, id=f"s/{i}"), 0))
        seen.update(names)
        first[names[0]] += 1
    for t in TYPES:
        assert seen[t] / n == pytest.approx(0.7, abs=0.08)  # four standard deviations
        assert first[t] / n == pytest.approx(0.1, abs=0.05)


def test_at_most_max_types_and_at_least_one(tiny: Base) -> None:
    few = Renderer(tiny.tokenizer, 0, recipe(label_drop=0.0, max_types=3))
    none = Renderer(tiny.tokenizer, 0, recipe(label_drop=0.999))
    assert {len(asked(prompt_of(tiny, few, SENTENCE, e))) for e in range(10)} == {3}
    assert {len(asked(prompt_of(tiny, none, SENTENCE, e))) for e in range(10)} == {1}


def test_rendering_is_by_seed_first_sentence_and_epoch_alone(tiny: Base) -> None:
    one = Renderer(tiny.tokenizer, 0, recipe(seed=1))
    random.seed(5)
    batch = one([SENTENCE], TYPES, 2)
    random.seed(6)
    assert Renderer(tiny.tokenizer, 0, recipe(seed=1))([SENTENCE], TYPES, 2) == batch
    others = [one([SENTENCE], TYPES, 3), one([replace(SENTENCE, id="s/1")], TYPES, 2)]
    others.append(Renderer(tiny.tokenizer, 0, recipe(seed=2))([SENTENCE], TYPES, 2))
    assert batch not in others
    assert one([SENTENCE, replace(SENTENCE, id="s/1")], TYPES, 2).prefix == batch.prefix


def test_negatives_are_foreign_types_without_gold(tiny: Base) -> None:
    renderer = Renderer(tiny.tokenizer, 0, recipe(label_drop=0.0, negatives=3))
    foreign = ["gene", "drug", "cell", "organ"]
    added: Counter[int] = Counter()
    for epoch in range(200):
        ((text, completion),) = texts_of(tiny.tokenizer, renderer([SENTENCE], TYPES, epoch, foreign))
        assert set(TYPES) <= set(asked(text)) <= {*TYPES, *foreign}
        added[len(asked(text)) - len(TYPES)] += 1
        assert completion == prompts.answer(SENTENCE, asked(text)) and not set(foreign) & {
            t for t, _ in parsing.parse(completion).pairs
        }
    assert set(added) == {0, 1, 2, 3} and min(added.values()) > 30
    one = Renderer(tiny.tokenizer, 0, recipe(label_drop=0.0, negatives=3, max_types=10))
    assert {len(asked(prompt_of(tiny, one, SENTENCE, e, foreign))) for e in range(20)} == {10}


def test_detokenise_is_a_chance(tiny: Base) -> None:
    sentence = replace(SENTENCE, text="Ada saw London .")
    for chance, shown in ((0.0, {False}), (0.5, {False, True}), (1.0, {True})):
        renderer = Renderer(tiny.tokenizer, 0, recipe(detokenise=chance))
        texts = [prompt_of(tiny, renderer, sentence, e) for e in range(30)]
        assert {"London.\n" in text for text in texts} == shown
    together = Renderer(tiny.tokenizer, 0, recipe(detokenise=0.5))([sentence] * 30, TYPES, 0)
    assert {"London.\n" in text for text, _ in texts_of(tiny.tokenizer, together)} == {False, True}
