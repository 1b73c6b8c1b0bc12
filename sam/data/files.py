"""A user's own sentences, with or without gold mentions: JSON lines, CoNLL columns, plain text."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam.data.readers.base import join_tokens, tag_spans
from sam.errors import SamError
from sam.types import Mention, Sentence

log = logging.getLogger(__name__)

COLUMNS = (".conll", ".bio", ".iob", ".tsv")
TAG = re.compile(r"O|[BIELSU]-.+")
SNIFFED_LINES = 50
KEYS = ("text", "mentions", "id", "types")


def read_file(path: str | Path) -> list[Sentence]:
    """The sentences of a file, with ids ``{stem}/{index}`` unless the file gives them.

    - ``.jsonl``: ``{"text", "mentions": [{"type", "start", "end"}], "id", "types": ["gene"]}`` per line; all but the
      text may be left out; offsets count characters of the text, end exclusive; ``types`` are those that this sentence
      is asked for.
    - ``.conll``, ``.bio``, ``.iob``, ``.tsv``: token first, tag (any IOB or BILOU scheme) last, separated by tabs
      or else by spaces; a blank line between sentences.
    - any other: one of these if its first lines have that form, else plain text, one sentence per line, without gold.

    A byte order mark is passed over.
    Raises SamError with file and line for what cannot be read; nothing is skipped but blank lines.
    """
    path = Path(path)
    if path.is_dir():
        raise SamError(f"{path} is a folder; give a file")
    if not path.is_file():
        raise SamError(f"{path}: no such file")
    lines = _lines(path)
    kind = _kind(path, lines)
    reader = {"jsonl": _from_json, "columns": _from_columns, "text": _from_text}[kind]
    sentences = list(reader(path, lines))
    if not sentences:
        raise SamError(f"{path}: no sentences in it (read as {kind})")
    _refuse_repeated_ids(path, sentences)
    return sentences


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SamError(f"{path}:{line}: not UTF-8; convert the file to UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def _kind(path: Path, lines: list[str]) -> str:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        raise SamError(f"{path}: CSV is not read; give JSON lines (.jsonl), CoNLL columns (.conll) or text (.txt)")
    if suffix in (".jsonl", *COLUMNS):
        return "jsonl" if suffix == ".jsonl" else "columns"
    head = [line for line in lines if line.strip()][:SNIFFED_LINES]
    if head and all(line.strip().startswith("{") and line.strip().endswith("}") for line in head):
        return "jsonl"
    if head and suffix == ".json":
        raise SamError(f"{path}: not JSON lines; put each sentence's object on a line of its own (.jsonl)")
    if head and all(len(cells := _cells(line)) > 1 and TAG.fullmatch(cells[-1]) for line in head):
        return "columns"
    return "text"


def _from_text(path: Path, lines: list[str]) -> Iterator[Sentence]:
    for index, line in enumerate(line.strip() for line in lines if line.strip()):
        yield Sentence(f"{path.stem}/{index}", line)


def _from_json(path: Path, lines: list[str]) -> Iterator[Sentence]:
    index = 0
    unread: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SamError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict) or not isinstance(text := record.get("text"), str) or not text.strip():
            raise SamError(f'{where}: needs an object with a "text" that is not empty')
        unread.update(record.keys() - KEYS)
        mentions = record.get("mentions")
        gold = None if mentions is None else _mentions(where, text, mentions)
        yield Sentence(str(record.get("id", f"{path.stem}/{index}")), text, gold, _types(where, record.get("types")))
        index += 1
    if unread:
        log.warning("%s: not read: %s; a line may have %s", path, ", ".join(sorted(unread)), ", ".join(KEYS))


def _mentions(where: str, text: str, mentions: Any) -> tuple[Mention, ...]:
    if not isinstance(mentions, list):
        raise SamError(f'{where}: "mentions" must be a list of {{"type", "start", "end"}}')
    read = [_mention(where, text, m) for m in mentions]
    return tuple(sorted(read, key=lambda m: (m.start, -m.end, m.type)))


def _types(where: str, types: Any) -> tuple[str, ...] | None:
    if types is None:
        return None
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t.strip() for t in types):
        raise SamError(f'{where}: "types" must be a list of entity types, at least one')
    return tuple(types)


def _mention(where: str, text: str, mention: Any) -> Mention:
    keys = ("type", "start", "end")
    if not isinstance(mention, dict) or [type(mention.get(k)) for k in keys] != [str, int, int]:
        raise SamError(f'{where}: mention {json.dumps(mention)} needs "type" (string), "start" and "end" (integers)')
    name, start, end = (mention[k] for k in keys)
    if not 0 <= start < end <= len(text):
        raise SamError(f"{where}: mention {start}-{end} is not within the text of {len(text)} characters")
    if not text[start:end].strip():
        raise SamError(f"{where}: mention {start}-{end} covers no text, only space")
    return Mention(start, end, name)


def _from_columns(path: Path, lines: list[str]) -> Iterator[Sentence]:
    counts: Counter[str] = Counter()
    tokens: list[str] = []
    tags: list[str] = []
    index = 0
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            token, tag = _row(f"{path}:{number}", line)
            tokens.append(token)
            tags.append(tag)
        elif tokens:
            text, mentions = join_tokens(tokens, tag_spans(tags, "IOB2", counts), counts)
            yield Sentence(f"{path.stem}/{index}", text, mentions)
            tokens, tags, index = [], [], index + 1
    if counts["opened_by_I"]:
        log.info("%s: %d spans begin without B-, as in IOB1: read as new spans", path, counts["opened_by_I"])


def _row(where: str, line: str) -> tuple[str, str]:
    cells = _cells(line)
    if len(cells) < 2 or not cells[0]:
        raise SamError(f"{where}: needs a token in the first column and a tag in the last")
    if not TAG.fullmatch(cells[-1]):
        raise SamError(f"{where}: tag '{cells[-1]}' is neither O nor B-TYPE or I-TYPE (nor E-, L-, S-, U-)")
    return cells[0], cells[-1]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def _refuse_repeated_ids(path: Path, sentences: list[Sentence]) -> None:
    twice = next((i for i, n in Counter(s.id for s in sentences).items() if n > 1), None)
    if twice is not None:
        raise SamError(f"{path}: id '{twice}' belongs to more than one sentence; ids must differ")
