"""The engine: predictions of merged models against merging by hand, what names a model, what is kept and reused."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sam.engine
from sam.engine import SINGLE, Engine
from sam.errors import SamError
from sam.experts.card import Pool
from sam.generation import Completion, CompletionCache, Request
from sam.generation.transformers import TransformersGenerator
from sam.merging import AdapterDeltas, Merge, dare, linear, merge_modules, merged, ties
from sam.models.base import Base
from sam.models.identity import Identity
from sam.models.spec import BaseSpec
from sam.ner import parsing, prompts
from sam.ner.task import NER
from sam.task import Task
from sam.types import Prediction
from tests.fakes import FakeGenerator, numbered
from tests.generation.models import oracle

TYPES = ("person", "place")
TEXTS = ["Ada went to Bath.", "Alan Turing worked at Bletchley Park near London", "rain", "A court in Strasbourg."]
TIES = Merge(ties, {"density": 0.2, "trim_scope": "global"})
DARE = Merge(dare, {"density": 0.5, "seed": 0})
LINEAR = Merge(linear)
BASE = Identity("fingerprint", "settings")

MakeEngine = Callable[..., Engine]


@pytest.fixture
def pool(shared_pool: Pool) -> Pool:
    return shared_pool


@pytest.fixture
def cache(tmp_path: Path) -> CompletionCache:
    return CompletionCache(tmp_path / "completions")


@pytest.fixture
def engine(pool: Pool) -> MakeEngine:
    """An engine with a fake generator; without a cache nothing outlives it."""

    def make(
        cache: CompletionCache | None = None, constrained: bool = False, task: Task = NER, **options: Any
    ) -> Engine:
        generator = FakeGenerator(numbered, **options)
        return Engine(pool, generator, cache or CompletionCache(None), BASE, task, constrained)

    return make


def asked(types: Sequence[str] = TYPES, texts: Sequence[str] = TEXTS) -> list[tuple[tuple[str, ...], str]]:
    return [(tuple(types), text) for text in texts]


def counts(engine: Engine) -> dict[str, int]:
    return {"generated": engine.counts["generated"], "reused": engine.counts["reused"]}


def fake(engine: Engine) -> FakeGenerator:
    assert isinstance(engine.generator, FakeGenerator)
    return engine.generator


@pytest.mark.parametrize("merge", [TIES, DARE, LINEAR], ids=lambda m: m.name)
def test_predictions_are_those_of_the_merge_by_hand(tiny: Base, tiny_spec: BaseSpec, pool: Pool, merge: Merge) -> None:
    names = ["news", "stem", "social"]
    adapters = [AdapterDeltas.open(pool.folder(name)) for name in names]
    with merged(tiny.model, merge_modules(adapters, names, merge)):
        by_hand = [oracle(tiny, Request(prompts.prefix(TYPES), prompts.suffix(text)), 8) for text in TEXTS]
    generator = TransformersGenerator(tiny_spec, "cpu", 8, 2, "auto")
    found = Engine(pool, generator, CompletionCache(None), BASE, NER).predict(names, merge, asked())
    assert found == [parsing.predict(t, text, TYPES, cut) for t, (text, cut) in zip(TEXTS, by_hand, strict=True)]


def test_models_differ(engine: MakeEngine) -> None:
    one = engine()
    models: list[tuple[list[str], Merge]] = [
        (["news"], SINGLE),
        (["stem"], SINGLE),
        (["news", "stem"], LINEAR),
        (["news", "stem"], TIES),
        ([], SINGLE),
    ]
    found = {tuple(p.completion for p in one.predict(experts, merge, asked())) for experts, merge in models}
    assert len(found) == len(set(fake(one).loads)) == 5


def test_experts_in_another_order_are_the_same_model(engine: MakeEngine) -> None:
    one = engine()
    for number, merge in enumerate((TIES, DARE, LINEAR), 1):
        assert one.key(["news", "stem"], merge) == one.key(["stem", "news"], merge)
        first = one.predict(["news", "stem"], merge, asked())
        assert one.predict(["stem", "news"], merge, asked()) == first
        assert len(fake(one).loads) == number


def test_one_expert_is_one_model_under_every_merge(engine: MakeEngine) -> None:
    one = engine()
    assert len({one.key(["news"], merge) for merge in (TIES, DARE, LINEAR, SINGLE)}) == 1
    found = [one.predict(["news"], merge, asked()) for merge in (TIES, DARE, LINEAR)]
    assert found[0] == found[1] == found[2]
    assert counts(one) == {"generated": 4, "reused": 8}


def test_kept_completions_need_no_model(engine: MakeEngine, cache: CompletionCache) -> None:
    expected = engine(cache).predict(["news", "stem"], TIES, asked())
    again = engine(cache)
    assert again.predict(["stem", "news"], TIES, asked()[::-1]) == expected[::-1]
    assert counts(again) == {"generated": 0, "reused": 4}
    assert fake(again).loads == [] and "generate" not in again.seconds


def test_only_missing_completions_are_generated(engine: MakeEngine, cache: CompletionCache) -> None:
    engine(cache).predict(["news"], SINGLE, asked(texts=TEXTS[:2]))
    again = engine(cache)
    found = again.predict(["news"], SINGLE, asked())
    assert counts(again) == {"generated": 2, "reused": 2}
    assert found == engine().predict(["news"], SINGLE, asked())


@pytest.mark.parametrize(
    "changed",
    [
        {"experts": ["news", "social"]},
        {"experts": ["news", "stem", "social"]},
        {"merge": LINEAR},
        {"merge": Merge(dare, {"density": 0.5, "seed": 1})},
        {"merge": Merge(dare, {"density": 0.6, "seed": 0})},
        {"merge": Merge(dare, {"density": 0.5, "seed": 0, "lam": 0.5})},
        {"types": ("place", "person")},
        {"types": ("person",)},
        {"max_new_tokens": 9},
        {"constrained": True},
    ],
    ids=["expert", "k", "merge", "seed", "density", "lam", "order of types", "types", "length", "constrained"],
)
def test_a_completion_is_not_reused_where_something_can_change_it(
    engine: MakeEngine, cache: CompletionCache, changed: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {"experts": ["news", "stem"], "merge": DARE, "types": TYPES}

    def ask(experts: list[str], merge: Merge, types: tuple[str, ...], **options: Any) -> dict[str, int]:
        one = engine(cache, **options)
        one.predict(experts, merge, asked(types))
        return counts(one)

    assert ask(**usual) == {"generated": 4, "reused": 0}
    assert ask(**usual) == {"generated": 0, "reused": 4}
    assert ask(**{**usual, **changed}) == {"generated": 4, "reused": 0}


def test_types_of_one_prompt_and_other_grammars_share_only_free_completions(
    engine: MakeEngine, cache: CompletionCache
) -> None:
    for constrained, reused in ((False, 4), (True, 0)):
        engine(cache, constrained).predict(["news"], SINGLE, asked(("person, place",)))
        again = engine(cache, constrained)
        again.predict(["news"], SINGLE, asked(("person", "place")))
        assert again.counts["reused"] == reused


def test_a_completion_is_not_reused_for_another_prompt(engine: MakeEngine, cache: CompletionCache) -> None:
    engine(cache).predict(["news"], SINGLE, asked())
    again = engine(cache, task=replace(NER, version="another"))
    again.predict(["news"], SINGLE, asked())
    assert counts(again) == {"generated": 4, "reused": 0}


def test_what_cannot_change_a_completion_does_not_hinder_reuse(engine: MakeEngine, cache: CompletionCache) -> None:
    engine(cache).predict(["news"], SINGLE, asked())
    again = engine(cache)
    again.predict(["news"], Merge(ties, {"density": 0.9, "sign": "count", "aggregate": "sum"}), asked())
    assert counts(again) == {"generated": 0, "reused": 4}


def test_a_text_that_comes_twice_is_asked_once(engine: MakeEngine) -> None:
    one = engine()
    done: list[int] = []
    found = one.predict(["news"], SINGLE, asked(texts=[TEXTS[0], TEXTS[1], TEXTS[0]]), done.append)
    assert found[0] == found[2] == engine().predict(["news"], SINGLE, asked(texts=TEXTS[:1]))[0]
    assert counts(one) == {"generated": 2, "reused": 1}
    assert sum(done) == 3


def test_progress_counts_every_text_once(engine: MakeEngine, cache: CompletionCache) -> None:
    one = engine(cache)
    one.predict(["news"], SINGLE, asked(texts=TEXTS[:1]))
    done: list[int] = []
    one.predict(["news"], SINGLE, asked(), done.append)
    assert sum(done) == len(TEXTS)
    assert one.predict(["news"], SINGLE, []) == []


def test_a_completion_is_kept_before_the_next_one_is_awaited(engine: MakeEngine, tmp_path: Path) -> None:
    """A run that is killed, where nothing can be tidied up, loses none; one that fails neither."""
    one = engine(CompletionCache(tmp_path))
    seen: list[int] = []

    def dies(done: int) -> None:
        other = engine(CompletionCache(tmp_path))
        other.predict(["news"], SINGLE, asked())
        seen.append(other.counts["reused"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.predict(["news"], SINGLE, asked(), lambda n: dies(n) if n else None)
    assert seen == [1]


def test_an_error_while_merging_is_not_a_loaded_model(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    expected = engine().predict(["news", "stem"], TIES, asked())

    def breaks(*args: Any) -> Iterator[Any]:
        yield next(iter(merge_modules(*args)))
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(sam.engine, "merge_modules", breaks)
        with pytest.raises(RuntimeError, match="half way"):
            one.predict(["news", "stem"], TIES, asked())
    assert one.predict(["news", "stem"], TIES, asked()) == expected


def test_a_merge_is_streamed_and_not_held(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is one module's deltas, not the whole model's."""
    yielded: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for module, delta in merge_modules(*args):
            yielded.append(weakref.ref(delta))
            yield module, delta
            del delta
            most = max(most, sum(ref() is not None for ref in yielded))

    monkeypatch.setattr(sam.engine, "merge_modules", watched)
    engine().predict(["news", "stem"], TIES, asked(texts=TEXTS[:1]))
    assert len(yielded) == 14
    assert most <= 1
    assert [ref() for ref in yielded] == [None] * 14


def test_a_model_stays_loaded_from_call_to_call(engine: MakeEngine) -> None:
    one = engine()
    one.predict(["news", "stem"], TIES, asked(texts=TEXTS[:1]))
    one.predict(["stem", "news"], TIES, asked(texts=TEXTS[1:]))
    assert len(fake(one).loads) == 1
    one.close()
    assert fake(one).closed == 1
    one.predict(["news", "stem"], TIES, asked(texts=["another"]))
    assert len(fake(one).loads) == 2


def test_requests_of_several_targets_at_once_are_answered_as_one_by_one(engine: MakeEngine) -> None:
    several = [(("person",), TEXTS[0]), (("place", "person"), TEXTS[0]), (("person",), TEXTS[1])]
    one = engine()
    found = one.predict(["news", "stem"], TIES, several)
    assert counts(one) == {"generated": 3, "reused": 0}
    by_one: list[Prediction] = [engine().predict(["news", "stem"], TIES, [each])[0] for each in several]
    assert found == by_one and len({p.completion for p in found}) == 3


def test_unknown_and_repeated_experts_are_refused(engine: MakeEngine) -> None:
    with pytest.raises(SamError, match="'sports' is not in"):
        engine().predict(["sports"], SINGLE, asked())
    with pytest.raises(SamError, match="selected twice"):
        engine().predict(["news", "news"], LINEAR, asked())


def test_constrained_requests_carry_their_grammar(engine: MakeEngine) -> None:
    one = engine(constrained=True)
    one.predict(["news"], SINGLE, asked())
    assert all(r.grammar and "person" in r.grammar for r in fake(one).asked)
    assert isinstance(next(iter(one.generator.generate(fake(one).asked[:1])))[1], Completion)
