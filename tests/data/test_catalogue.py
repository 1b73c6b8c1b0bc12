"""The catalogue's configs, and what loading does with drafts: names, ids, drops, folds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from sam.data import catalogue, datasets, load, load_report, spec
from sam.errors import SamError

SOURCE_DOMAINS = {"news", "social", "biomedical", "stem", "legal", "traffic"}

TOY = {
    "id": "toy",
    "title": "Toy",
    "domain": "news",
    "role": "source",
    "url": "http://localhost:9/{path}",
    "mirror": "to-y",
    "licence": "none",
    "format": {"kind": "columns", "tag": 1},
    "splits": {
        "all": {"paths": ["*.tsv"], "sentences": 0, "mentions": 0},
        "test": {"paths": ["*.tsv"], "fold": [1], "sentences": 0, "mentions": 0},
    },
    "labels": {"PER": "person"},
    "drop": {"text": {"dropped_notes": "Note : .*"}, "without_mentions": "b*.tsv"},
}
FILES = {
    "a.tsv": "Note\tO\n:\tO\n7\tO\n\nAda\tI-PER\n\nhi\tO\n\n\tO\n",
    "b.tsv": "Bob\tI-PER\n\nhi\tO\n",
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes a dataset ``toy`` with its mirror and makes it the only one; gives a function that changes its config."""
    (tmp_path / "mirror" / "to-y").mkdir(parents=True)
    (tmp_path / "dataset").mkdir()
    for name, text in FILES.items():
        (tmp_path / "mirror" / "to-y" / name).write_text(text)
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    monkeypatch.setenv("SAM_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(catalogue, "conf_dir", lambda: tmp_path)

    def write(**changes: object) -> None:
        (tmp_path / "dataset" / "toy.yaml").write_text(yaml.safe_dump({**TOY, "files": sums, **changes}))
        spec.cache_clear()

    write()
    yield write
    spec.cache_clear()


def test_drops_are_counted_and_ids_are_places_before_drops(
    toy: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sam.data.loading"):
        report = load_report("toy", "all")
    assert [(s.id, s.text, s.pairs) for s in report.sentences] == [
        ("toy/all/1", "Ada", (("person", "Ada"),)),
        ("toy/all/2", "hi", ()),
        ("toy/all/4", "Bob", (("person", "Bob"),)),
    ]
    assert report.counts == {
        "blank_token_dropped": 1,
        "dropped_damaged": 1,
        "dropped_notes": 1,
        "empty_sentences_dropped": 1,
        "opened_by_I": 2,
    }
    assert (report.read_sentences, report.read_mentions, report.read_labels) == (6, 2, {"PER": 2})
    assert [r.message for r in caplog.records] == [
        "toy/all: 1 blank_token_dropped, 1 dropped_damaged, 1 dropped_notes, 1 empty_sentences_dropped, 2 opened_by_I"
    ]


def test_a_fold_takes_documents_and_only_their_counts(toy: Callable[..., None]) -> None:
    report = load_report("toy", "test")
    assert [(s.id, s.text) for s in report.sentences] == [("toy/test/0", "Bob")]
    assert report.counts == {"dropped_damaged": 1, "opened_by_I": 1}
    assert (report.read_sentences, report.read_mentions) == (2, 1)


def test_a_label_without_a_name_is_an_error(toy: Callable[..., None]) -> None:
    toy(labels={"LOC": "location"})
    with pytest.raises(SamError, match=r"toy: label 'PER' has no name; add 'PER: <name>' under labels: in conf/"):
        load("toy", "all")


def test_a_wrong_config_is_named(toy: Callable[..., None]) -> None:
    toy(drop={"all_of_it": True})
    with pytest.raises(SamError, match=r"conf/dataset/toy.yaml: .*all_of_it"):
        spec("toy")
    toy(format={"kind": "columns", "tag": 1, "scheme": "BIO"})
    with pytest.raises(SamError, match=r"conf/dataset/toy.yaml: format.scheme: 'BIO'"):
        spec("toy")


def test_unknown_names_are_answered_with_those_there_are() -> None:
    with pytest.raises(SamError, match=r"unknown dataset: 'conl2003'; did you mean 'conll2003'\? one of anatem, "):
        load("conl2003", "train")
    with pytest.raises(SamError, match=r"'crossner-ai'; did you mean 'crossner_ai'\?"):
        spec("crossner-ai")
    with pytest.raises(SamError, match=r"unknown split of mit_movie: 'dev'; one of train, test, trivia_train"):
        load("mit_movie", "dev")


def test_the_catalogue_is_whole() -> None:
    assert len(datasets()) == 32
    roles = [spec(i).role for i in datasets()]
    assert (roles.count("source"), roles.count("target"), roles.count("open")) == (24, 7, 1)
    assert {spec(i).domain for i in datasets() if spec(i).role == "source"} == SOURCE_DOMAINS


@pytest.mark.parametrize("dataset_id", datasets())
def test_a_config_is_consistent(dataset_id: str) -> None:
    dataset = spec(dataset_id)
    assert dataset.id == dataset_id == dataset.mirror.replace("-", "_")
    assert dataset.embedded or (dataset.url.startswith("https://") and dataset.url.endswith("{path}"))
    assert all(len(c.mirror) == 64 and len(c.published or "") == 64 for c in dataset.files.values())
    for split in dataset.splits:
        assert dataset.paths(split), split
        assert dataset.split(split).sentences > 0 and dataset.split(split).mentions > 0
    # Names are words for a prompt: no code of the corpus, and the catch-all type has one name everywhere.
    assert all(name and "_" not in name and name == name.strip() for name in dataset.types)
    assert not {"misc", "other", "organisation", "per", "loc", "org"} & {name.lower() for name in dataset.types}


def test_labels_are_named_in_the_terms_of_the_field() -> None:
    assert spec("conll2003").types == ["location", "person", "organization", "miscellaneous"]
    assert spec("wnut16").labels["other"] == "miscellaneous"
    assert spec("crossner_ai").labels["metrics"] == "metric"
    assert 25 <= len(spec("atis").types) <= 35 < len(spec("atis").labels)


def test_folds_share_out_all_documents() -> None:
    for dataset_id in ("e_ner", "en_worldwide_newswire"):
        splits = spec(dataset_id).splits
        folds = [n for name in ("train", "dev", "test") for n in splits[name].fold or ()]
        assert sorted(folds) == list(range(10))
        assert sum(splits[name].sentences for name in ("train", "dev", "test")) == splits["all"].sentences
        assert sum(splits[name].mentions for name in ("train", "dev", "test")) == splits["all"].mentions
