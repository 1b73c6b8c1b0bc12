"""The language of the answers to one prompt, as an automaton over UTF-8 bytes that decoding can be held to.

A word of it is what :func:`sam.prompts.answer` can write of a sentence, in either form: one JSON object from types
asked for, each at most once, to at least one text each; or from texts to types asked for, each text at a place after
that of the one before it (two mentions that begin together are not in the language, and a pair can come again where
its text does). Each text is a piece of the sentence that cuts no word. Bytes, as a token may hold a part of a
character.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from sam.prompts import fold

GRAMMAR_VERSION = 2
"""Goes into the key under which constrained answers are kept: raise it with every change to the language."""

State = tuple[int, str, int, int]
"""(spent, where in the syntax, place in its literal, what is still possible): sets of types, and of places in the
sentence, are bit masks. ``where`` is one of the names below. ``spent`` are the types used, or, from a text to its type,
the places at which a next text can start."""

_BEGIN, _FIRST, _KEY, _TEXT = "begin", "first", "key", "text"
_MORE, _SPACE, _NEXT, _END = "after a text", "before a text", "after a list", "end"
_MENTION, _TYPE, _PAIR = "text that is a key", "type of a text", "after a pair"
_OPEN = " {"


class Answers:
    """The automaton of the answers to one prompt: deterministic, and every state leads to a whole answer."""

    start: State = (0, _BEGIN, 0, 0)

    def __init__(self, types: Sequence[str], text: str) -> None:
        """``types`` asked of the sentence ``text`` (raw)."""
        folded = fold(text)
        pieces = [json.dumps(character, ensure_ascii=False)[1:-1].encode() for character in folded]
        self._keys, self._values = _literals(tuple(types))
        self._places = _places(b"".join(pieces))
        self._starts = self._ends = place = 0
        for i, character in enumerate(folded):
            if character != " " and not (i and _joined(folded[i - 1], character)):
                self._starts |= 1 << place
            place += len(pieces[i])
            if character != " " and not (i + 1 < len(folded) and _joined(character, folded[i + 1])):
                self._ends |= 1 << place

    def step(self, state: State, byte: int) -> State | None:
        """The state after ``byte``; None if no answer goes on so."""
        used, where, place, possible = state
        if where == _TEXT:
            # ``possible`` are the places of the sentence at which what was read of the text can end: shift-and.
            if byte == ord('"') and place and possible & self._ends:
                return used, _MORE, 0, 0
            possible = (possible & self._places.get(byte, 0)) << 1
            return (used, _TEXT, 1, possible) if possible else None
        if where == _KEY:
            return self._key(used, place, possible, byte)
        if where == _MENTION:
            return self._mention(used, place, possible, byte)
        if where == _TYPE:
            possible, whole = _follow(self._values, place, possible, byte)
            if whole:
                return used, _PAIR, 0, 0
            return (used, _TYPE, place + 1, possible) if possible else None
        return self._syntax(used, where, place, chr(byte))

    def final(self, state: State) -> bool:
        """Whether an answer can end here; none goes on from here."""
        return state[1] == _END

    def _key(self, used: int, place: int, possible: int, byte: int) -> State | None:
        """Within a key and the syntax up to its first text; ``possible`` are the types that it can be."""
        if place == 1 and not used and byte == ord(" "):  # with the first key the form is chosen
            return self._starts, _MENTION, 0, self._starts
        possible, whole = _follow(self._keys, place, possible, byte)
        if whole:
            return used | possible, _TEXT, 0, self._starts
        return (used, _KEY, place + 1, possible) if possible else None

    def _mention(self, starts: int, length: int, possible: int, byte: int) -> State | None:
        """Within a text that is a key, of which ``length`` bytes were read; it started at one of ``starts``."""
        ends = possible & self._ends if length else 0
        if byte == ord('"') and ends:
            first = (ends & -ends).bit_length() - 1 - length  # of its occurrences the one that leaves most room
            return starts >> first + 1 << first + 1, _TYPE, 0, (1 << len(self._values)) - 1
        possible = (possible & self._places.get(byte, 0)) << 1
        return (starts, _MENTION, length + 1, possible) if possible else None

    def _syntax(self, used: int, where: str, place: int, character: str) -> State | None:
        """Between texts and keys."""
        left = (1 << len(self._keys)) - 1 & ~used if self._starts else 0
        if where == _BEGIN and character == _OPEN[place]:
            return (used, _BEGIN, 1, 0) if place == 0 else (used, _FIRST, 0, 0)
        if where == _FIRST and character == "}":
            return used, _END, 0, 0
        if where == _FIRST and left:
            return self._key(used, 0, left, ord(character))
        if where == _MORE and character in ",]":
            return (used, _SPACE, 0, 0) if character == "," else (used, _NEXT, 0, 0)
        if where == _SPACE and character == (" ", '"')[place]:
            return (used, _SPACE, 1, 0) if place == 0 else (used, _TEXT, 0, self._starts)
        if where == _NEXT and place == 0 and character in "},":
            if character == "}":
                return used, _END, 0, 0
            return (used, _NEXT, 1, 0) if left else None
        if where == _NEXT and place == 1 and character == " ":
            return used, _KEY, 0, left
        if where == _PAIR and place == 0 and character == "}":
            return used, _END, 0, 0
        if where == _PAIR and used and character == '," '[place]:
            return (used, _PAIR, place + 1, 0) if place < 2 else (used, _MENTION, 0, used)
        return None


def automata(asked: Iterable[tuple[Sequence[str], str]]) -> list[Answers]:
    """The automaton of each (types, text)."""
    return [Answers(types, text) for types, text in asked]


@lru_cache(maxsize=64)
def _literals(types: tuple[str, ...]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Each type as a key with the syntax up to its first text, and as the value of a text with what comes before it."""
    names = [json.dumps(name, ensure_ascii=False)[1:] for name in dict.fromkeys(types)]
    return tuple(f'"{name}: ["'.encode() for name in names), tuple(f':" {name}'.encode() for name in names)


def _follow(literals: Sequence[bytes], place: int, possible: int, byte: int) -> tuple[int, bool]:
    """Which of the ``possible`` literals go on with ``byte`` at ``place``, and whether it ends one: none is the
    beginning of another, as their quotes close them."""
    found, whole = 0, False
    for i, text in enumerate(literals):
        if possible >> i & 1 and text[place] == byte:
            found |= 1 << i
            whole = whole or place + 1 == len(text)
    return found, whole


def _places(text: bytes) -> dict[int, int]:
    """For each byte the mask of the places where it stands in ``text``."""
    found: dict[int, int] = {}
    for place, byte in enumerate(text):
        found[byte] = found.get(byte, 0) | 1 << place
    return found


def _joined(left: str, right: str) -> bool:
    """Whether an edge between the two would cut a word: an accent off its letter, or a letter or digit off another.

    Letters without case (category Lo) are the exception: Chinese and Thai do not write where a word ends.
    """
    return _is_mark(right) or (_in_word(left) and _in_word(right))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _in_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LNM" and category != "Lo"
