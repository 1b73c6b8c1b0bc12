"""Every split of every corpus against the numbers in its config, in the mirror's index, and measured here."""

from __future__ import annotations

import json
import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sam.data import Loaded, datasets, load_report, spec

MIRROR = os.environ.get("SAM_MIRROR")
SPLITS = [(dataset_id, split) for dataset_id in datasets() for split in spec(dataset_id).splits]

pytestmark = pytest.mark.skipif(not MIRROR, reason="SAM_MIRROR is unset: it must name a folder that holds the corpora")

# Repairs and drops, measured; a split that is not here has none.
COUNTS: dict[tuple[str, str], dict[str, int]] = {
    ("btc", "train"): {"marks_joined": 1415},
    ("btc", "dev"): {"blank_token_dropped": 4, "empty_sentences_dropped": 1, "marks_joined": 604},
    ("btc", "test"): {"blank_token_dropped": 3, "marks_joined": 1380},
    ("e_ner", "train"): {"stray_tag_read_as_O": 4},
    ("e_ner", "all"): {"stray_tag_read_as_O": 4},
    ("inlegalner", "train"): {"dropped_damaged": 1141},
    ("inlegalner", "dev"): {"dropped_damaged": 89},
    ("inlegalner", "train_judgement"): {"dropped_damaged": 1141},
    ("inlegalner", "dev_judgement"): {"dropped_damaged": 89},
    ("matscholar", "train"): {"blank_token_dropped": 3},
    ("matscholar", "dev"): {"missing_tag_read_as_O": 32, "opened_by_I": 1},
    ("scier", "train"): {"repeated_pairs": 899},
    ("scier", "dev"): {"repeated_pairs": 101},
    ("scier", "test"): {"repeated_pairs": 178},
    ("scier", "test_ood"): {"repeated_pairs": 37},
    ("sofc_exp", "train"): {"dropped_unannotated": 5458},
    ("sofc_exp", "dev"): {"dropped_unannotated": 1469},
    ("sofc_exp", "test"): {"dropped_unannotated": 1663},
    ("stackoverflow_ner", "train"): {
        "dropped_masked_blocks": 2004,
        "dropped_metadata_sentences": 3276,
        "opened_by_I": 7,
    },
    ("stackoverflow_ner", "dev"): {
        "dropped_masked_blocks": 599,
        "dropped_metadata_sentences": 1072,
        "opened_by_I": 3,
    },
    ("stackoverflow_ner", "test"): {
        "dropped_masked_blocks": 703,
        "dropped_metadata_sentences": 1128,
        "opened_by_I": 1,
    },
    ("topres19th", "train"): {"opened_by_I": 3},
    ("topres19th", "dev"): {"opened_by_I": 1},
    ("topres19th", "test"): {"opened_by_I": 1},
}

# Mentions that go with dropped sentences (the masks of code and output blocks) or are parts of others, measured.
LOST_MENTIONS = {
    ("btc", "train"): 1415,
    ("btc", "dev"): 604,
    ("btc", "test"): 1380,
    ("stackoverflow_ner", "train"): 2006,
    ("stackoverflow_ner", "dev"): 600,
    ("stackoverflow_ner", "test"): 703,
}

DROPS = ("dropped_", "empty_sentences_dropped")

cached_report = cache(load_report)


def index(dataset_id: str) -> dict[str, Any]:
    """The entry of ``dataset_id`` in the mirror's ``sources.json``, with split names as ours."""
    path = Path(MIRROR or "") / "sources.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the counts cannot be compared with the mirror's index")
    entries = json.loads(path.read_text(encoding="utf-8"))["datasets"]
    entry = next(e for e in entries if e["id"] == spec(dataset_id).mirror)
    for key in ("splits", "labels_by_split"):
        entry[key] = {{"valid": "dev"}.get(k, k).replace("-", "_"): v for k, v in entry[key].items()}
    return entry


@pytest.mark.parametrize(("dataset_id", "split"), SPLITS)
def test_counts(dataset_id: str, split: str) -> None:
    report: Loaded = cached_report(dataset_id, split)
    declared = spec(dataset_id).split(split)
    assert (report.read_sentences, report.read_mentions) == (declared.sentences, declared.mentions)
    assert report.counts == COUNTS.get((dataset_id, split), {})
    dropped = sum(n for name, n in report.counts.items() if name.startswith(DROPS))
    assert len(report.sentences) == report.read_sentences - dropped
    kept = sum(len(s.mentions or ()) for s in report.sentences)
    assert report.read_mentions - kept == LOST_MENTIONS.get((dataset_id, split), 0)


@pytest.mark.parametrize(("dataset_id", "split"), SPLITS)
def test_every_mention_is_a_stretch_of_text(dataset_id: str, split: str) -> None:
    names = set(spec(dataset_id).types)
    sentences = cached_report(dataset_id, split).sentences
    assert len({s.id for s in sentences}) == len(sentences)
    for sentence in sentences:
        assert sentence.text.strip() and "\n" not in sentence.text
        assert sentence.mentions is not None
        for mention in sentence.mentions:
            surface = sentence.surface(mention)
            assert 0 <= mention.start < mention.end <= len(sentence.text), sentence.id
            assert surface == surface.strip() and mention.type in (sentence.types or names), sentence.id
        # All corpora turn out flat once mentions are placed: a decoder may rely on it.
        assert all(a.end <= b.start for a, b in pairwise(sentence.mentions)), sentence.id


@pytest.mark.parametrize("dataset_id", [name for name in datasets() if not spec(name).embedded])
def test_counts_are_those_of_the_mirrors_index(dataset_id: str) -> None:
    entry = index(dataset_id)
    for split, numbers in entry["splits"].items():
        report = cached_report(dataset_id, split)
        assert (report.read_sentences, report.read_mentions) == (numbers["sentences"], numbers["entities"]), split
        assert dict(report.read_labels) == entry["labels_by_split"][split], split
    pinned = {f["path"]: (f["sha256"], f.get("upstream_sha256", f["sha256"])) for f in entry["files"]}
    assert {path: (c.mirror, c.published) for path, c in spec(dataset_id).files.items()} == pinned


def test_a_split_of_several_parts_is_their_sum() -> None:
    for split in ("train", "dev"):
        whole = cached_report("inlegalner", split).sentences
        names = (f"{split}_judgement", f"{split}_preamble")
        parts = [s for name in names for s in cached_report("inlegalner", name).sentences]
        assert [(s.text, s.mentions) for s in whole] == [(s.text, s.mentions) for s in parts]


def test_a_subset_adds_no_text() -> None:
    test = {s.text for s in cached_report("harveyner", "test").sentences}
    for part in ("simple", "complex"):
        assert {s.text for s in cached_report("harveyner", part).sentences} <= test
