"""The embedded sentences with open types keep their promises: surfaces, forbidden names, no text twice, no target's."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sam import data as corpora
from sam.data.readers import OpenTypes, Source
from sam.errors import SamError

FOLDER = Path(__file__).parents[2] / "sam" / "data" / "open_types"
FILES = sorted(path.name for path in FOLDER.glob("*.jsonl"))

# The label names of CrossNER and MIT: spelt out here, so that no change of a config loosens the promise.
NAMES = (
    "algorithm, product, task, field, metric, researcher, conference, programming language, university, writer, book, "
    "literary genre, award, poem, magazine, musical artist, band, music genre, album, song, musical instrument, "
    "political party, politician, election, scientist, astronomical object, chemical compound, academic journal, "
    "protein, enzyme, discipline, chemical element, theory, genre, actor, year, title, rating, plot, average rating, "
    "director, character, review, trailer, cuisine, amenity, restaurant name, dish, hours, price, event"
)
FORBIDDEN = set(NAMES.split(", "))
ALLOWED = {"person", "organization", "location", "country"}
"""Names of the targets' types that stand in open types as well as in the source datasets."""

TRIVIA = {"opinion", "origin of the story", "quote", "relationship to other films", "soundtrack", "character name"}
"""Of MIT Movie's other corpus, which is no target."""

SEVERAL_TIMES = ("i_", "u_")
"""Files in which each text stands three times, with other names."""


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def normal(text: str) -> str:
    return "".join(char for char in text.lower() if char.isalnum())


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_text_mentions_and_absent_types(name: str) -> None:
    for line in lines(name):
        assert set(line) == {"text", "mentions", "absent"}
        text, types = line["text"], {kind for kind, _ in line["mentions"]}
        assert text == text.strip() and "\n" not in text
        assert all(surface and surface == surface.strip() and surface in text for _, surface in line["mentions"]), text
        named = [*types, *line["absent"]]
        assert len(named) == len(set(named)) > 0, text
        assert all(kind == kind.strip().lower() and len(kind.split()) <= 4 for kind in named), text
        assert not FORBIDDEN & set(named), text


def test_the_forbidden_names_are_those_of_the_targets() -> None:
    targets = [corpora.spec(name) for name in corpora.datasets() if corpora.spec(name).role == "target"]
    tested = {kind for spec in targets for kind in spec.types} - {"miscellaneous"}
    assert tested >= FORBIDDEN and tested - FORBIDDEN - ALLOWED == TRIVIA
    sources = [corpora.spec(name) for name in corpora.datasets() if corpora.spec(name).role == "source"]
    assert {kind for spec in sources for kind in spec.types} >= ALLOWED


@pytest.mark.parametrize("split", sorted(corpora.spec("open_types").splits))
def test_the_loader_marks_every_pair(split: str) -> None:
    report = corpora.load_report("open_types", split)
    assert not report.counts
    written = [line for path in corpora.spec("open_types").paths(split) for line in lines(path)]
    for sentence, line in zip(report.sentences, written, strict=True):
        assert set(sentence.pairs) == {(kind, surface) for kind, surface in line["mentions"]}
        assert set(sentence.types or ()) == {*(kind for kind, _ in line["mentions"]), *line["absent"]}
    declared = corpora.spec("open_types").split(split)
    assert (report.read_sentences, report.read_mentions) == (declared.sentences, declared.mentions)


def test_training_and_held_out_files_are_apart_and_all_are_used() -> None:
    spec = corpora.spec("open_types")
    used = [path for split in spec.splits for path in spec.paths(split)]
    assert sorted(used) == FILES == sorted(spec.files)
    assert len(used) == len(set(used))
    texts = {split: {normal(s.text) for s in corpora.load("open_types", split)} for split in spec.splits}
    assert not texts["train"] & (texts["dev"] | texts["dev_schemas"])


def test_no_text_stands_twice() -> None:
    seen = Counter(normal(line["text"]) for name in FILES if not name.startswith(SEVERAL_TIMES) for line in lines(name))
    assert [text for text, n in seen.items() if n > 1] == []
    several = [normal(line["text"]) for name in FILES if name.startswith(SEVERAL_TIMES) for line in lines(name)]
    assert set(Counter(several).values()) == {3} and not set(several) & set(seen)


def test_some_sentences_have_no_mention_and_most_types_are_rare() -> None:
    train = [line for path in corpora.spec("open_types").paths("train") for line in lines(path)]
    empty = sum(not line["mentions"] for line in train) / len(train)
    assert 0.04 < empty < 0.12
    asked = Counter(kind for line in train for kind in {*(k for k, _ in line["mentions"]), *line["absent"]})
    assert len(asked) > 10_000 and sum(n <= 3 for n in asked.values()) > len(asked) / 2


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"text": "a"}',
        '{"text": 5, "mentions": [], "absent": []}',
        '{"text": "a", "mentions": [[1, "a"]], "absent": []}',
        '{"text": "a", "mentions": [["x"]], "absent": []}',
    ],
)
def test_a_line_of_another_form_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "mentions": [], "absent": ["x"]}\n\n' + line + "\n")
    with pytest.raises(SamError, match=r"a.jsonl:3: not an object with text, mentions and absent"):
        list(OpenTypes().read(Source({"a.jsonl": tmp_path / "a.jsonl"}), Counter()))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SAM_MIRROR"), reason="SAM_MIRROR is unset: the corpora are needed")
def test_no_sentence_is_of_a_corpus() -> None:
    ours = {normal(line["text"]) for name in FILES for line in lines(name)}
    for name in (n for n in corpora.datasets() if corpora.spec(n).role != "open"):
        for split in corpora.spec(name).splits:
            # Of a word or two, such as "Help", an own sentence and a tweet may be the same by chance.
            shared = {s.text for s in corpora.load(name, split) if len(s.text) > 25 and normal(s.text) in ours}
            assert not shared, (name, split)
