"""Prompt and answer: what a model is asked, and what is read out of what it writes.

A prompt is a ``prefix`` that names the entity types and a ``suffix`` that holds one sentence. A decoder tokenises
the two apart and runs the prefix once for all sentences of a target. The answer is one JSON object from text to entity
type. Reading is lenient and linear in the answer's length: a cut or broken answer keeps what is whole in it, and
nothing that a model writes raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sam.ner import Mention, Pair, Prediction, Sentence

PROMPT_VERSION = "1"
"""Goes into the key under which answers are kept: raise it with every change to what a model is shown."""


@dataclass(frozen=True)
class Parsed:
    """What could be read out of an answer.

    ``pairs`` are distinct and in order, whitespace folded. ``unparsable``: no JSON object was there, nor a piece of
    one that has a key.
    """

    pairs: tuple[Pair, ...]
    unparsable: bool = False


def fold(text: str) -> str:
    """``text`` with every run of whitespace as one space, and none at its ends."""
    return " ".join(text.split())


def prefix(types: Sequence[str]) -> str:
    """The part of the prompt that all sentences of a target share."""
    return "Entity types: " + ", ".join(types) + "\nText:"


def suffix(text: str) -> str:
    """The part of the prompt that holds one sentence.

    Whitespace is folded: where lines happen to break must not change an answer, and a newline ends the text in this
    prompt. Answers therefore hold folded texts, and ``align`` finds them in the raw text all the same.
    """
    return f" {fold(text)}\nEntities:"


def render(types: Sequence[str], text: str) -> str:
    """The whole prompt for one sentence: ``prefix`` and ``suffix``."""
    return prefix(types) + suffix(text)


def answer(sentence: Sentence, types: Sequence[str]) -> str:
    """The gold answer that an expert learns to write: ``' {" Ada":" person"," Alan":" person"}'``.

    Distinct pairs in order of appearance, whitespace folded, mentions of other types left out; ``' {}'`` without
    mentions. With a space before it, a word is mostly of the same tokens as in the sentence.
    """
    asked = set(types)
    pairs = dict.fromkeys((kind, fold(text)) for kind, text in sentence.pairs if kind in asked and fold(text))
    # A text of two types is a key twice: written by hand, as a mapping has each key once.
    return " {" + ",".join(f"{_quote(' ' + text)}:{_quote(' ' + kind)}" for kind, text in pairs) + "}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_Item = tuple[str, str]
"""(key, string under it)."""


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, told from a list by its class: a key that a model repeats keeps all its values."""


# Newlines inside strings are let through (strict=False): they are folded afterwards.
_DECODER = json.JSONDecoder(object_pairs_hook=_Object, strict=False)
_OPENING = re.compile(r'\{\s*["}]')  # a brace in chatter is not followed by a quote
# Possessive, so an unfinished string fails at once; the lone quote in the end is such a string's start.
_TOKEN = re.compile(r'(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[{}\[\]:,]|(?P<junk>[^"{}\[\]:,\s]+)|"', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(answer: str, types: Collection[str] = ()) -> Parsed:
    """Read the (type, text) pairs out of a model's raw ``answer``; never raises.

    The first JSON object counts; chatter and code fences before it and text after it are passed over. A key is a text
    and the string under it its type, unless exactly one of the two is in ``types``: then that is the type. Of a broken
    or cut object, all whole pairs are kept. What is no string (numbers, lists, objects), or an empty one, is passed
    over.
    """
    opening = _OPENING.search(answer)
    if opening is None:
        return Parsed((), unparsable=True)
    try:
        found = _DECODER.raw_decode(answer, opening.start())[0]
        items, unparsable = [(key, value) for key, value in found if isinstance(value, str)], False
    except (ValueError, RecursionError):
        items, keys = _recover(answer, opening.start() + 1)
        unparsable = not keys
    return Parsed(_clean(items, {fold(entity_type).casefold() for entity_type in types}), unparsable)


def _recover(answer: str, start: int) -> tuple[list[_Item], int]:
    """What a broken object holds from ``start``, just after its brace, on: (pairs, keys read).

    One pass without recursion. A string that a colon follows is a key, and the next string its value unless a comma,
    or a nested list or object, comes first.
    """
    items: list[_Item] = []
    key: str | None = None
    pending: str | None = None  # a string whose follower has not been seen yet
    nested = keys = 0
    for token in _TOKEN.finditer(answer, start):
        mark = token.group()
        if mark == '"':  # nothing whole can follow it, and to look would take quadratic time
            break
        if nested:
            nested += (mark in "{[") - (mark in "}]")
            continue
        if mark == ":" and pending is not None:
            key, pending, keys = pending, None, keys + 1
            continue
        if pending is not None and key is not None:
            items.append((key, pending))
            key = None
        pending = None
        if token["string"]:
            pending = _unquote(mark)
        elif mark in "{[":
            nested, key = 1, None
        elif mark == ",":
            key = None
        elif mark == "}":
            break
    if pending is not None and key is not None:
        items.append((key, pending))
    return items, keys


def _unquote(token: str) -> str:
    """The text of a quoted string; with an escape that JSON does not know, its backslashes stand for themselves."""
    try:
        return _DECODER.decode(token)
    except ValueError:
        return token[1:-1].replace('\\"', '"')


def _clean(items: Iterable[_Item], asked: Collection[str]) -> tuple[Pair, ...]:
    """The distinct pairs, folded, without those that have no type, no text, or half a character (a lone surrogate).

    ``asked``: the types asked for, folded and without case.
    """
    pairs: dict[Pair, None] = {}
    for left, right in items:
        key, value = fold(left), fold(right)
        pair = (key, value) if key.casefold() in asked and value.casefold() not in asked else (value, key)
        # A lone surrogate can be escaped in JSON but not be written to a UTF-8 file.
        if key and value and not _SURROGATE.search(key + value):
            pairs[pair] = None
    return tuple(pairs)


def align(text: str, pairs: Iterable[Pair]) -> tuple[Mention, ...]:
    """The spans of the pairs in ``text`` (raw, offsets in characters), sorted by start; never overlapping.

    Every occurrence of a pair's text counts, case-sensitive, a space standing for any run of whitespace. Where a text
    occurs as whole words, only those occurrences count, else all (as within Chinese, or ``cat`` in ``category``).
    Longest text first; what overlaps a span already placed is dropped; a text under two types goes to the first.
    """
    folded, offsets = _fold_with_offsets(text)
    taken = bytearray(len(folded))
    mentions: list[Mention] = []
    clean = [(entity_type, fold(surface)) for entity_type, surface in pairs]
    for entity_type, surface in sorted(clean, key=lambda pair: -len(pair[1])):
        for start in _occurrences(folded, surface):
            end = start + len(surface)
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * len(surface)
                mentions.append(Mention(offsets[start], offsets[end - 1] + 1, entity_type))
    return tuple(sorted(mentions))


def _fold_with_offsets(text: str) -> tuple[str, Sequence[int]]:
    """The folded text, and for each of its characters the offset in ``text``."""
    folded = fold(text)
    if folded == text:
        return folded, range(len(text))
    offsets: list[int] = []
    for word in re.finditer(r"\S+", text):
        if offsets:
            offsets.append(word.start() - 1)
        offsets.extend(range(*word.span()))
    return folded, offsets


def _occurrences(text: str, surface: str) -> list[int]:
    """Where ``surface`` starts in ``text``: as whole words if it does so anywhere, else at any place."""
    starts = list(_find_all(text, surface))
    whole = [start for start in starts if _is_whole(text, start, start + len(surface))]
    return whole or starts


def _find_all(text: str, surface: str) -> Iterator[int]:
    start = text.find(surface) if surface else -1
    while start >= 0:
        yield start
        start = text.find(surface, start + 1)


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether neither edge of the span lies between two alphanumeric characters."""
    cuts_left = start > 0 and text[start].isalnum() and text[start - 1].isalnum()
    cuts_right = end < len(text) and text[end - 1].isalnum() and text[end].isalnum()
    return not cuts_left and not cuts_right


def locate(pairs: Sequence[Pair], text: str, types: Collection[str]) -> tuple[tuple[Mention, ...], int, int]:
    """The spans of the pairs whose type is in ``types``, and how many pairs are not in the sentence, and not asked for.

    The two counts are apart: a pair can be in both.
    """
    folded = fold(text)
    found = [pair for pair in pairs if fold(pair[1]) in folded]
    mentions = align(text, [pair for pair in found if pair[0] in types])
    return mentions, len(pairs) - len(found), sum(entity_type not in types for entity_type, _ in pairs)


def predict(text: str, answer: str, types: Sequence[str], truncated: bool = False) -> Prediction:
    """Read a model's raw ``answer`` on the sentence ``text``, asked for ``types``.

    A type that equals one asked for but for case and whitespace becomes that; another is kept as answered and counted
    in ``not_asked``. ``truncated``: the decoder stopped at its limit of tokens, not at the answer's end.
    """
    asked: dict[str, str] = {}
    for entity_type in types:
        asked.setdefault(fold(entity_type).casefold(), entity_type)
    parsed = parse(answer, types)
    canonical = ((asked.get(entity_type.casefold(), entity_type), surface) for entity_type, surface in parsed.pairs)
    pairs = tuple(dict.fromkeys(canonical))
    mentions, not_in_sentence, not_asked = locate(pairs, text, types)
    return Prediction(pairs, mentions, answer, parsed.unparsable, truncated, not_in_sentence, not_asked)
