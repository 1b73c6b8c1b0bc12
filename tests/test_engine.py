"""The engine: answers of merged models against merging by hand, what names a model, and what is kept and reused."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sam.engine
from sam import prompts
from sam.base import Base, BaseSpec
from sam.decoding import AnswerStore, DecodeSpec
from sam.decoding.greedy import Answer, decode, stream
from sam.decoding.packed import PackedWeights
from sam.engine import SINGLE, Engine
from sam.errors import SamError
from sam.experts.card import Pool
from sam.merging import AdapterDeltas, MergeSpec, merge_modules, merged

TYPES = ("person", "place")
TEXTS = ["Ada went to Bath.", "Alan Turing worked at Bletchley Park near London", "rain", "A court in Strasbourg."]
SPEC = DecodeSpec(max_new_tokens=8, batch_size=2, mode="exact")
TIES = MergeSpec("ties", density=0.2, trim_scope="global", sign="sum", aggregate="mean")
DARE = MergeSpec("dare", density=0.5, seed=0)
LINEAR = MergeSpec("linear")

MakeEngine = Callable[..., Engine]


@pytest.fixture
def pool(shared_pool: Pool) -> Pool:
    return shared_pool


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AnswerStore]:
    kept = AnswerStore(tmp_path / "answers.sqlite")
    yield kept
    kept.close()


@pytest.fixture
def engine(tiny_spec: BaseSpec, pool: Pool) -> MakeEngine:
    """An engine with a base model of its own, loaded when it is first needed."""

    def make(store: AnswerStore | None = None, decoding: DecodeSpec = SPEC) -> Engine:
        return Engine(tiny_spec, pool, decoding, store, "cpu")

    return make


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The experts of each merge that is computed."""
    calls: list[tuple[str, ...]] = []

    def counted(adapters: Any, names: Any, spec: MergeSpec) -> Any:
        calls.append(tuple(names))
        return merge_modules(adapters, names, spec)

    monkeypatch.setattr(sam.engine, "merge_modules", counted)
    return calls


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.base.model.state_dict().items()}


def counts(engine: Engine) -> dict[str, int]:
    return {"decoded": engine.counts["decoded"], "reused": engine.counts["reused"]}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("merge", [TIES, DARE, LINEAR], ids=lambda m: m.name)
def test_answers_are_those_of_the_merge_by_hand(tiny: Base, engine: MakeEngine, pool: Pool, merge: MergeSpec) -> None:
    names = ["news", "stem", "social"]
    adapters = [AdapterDeltas.open(pool.folder(name)) for name in names]
    with merged(tiny.model, merge_modules(adapters, names, merge)):
        by_hand = [decode(tiny, TYPES, [text], SPEC)[0] for text in TEXTS]
    found = engine().predict(names, merge, TYPES, TEXTS)
    assert [p.answer for p in found] == [a.text for a in by_hand]
    assert [p.truncated for p in found] == [a.truncated for a in by_hand]
    assert found == [prompts.predict(t, a.text, TYPES, a.truncated) for t, a in zip(TEXTS, by_hand, strict=True)]


def test_answers_differ_from_model_to_model(engine: MakeEngine) -> None:
    one = engine()
    found = {
        tuple(p.answer for p in one.predict(experts, merge, TYPES, TEXTS))
        for experts, merge in [
            (["news"], SINGLE),
            (["stem"], SINGLE),
            (["news", "stem"], LINEAR),
            (["news", "stem"], TIES),
        ]
    }
    assert len(found) == 4


@pytest.mark.parametrize("packed", [True, False])
def test_the_base_is_given_back_bit_for_bit(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    if not packed:
        monkeypatch.setattr("sam.decoding.packed.packs", lambda dtype: False)
    one = engine()
    before = weights(one)
    layer = one.base.model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    one.predict(["news", "stem"], TIES, TYPES, TEXTS)
    assert (layer(x) - plain).abs().max() > 1e-3
    one.predict(["news"], SINGLE, TYPES, TEXTS)
    for _ in range(2):
        one.reset()
        assert torch.equal(layer(x), plain)
    assert same_bits(before, weights(one))


def test_the_base_is_given_back_after_an_error(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    before = weights(one)
    expected = one.predict(["news", "stem"], TIES, TYPES, TEXTS)

    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(sam.engine, "stream", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            one.predict(["news", "stem"], TIES, TYPES, TEXTS)
    assert same_bits(before, weights(one))
    assert one.predict(["news", "stem"], TIES, TYPES, TEXTS) == expected


def test_an_error_within_a_merge_leaves_nothing_behind(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    before = weights(one)

    def breaks(*args: Any) -> Iterator[Any]:
        yield next(iter(merge_modules(*args)))
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(sam.engine, "merge_modules", breaks)
        with pytest.raises(RuntimeError, match="half way"):
            one.predict(["news", "stem"], TIES, TYPES, TEXTS)
    assert same_bits(before, weights(one))
    assert one.predict(["news", "stem"], TIES, TYPES, TEXTS) == engine().predict(["news", "stem"], TIES, TYPES, TEXTS)


def test_experts_in_another_order_are_the_same_model(engine: MakeEngine, merges: list[tuple[str, ...]]) -> None:
    one = engine()
    for merge in (TIES, DARE, LINEAR):
        merges.clear()
        assert one.key(["news", "stem"], merge) == one.key(["stem", "news"], merge)
        first = one.predict(["news", "stem"], merge, TYPES, TEXTS)
        assert one.predict(["stem", "news"], merge, TYPES, TEXTS) == first
        assert merges == [("news", "stem")]
        one.predict(["social"], SINGLE, TYPES, TEXTS)
        assert one.predict(["stem", "news"], merge, TYPES, TEXTS) == first


def test_one_expert_is_one_model_under_every_merge(engine: MakeEngine, store: AnswerStore) -> None:
    one = engine(store)
    assert len({one.key(["news"], merge) for merge in (TIES, DARE, LINEAR, SINGLE)}) == 1
    found = [one.predict(["news"], merge, TYPES, TEXTS) for merge in (TIES, DARE, LINEAR)]
    assert found[0] == found[1] == found[2]
    assert counts(one) == {"decoded": 4, "reused": 8}


def test_kept_answers_need_no_model(
    engine: MakeEngine, store: AnswerStore, merges: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine(store).predict(["news", "stem"], TIES, TYPES, TEXTS)

    def refuses(*args: Any) -> None:
        raise AssertionError("all answers are kept: the model is not to be loaded")

    monkeypatch.setattr(sam.engine, "load", refuses)
    merges.clear()
    again = engine(store)
    assert again.predict(["stem", "news"], TIES, TYPES, TEXTS[::-1]) == expected[::-1]
    assert counts(again) == {"decoded": 0, "reused": 4}
    assert "base" not in vars(again)
    assert merges == []
    assert "decode" not in again.seconds


def test_only_missing_answers_are_decoded(engine: MakeEngine, store: AnswerStore) -> None:
    engine(store).predict(["news"], SINGLE, TYPES, TEXTS[:2])
    again = engine(store)
    found = again.predict(["news"], SINGLE, TYPES, TEXTS)
    assert counts(again) == {"decoded": 2, "reused": 2}
    assert found == engine().predict(["news"], SINGLE, TYPES, TEXTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"experts": ["news", "social"]},
        {"experts": ["news", "stem", "social"]},
        {"merge": LINEAR},
        {"merge": MergeSpec("dare", density=0.5, seed=1)},
        {"merge": MergeSpec("dare", density=0.6, seed=0)},
        {"merge": MergeSpec("dare", density=0.5, seed=0, lam=0.5)},
        {"types": ("place", "person")},
        {"types": ("person",)},
        {"decoding": DecodeSpec(max_new_tokens=9, batch_size=2, mode="exact")},
        {"decoding": DecodeSpec(max_new_tokens=8, batch_size=2, mode="exact", constrained=True)},
    ],
    ids=["expert", "k", "merge", "seed", "density", "lam", "order of types", "types", "length", "constrained"],
)
def test_an_answer_is_not_reused_where_something_can_change_it(
    engine: MakeEngine, store: AnswerStore, changed: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"experts": ["news", "stem"], "merge": DARE, "types": TYPES, "decoding": SPEC}

    def ask(experts: list[str], merge: MergeSpec, types: tuple[str, ...], decoding: DecodeSpec) -> dict[str, int]:
        one = engine(store, decoding)
        one.predict(experts, merge, types, TEXTS)
        return counts(one)

    assert ask(**asked) == {"decoded": 4, "reused": 0}
    assert ask(**asked) == {"decoded": 0, "reused": 4}
    assert ask(**{**asked, **changed}) == {"decoded": 4, "reused": 0}


def test_types_of_one_prompt_and_other_languages_share_only_free_answers(
    engine: MakeEngine, store: AnswerStore
) -> None:
    for constrained, reused in ((False, 4), (True, 0)):
        spec = DecodeSpec(max_new_tokens=8, batch_size=2, mode="exact", constrained=constrained)
        engine(store, spec).predict(["news"], SINGLE, ("person, place",), TEXTS)
        again = engine(store, spec)
        again.predict(["news"], SINGLE, ("person", "place"), TEXTS)
        assert again.counts["reused"] == reused


def test_an_answer_is_not_reused_for_another_prompt(
    engine: MakeEngine, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(store).predict(["news"], SINGLE, TYPES, TEXTS)
    monkeypatch.setattr(prompts, "PROMPT_VERSION", "another")
    again = engine(store)
    again.predict(["news"], SINGLE, TYPES, TEXTS)
    assert counts(again) == {"decoded": 4, "reused": 0}


def test_what_cannot_change_an_answer_does_not_hinder_reuse(engine: MakeEngine, store: AnswerStore) -> None:
    engine(store).predict(["news"], SINGLE, TYPES, TEXTS)
    again = engine(store, DecodeSpec(max_new_tokens=8, batch_size=3, mode="exact"))
    again.predict(
        ["news"], MergeSpec("ties", density=0.9, trim_scope="tensor", sign="count", aggregate="sum"), TYPES, TEXTS
    )
    assert counts(again) == {"decoded": 0, "reused": 4}


def test_a_text_that_comes_twice_is_decoded_once(engine: MakeEngine) -> None:
    one = engine()
    done: list[int] = []
    asked = [(TYPES, text) for text in (TEXTS[0], TEXTS[1], TEXTS[0])]
    found = one.predict_all(["news"], SINGLE, asked, done.append)
    assert found[0] == found[2] == engine().predict(["news"], SINGLE, TYPES, TEXTS[:1])[0]
    assert counts(one) == {"decoded": 2, "reused": 1}
    assert sum(done) == 3


def test_progress_counts_every_text_once(engine: MakeEngine, store: AnswerStore) -> None:
    one = engine(store)
    one.predict(["news"], SINGLE, TYPES, TEXTS[:1])
    done: list[int] = []
    one.predict_all(["news"], SINGLE, [(TYPES, text) for text in TEXTS], done.append)
    assert sum(done) == len(TEXTS)
    assert one.predict(["news"], SINGLE, TYPES, []) == []


def test_answers_are_kept_as_they_come(engine: MakeEngine, store: AnswerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies has kept what was done."""
    texts = [f"text number {i}" for i in range(4)]

    def dies_later(*args: Any) -> Any:
        for number, answer in enumerate(stream(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(sam.engine, "stream", dies_later)
        with pytest.raises(KeyboardInterrupt):
            engine(store).predict(["news"], SINGLE, TYPES, texts)
    again = engine(store)
    again.predict(["news"], SINGLE, TYPES, texts)
    assert counts(again) == {"decoded": 2, "reused": 2}


def test_the_most_similar_models_answer_is_the_guess(
    engine: MakeEngine, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equally similar models the last one's, whichever process it was of; to another prompt there is none."""
    guesses: list[str] = []

    def answering(base: Any, parts: Any, spec: Any, drafter: Any, earlier: list[str], *others: Any) -> Any:
        guesses.extend(earlier)
        yield from ((index, Answer(f"answer {len(guesses)}", False)) for index in range(len(parts)))

    monkeypatch.setattr(sam.engine, "stream", answering)
    engines = [engine(store), engine(store)]
    for number, (experts, merge, text, guess) in enumerate(
        (
            (["news"], SINGLE, "Ada", ""),
            (["social", "stem"], TIES, "Ada", "answer 1"),
            (["news"], SINGLE, "Bath", ""),
            (["news", "social", "stem"], LINEAR, "Ada", "answer 2"),
            (["stem", "social"], DARE, "Ada", "answer 2"),
            (["biomedical"], SINGLE, "Ada", "answer 5"),
            (["social", "stem"], LINEAR, "Ada", "answer 5"),
            (["news", "social"], TIES, "Ada", "answer 4"),
            (["news", "stem"], TIES, "Ada", "answer 4"),
            (["social"], SINGLE, "Ada", "answer 8"),
        )
    ):
        engines[number % 2].predict(experts, merge, TYPES, [text])
        assert guesses[-1] == guess, (experts, merge)


@pytest.mark.usefixtures("one_thread")
def test_what_another_process_answers_meanwhile_is_taken(engine: MakeEngine, store: AnswerStore) -> None:
    one, other = engine(store, replace(SPEC, batch_size=1)), engine(store)
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        if more and not counts(other)["decoded"]:
            other.predict(["news"], SINGLE, TYPES, TEXTS)

    found = one.predict_all(["news"], SINGLE, [(TYPES, text) for text in TEXTS], step)
    assert found == engine().predict(["news"], SINGLE, TYPES, TEXTS)
    assert done == len(TEXTS)
    assert counts(one) == {"decoded": 1, "reused": len(TEXTS) - 1}
    assert counts(other) == {"decoded": len(TEXTS) - 1, "reused": 1}


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_between_answers_gives_attention_back(
    engine: MakeEngine, threads: Callable[[int], None], count: int
) -> None:
    threads(count)
    one = engine(None, replace(SPEC, batch_size=1))
    before, running = one.base.model.config._attn_implementation, set(threading.enumerate())

    def stops(done: int) -> None:
        if one.counts["decoded"] or done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        one.predict_all(["news"], SINGLE, [(TYPES, text) for text in TEXTS], stops)
    # The traceback, which is alive here, holds the frames of the run.
    assert kept.tb is not None
    assert one.base.model.config._attn_implementation == before
    assert not [t for t in set(threading.enumerate()) - running if t.name.endswith("(work)")]


def test_an_answer_is_kept_before_the_next_one_is_awaited(
    engine: MakeEngine, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that is killed, where nothing can be tidied up, loses none."""
    kept: list[str] = []
    put = store.put

    def watched(key: str, answer: str, truncated: bool) -> None:
        put(key, answer, truncated)
        kept.append(key)

    monkeypatch.setattr(store, "put", watched)
    found: list[int] = []

    def seen(done: int) -> None:
        if done:  # the first call is for those found in the store
            assert len(store.get(kept)) == len(kept) == len(found) + 1
            found.append(done)

    engine(store).predict_all(["news"], SINGLE, [(TYPES, f"text number {i}") for i in range(8)], seen)
    assert len(found) == 8


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
    engine().predict(["news", "stem"], TIES, TYPES, TEXTS[:1])
    assert len(yielded) == 14
    assert most <= 1
    assert [ref() for ref in yielded] == [None] * 14


def test_a_merge_stays_applied_from_call_to_call(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    one.predict(["news", "stem"], TIES, TYPES, TEXTS[:1])
    applied: list[Any] = []
    monkeypatch.setattr(PackedWeights, "apply", lambda self, modules: applied.append(modules))
    one.predict(["stem", "news"], TIES, TYPES, TEXTS[1:])
    assert applied == []


@pytest.mark.parametrize("constrained", [False, True])
def test_constrained_answers_are_chosen_among_exact_logits_and_int8_has_its_sample(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, constrained: bool
) -> None:
    asked: list[Any] = []

    made = PackedWeights.__init__

    def watched(self: Any, model: Any, mode: str, *, all_logits: bool, sample: Any) -> None:
        asked.append((all_logits, sample))
        made(self, model, mode, all_logits=all_logits, sample=sample)

    monkeypatch.setattr(PackedWeights, "__init__", watched)
    one = engine(decoding=DecodeSpec(8, 2, "fast", constrained))
    one.predict(["news"], SINGLE, TYPES, TEXTS[:1])
    assert asked == [(constrained, one.base.tokenizer(prompts.SAMPLE).input_ids)]


def test_a_base_loaded_in_inference_mode_serves_outside_of_it(engine: MakeEngine) -> None:
    """Trainer.predict loads and merges in inference mode; whoever uses the engine afterwards may not be in it."""
    one = engine()
    with torch.inference_mode():
        inside = one.predict(["news", "stem"], TIES, TYPES, TEXTS)
    one.predict(["news"], SINGLE, TYPES, TEXTS)
    assert one.predict(["news", "stem"], TIES, TYPES, TEXTS) == inside
    one.reset()
    assert same_bits(weights(one), weights(engine()))


def test_questions_of_several_targets_at_once_are_answered_as_one_by_one(engine: MakeEngine) -> None:
    asked = [(("person",), TEXTS[0]), (("place", "person"), TEXTS[0]), (("person",), TEXTS[1])]
    one = engine()
    found = one.predict_all(["news", "stem"], TIES, asked)
    assert counts(one) == {"decoded": 3, "reused": 0}
    assert found == [engine().predict(["news", "stem"], TIES, types, [text])[0] for types, text in asked]


def test_unknown_and_repeated_experts_are_refused(engine: MakeEngine) -> None:
    with pytest.raises(SamError, match="'sports' is not in"):
        engine().predict(["sports"], SINGLE, TYPES, TEXTS)
    with pytest.raises(SamError, match="selected twice"):
        engine().predict(["news", "news"], LINEAR, TYPES, TEXTS)
