import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam.ner.alignment import align
from sam.ner.parsing import parse, predict
from sam.ner.prompts import answer, normalised, prefix, suffix
from sam.types import Mention, Sentence

TYPES = ["person", "musical artist"]


def sentence(text: str, *spans: tuple[int, int, str]) -> Sentence:
    return Sentence("s", text, tuple(Mention(*span) for span in spans))


def spans(text: str, *pairs: tuple[str, str]) -> list[tuple[str, str, int]]:
    """The aligned (type, raw text, start) of ``pairs``."""
    return [(m.type, text[m.start : m.end], m.start) for m in align(text, pairs)]


def test_prompt_is_this_text() -> None:
    assert prefix(TYPES) == "Entity types: person, musical artist\nText:"
    assert suffix("Ada met Alan.") == " Ada met Alan.\nEntities:"
    assert prefix(TYPES) + suffix("Ada.") == "Entity types: person, musical artist\nText: Ada.\nEntities:"


def test_prompt_does_not_depend_on_line_breaks() -> None:
    assert suffix("\n Ada\r\n met\t\tAlan\u00a0T. ") == suffix("Ada met Alan T.")


def test_answer_has_distinct_pairs_as_they_appear() -> None:
    gold = sentence('Zoë met "Ada", Zoë!', (0, 3, "b"), (8, 13, "a"), (15, 18, "b"), (15, 18, "a"))
    assert answer(gold, ["a", "none", "b"]) == r' {" Zoë":" b"," \"Ada\"":" a"," Zoë":" a"}'
    assert answer(gold, ["a"]) == r' {" \"Ada\"":" a"," Zoë":" a"}'


def test_answer_normalises_whitespace_and_merges_what_then_is_one() -> None:
    gold = sentence("New\n York, New York", (0, 9, "place"), (11, 19, "place"))
    assert answer(gold, ["place"]) == ' {" New York":" place"}'


@pytest.mark.parametrize("mentions", [None, ()])
def test_answer_without_mentions_is_an_empty_object(mentions: tuple[Mention, ...] | None) -> None:
    assert answer(Sentence("s", "text", mentions), TYPES) == " {}"


@pytest.mark.parametrize(
    ("raw", "pairs"),
    [
        ("{}", []),
        ('{" x ": "a"}', [("a", "x")]),
        (' {" x":" a"," y z":" b"," x":" b"}', [("a", "x"), ("b", "y z"), ("b", "x")]),
        ('{"x": "a", "x": "a", "x": "b"}', [("a", "x"), ("b", "x")]),
        ('{" x":" a","b":["y"]," z":["a"]}', [("a", "x")]),
        ('{" x":1," y":null," z":{" a":" b"},"":" a"," v":" "}', []),
        ('{"x": "a"} {"y": "b"}', [("a", "x")]),
        ('Sure {as asked}:\n```json\n{"x": "a"}\n``` I hope', [("a", "x")]),
        ('{\n  "x":\n    "a"\n}', [("a", "x")]),
        (r'{"\"x\" \u00e9\n\\ y": "a"}', [("a", '"x" é \\ y')]),
        ('{"New\n  York": "a"}', [("a", "New York")]),
        ('{"IL-2 [human]": "a", "{x}": "a", "a: b": "c; d"}', [("a", "IL-2 [human]"), ("a", "{x}"), ("c; d", "a: b")]),
        ('{"C++": "a", "C#": "a", "A*": "a", "U.S.": "a"}', [("a", t) for t in ("C++", "C#", "A*", "U.S.")]),
        (r'{"\ud800": "a", "x": "a"}', [("a", "x")]),
    ],
)
def test_parse_whole_object(raw: str, pairs: list[tuple[str, str]]) -> None:
    parsed = parse(raw)
    assert list(parsed.pairs) == pairs
    assert not parsed.unparsable


@pytest.mark.parametrize(
    ("raw", "pairs"),
    [
        ('{"x": "a", "b"', [("a", "x")]),
        (' {" x":" a"," y":" b', [("a", "x")]),
        (' {" x":" a"," y":', [("a", "x")]),
        (' {" x":" a"," y', [("a", "x")]),
        (' {" x":" a"," y":" b"', [("a", "x"), ("b", "y")]),
        (' {" x":" a" " y":" b", " z" " a"', [("a", "x"), ("b", "y")]),
        ('{"x": "a", "y": [', [("a", "x")]),
        ('{"x": "a", "y": ["v", "w": "b"], "z": "b"', [("a", "x"), ("b", "z")]),
        ('{"x": "a",, z, "y": "b"', [("a", "x"), ("b", "y")]),
        ('{"x": {"c": "d", "e": [{}]}, "y": "a"', [("a", "y")]),
        ('{"x": , "y": "a"', [("a", "y")]),
        (r'{"C:\Pro \"q\"": "a"}', [("a", r'C:\Pro "q"')]),
        (r'{"x": "a\"', []),
        ('{"x":', []),
    ],
)
def test_parse_recovers_what_is_whole_in_a_broken_object(raw: str, pairs: list[tuple[str, str]]) -> None:
    parsed = parse(raw)
    assert list(parsed.pairs) == pairs
    assert not parsed.unparsable


def test_of_key_and_string_the_one_that_alone_is_asked_for_is_the_type() -> None:
    raw = '{"Person": "Ada", "Bob": "person", "x": "y", "person": "musical  artist"'
    for whole in (raw, raw + "}"):
        assert parse(whole, TYPES).pairs == (
            ("Person", "Ada"),
            ("person", "Bob"),
            ("y", "x"),
            ("musical artist", "person"),
        )
    assert parse(raw).pairs[0] == ("Ada", "Person")


@pytest.mark.parametrize("raw", ["", "I see no entities.", '["x"]', "{", '{"mus', '{"a"', "{a: 1}", '{"a", "b"}'])
def test_parse_tells_what_is_no_answer(raw: str) -> None:
    parsed = parse(raw)
    assert parsed.unparsable
    assert parsed.pairs == ()


pieces = st.lists(
    st.sampled_from([*'{}[]:,"\\ \n', '"a"', '": ["', "x", "12", "null", "\ud800", "\u0000", '{"k": ["v"]}'])
)


@settings(max_examples=500)
@given(st.one_of(st.text(), pieces.map("".join), pieces.map(lambda parts: '{"k": ["v", ' + "".join(parts))))
def test_parse_never_raises_and_yields_clean_pairs(raw: str) -> None:
    parsed = parse(raw)
    assert len(set(parsed.pairs)) == len(parsed.pairs)
    assert all(part and part == normalised(part) for pair in parsed.pairs for part in pair)
    assert not (parsed.unparsable and parsed.pairs)
    "".join(part for pair in parsed.pairs for part in pair).encode()


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1))), st.data())
def test_any_cut_of_an_answer_keeps_the_whole_pairs_before_it(
    values: list[tuple[str, str]], data: st.DataObject
) -> None:
    raw = "{" + ",".join(f"{json.dumps(text)}:{json.dumps(kind)}" for kind, text in values) + "}"
    whole = parse(raw)
    assert whole.pairs == tuple(
        dict.fromkeys((normalised(k), normalised(t)) for k, t in values if normalised(k) and normalised(t))
    )
    cut = parse(raw[: data.draw(st.integers(0, len(raw)))])
    assert cut.pairs == whole.pairs[: len(cut.pairs)]
    if values:
        assert parse(raw[:-1]).pairs == whole.pairs


@pytest.mark.parametrize(
    "raw",
    [
        '{" x":" a",' * 50_000,
        '{"a":' * 50_000,
        '{"a": ' + "[" * 200_000,
        '{"a": ["x", ' + '{"b": [' * 30_000,
        "{" * 200_000,
        ("{" + " " * 9) * 20_000,
        '{"a": ["' + '\\"' * 100_000,
        '{"a": [{"' + '\\"' * 100_000,
        '{"a": ["x", ' + '"' * 200_001,
        '{"a": ["x" ' * 20_000,
        '{"a": [' + "9" * 200_000,
        '{"a": ["x", ' + "\\" * 200_000,
        '{"a": ["' + "x" * 200_000,
    ],
)
def test_parse_takes_linear_time_without_recursion(raw: str) -> None:
    start = time.perf_counter()
    parse(raw)
    assert time.perf_counter() - start < 5  # quadratic time on these takes minutes


def test_deep_nesting_keeps_what_stands_outside_of_it() -> None:
    parsed = parse('{"x": "a", "z": ' + "[" * 100_000 + "]" * 100_000 + ', "y": "a"}')
    assert parsed.pairs == (("a", "x"), ("a", "y"))


def test_align_finds_every_occurrence_in_order() -> None:
    assert spans("Ada saw Bob; Ada left.", ("p", "Bob"), ("p", "Ada")) == [
        ("p", "Ada", 0),
        ("p", "Bob", 8),
        ("p", "Ada", 13),
    ]


def test_align_prefers_whole_words_and_else_takes_any_place() -> None:
    assert spans("USB of the US, USA", ("place", "US")) == [("place", "US", 11)]
    assert spans("USB and USA", ("place", "US")) == [("place", "US", 0), ("place", "US", 8)]
    assert spans("我在東京都", ("place", "東京")) == [("place", "東京", 2)]


def test_align_edges_that_are_no_letters_need_no_boundary() -> None:
    assert spans("C++11, C and C#", ("lang", "C++"), ("lang", "C#"), ("lang", "C")) == [
        ("lang", "C++", 0),
        ("lang", "C", 7),
        ("lang", "C#", 13),
    ]
    assert spans("snake_case case", ("t", "case")) == [("t", "case", 6), ("t", "case", 11)]


def test_align_places_the_longest_first_and_drops_overlaps() -> None:
    pairs = [("place", "York"), ("place", "New York"), ("paper", "New York Times")]
    assert spans("York: the New York Times", *pairs) == [("place", "York", 0), ("paper", "New York Times", 10)]


def test_align_gives_a_text_under_two_types_to_the_first() -> None:
    assert spans("Ada", ("b", "Ada"), ("a", "Ada")) == [("b", "Ada", 0)]


def test_align_matches_folded_whitespace_and_returns_raw_offsets() -> None:
    assert align("  New\n\t York\u00a0City ", [("place", "New  York City")]) == (Mention(2, 17, "place"),)


def test_align_is_case_sensitive_and_ignores_empty_texts() -> None:
    assert align("ada Ada", [("p", "Ada"), ("p", ""), ("p", " ")]) == (Mention(4, 7, "p"),)


@given(st.text("ab \n"), st.lists(st.tuples(st.sampled_from("pq"), st.text("ab ", min_size=1, max_size=3))))
def test_aligned_spans_are_flat_sorted_and_say_what_the_pair_says(text: str, pairs: list[tuple[str, str]]) -> None:
    mentions = align(text, pairs)
    normalised_pairs = {(entity_type, normalised(surface)) for entity_type, surface in pairs}
    assert all((m.type, normalised(text[m.start : m.end])) in normalised_pairs for m in mentions)
    assert all(left.end <= right.start for left, right in zip(mentions, mentions[1:], strict=False))
    covered = {normalised(text[m.start : m.end]) for m in mentions}
    longest = max((s for _, s in normalised_pairs if s and s in normalised(text)), key=len, default=None)
    assert longest is None or len(max(covered, key=len)) == len(longest)


@given(st.text("abc .\n", min_size=1), st.data())
def test_gold_answer_reads_back_as_the_gold_pairs(text: str, data: st.DataObject) -> None:
    cuts = st.tuples(st.integers(0, len(text)), st.integers(0, len(text)), st.sampled_from("pq"))
    gold = sentence(text, *[c for c in data.draw(st.lists(cuts)) if c[0] < c[1] and normalised(text[c[0] : c[1]])])
    prediction = predict(text, answer(gold, ["p", "q"]), ["p", "q"])
    assert set(prediction.pairs) == {(entity_type, normalised(surface)) for entity_type, surface in gold.pairs}
    assert (prediction.not_in_sentence, prediction.not_asked, prediction.unparsable) == (0, 0, False)


def test_predict_counts_what_is_not_asked_and_not_in_the_sentence() -> None:
    raw = (
        '{"Ada":"person","ada":"person","Bob":"person","Ada":"PERSON ","Cher":"Musical  Artist",'
        '"Rome":"city","Ada":"city"}'
    )
    got = predict("Ada and\nCher", raw, TYPES, truncated=True)
    person, artist = TYPES
    assert got.pairs == (
        (person, "Ada"),
        (person, "ada"),
        (person, "Bob"),
        (artist, "Cher"),
        ("city", "Rome"),
        ("city", "Ada"),
    )
    assert got.mentions == (Mention(0, 3, person), Mention(8, 12, artist))
    assert (got.not_in_sentence, got.not_asked) == (3, 2)
    assert (got.completion, got.unparsable, got.truncated) == (raw, False, True)


def test_predict_restores_the_case_of_the_type_asked_for() -> None:
    for raw in ('{"restaurant name": "Ada"}', '{" Ada":" restaurant name"}'):
        assert predict("Ada", raw, ["Restaurant Name"]).pairs == (("Restaurant Name", "Ada"),)


def test_predict_on_no_answer() -> None:
    got = predict("Ada", "none", TYPES)
    assert (got.pairs, got.mentions, got.unparsable) == ((), (), True)
