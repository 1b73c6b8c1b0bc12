"""Pilots of the recipe: what is trained on, what is asked for and what is scored, and the line that is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.pilots import DEFAULTS, LEFT_OUT, SIZES, PilotData, configure, domains, draw_scored, main, mean
from sam import corpora
from sam.errors import SamError
from sam.experts.data import Recipe, foreign_types
from sam.experts.packing import Batch
from sam.ner import Sentence
from tests.tiny import make_tokenizer, one_line
from tests.toy_training import toy


@pytest.fixture(autouse=True)
def one_text_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All splits of a dataset hold the same texts: what is scored and what is trained on can meet."""
    monkeypatch.setattr(corpora, "load", lambda dataset, split: toy(dataset, "any", 60))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models gain nothing from more, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scored() -> dict[str, list[Sentence]]:
    return {d: draw_scored(d, SIZES["in_domain"]) for part in domains() for d in part}


def data(held: dict[str, list[Sentence]], **options: object) -> PilotData:
    recipe = Recipe.from_config({**configure([])["train"], "max_length": 1000, **options})
    texts = {s.text for sentences in held.values() for s in sentences}
    found = PilotData(domains(), make_tokenizer(), 0, recipe, texts)
    found.setup()
    return found


def asked(batch: Batch) -> set[str]:
    """The entity types that the batch asks for."""
    prefix = str(make_tokenizer().decode(list(batch.prefix)))
    return set(prefix.splitlines()[0].removeprefix("Entity types: ").split(", "))


def test_domains_are_those_of_the_experts_and_none_is_a_target() -> None:
    trained = [d for part in domains() for d in part]
    assert len(domains()) == 4 and len(trained) == 11 and not set(trained) & set(LEFT_OUT)
    assert {corpora.spec(d).role for d in (*trained, *LEFT_OUT)} == {"source"}
    assert not {corpora.spec(d).domain for d in trained} & {corpora.spec(d).domain for d in LEFT_OUT}


def test_scored_sentences_do_not_depend_on_the_seed_and_are_not_trained_on() -> None:
    held = scored()
    assert all(len(sentences) == SIZES["in_domain"] for sentences in held.values())
    trained = [{s.text for s in data(held, sentences=20, seed=seed).sentences} for seed in (0, 1)]
    assert scored() == held
    assert trained[0] != trained[1]
    for texts in trained:
        assert texts and not texts & {s.text for sentences in held.values() for s in sentences}


def test_types_of_left_out_datasets_are_no_negatives() -> None:
    unasked = {t for dataset in LEFT_OUT for t in corpora.spec(dataset).types}
    foreign = set(foreign_types("conll2003"))
    assert foreign & unasked
    pilots = data({}, sentences=40, negatives=16, label_drop=0.0)
    types = set.union(*map(asked, pilots.plan))
    # The toys' own types are trained on, also where a left-out dataset has them.
    assert types & (foreign - unasked) and types & unasked == {"person", "location"}
    assert not set(pilots._foreign("conll2003")) & unasked and not set(pilots._foreign("bc5cdr")) & unasked
    assert data({}, sentences=4, negatives=0)._foreign("bc5cdr") == []


@pytest.mark.usefixtures("one_thread")
def test_a_pilot_is_a_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.pilots.SIZES", {"in_domain": 2, "left_out": 3})
    out = tmp_path / "new" / "pilots.jsonl"
    overrides = ["train.sentences=4", "train.seed=1", "train.r=2", "train.max_length=400", "decode.max_new_tokens=4"]
    overrides += ["base=local", f"base.location={tiny_base}"]
    assert main(["first", *overrides, "--out", str(out)]) == 0
    assert main(["second", *overrides, "train.epochs=2", "--out", str(out)]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["name"], first["overrides"]) == ("first", overrides) and second["name"] == "second"
    assert (first["sentences"], first["steps"], second["steps"]) == (
        16,
        11,
        22,
    )  # a batch is of one of the eleven datasets
    assert first["recipe"]["r"] == 2 and second["recipe"] == {**first["recipe"], "epochs": 2}
    assert first["precision"] in ("32-true", "bf16-mixed") and first["base_fingerprint"]
    assert set(first["datasets"]) == {*LEFT_OUT, *(d for part in domains() for d in part)}
    assert {d["n"] for d in first["datasets"].values()} == {2, 3}
    assert first["left_out"] == mean([first["datasets"][d] for d in LEFT_OUT])
    assert first["unparsable"] == sum(d["unparsable"] for d in first["datasets"].values())
    assert {"in_domain", "truncated", "git_commit"} <= first.keys()
    assert [json.loads(shown) for shown in capsys.readouterr().out.splitlines()] == [first, second]


def test_means_are_over_datasets() -> None:
    scores = [{"f1": 0.2, "precision": 1.0, "recall": 0.0}, {"f1": 0.4, "precision": 0.5, "recall": 0.5}]
    assert mean(scores) == pytest.approx({"f1": 0.3, "precision": 0.75, "recall": 0.25})


def test_a_pilot_starts_bare_and_refuses_what_it_does_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(["train.sentences=100"])
    assert config["base"]["fold"] is None and config["train"]["sentences"] == 100
    assert "train.sentences=200" in DEFAULTS and configure([])["train"]["sentences"] == 200
    with pytest.raises(SamError) as error:
        configure(["domain=social"])
    assert (
        one_line(error) == "domain=social changes nothing in a pilot, which reads train.*, base.*, trainer.*, decode.*"
    )
    assert main(["typo", "train.epoch=2"]) == 2
    assert "error: " in capsys.readouterr().err
