"""What is read out of a completion.

Reading is lenient and linear in the length: a cut or broken completion keeps what is whole in it, and nothing that a
model writes raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sam.ner.alignment import locate
from sam.ner.prompts import normalised
from sam.types import Pair, Prediction


@dataclass(frozen=True)
class Parsed:
    """What could be read out of a completion.

    ``pairs`` are distinct and in order, whitespace normalised. ``unparsable``: no JSON object was there, nor a piece of
    one that has a key.
    """

    pairs: tuple[Pair, ...]
    unparsable: bool = False


def predict(text: str, completion: str, types: Sequence[str], truncated: bool = False) -> Prediction:
    """The prediction that a model's raw ``completion`` holds, asked for ``types`` of the sentence ``text``.

    A type that equals one asked for but for case and whitespace becomes that; another is kept as written and counted
    in ``not_asked``. ``truncated``: the completion reached the limit of tokens.
    """
    asked: dict[str, str] = {}
    for entity_type in types:
        asked.setdefault(normalised(entity_type).casefold(), entity_type)
    parsed = parse(completion, types)
    canonical = ((asked.get(entity_type.casefold(), entity_type), surface) for entity_type, surface in parsed.pairs)
    pairs = tuple(dict.fromkeys(canonical))
    mentions, not_in_sentence, not_asked = locate(pairs, text, types)
    return Prediction(pairs, mentions, completion, parsed.unparsable, truncated, not_in_sentence, not_asked)


_Item = tuple[str, str]
"""(key, string under it)."""


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key that a model repeats keeps all its values; a class apart from lists."""


# Newlines inside strings are let through (strict=False): they are normalised afterwards.
_DECODER = json.JSONDecoder(object_pairs_hook=_Object, strict=False)
_OPENING = re.compile(r'\{\s*["}]')  # a brace in chatter is not followed by a quote
# Possessive, so an unfinished string fails at once; the lone quote in the end is such a string's start.
_TOKEN = re.compile(r'(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[{}\[\]:,]|(?P<junk>[^"{}\[\]:,\s]+)|"', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(completion: str, types: Collection[str] = ()) -> Parsed:
    """Read the (type, text) pairs out of a model's raw ``completion``; never raises.

    The first JSON object counts; chatter and code fences before it and text after it are passed over. A key is a text
    and the string under it its type, unless exactly one of the two is in ``types``: then that is the type. Of a broken
    or cut object, all whole pairs are kept. What is no string (numbers, lists, objects), or an empty one, is passed
    over.
    """
    opening = _OPENING.search(completion)
    if opening is None:
        return Parsed((), unparsable=True)
    try:
        read = _DECODER.raw_decode(completion, opening.start())[0]
        items, unparsable = [(key, value) for key, value in read if isinstance(value, str)], False
    except (ValueError, RecursionError):
        items, keys = _recover(completion, opening.start() + 1)
        unparsable = not keys
    return Parsed(_clean(items, {normalised(entity_type).casefold() for entity_type in types}), unparsable)


def _recover(completion: str, start: int) -> tuple[list[_Item], int]:
    """What a broken object holds from ``start``, just after its brace, on: (pairs, keys read).

    One pass without recursion. A string that a colon follows is a key, and the next string its value unless a comma,
    or a nested list or object, comes first.
    """
    items: list[_Item] = []
    key: str | None = None
    pending: str | None = None  # a string whose follower has not been seen yet
    nested = keys = 0
    for token in _TOKEN.finditer(completion, start):
        mark = token.group()
        if mark == '"':  # nothing whole can follow it, and a search would take quadratic time
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
    """The text of a quoted string; with an escape that JSON does not know, its backslashes are kept."""
    try:
        return _DECODER.decode(token)
    except ValueError:
        return token[1:-1].replace('\\"', '"')


def _clean(items: Iterable[_Item], asked: Collection[str]) -> tuple[Pair, ...]:
    """The distinct pairs, normalised, without those that have no type, no text, or half a character (a lone surrogate).

    ``asked``: the types asked for, normalised and without case.
    """
    pairs: dict[Pair, None] = {}
    for left, right in items:
        key, value = normalised(left), normalised(right)
        pair = (key, value) if key.casefold() in asked and value.casefold() not in asked else (value, key)
        # A lone surrogate can be escaped in JSON but not be written to a UTF-8 file.
        if key and value and not _SURROGATE.search(key + value):
            pairs[pair] = None
    return tuple(pairs)
