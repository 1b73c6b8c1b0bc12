"""Every way in which a corpus breaks a loader, on small texts written for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from sam.data.readers import Columns, Draft, Inline, Source, Standoff, Strings, make_reader
from sam.data.readers.base import join_tokens, tag_spans
from sam.errors import SamError


def parse(reader: Columns | Inline | Strings, text: str) -> tuple[list[Draft], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(reader.parse(text, counts)), +counts


def pairs(draft: Draft) -> list[tuple[str, str]]:
    return [(m.type, draft.text[m.start : m.end]) for m in draft.mentions]


# --- tags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "tags", "spans", "repairs"),
    [
        ("IOB2", "B-X I-X O B-X", [(0, 2, "X"), (3, 4, "X")], {}),
        ("IOB2", "B-X B-X", [(0, 1, "X"), (1, 2, "X")], {}),
        ("IOB2", "O I-X I-X", [(1, 3, "X")], {"opened_by_I": 1}),
        ("IOB2", "B-X I-Y", [(0, 1, "X"), (1, 2, "Y")], {"opened_by_I": 1}),
        ("IOB1", "I-X I-X B-X I-Y", [(0, 2, "X"), (2, 3, "X"), (3, 4, "Y")], {}),
        ("BILOU", "U-X U-X B-X I-X L-X O", [(0, 1, "X"), (1, 2, "X"), (2, 5, "X")], {}),
        ("BILOU", "B-X L-X L-X", [(0, 2, "X"), (2, 3, "X")], {"opened_by_I": 1}),
        ("BILOU", "S-X B-X E-X I-X", [(0, 1, "X"), (1, 3, "X"), (3, 4, "X")], {"opened_by_I": 1}),
        ("IOB2", "B-geo-loc I-geo-loc B-A/B.c_d", [(0, 2, "geo-loc"), (2, 3, "A/B.c_d")], {}),
        ("IOB1", "I-X P I-X", [(0, 1, "X"), (2, 3, "X")], {"stray_tag_read_as_O": 1}),
    ],
)
def test_tag_spans(scheme: str, tags: str, spans: list[tuple[int, int, str]], repairs: dict[str, int]) -> None:
    counts: Counter[str] = Counter()
    assert tag_spans(tags.split(), scheme, counts) == spans
    assert counts == repairs


def test_an_empty_tag_is_outside_and_ends_a_span() -> None:
    counts: Counter[str] = Counter()
    assert tag_spans(["B-X", "", "I-X"], "IOB2", counts) == [(0, 1, "X"), (2, 3, "X")]
    assert counts == {"missing_tag_read_as_O": 1, "opened_by_I": 1}


@given(st.lists(st.sampled_from(["O", *(f"{p}-{t}" for p in "BIES" for t in ("X", "Y-Z"))])))
def test_spans_are_those_of_seqeval(tags: list[str]) -> None:
    spans = [(start, end - 1, label) for start, end, label in tag_spans(tags, "IOB2", Counter())]
    assert spans == [(start, end, label) for label, start, end in get_entities(tags)]


@given(st.lists(st.tuples(st.sampled_from(["", "a", "bc d", "é"]), st.sampled_from(["O", "B-X", "I-X"]))))
def test_mentions_cover_their_tokens(rows: list[tuple[str, str]]) -> None:
    tokens, tags = [r[0] for r in rows], [r[1] for r in rows]
    spans = tag_spans(tags, "IOB2", Counter())
    counts: Counter[str] = Counter()
    text, mentions = join_tokens(tokens, spans, counts)
    assert text == " ".join(t for t in tokens if t)
    surfaces = [" ".join(t for t in tokens[a:b] if t) for a, b, _ in spans]
    assert [text[m.start : m.end] for m in mentions] == [s for s in surfaces if s]
    assert counts["blank_mention_dropped"] == surfaces.count("")
    assert counts["blank_token_dropped"] == tokens.count("")


# --- columns ------------------------------------------------------------------------------------------------------


def test_blank_lines_of_any_kind_and_number_end_one_sentence() -> None:
    drafts, counts = parse(Columns(tag=1), "\n\nAda\tB-per\nsang\tO\n\t\n\n \nBonn\tB-loc\n\n\n")
    assert [d.text for d in drafts] == ["Ada sang", "Bonn"]
    assert [pairs(d) for d in drafts] == [[("per", "Ada")], [("loc", "Bonn")]]
    assert counts == {}


def test_no_newline_at_the_end_and_a_byte_order_mark() -> None:
    drafts, _ = parse(Columns(tag=1), "\ufeffAda\tB-per\nsang\tO")
    assert [(d.text, pairs(d)) for d in drafts] == [("Ada sang", [("per", "Ada")])]


def test_tag_before_token() -> None:
    drafts, _ = parse(Columns(token=1, tag=0), "O\tfilms\nO\tby\nB-D\tlee\nI-D\tchang\n")
    assert pairs(drafts[0]) == [("D", "lee chang")]


def test_tokens_with_spaces_and_ragged_rows() -> None:
    text = "at\tO\n15 pm\tB-Date\tB-Num\tx\nBonn\tB-Loc\n"
    drafts, counts = parse(Columns(tag=1), text)
    assert (drafts[0].text, pairs(drafts[0])) == ("at 15 pm Bonn", [("Date", "15 pm"), ("Loc", "Bonn")])
    assert counts == {}


def test_a_blank_token_is_dropped_without_shifting_columns() -> None:
    drafts, counts = parse(Columns(tag=1), "hi\tO\n\tO\n☃ \tB-X\n \tI-X\nBonn\tB-L\n")
    assert (drafts[0].text, pairs(drafts[0])) == ("hi ☃ Bonn", [("X", "☃"), ("L", "Bonn")])
    assert counts == {"blank_token_dropped": 2}


def test_a_sentence_of_blank_tokens_is_read_as_empty() -> None:
    drafts, counts = parse(Columns(tag=1), "\tB-X\n\nBonn\tB-L\n")
    assert [(d.text, pairs(d)) for d in drafts] == [("", []), ("Bonn", [("L", "Bonn")])]
    assert counts == {"blank_token_dropped": 1, "blank_mention_dropped": 1}


def test_only_a_newline_ends_a_line() -> None:
    drafts, _ = parse(Columns(tag=1), "a\u2028b\tO\nc\x0bd\u0085e\tB-X\n\u200b\tO\nx\ufe0f\tO\n")
    assert [d.text for d in drafts] == ["a\u2028b c\x0bd\u0085e \u200b x\ufe0f"]
    assert pairs(drafts[0]) == [("X", "c\x0bd\u0085e")]


def test_space_separator_is_cut_from_the_right() -> None:
    text = "rock NN O I-M\n\n<111>  O NN I-M\n"
    drafts, _ = parse(Columns(tag=3, separator="space", scheme="IOB1"), text)
    assert [(d.text, pairs(d)) for d in drafts] == [("rock", [("M", "rock")]), ("<111>", [("M", "<111>")])]


def test_space_separator_with_spaces_in_the_token_and_no_tag() -> None:
    drafts, counts = parse(Columns(tag=1, separator="space"), "<111>  O\nMPa 1/2  B-P\nsteel \n\n\ntin B-M\n")
    assert [(d.text, pairs(d)) for d in drafts] == [
        ("<111> MPa 1/2 steel", [("P", "MPa 1/2")]),
        ("tin", [("M", "tin")]),
    ]
    assert counts == {"missing_tag_read_as_O": 1}


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (Columns(tag=3), "-DOCSTART- -X- -X- O\n\nAda\t-\t-\tB-P\n\nBonn\t-\t-\tB-L\n"),
        (
            Columns(tag=3, separator="space"),
            "-DOCSTART- N O O\n\nAda N O B-P\n\n-DOCSTART- N O O\n\nBonn N O B-L\n",
        ),
        (Columns(tag=1, separator="space"), "-DOCSTART- O\nAda B-P\n\n-DOCSTART- O\nBonn B-L\n"),
        (Columns(tag=1, separator="csv"), "-DOCSTART-,O\nAda,B-P\n,O\n-DOCSTART-,O\nBonn,B-L\n"),
    ],
)
def test_docstart_is_no_token_and_no_sentence(reader: Columns, text: str) -> None:
    drafts, _ = parse(reader, text)
    assert [(d.text, pairs(d)) for d in drafts] == [("Ada", [("P", "Ada")]), ("Bonn", [("L", "Bonn")])]


def test_csv_quoting_sentence_ends_and_documents() -> None:
    text = '-DOCSTART-,O\n,O\nAcme,I-B\n",",I-B\n"""Co""",I-B\n,\n\nsaid,O\n,O\nBonn,P\n-DOCSTART-,O\nIowa,I-L\n'
    drafts, counts = parse(Columns(tag=1, separator="csv", scheme="IOB1", documents="docstart"), text)
    assert [d.text for d in drafts] == ['Acme , "Co" said', "Bonn", "Iowa"]
    assert [pairs(d) for d in drafts] == [[("B", 'Acme , "Co"')], [], [("L", "Iowa")]]
    assert [d.document for d in drafts] == [0, 0, 1]
    assert counts == {"stray_tag_read_as_O": 1}


def test_sentence_flags_and_missing_spaces_in_a_notes_column() -> None:
    rows = ["TOKEN\tCOARSE\tMISC", "# date = 1860", "Poole\tB-LOC\tNoSpaceAfter", ".\tO\tEndOfSentence"]
    rows += ["High\tI-ST\t_", "Street\tI-ST\t", "", "# date = 1861", "#\tO\tNoSpaceAfter", "Bath\tB-LOC\tNoSpaceAfter"]
    drafts, counts = parse(Columns(tag=1, header=True, comment="# ", note=2), "\n".join(rows) + "\n\n")
    assert [d.text for d in drafts] == ["Poole.", "High Street", "#Bath"]
    assert [pairs(d) for d in drafts] == [[("LOC", "Poole")], [("ST", "High Street")], [("LOC", "Bath")]]
    assert counts == {"opened_by_I": 1}


def test_comment_lines_do_not_end_a_sentence() -> None:
    text = "# sent_id = 1\n# text = Ada sang\n1\tAda\tB-P\t-\t-\n2\tsang\tO\t-\t-\n"
    drafts, _ = parse(Columns(token=1, tag=2, comment="# "), text)
    assert [(d.text, pairs(d)) for d in drafts] == [("Ada sang", [("P", "Ada")])]


def test_a_file_ends_a_sentence_and_is_a_document(tmp_path: Path) -> None:
    for name, text in (("a", "Ada\tB-P"), ("b", "Bonn\tB-L")):
        (tmp_path / name).write_bytes(text.encode())
    source = Source({name: tmp_path / name for name in ("a", "b")})
    drafts = list(Columns(tag=1).read(source, Counter()))
    assert [(d.text, d.path, d.document) for d in drafts] == [("Ada", "a", 0), ("Bonn", "b", 1)]


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"caf\xe9\tO\n")
    with pytest.raises(SamError, match=r"a: not UTF-8 at byte 3"):
        list(Columns(tag=1).read(Source({"a": tmp_path / "a"}), Counter()))


# --- the other formats --------------------------------------------------------------------------------------------


def test_inline_splits_at_the_last_colon() -> None:
    text = "at:O 8:30:B-time am:I-time to:O bonn:B-toloc.city_name <=> flight;fare\n\nhi:O <=> greet\n"
    drafts, _ = parse(Inline(), text)
    assert [d.text for d in drafts] == ["at 8:30 am to bonn", "hi"]
    assert pairs(drafts[0]) == [("time", "8:30 am"), ("toloc.city_name", "bonn")]


def strings(sentence: str, *ner: tuple[str, str]) -> tuple[Draft, Counter[str]]:
    drafts, counts = parse(Strings(), json.dumps({"sentence": sentence, "ner": ner}) + "\n")
    return drafts[0], counts


def test_mention_strings_take_occurrences_in_order() -> None:
    draft, counts = strings("a CNN beats a big CNN ; CNNs win", ("CNN", "M"), ("CNN", "M"), ("CNNs", "M"))
    assert [(m.start, m.end) for m in draft.mentions] == [(2, 5), (18, 21), (24, 28)]
    assert counts == {"repeated_pairs": 1}


def test_mention_strings_stand_in_order_of_the_text() -> None:
    """The second CNN is meant: it is listed behind "2D CNN", which holds the first one."""
    draft, counts = strings("2D CNN or CNN", ("2D CNN", "M"), ("CNN", "M"))
    assert [(m.start, m.end) for m in draft.mentions] == [(0, 6), (10, 13)]
    assert counts == {}


def test_mention_strings_may_nest_and_may_be_lost() -> None:
    draft, counts = strings("use 2D CNN", ("2D CNN", "M"), ("CNN", "T"), ("CNN", "T"), ("CNNs", "M"))
    assert [(m.start, m.end, m.type) for m in draft.mentions] == [(4, 10, "M"), (7, 10, "T")]
    assert counts == {"nested_mentions": 1, "repeated_pairs": 1, "pairs_without_occurrence": 2}


def test_mention_strings_out_of_order_are_found_and_sorted() -> None:
    draft, counts = strings("deep big nets", ("nets", "M"), ("deep", "T"), ("deep big", "M"))
    assert [(m.start, m.end, m.type) for m in draft.mentions] == [(0, 8, "M"), (0, 4, "T"), (9, 13, "M")]
    assert counts == {"nested_mentions": 1}


def test_a_broken_json_line_is_named() -> None:
    with pytest.raises(SamError, match=r":2: not an object with sentence and ner"):
        parse(Strings(), '{"sentence": "a", "ner": []}\n{"sentence": "b"}\n')


STANDOFF = {"kind": "standoff", "metadata": "meta.csv"} | {k: k + "/{name}.csv" for k in ("text", "sentences", "tags")}


def test_standoff_tables(tmp_path: Path) -> None:
    # Authors of doc1 hold a line break inside quotes; doc3 belongs to another split.
    documents = ['One\t"Ada\nBob"\tdoc1\ttrain', "Two\tC\tdoc2\ttrain", "Three\tD\tdoc3\tdev"]
    doc1 = ["0\t4\tO", "5\t8\tB-MAT", "9\t11\tO", "12\t13\tI-VAL", "14\t15\tI-VAL"]
    files = {
        "meta.csv": "\n".join(["Title\tAuthors\tname\tset", *documents, ""]),
        "text/doc1.csv": "Über YSZ\nat 5 K. No tags here.",
        "sentences/doc1.csv": "1\t1\t0\t16\n2\t0\t17\t30\n",
        "tags/doc1.csv": "".join(f"1\t{i}\t{row}\tO\n" for i, row in enumerate(doc1, start=1)),
        "text/doc2.csv": "YSZ",
        "sentences/doc2.csv": "1\t1\t0\t3\n",
        "tags/doc2.csv": "1\t1\t0\t3\tB-MAT\tO\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    reader = make_reader(STANDOFF)
    assert isinstance(reader, Standoff)
    counts: Counter[str] = Counter()
    drafts = list(reader.read(Source({name: tmp_path / name for name in files}, "train"), counts))
    assert [d.text for d in drafts] == ["Über YSZ at 5 K.", "No tags here.", "YSZ"]
    assert [pairs(d) for d in drafts] == [[("MAT", "YSZ"), ("VAL", "5 K")], [], [("MAT", "YSZ")]]
    assert [d.annotated for d in drafts] == [True, False, True]
    assert [d.document for d in drafts] == [0, 0, 1]
    assert counts == {"opened_by_I": 1}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "xml"}, "format.kind: 'xml' is not one of columns, inline, open_types, standoff, strings"),
        ({"kind": "columns", "tag": 1, "separator": "pipe"}, "format.separator: 'pipe' is not one of tab, space, csv"),
        ({"kind": "columns", "tag": 1, "scheme": "BIO"}, "format.scheme: 'BIO' is not one of IOB1, IOB2, BILOU"),
        ({"kind": "inline", "colon": 1}, "format of kind inline: .*'colon'"),
    ],
)
def test_wrong_format_parameters_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(SamError, match=message):
        make_reader(params)
