"""The embedded mini benchmark keeps its promises: sizes, offsets, types, coverage, no duplicates."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

MINI = Path(__file__).parents[2] / "sam" / "data" / "mini"

# Spelt out here, so that the files are held to a list that does not come from the library.
TYPES: dict[str, str] = {
    "ai": "algorithm, product, task, field, metric, researcher, organization, conference, programming language, "
    "university, country, person, location",
    "literature": "writer, book, person, literary genre, award, country, poem, organization, location, magazine, event",
    "music": "musical artist, band, music genre, album, location, award, song, organization, country, person, event, "
    "musical instrument",
    "politics": "political party, politician, location, organization, election, country, person, event",
    "science": "scientist, astronomical object, organization, person, chemical compound, location, academic journal, "
    "award, protein, university, enzyme, discipline, chemical element, event, country, theory",
    "movie": "genre, actor, year, title, rating, plot, average rating, director, character, song, review, trailer",
    "restaurant": "location, cuisine, amenity, restaurant name, dish, rating, hours, price",
}
SPOKEN = ("movie", "restaurant")

each_target = pytest.mark.parametrize("target", TYPES)


def labelled(target: str) -> list[dict[str, Any]]:
    lines = (MINI / f"{target}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def unlabelled(target: str) -> list[str]:
    return (MINI / f"{target}.unlabelled.txt").read_text(encoding="utf-8").splitlines()


def texts(target: str) -> list[str]:
    return [row["text"] for row in labelled(target)] + unlabelled(target)


def test_the_folder_holds_the_seven_targets_and_nothing_else() -> None:
    expected = {f"{t}{end}" for t in TYPES for end in (".jsonl", ".unlabelled.txt")}
    found = {p.name for p in MINI.iterdir() if p.suffix in {".jsonl", ".txt"}}
    assert found == expected


@each_target
def test_at_least_thirty_sentences_of_each_kind(target: str) -> None:
    assert len(labelled(target)) >= 30
    assert len(unlabelled(target)) >= 30


@each_target
def test_rows_have_exactly_the_documented_keys_and_running_ids(target: str) -> None:
    rows = labelled(target)
    assert [row["id"] for row in rows] == [f"mini_{target}/{i}" for i in range(len(rows))]
    assert all(row.keys() == {"id", "text", "mentions"} for row in rows)
    assert all(m.keys() == {"type", "start", "end"} for row in rows for m in row["mentions"])


@each_target
def test_offsets_are_in_range_and_have_non_space_edges(target: str) -> None:
    for row in labelled(target):
        for m in row["mentions"]:
            assert 0 <= m["start"] < m["end"] <= len(row["text"]), (row["id"], m)
            surface = row["text"][m["start"] : m["end"]]
            assert surface == surface.strip(), (row["id"], surface)


@each_target
def test_mentions_begin_and_end_at_word_boundaries(target: str) -> None:
    for row in labelled(target):
        text = row["text"]
        for m in row["mentions"]:
            before, after = text[: m["start"]][-1:], text[m["end"] :][:1]
            assert not (before.isalnum() or after.isalnum()), (row["id"], text[m["start"] : m["end"]])


@each_target
def test_mentions_stand_in_order_and_do_not_overlap(target: str) -> None:
    for row in labelled(target):
        for left, right in pairwise(row["mentions"]):
            assert left["end"] <= right["start"], (row["id"], left, right)


@each_target
def test_types_are_the_fixed_list_and_all_are_covered(target: str) -> None:
    found = {m["type"] for row in labelled(target) for m in row["mentions"]}
    assert found == set(TYPES[target].split(", "))


@each_target
def test_some_sentences_have_no_mention_and_some_have_many(target: str) -> None:
    counts = [len(row["mentions"]) for row in labelled(target)]
    assert sum(n == 0 for n in counts) >= 2
    assert sum(n >= 6 for n in counts) >= 3


def test_no_text_occurs_twice_within_or_across_files() -> None:
    seen = Counter(text for target in TYPES for text in texts(target))
    assert [text for text, n in seen.items() if n > 1] == []


@each_target
def test_texts_are_single_spaced_and_not_empty(target: str) -> None:
    assert [text for text in texts(target) if not text or text != " ".join(text.split())] == []


@pytest.mark.parametrize("target", SPOKEN)
def test_queries_are_lower_case_words_without_punctuation(target: str) -> None:
    bad = [text for text in texts(target) if text != text.lower() or not text.replace(" ", "").isalnum()]
    assert bad == []
