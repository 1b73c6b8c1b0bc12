"""Ordinary spacing where a corpus kept only tokens: ``C + + ( a language ) .`` becomes ``C++ (a language).``

Only spaces are taken away, so that mentions keep their characters and move with them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import replace

from sam.types import Mention, Sentence

_SPACE = re.compile(
    r""" (?=[.,!?%)\]}…’”](?: |$)|[;:](?: \w|$)|'(?:s|re|ve|ll|d|m|S)\b|n't\b|\+ ?\+)"""  # before what closes
    r"""|(?<=[(\[{$£€“‘]) |(?<=\+) (?=\+)|(?<=\d \.) (?=\d)"""  # after what opens
)
_QUOTE = re.compile(r'(?<!\S)"(?!\S)')


def detokenised(sentence: Sentence) -> Sentence:
    """``sentence`` without the spaces that tokenising put before closing and after opening punctuation.

    Lone straight quotes open and close in turn, where their number is even. Offsets of the mentions follow the text.
    """
    text = sentence.text
    gone = {match.start() for match in _SPACE.finditer(text)}
    quotes = list(_QUOTE.finditer(text))
    for turn, quote in enumerate(quotes if len(quotes) % 2 == 0 else []):
        gone.add(quote.end() if turn % 2 == 0 else quote.start() - 1)
    removed = sorted(position for position in gone if 0 < position < len(text) - 1)
    kept = "".join(c for position, c in enumerate(text) if position not in gone or position in (0, len(text) - 1))
    if sentence.mentions is None:
        return replace(sentence, text=kept)
    moved = tuple(
        Mention(m.start - bisect_left(removed, m.start), m.end - bisect_left(removed, m.end), m.type)
        for m in sentence.mentions
    )
    return replace(sentence, text=kept, mentions=moved)
