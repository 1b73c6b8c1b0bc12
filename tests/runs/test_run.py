"""The task ``run`` in this process: what a result says, when it is done again, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import sam.runs.run
from sam import launch
from sam.data.targets import mini
from sam.engine import SINGLE, Engine
from sam.errors import SamError
from sam.experts.card import Pool
from sam.generation import CompletionCache
from sam.merging import AdapterDeltas
from sam.models.identity import Identity
from sam.models.spec import BaseSpec
from sam.module import SamModule
from sam.ner import parsing
from sam.ner.combine import combine, union
from sam.ner.scoring import score
from sam.paths import conf_dir
from sam.results import PREDICTIONS, RESULT, STATUS
from sam.runs.plan import content, content_hash, identified, plan
from sam.runs.run import Models, run
from sam.types import Mention, Prediction, Sentence
from tests.fakes import FakeGenerator
from tests.tiny import HashEncoder, make_card, one_line

Config = dict[str, Any]
Compose = Callable[..., Config]


@pytest.fixture
def pool(shared_pool: Pool, tmp_path: Path) -> Pool:
    """Three experts and a unified one, to be changed at will."""
    return Pool(shutil.copytree(shared_pool.path, tmp_path / "pool", ignore=shutil.ignore_patterns("stem")))


@pytest.fixture
def composed(pool: Pool, tiny_spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compose]:
    """``composed(*overrides)``: the plain config of a run on the tiny base and pool, no model asked."""
    launch.register_resolvers()
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setenv("SAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sam.models.encoder.Encoder", lambda spec: HashEncoder())
    fixed = ["base=local", f"base.location={tiny_spec.location}", f"experts.path={pool.path}", "logger=none"]
    fixed += [
        "generator._target_=tests.fakes.mixed_generator",
        "trainer=cpu",
        "target=mini_movie",
        "limit=6",
        "k=2",
        "sample_size=3",
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):

        def make(*overrides: str) -> Config:
            found = OmegaConf.to_container(compose("config", [*fixed, *overrides]), resolve=True)
            assert isinstance(found, dict)
            return {str(k): v for k, v in found.items()}

        yield make


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RESULT).read_text()))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]


def test_predictions_scored_again_give_the_result(composed: Compose, tmp_path: Path) -> None:
    f1 = run(composed("target=[mini_movie,mini_music]"), tmp_path / "r", [], None)
    result, rows = result_of(tmp_path / "r"), rows_of(tmp_path / "r")
    assert list(result["targets"]) == ["mini_movie", "mini_music"]
    for name, target in result["targets"].items():
        mine = [row for row in rows if row["target"] == name]
        assert [row["id"] for row in mine] == [s.id for s in mini(name.removeprefix("mini_")).sentences[:6]]
        assert target["n"] == 6
        gold = [Sentence(r["id"], r["text"], tuple(Mention(a, b, t) for t, a, b in r["gold"])) for r in mine]
        found: dict[str, list[Prediction]] = {
            model: [parsing.predict(r["text"], r["models"][model]["answer"], target["types"]) for r in mine]
            for model in target["models"]
        }
        found["combined"] = [
            combine(list(models), r["text"], union, target["types"])
            for r, *models in zip(mine, *found.values(), strict=True)
        ]
        kept = {**target["models"], "combined": target["combined"]}
        assert set(kept) == {"domain", "sampling", "combined"}
        for model, predictions in found.items():
            assert json.loads(json.dumps(score(gold, predictions).to_dict())) == kept[model]["scores"]
            for r, p in zip(mine, predictions, strict=True):
                line = r["combined"] if model == "combined" else r["models"][model]
                assert line["pairs"] == [list(pair) for pair in p.pairs]
                assert line["mentions"] == [[m.type, m.start, m.end] for m in p.mentions]
    for metric in ("precision", "recall", "f1", "span_f1"):
        values = [t["combined"]["scores"][metric] for t in result["targets"].values()]
        assert result["overall"][metric] == pytest.approx(sum(values) / 2, abs=1e-12)
    assert f1 == result["overall"]["f1"]
    assert 0 < f1 < 1
    faults = [t["models"][m]["scores"] for t in result["targets"].values() for m in t["models"]]
    assert all(sum(s[fault] for s in faults) > 0 for fault in ("unparsable", "not_asked", "not_in_sentence"))


def test_a_result_says_what_it_stands_on(composed: Compose, pool: Pool, tmp_path: Path) -> None:
    config = composed()
    run(config, tmp_path / "r", ["k=2"], "sweep")
    result = result_of(tmp_path / "r")
    assert result["config"] == json.loads(json.dumps({k: v for k, v in config.items() if k not in ("train", "domain")}))
    assert result["generator"] == {"generator": "fake", "max_new_tokens": 160}
    assert result["overrides"] == ["k=2"]
    assert result["base"]["name"] == "local"
    assert len(result["base"]["fingerprint"]) == 64
    assert result["experts"] == {n: AdapterDeltas.open(pool.folder(n)).content_hash for n in pool.names}
    target = result["targets"]["mini_movie"]
    assert target["labels_used_for_selection"] is False
    for name, model in target["models"].items():
        assert model["experts"] == target["selections"][name]["experts"]
        assert len(set(model["experts"])) == 2
        assert set(target["selections"][name]["scores"]) == {"biomedical", "news", "social"}
    sampled = target["selections"]["sampling"]["details"]["sampled"]
    assert len(sampled) == 3
    assert result["completions"]["generated"] > 0
    assert result["seconds"]["total"] >= result["seconds"]["generate"]


def again(monkeypatch: pytest.MonkeyPatch, config: Config, folder: Path) -> bool:
    """Whether ``config`` is run once more in ``folder``."""
    real, calls = sam.runs.run.run_targets, []

    def run_targets(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sam.runs.run, "run_targets", run_targets)
        run(config, folder, [], None)
    return bool(calls)


def test_what_is_done_is_left_alone(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f1 = run(composed(), tmp_path / "r", [], None)
    before = (tmp_path / "r" / RESULT).stat().st_mtime_ns
    assert not again(monkeypatch, composed(), tmp_path / "r")
    assert not again(monkeypatch, composed("completions=fresh", "trainer=auto", "sweep=x"), tmp_path / "r")
    assert run(composed(), tmp_path / "r", [], None) == f1
    assert (tmp_path / "r" / RESULT).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "override",
    [
        *("sample_size=2", "k=1", "seed=1", "merge=linear", "merge.density=0.3", "limit=5", "combine=intersection"),
        *("selector=domain", "experts.exclude=[news]", "decode.max_new_tokens=9", "decode=constrained"),
        *("target.types=[actor]", "target=mini_music", "base.dtype=bfloat16"),
    ],
)
def test_another_question_is_run_again(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    run(composed(), tmp_path / "r", [], None)
    old = result_of(tmp_path / "r")["config_hash"]
    assert again(monkeypatch, composed(override), tmp_path / "r")
    assert result_of(tmp_path / "r")["config_hash"] != old


@pytest.mark.parametrize(
    ("selector", "ignored"),
    [
        (["selector=none"], ["k=1", "sample_size=2", "seed=1", "merge=linear", "experts.exclude=[news]"]),
        (["selector=all"], ["k=1", "sample_size=2", "seed=1"]),
        (["selector=each"], ["k=1", "seed=1", "merge=linear"]),
        (["selector=unified"], ["k=1", "seed=1", "merge=linear", "experts.exclude=[news]"]),
        (["selector=domain"], ["sample_size=2"]),
        (["selector=random", "k=1"], ["sample_size=2", "merge=linear"]),
    ],
)
def test_what_a_selector_ignores_is_not_in_the_hash(composed: Compose, selector: list[str], ignored: list[str]) -> None:
    def digest(*overrides: str) -> str:
        planned = plan(composed(*selector, *overrides))
        return content_hash(content(planned, Identity("base", "settings")))

    assert {digest(override) for override in ignored} == {digest()}
    assert digest("combine=vote") != digest() != digest("limit=5")


def test_another_expert_is_run_again(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    run(composed(), tmp_path / "r", [], None)
    card = Pool(pool.path).cards["news"]
    make_card("news", card.base_fingerprint, centroid=tuple(-x for x in card.centroid)).write(pool.path / "news")
    assert again(monkeypatch, composed(), tmp_path / "r"), "the centroid decides who is selected"
    settings = json.loads((pool.path / "news" / "adapter_config.json").read_text())
    settings["lora_alpha"] *= 2
    (pool.path / "news" / "adapter_config.json").write_text(json.dumps(settings))
    assert again(monkeypatch, composed(), tmp_path / "r"), "alpha scales the delta"
    assert not again(monkeypatch, composed(), tmp_path / "r")


def test_jobs_of_one_process_share_what_they_can(
    composed: Compose, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models()

    def engine_after(*overrides: str) -> Any:
        run(composed("completions=fresh", *overrides), tmp_path / "-".join(["r", *overrides]), models=models)
        return models._engine

    first = engine_after()
    counts = dict(first.counts)
    assert engine_after("merge=linear") is first and engine_after("k=1") is first
    assert first.counts["generated"] <= counts["generated"], "counts begin anew"
    assert engine_after("decode.max_new_tokens=9") is not first
    card = Pool(pool.path).cards["news"]
    flipped = tuple(-x for x in card.centroid)
    make_card("news", card.base_fingerprint, centroid=flipped).write(pool.path / "news")
    assert engine_after("k=1", "seed=1").pool.cards["news"].centroid == flipped
    settings = json.loads((pool.path / "news" / "adapter_config.json").read_text())
    settings["lora_alpha"] *= 2
    latest = models._engine
    monkeypatch.setattr(FakeGenerator, "key", lambda self: {"generator": "fake", "device": "another"})
    assert engine_after("seed=3") is not latest, "the device is another"
    latest = models._engine
    assert latest is not None
    before = latest.key(["news"], SINGLE)
    (pool.path / "news" / "adapter_config.json").write_text(json.dumps(settings))
    assert engine_after("seed=2") is engine_after("selector=unified") is latest
    assert latest.key(["news"], SINGLE) != before, "adapters are read again"
    monkeypatch.setattr(FakeGenerator, "generate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine_after("seed=4")
    assert models._engine is None


@pytest.mark.parametrize("moved", ["pool", "base", "target"])
def test_a_result_does_not_depend_on_where_things_lie(
    composed: Compose, tmp_path: Path, pool: Pool, tiny_spec: BaseSpec, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    """Two checkouts in different folders share their results."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Ada in Bath", "mentions": [{"type": "person", "start": 0, "end": 3}]}')
    there = {"pool": pool.path, "base": Path(str(tiny_spec.location)), "target": text}
    options = {"pool": "experts.path", "base": "base.location", "target": "target.path"}
    own = ["target=files", "target.types=[person]"]

    def question(name: str, place: Path) -> Config:
        places = {**there, name: place}
        return composed(*own, *(f"{options[part]}={path}" for part, path in places.items()))

    run(question(moved, there[moved]), tmp_path / "r")
    place = tmp_path / "elsewhere" / there[moved].name
    place.parent.mkdir()
    copied = shutil.copytree if there[moved].is_dir() else shutil.copy
    copied(there[moved], place)
    assert not again(monkeypatch, question(moved, place), tmp_path / "r")


def test_an_expert_that_is_not_looked_at_changes_nothing(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    config = composed("experts.exclude=[news]")
    run(config, tmp_path / "r", [], None)
    card = Pool(pool.path).cards["news"]
    make_card("news", card.base_fingerprint, sentences=11).write(pool.path / "news")
    assert not again(monkeypatch, config, tmp_path / "r")


def test_completions_are_shared_from_run_to_run(composed: Compose, tmp_path: Path) -> None:
    run(composed("k=1", "merge=ties"), tmp_path / "a", [], None)
    run(composed("k=1", "merge=dare"), tmp_path / "b", [], None)
    assert result_of(tmp_path / "b")["completions"].get("generated", 0) == 0
    assert result_of(tmp_path / "b")["overall"] == result_of(tmp_path / "a")["overall"]
    run(composed("k=1", "merge=dare", "completions=fresh"), tmp_path / "c", [], None)
    assert result_of(tmp_path / "c")["completions"]["generated"] > 0
    assert result_of(tmp_path / "c")["overall"] == result_of(tmp_path / "a")["overall"]


def test_what_fails_before_its_start_takes_no_result_away(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(composed(), tmp_path / "r", [], None)
    before = (tmp_path / "r" / RESULT).read_bytes()

    def refuses(*args: Any, **options: Any) -> None:
        raise SamError("no W&B")

    monkeypatch.setattr(sam.runs.run, "tracked", refuses)
    with pytest.raises(SamError, match="no W&B"):
        run(composed("k=1"), tmp_path / "r", ["k=1"], None)
    assert (tmp_path / "r" / RESULT).read_bytes() == before


def test_a_plan_holds_the_method_of_its_config(composed: Compose) -> None:
    planned = plan(
        composed("k=1", "sample_size=4", "seed=5", "selector=sampling", "combine=vote", "experts.only=[news]")
    )
    method = planned.method
    assert (method.selector.name, method.rule.name, method.names) == ("sampling", "vote", ("news",))
    assert (method.k, method.sample_size, method.seed, method.merge.name) == (1, 4, 5, "ties")


def test_the_default_method_is_that_of_the_paper(composed: Compose) -> None:
    method = plan(composed()).method
    assert (method.selector.name, method.merge.name, method.rule.name) == ("sam", "ties", "union")


def test_lightning_gives_the_numbers_of_a_run(composed: Compose, tmp_path: Path) -> None:
    planned = plan(composed())
    run(composed(), tmp_path / "r")
    expected = result_of(tmp_path / "r")["targets"]["mini_movie"]
    engine = Engine(planned.pool, planned.generator, CompletionCache(None), identified(planned), planned.task)
    module = SamModule(engine, HashEncoder(), planned.targets[0], planned.method)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(module, verbose=False)
    tested = {name: scores.to_dict() for name, scores in module.result().scores.items()}
    trainer.predict(module, return_predictions=False)
    predicted = {name: scores.to_dict() for name, scores in module.result().scores.items()}
    by_run = {name: model["scores"] for name, model in expected["models"].items()}
    by_run["combined"] = expected["combined"]["scores"]
    assert json.loads(json.dumps(tested)) == json.loads(json.dumps(predicted)) == by_run


def test_an_old_result_does_not_pass_for_a_new_run_that_dies(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(composed(), tmp_path / "r", [], None)

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sam.runs.run, "run_targets", dies)
    with pytest.raises(KeyboardInterrupt):
        run(composed("k=1"), tmp_path / "r", ["k=1"], None)
    assert not (tmp_path / "r" / RESULT).exists()
    status = json.loads((tmp_path / "r" / STATUS).read_text())
    assert (status["state"], status["overrides"]) == ("running", ["k=1"])


def test_sentences_without_gold_are_predicted_and_not_scored(composed: Compose, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a film with ada lovelace\nanother one\n")
    overrides = ["target=files", f"target.path={path}", "target.types=[actor,year]"]
    assert str(run(composed(*overrides), tmp_path / "r", [], None)) == "nan"
    result, rows = result_of(tmp_path / "r"), rows_of(tmp_path / "r")
    assert result["overall"] is None
    assert result["targets"]["files"]["combined"]["scores"] is None
    assert [row["gold"] for row in rows] == [None, None]
    assert {row["prompt"].partition("\n")[0] for row in rows} == {"Entity types: actor, year"}
    # Once more: what is done is done, also without a score.
    assert str(run(composed(*overrides), tmp_path / "r", [], None)) == "nan"


def test_the_oracle_is_labelled(composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(composed("selector=oracle"), tmp_path / "r", [], None)
    target = result_of(tmp_path / "r")["targets"]["mini_movie"]
    assert target["labels_used_for_selection"] is True
    assert "gold" in target["selections"]["oracle"]["details"]["by"]
    out = " ".join(capsys.readouterr().out.split())
    assert "not a method" in out
    assert "gold labels used" in out


def test_one_name_may_stand_bare(composed: Compose, tmp_path: Path) -> None:
    run(composed("selector=named", "selector.experts=unified"), tmp_path / "r", [], None)
    assert result_of(tmp_path / "r")["targets"]["mini_movie"]["models"]["named"]["experts"] == ["unified"]
    assert plan(composed("experts.only=news", "k=1")).method.names == ("news",)
    assert plan(composed("experts.exclude=news")).method.names == ("biomedical", "social")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["k=4"], ("k=4", "1..3", "biomedical, news, social")),
        (["experts.only=[news]"], ("k=2", "1..1")),
        (["experts.only=[sports]"], ("'sports'", "news")),
        (["experts.only=[news,unified]"], ("'unified' is not ranked", "selector=named")),
        (["merge.weights=0.5"], ("merge.weights=0.5 is not a list",)),
        (["decode.max_new_tokens=null"], ("decode.max_new_tokens=null must be an integer",)),
        (["+decode.temperature=0.7"], ("decode.temperature is unknown", "max_new_tokens")),
        (["experts.exclude=[news,social,biomedical]"], ("leave no expert", "news")),
        (["merge.density=2"], ("merge.density=2", "(0, 1]")),
        (["merge.weights=[1,2,3]"], ("3 values for 2 experts",)),
        (["merge.weights=[1,2,3]", "selector=all_each"], ("selector=all_each", "selector=all")),
        (["+merge.theta=1"], ("sam.merging.ties does not take", "theta")),
        (["completions=old"], ("completions=old", "reuse, fresh")),
        (["limit=0"], ("limit=0",)),
        (["seed=one"], ("seed='one'",)),
        (["target.types=[actr]"], ("'actr'", "'actor'")),
        (["target=files", "target.path=x.txt", "target.types=[a]", "selector=oracle"], ("x.txt",)),
        (["base.location=/nowhere"], ("base.location=/nowhere",)),
        (["experts.path=/nowhere"], ("experts.path=/nowhere",)),
        (["decode.max_new_tokens=0"], ("decode.max_new_tokens=0",)),
        (["generator.batch_size=0"], ("generator.batch_size=0",)),
    ],
)
def test_mistakes_are_refused_in_one_line_before_a_model_is_loaded(
    composed: Compose, overrides: list[str], named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(FakeGenerator, "load", refuses)
    with pytest.raises(SamError) as error:
        plan(composed(*overrides))
    message = one_line(error)
    assert all(part in message for part in named)


def test_the_oracle_needs_gold(composed: Compose, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a film\n")
    with pytest.raises(SamError, match="ranks by gold labels"):
        plan(composed("target=files", f"target.path={path}", "target.types=[a]", "selector=oracle"))


def test_the_base_alone_runs_beside_experts_of_another_base(composed: Compose, pool: Pool, tmp_path: Path) -> None:
    card = pool.folder("news") / "expert.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "base_fingerprint": "0" * 64}))
    with pytest.raises(SamError, match="expert 'news' was trained on base"):
        identified(plan(composed("selector=all")))
    assert run(composed("selector=none"), tmp_path / "run", ["selector=none"], None) >= 0
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert result["targets"]["mini_movie"]["models"]["none"]["experts"] == [] and result["experts"] == {}
    with pytest.raises(SamError, match="merge.weights fits no selector=none"):
        plan(composed("selector=none", "merge.weights=[1,1]"))


def test_weights_are_not_counted_where_only_the_selector_knows_how_many(composed: Compose) -> None:
    given = {"_target_": "tests.fakes.gold_of", "name": "mine"}
    config = composed("merge.weights=[1,2,3,4]")
    assert plan({**config, "selector": given}).method.merge.weights == [1, 2, 3, 4]
