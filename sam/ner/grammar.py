"""The language of the completions of one prompt, as an EBNF grammar that every generator can be held to.

A sentence of the language is what :func:`sam.ner.prompts.answer` writes: one JSON object from texts to requested types,
each text a span of the sentence that cuts no word and starts after the end of the one before it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from sam.generation.api import Request
from sam.ner import prompts
from sam.ner.prompts import normalised

EMPTY = 'root ::= " {}"'


def request(types: Sequence[str], text: str, constrained: bool) -> Request:
    """What a model is asked about ``text``; ``constrained``: with the grammar of its completions."""
    return Request(prompts.prefix(types), prompts.suffix(text), ebnf(types, text) if constrained else None)


def ebnf(types: Sequence[str], text: str) -> str:
    """The grammar, in xgrammar's dialect, of the completions for ``types`` of the sentence ``text`` (raw).

    Of piece *i* of the sentence there are three rules: ``from_i``, a text that starts at *i* or later; ``at_i``, the
    rest of a text from *i* on; ``end_i``, what follows a text that ends with *i*. Linear in the sentence's length.
    """
    parts = pieces(normalised(text))
    if not parts or not types:
        return EMPTY
    names = " | ".join(_literal(json.dumps(f" {name}", ensure_ascii=False)) for name in dict.fromkeys(types))
    rules = ['root ::= " {" ("}" | "\\" " from_0)', f"type ::= {names}"]
    for i, (_, piece) in enumerate(parts):
        word = _literal(json.dumps(piece, ensure_ascii=False)[1:-1])
        if i + 1 == len(parts):
            rules += [f"from_{i} ::= at_{i}", f"at_{i} ::= {word} end_{i}", f'end_{i} ::= "\\":" type "}}"']
            continue
        space = '" " ' if parts[i + 1][0] else ""
        rules.append(f"from_{i} ::= at_{i} | from_{i + 1}")
        rules.append(f"at_{i} ::= {word} ({space}at_{i + 1} | end_{i})")
        rules.append(f'end_{i} ::= "\\":" type ("}}" | ",\\" " from_{i + 1})')
    return "\n".join(rules)


def pieces(text: str) -> list[tuple[bool, str]]:
    """The shortest pieces of ``text`` at whose edges a mention can start and end: (is a space before it, piece).

    Between two letters or digits there is no edge, nor between a letter and its accent. Letters without case (category
    Lo) are the exception: Chinese and Thai do not write where a word ends.
    """
    cut: list[tuple[bool, str]] = []
    before = ""
    for character in text:
        if character != " ":
            if before not in ("", " ") and _joined(before, character):
                cut[-1] = (cut[-1][0], cut[-1][1] + character)
            else:
                cut.append((before == " ", character))
        before = character
    return cut


def _literal(text: str) -> str:
    """EBNF for ``text``. Characters beyond ASCII are classes of one: OpenVINO GenAI 2026.4 prints those of a literal as
    escapes and reads a hexadecimal digit after one as part of it."""
    runs = re.findall(r"[ -~]+|[^ -~]", text)
    return " ".join(json.dumps(run) if " " <= run[0] <= "~" else f"[{run}]" for run in runs)


def _joined(left: str, right: str) -> bool:
    return unicodedata.category(right).startswith("M") or (_in_word(left) and _in_word(right))


def _in_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LNM" and category != "Lo"
