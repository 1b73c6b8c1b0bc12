"""Targets: the embedded ones, a user's files, and what is asked for of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sam import data as corpora
from sam.data.targets import MISC, load_targets, mini
from sam.errors import SamError
from sam.launch import compose
from sam.types import Mention, Sentence
from tests.tiny import one_line

MINI = ("ai", "literature", "movie", "music", "politics", "restaurant", "science")


def config(sets: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"sets": sets, "types": None, "keep_misc": False, "path": None, "unlabelled": None, **options}


def minis(*datasets: str, **options: Any) -> dict[str, Any]:
    return config({f"mini_{d}": {"kind": "mini", "dataset": d} for d in datasets}, **options)


def files(path: Path, **options: Any) -> dict[str, Any]:
    return config({"files": {"kind": "files"}}, **{"path": str(path), "types": ["gene", "disease"], **options})


def write_jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "mine.jsonl",
        {
            "text": "BRCA1 in Bath",
            "mentions": [{"type": "gene", "start": 0, "end": 5}, {"type": "place", "start": 9, "end": 13}],
        },
        {"text": "no gold here"},
        {"text": "nothing in it", "mentions": []},
    )


@pytest.mark.parametrize("dataset", MINI)
def test_every_mini_target_is_whole(dataset: str) -> None:
    (target,) = load_targets(minis(dataset))
    assert target.name == f"mini_{dataset}"
    assert len(target.scored) == len(target.sentences) >= 30
    assert {m.type for s in target.sentences for m in s.mentions or ()} == set(target.types)
    assert MISC not in target.types
    assert len(set(target.unlabelled)) >= 30
    # Selection sees other sentences than those that are scored.
    assert not {s.text for s in target.sentences} & set(target.unlabelled)


def test_a_target_called_from_python_bears_its_own_name() -> None:
    assert mini("movie").name == "mini_movie"
    with pytest.raises(SamError) as error:
        mini("films")
    assert all(name in one_line(error) for name in MINI)


def test_limit_takes_the_first_sentences_and_leaves_the_unlabelled() -> None:
    (whole,), (part,) = load_targets(minis("movie")), load_targets(minis("movie"), limit=3)
    assert part.sentences == whole.sentences[:3]
    assert part.unlabelled == whole.unlabelled
    assert part.types == whole.types
    assert load_targets(minis("movie"), limit=10**6) == [whole]


@pytest.mark.parametrize("limit", [0, -1, "three", 2.5])
def test_a_limit_below_one_is_refused(limit: Any) -> None:
    with pytest.raises(SamError) as error:
        load_targets(minis("movie"), limit=limit)
    assert f"limit={limit}" in one_line(error)


def test_types_narrow_the_question_and_the_gold() -> None:
    (target,) = load_targets(minis("movie", types=["actor", "year"]))
    assert set(target.types) == {"actor", "year"}
    assert {m.type for s in target.sentences for m in s.mentions or ()} == {"actor", "year"}
    # Sentences without such a mention stay: finding one there is an error.
    assert len(target.sentences) == len(mini("movie").sentences)
    (single,) = load_targets(minis("movie", types="actor"))
    assert single.types == ("actor",)


def test_an_unknown_type_is_refused_with_what_there_is_and_a_hint() -> None:
    with pytest.raises(SamError) as error:
        load_targets(minis("movie", types=["actor", "yeer"]))
    message = one_line(error)
    assert "'yeer'" in message
    assert "actor, average rating" in message
    assert "did you mean 'year'?" in message


def test_a_type_must_be_of_every_target() -> None:
    with pytest.raises(SamError) as error:
        load_targets(minis("movie", "science", types=["actor"]))
    assert "mini_science" in one_line(error)


def test_misc_is_left_out_unless_kept_or_asked_for(tmp_path: Path) -> None:
    record = {
        "text": "Ada and things",
        "mentions": [{"type": "person", "start": 0, "end": 3}, {"type": MISC, "start": 8, "end": 14}],
    }
    path = write_jsonl(tmp_path / "m.jsonl", record)
    both = ["person", MISC]

    def asked(**options: Any) -> tuple[tuple[str, ...], int]:
        (target,) = load_targets(files(path, **options))
        return target.types, len(target.sentences[0].mentions or ())

    assert asked(types=both) == (("person", MISC), 2)
    (kept,) = load_targets(minis("music", keep_misc=True))
    (left,) = load_targets(minis("music"))
    assert set(kept.types) - set(left.types) <= {MISC}


@pytest.mark.parametrize("dataset", ["crossner_ai"])
def test_misc_of_crossner(dataset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the corpus itself: a file with its types stands in for it."""
    record = {
        "text": "SVM and ROUGE",
        "mentions": [{"type": "algorithm", "start": 0, "end": 3}, {"type": MISC, "start": 8, "end": 13}],
    }
    sentences = corpora.read_file(write_jsonl(tmp_path / "c.jsonl", record))
    asked: list[str] = []

    def load(name: str, split: str) -> Any:
        asked.append(split)
        return sentences

    monkeypatch.setattr("sam.data.targets.load", load)
    sets = {dataset: {"kind": "corpus", "dataset": dataset, "split": "test", "unlabelled": "train"}}
    (target,) = load_targets(config(sets))
    assert asked == ["test", "train"]
    assert target.types == ("algorithm",)
    assert target.sentences[0].mentions == (Mention(0, 3, "algorithm"),)
    (target,) = load_targets(config(sets, keep_misc=True))
    assert set(target.types) == {"algorithm", MISC}
    assert len(target.sentences[0].mentions or ()) == 2


def test_a_labelled_file(labelled: Path) -> None:
    (target,) = load_targets(files(labelled))
    assert target.types == ("gene", "disease")
    # Gold of types that are not asked for does not count; no gold and empty gold are two things.
    assert [s.mentions for s in target.sentences] == [(Mention(0, 5, "gene"),), None, ()]
    assert [s.text for s in target.scored] == ["BRCA1 in Bath", "nothing in it"]
    assert target.unlabelled == ("BRCA1 in Bath", "no gold here", "nothing in it")


def test_a_text_file_has_no_gold(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one line\n\n another \n", encoding="utf-8")
    (target,) = load_targets(files(path))
    assert [s.text for s in target.sentences] == ["one line", "another"]
    assert target.scored == ()
    assert target.unlabelled == ("one line", "another")


def test_unlabelled_sentences_of_their_own(labelled: Path, tmp_path: Path) -> None:
    other = tmp_path / "more.txt"
    other.write_text("more\nof it\n", encoding="utf-8")
    (target,) = load_targets(files(labelled, unlabelled=str(other)), limit=1)
    assert len(target.sentences) == 1
    assert target.unlabelled == ("more", "of it")


def test_types_keep_the_order_in_which_a_user_gives_them(labelled: Path) -> None:
    (target,) = load_targets(files(labelled, types=["disease", "place", "gene"]))
    assert target.types == ("disease", "place", "gene")
    assert len(target.sentences[0].mentions or ()) == 2


def test_sentences_of_a_file_can_have_types_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "Ada", "types": ["gene", "place"]}\n{"text": "Bob", "types": ["place"]}\n')
    (target,) = load_targets(files(path, types=None))
    assert target.types == ("gene", "place")
    assert [target.types_of(s) for s in target.sentences] == [("gene", "place"), ("place",)]
    assert [target.types_of_text(text) for text in target.unlabelled] == [("gene", "place"), ("place",)]
    (some,) = load_targets(files(path, types=["gene"]))
    assert [(s.text, some.types_of(s)) for s in some.sentences] == [("Ada", ("gene",))]
    path.write_text('{"text": "Ada", "types": ["gene"]}\n{"text": "Bob"}\n')
    with pytest.raises(SamError, match="needs the entity types to ask for"):
        load_targets(files(path, types=None))
    (both,) = load_targets(files(path, types=["gene", "place"]))
    assert [both.types_of(s) for s in both.sentences] == [("gene",), ("gene", "place")]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"types": None}, ("target.types=[gene,disease]",)),
        ({"types": []}, ("target.types=[gene,disease]",)),
        ({"types": ["gene", "gene"]}, ("'gene' twice",)),
        ({"types": ["gene", " place"]}, ("' place'", "without space")),
        ({"types": ["gene", ""]}, ("''", "a type must be text")),
        ({"types": ["gene", 5]}, ("names 5;", "a type must be text")),
        ({"types": ["protein"]}, ("['protein']", "gene, place")),
        ({"unlabelled": "/nowhere/else.txt"}, ("/nowhere/else.txt", "no such file")),
    ],
)
def test_what_cannot_be_asked_of_a_file(labelled: Path, options: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(SamError) as error:
        load_targets(files(labelled, **options))
    message = one_line(error)
    assert all(part in message for part in named)


def test_a_single_type_may_stand_bare(labelled: Path) -> None:
    (target,) = load_targets(files(labelled, types="gene"))
    assert target.types == ("gene",)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(SamError) as error:
        load_targets(files(path))
    assert "no sentences" in one_line(error)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SamError, match="no such file"):
        load_targets(files(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"dataset": "wnut17"}, "target.sets.x.kind=None is unknown; allowed: mini, corpus, files"),
        ("wnut17", "target.sets.x.kind=wnut17 is unknown"),
        ({"kind": ["mini"]}, "target.sets.x.kind=['mini'] is unknown"),
        ({"kind": "mini"}, "target.sets.x.dataset is missing; kind: mini needs dataset"),
        ({"kind": "corpus", "dataset": "wnut17", "split": "dev"}, "target.sets.x.unlabelled is missing; kind: corpus"),
    ],
)
def test_an_incomplete_set_is_refused(part: Any, message: str) -> None:
    with pytest.raises(SamError) as error:
        load_targets(config({"x": part}))
    assert one_line(error).startswith(message)


def test_sets_are_a_mapping() -> None:
    with pytest.raises(SamError, match=r"target.sets=\['a'\] must be a mapping"):
        load_targets({**config({}), "sets": ["a"]})


def test_types_that_the_gold_has_not_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", {"text": "BRCA1", "mentions": [{"type": "gene", "start": 0, "end": 5}]})
    assert load_targets(files(path, types=["gene"])) and not caplog.records
    assert load_targets(files(path, types=["gene", "diseases"]))
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: the gold has no mention of diseases"


def test_no_set_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(SamError, match="target=mini_movie"):
        load_targets({})
    with pytest.raises(SamError) as error:
        load_targets(config({"x": {"kind": "web"}}))
    message = one_line(error)
    assert "target.sets.x.kind=web" in message
    assert "mini, corpus, files" in message


def test_limit_takes_the_first_or_draws_by_its_seed() -> None:
    (whole,) = load_targets(minis("ai"))
    (first,) = load_targets(minis("ai"), 5)
    assert first.sentences == whole.sentences[:5] and first.types == whole.types
    drawn = {seed: load_targets(minis("ai"), 5, seed)[0].sentences for seed in (0, 1)}
    assert drawn[0] == load_targets(minis("ai"), 5, 0)[0].sentences != drawn[1]
    places = [whole.sentences.index(s) for s in drawn[0]]
    assert places == sorted(set(places)) and len(places) == 5
    assert load_targets(minis("ai"), 10_000, 0)[0].sentences == whole.sentences


def test_open_sentences_keep_their_own_types() -> None:
    (target, _) = load_targets(compose("target=open_types")["target"], limit=5)
    assert len(target.sentences) == 5 and all(target.types_of(s) == s.types for s in target.sentences)
    # Also of the texts beyond the limit, which selection may sample.
    whole = {s.text: s.types for s in corpora.load("open_types", "dev")}
    assert len(target.unlabelled) == len(whole) == 240
    assert all(target.types_of_text(text) == whole[text] != target.types for text in target.unlabelled)
    assert target.types_of_text("another text") == target.types
    assert {t for s in target.sentences for t in s.types or ()} <= set(target.types)
    assert any(set(s.types or ()) - {m.type for m in s.mentions or ()} for s in target.sentences)  # some are absent
    (narrow, _) = load_targets(compose("target=open_types", "target.types=[date,country]")["target"])
    kept = [s for s in corpora.load("open_types", "dev") if {"date", "country"} & set(s.types or ())]
    assert [s.id for s in narrow.sentences] == [s.id for s in kept]  # the others would be asked for nothing
    assert [s.types for s in narrow.sentences] == [
        tuple(t for t in s.types or () if t in ("date", "country")) for s in kept
    ]
    assert set(narrow.unlabelled) == {s.text for s in kept}


def test_texts_of_another_split_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"test": ["a", "b", "c"], "train": ["b", "d"]}
    monkeypatch.setattr(
        "sam.data.targets.load", lambda dataset, split: [Sentence(t, t, (Mention(0, 1, "x"),)) for t in texts[split]]
    )
    part = {"kind": "corpus", "dataset": "toy", "split": "test", "unlabelled": "train"}
    (plain,), (without,) = (load_targets(config({"t": options})) for options in (part, {**part, "without": "train"}))
    assert [s.text for s in plain.sentences] == ["a", "b", "c"] and plain.unlabelled == ("b", "d")
    assert [s.text for s in without.sentences] == ["a", "c"] and without.unlabelled == ("b", "d")
