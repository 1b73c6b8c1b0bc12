"""SamModule under Lightning's Trainer: selection, task models, union and scores against the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
import pytest

import sam
from sam import pipeline
from sam.data.targets import Target
from sam.engine import SINGLE, Engine
from sam.errors import SamError
from sam.experts.card import Pool
from sam.extend import Configured
from sam.generation import CompletionCache
from sam.merging import Merge, ties
from sam.models.identity import Identity
from sam.module import SamModule
from sam.ner.combine import combine, union
from sam.ner.scoring import score
from sam.ner.task import NER
from sam.pipeline import Method
from sam.selection import Query, Selector, by_domain, by_sampling, selectors
from sam.types import Mention, Prediction, Sentence
from tests.fakes import FakeGenerator, Reply, capitals, numbered
from tests.tiny import HashEncoder, one_line

TYPES = ("person", "place")
TIES = Merge(ties, {"density": 0.2, "trim_scope": "global"})
SENTENCES = (
    Sentence("s0", "Ada went to Bath", (Mention(0, 3, "person"), Mention(12, 16, "place"))),
    Sentence("s1", "Alan Turing worked at Bletchley Park", (Mention(0, 11, "person"), Mention(22, 36, "place"))),
    Sentence("s2", "Rain again", ()),
    Sentence("s3", "Unknown Cork", None),
    Sentence("s4", "Dee saw Ely and Bath", (Mention(0, 3, "person"), Mention(8, 11, "place"))),
)
TARGET = Target("t", TYPES, SENTENCES, ("Eve left Rome", "Bob", "the rain in Spain", "Ely"))

MakeModule = Callable[..., SamModule]


@pytest.fixture
def pool(shared_pool: Pool) -> Pool:
    return shared_pool


@pytest.fixture
def make(pool: Pool) -> MakeModule:
    def module(target: Target = TARGET, reply: Reply = numbered, **options: Any) -> SamModule:
        engine = Engine(pool, FakeGenerator(reply), CompletionCache(None), Identity("f", "s"), NER)
        settings: dict[str, Any] = {"k": 2, "sample_size": 3, "rule": Configured(union), "seed": 0}
        settings["selector"] = Selector(selectors.sam)
        settings |= {"merge": TIES, "names": tuple(pool.names), **options}
        return SamModule(engine, HashEncoder(), target, Method(**settings))

    return module


def trainer(**options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", devices=1, logger=False, **quiet, **options)


def test_predictions_are_those_of_each_step_by_hand(make: MakeModule, pool: Pool) -> None:
    module = make()
    trainer().predict(module, return_predictions=False)

    engine = make().engine
    ids = by_sampling.draw(TARGET.unlabelled, 3, 0, "t")

    def ask(expert: str, texts: Sequence[str]) -> list[Prediction]:
        return engine.predict([expert], SINGLE, [(TYPES, text) for text in texts])

    first = by_domain.rank(TARGET.unlabelled, pool.names, pool, HashEncoder()).experts[:2]
    second = by_sampling.rank(TARGET.unlabelled, ids, pool.names, ask, (0, "t")).experts[:2]
    assert {name: s.experts for name, s in module.selections.items()} == {"domain": first, "sampling": second}
    for name, experts in (("domain", first), ("sampling", second)):
        by_hand = engine.predict(experts, TIES, [(TYPES, s.text) for s in SENTENCES])
        assert module.predictions[name] == {s.id: p for s, p in zip(SENTENCES, by_hand, strict=True)}
    for s in SENTENCES:
        both = [module.predictions["domain"][s.id], module.predictions["sampling"][s.id]]
        assert module.result().combined[s.id] == combine(both, s.text, union, TYPES)


def test_the_package_gives_the_module() -> None:
    assert sam.SamModule is SamModule


def test_union_scores_and_logged_metrics(make: MakeModule) -> None:
    module = make(reply=capitals)
    logged = trainer().test(module, verbose=False)
    labelled = [s for s in SENTENCES if s.mentions is not None]
    scores = module.result().scores
    assert list(scores) == ["domain", "sampling", "combined"]
    for name in ("domain", "sampling"):
        assert scores[name] == score(labelled, [module.predictions[name][s.id] for s in labelled])
    union = module.result().combined
    assert set(union) == {s.id for s in labelled}
    for s in labelled:
        pairs = [set(module.predictions[name][s.id].pairs) for name in ("domain", "sampling")]
        assert set(union[s.id].pairs) == pairs[0] | pairs[1]
    assert scores["combined"] == score(labelled, [union[s.id] for s in labelled])
    # The answers are right now and then: zeros everywhere would prove nothing.
    assert 0 < scores["combined"].f1 < 1
    assert scores["combined"].n == 4
    expected = {
        f"t/{name}/{metric}": getattr(s, metric)
        for name, s in scores.items()
        for metric in ("precision", "recall", "f1", "span_f1")
    }
    # Lightning gives them once a dataloader, and holds them in single precision.
    assert len(logged) == 2
    assert all(found == pytest.approx(expected, abs=1e-6) for found in logged)


def test_predict_returns_what_it_keeps(make: MakeModule) -> None:
    module = make(selector=Selector(selectors.named, {"experts": ["news", "stem"]}), reply=capitals)
    returned = {row["id"]: row for batch in trainer().predict(module) for row in batch}
    assert set(returned) == set(module.predictions["named"]) == {s.id for s in SENTENCES}
    for key, prediction in module.predictions["named"].items():
        assert returned[key] == {"id": key, "model": "named", **asdict(prediction)}


def test_predictions_do_not_depend_on_the_order_of_sentences(make: MakeModule) -> None:
    forward, backward = make(), make(Target("t", TYPES, SENTENCES[::-1], TARGET.unlabelled))
    for module in (forward, backward):
        trainer().predict(module, return_predictions=False)
    assert forward.predictions == backward.predictions
    assert forward.result().combined == backward.result().combined


def fails(*args: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_target_without_gold_can_be_predicted_but_not_tested(make: MakeModule) -> None:
    blind = Target("t", TYPES, tuple(Sentence(s.id, s.text) for s in SENTENCES), TARGET.unlabelled)
    with pytest.raises(SamError) as error:
        trainer().test(make(blind), verbose=False)
    assert "Trainer.predict" in one_line(error)
    module = make(blind)
    trainer().predict(module)
    assert set(module.result().combined) == {s.id for s in SENTENCES}
    again = pipeline.select_for(module.method, blind, module.engine, HashEncoder())
    assert module.selections == again


def test_a_part_of_the_batches_is_scored_as_that_part(make: MakeModule) -> None:
    many = tuple(Sentence(f"s{i}", f"Ada met Bob {i}", (Mention(0, 3, "person"),)) for i in range(90))
    module = make(Target("t", TYPES, many, TARGET.unlabelled), reply=capitals)
    trainer(limit_test_batches=1).test(module, verbose=False)
    assert 0 < module.result().scores["combined"].n < 90


def test_a_second_run_selects_no_more(make: MakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    trainer().predict(module)
    monkeypatch.setattr(Query, "domain", property(fails))
    monkeypatch.setattr(Query, "sampling", property(fails))
    trainer().test(module, verbose=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": 9}, ("k=9", "1..4")),
        ({"selector": Selector(selectors.random), "k": 5}, ("k=5",)),
        ({"sample_size": 0}, ("sample_size=0",)),
        ({"merge": Merge(ties)}, ("merge=ties", "density")),
        ({"selector": Selector(selectors.named, {"experts": ["sports"]})}, ("'sports'",)),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(
    make: MakeModule, options: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(SamError) as error:
        make(**options)
    message = one_line(error)
    assert all(part in message for part in named)


def test_a_sentence_with_types_of_its_own_is_asked_for_those(make: MakeModule) -> None:
    own = Sentence("s5", "Fay saw Ely", (Mention(0, 3, "knight"), Mention(8, 11, "isle")), ("knight", "isle"))
    module = make(
        Target("t", TYPES, (*SENTENCES, own), TARGET.unlabelled),
        selector=Selector(selectors.named, {"experts": ["news", "stem"]}),
        reply=capitals,
    )
    trainer().test(module, verbose=False)
    predicted = module.predictions["named"]
    assert {t for t, _ in predicted["s5"].pairs} <= {"knight", "isle"} and predicted["s5"].not_asked == 0
    assert all({t for t, _ in predicted[s.id].pairs} <= set(TYPES) for s in SENTENCES if s.mentions is not None)
    assert (module.result().combined["s5"].pairs, module.result().combined["s5"].mentions) == (
        predicted["s5"].pairs,
        predicted["s5"].mentions,
    )


def test_the_base_alone_is_a_task_model_without_experts(make: MakeModule) -> None:
    module = make(selector=Selector(selectors.none))
    trainer().predict(module, return_predictions=False)
    assert {name: s.experts for name, s in module.selections.items()} == {"none": ()}
    assert [module.predictions["none"][s.id].completion for s in SENTENCES] == [
        numbered(0, TYPES, s.text) for s in SENTENCES
    ]
