"""A user's own files: what is read, and the line that a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam.data import read_file
from sam.errors import SamError
from sam.types import Mention


def write(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "mine.jsonl",
        '\ufeff{"text": "Ada in Bonn", "mentions": [{"type": "loc", "start": 7, "end": 11}, '
        '{"type": "per", "start": 0, "end": 3}]}\r\n\n'
        '{"text": "Ünï", "mentions": []}\n{"text": "no gold", "id": "x7"}',
    )
    ada, empty, bare = read_file(path)
    assert (ada.id, ada.text) == ("mine/0", "Ada in Bonn")
    assert ada.mentions == (Mention(0, 3, "per"), Mention(7, 11, "loc"))
    assert (empty.id, empty.text, empty.mentions) == ("mine/1", "Ünï", ())
    assert (bare.id, bare.mentions) == ("x7", None)


@pytest.mark.parametrize("name", ["mine.conll", "mine.bio", "mine.iob", "mine.tsv", "mine.txt", "mine"])
@pytest.mark.parametrize("gap", ["\t", " ", "  \t"])
def test_columns(tmp_path: Path, name: str, gap: str) -> None:
    rows = ["-DOCSTART- -X- O", "", "\ufeffAda", "sang", "", "Bonn", "Beuel"]
    tags = ["", "", "I-per", "O", "", "B-geo-loc", "I-geo-loc"]
    text = "\n".join(f"{r}{gap}NN{gap}{t}" if t else r for r, t in zip(rows, tags, strict=True))
    text = text.replace("\ufeff", "") if name not in ("mine.txt", "mine") else text.split("\n", 2)[2]
    first, second = read_file(write(tmp_path, name, text))
    assert (first.id, first.text, first.pairs) == ("mine/0", "Ada sang", (("per", "Ada"),))
    assert (second.id, second.text, second.pairs) == ("mine/1", "Bonn Beuel", (("geo-loc", "Bonn Beuel"),))


def test_types_with_spaces_between_tabs(tmp_path: Path) -> None:
    (sentence,) = read_file(write(tmp_path, "a.tsv", "New York\tB-big city\n"))
    assert sentence.pairs == (("big city", "New York"),)


def test_plain_text(tmp_path: Path) -> None:
    sentences = read_file(write(tmp_path, "mine.txt", "\ufeffAda sang.\r\n\nTo Bonn, O\n"))
    assert [(s.id, s.text, s.mentions) for s in sentences] == [
        ("mine/0", "Ada sang.", None),
        ("mine/1", "To Bonn, O", None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a.jsonl:2: not JSON: Expecting value at column 10"),
        ("a.jsonl", '["a"]\n', r"a.jsonl:1: needs an object with a \"text\""),
        ("a.jsonl", '{"text": " "}\n', r"a.jsonl:1: needs an object with a \"text\""),
        ("a.jsonl", '{"text": "a", "mentions": {}}\n', r"a.jsonl:1: \"mentions\" must be a list"),
        ("a.jsonl", '{"text": "a", "mentions": [["x", 0, 1]]}\n', r"a.jsonl:1: mention \[\"x\", 0, 1\] needs"),
        ("a.jsonl", '{"text": "a", "mentions": [{"type": "x", "start": "0", "end": 1}]}\n', r"a.jsonl:1: .*integers"),
        (
            "a.jsonl",
            '\n{"text": "abc", "mentions": [{"type": "x", "start": 2, "end": 4}]}\n',
            r"a.jsonl:2: mention 2-4 is not within the text of 3 characters",
        ),
        ("a.jsonl", '{"text": "abc", "mentions": [{"type": "x", "start": 2, "end": 2}]}\n', r":1: mention 2-2 is not"),
        ("a.jsonl", '{"text": "abc", "mentions": [{"type": "x", "start": -1, "end": 2}]}\n', r":1: mention -1-2 is"),
        (
            "a.jsonl",
            '{"text": "a  c", "mentions": [{"type": "x", "start": 1, "end": 3}]}\n',
            r"a.jsonl:1: mention 1-3 covers no text",
        ),
        ("a.jsonl", '{"text": "abc", "types": "x"}\n', r'a.jsonl:1: "types" must be a list of entity types'),
        ("a.jsonl", '{"text": "abc", "types": []}\n', r'a.jsonl:1: "types" must be a list of entity types'),
        ("a.csv", "text,label\nAda sang,x\n", r"a.csv: CSV is not read; give JSON lines"),
        ("a.json", '[\n {"text": "Ada sang"}\n]\n', r"a.json: not JSON lines; put each sentence's object on a line"),
        ("a.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": "1"}\n', r"a.jsonl: id '1' belongs to more than one"),
        ("a.conll", "Ada B-per\nsang\n", r"a.conll:2: needs a token in the first column and a tag in the last"),
        ("a.tsv", "Ada\tB-per\n\tO\n", r"a.tsv:2: needs a token"),
        ("a.tsv", "Ada\tB-per\nx\tP\n", r"a.tsv:2: tag 'P' is neither O nor B-TYPE or I-TYPE"),
        ("a.txt", b"ok\ncaf\xe9\n", r"a.txt:2: not UTF-8"),
        ("a.jsonl", "", r"a.jsonl: no sentences in it"),
        ("a.txt", "\ufeff\n \n", r"a.txt: no sentences in it"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(SamError, match=message) as caught:
        read_file(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_json_that_is_a_sentence_a_line_is_read(tmp_path: Path) -> None:
    assert read_file(write(tmp_path, "a.json", ' {"text": "Ada"}\n{"text": "Bonn"}\n'))[1].text == "Bonn"


def test_keys_that_are_not_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "Ada", "entities": []}\n{"text": "Bonn", "label": 1}\n')
    assert [s.mentions for s in read_file(path)] == [None, None]
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: not read: entities, label; a line may have text, mentions, id, types"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SamError, match="is a folder; give a file"):
        read_file(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SamError, match=r"nowhere.jsonl: no such file"):
        read_file(tmp_path / "nowhere.jsonl")
