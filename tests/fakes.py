"""A generator without a model, for tests of what is done with completions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from sam.data.targets import mini
from sam.generation import Completion, Request
from sam.ner import prompts
from sam.selection import Query
from sam.types import Mention, Sentence

Reply = Callable[[int, Sequence[str], str], str]
"""(a number that the loaded deltas decide, requested types, text) -> completion."""


class FakeGenerator:
    """Completes by a function. ``loads``: the numbers of what was loaded; ``asked``: every request."""

    def __init__(self, reply: Reply, max_new_tokens: int = 8, **key: Any) -> None:
        self.reply, self.settings = reply, {"max_new_tokens": max_new_tokens, **key}
        self.loads: list[int] = []
        self.asked: list[Request] = []
        self.closed = 0

    def key(self) -> dict[str, Any]:
        return {"generator": "fake", **self.settings}

    def load(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        total = 0.0
        for number, (_, delta) in enumerate(deltas):
            total += (number + 1) * float(delta.abs().sum())
            del delta
        self.loads.append(int(total * 100))

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        for i, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            yield i, Completion(self.reply(self.loads[-1], *read(request)), False, (-0.5,), (1,))

    def close(self) -> None:
        self.closed += 1


def read(request: Request) -> tuple[list[str], str]:
    """The types and the text of a prompt."""
    types = request.prefix.removeprefix("Entity types: ").partition("\n")[0].split(", ")
    return types, request.suffix.removesuffix("\nEntities:").strip()


def numbered(number: int, types: Sequence[str], text: str) -> str:
    """A completion that tells everything apart that may change it."""
    return json.dumps({f" {number} {len(types)} {types[0]}": f" {text}"})


def capitals(number: int, types: Sequence[str], text: str) -> str:
    """Most capitalised words, of a type drawn by the model's number."""
    words = [w for w in re.findall(r"\b[A-Z][a-z]+\b", text) if len(w) % 5 != number % 5]
    kind = types[number % len(types)]
    gold = tuple(Mention(text.index(w), text.index(w) + len(w), kind) for w in words)
    return prompts.answer(Sentence("", text, gold), types)


def mixed(number: int, types: Sequence[str], text: str) -> str:
    """Completions of the mini benchmark that are right, half right, wrong, and no JSON, in turn by number and text."""
    gold = {s.text: s for name in ("movie", "music") for s in mini(name).sentences}.get(text, Sentence("", text, ()))
    turn = (number + len(text)) % 4
    if turn < 2:
        return prompts.answer(gold, types if turn == 0 else types[::2])
    wrong = {"not there": types[0], text[:3]: types[0], "x": "wizard"}
    return f" {json.dumps(wrong)}" if turn == 2 else "I do not know"


def mixed_generator(spec: Any, device: str, max_new_tokens: int, **options: Any) -> FakeGenerator:
    """As ``generator._target_``."""
    return FakeGenerator(mixed, max_new_tokens)


def gold_of(query: Query) -> dict[str, list[str]]:
    """A selector that says in its model's name whether it sees gold mentions."""
    return {"gold" if query.target.scored else "blind": list(query.names)}
