"""The prompt, and the completion that an expert learns to write.

A prompt is a ``prefix`` that names the entity types and a ``suffix`` that holds one sentence. A generator tokenises
the two apart and computes the prefix once for all sentences of a target. A completion is one JSON object from text to
entity type.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from sam.types import Sentence

PROMPT_VERSION = "1"
"""Part of every completion's key: raise it with every change to what a model is shown."""


def normalised(text: str) -> str:
    """``text`` with every run of whitespace as one space, and none at its ends."""
    return " ".join(text.split())


def prefix(types: Sequence[str]) -> str:
    """The part of the prompt that all sentences of a target share."""
    return "Entity types: " + ", ".join(types) + "\nText:"


def suffix(text: str) -> str:
    """The part of the prompt that holds one sentence.

    Whitespace is normalised: where lines happen to break must not change a completion, and a newline ends the text
    in this prompt. Completions therefore hold normalised texts; ``align`` finds them in the raw text all the same.
    """
    return f" {normalised(text)}\nEntities:"


def answer(sentence: Sentence, types: Sequence[str]) -> str:
    """The gold completion that an expert learns to write: ``' {" Ada":" person"," Alan":" person"}'``.

    Distinct pairs in order of appearance, whitespace normalised, mentions of other types left out; ``' {}'`` without
    mentions. With a space before it, a word is mostly of the same tokens as in the sentence.
    """
    asked = set(types)
    pairs = dict.fromkeys(
        (kind, normalised(text)) for kind, text in sentence.pairs if kind in asked and normalised(text)
    )
    # A text of two types is a key twice: written by hand, as a mapping has each key once.
    return " {" + ",".join(f"{_quote(' ' + text)}:{_quote(' ' + kind)}" for kind, text in pairs) + "}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
