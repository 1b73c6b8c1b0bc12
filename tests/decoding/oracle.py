"""What tests of decoding share: the answers that ``generate`` gives to one unpadded sentence, and a count of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from sam import prompts
from sam.base import Base
from sam.decoding.drafts import Drafter, Memory
from sam.decoding.greedy import Answer

TYPES = ["person", "location"]
TEXTS = [
    "Ada Lovelace wrote the first program.",
    "x",
    "Alan Turing worked at Bletchley Park, near Milton Keynes, from 1939 until the end of the war in 1945.",
    "The court in Strasbourg held that Article 8 was violated.",
    "Aspirin",
    "A mutation in BRCA1 raises the risk of breast cancer; aspirin may lower it, but nobody knows by how much. " * 2,
    "In London it rains.",
    "A b c d e f g h i j k l m n o p.",
    "Bletchley",
    "Zürich, 東京 and São Paulo",
]


class Numbers:
    """A tokenizer whose ``decode`` gives the token ids themselves, so that answers compare token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        return self._tokenizer(text, **options)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(token)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def numbers(base: Base, stop_ids: Sequence[int] | None = None, model: Any = None) -> Base:
    """``base`` with its answers as token ids, and other stop tokens or another model if given."""
    return dataclasses.replace(
        base,
        tokenizer=Numbers(base.tokenizer),
        stop_ids=tuple(stop_ids or base.stop_ids),
        model=base.model if model is None else model,
    )


def oracle(base: Base, text: str, limit: int, types: Sequence[str] = TYPES) -> Answer:
    """What ``generate`` gives for the whole prompt of one sentence, in one piece."""
    prompt = base.tokenizer(prompts.prefix(types), add_special_tokens=True).input_ids
    prompt = prompt + base.tokenizer(prompts.suffix(text), add_special_tokens=False).input_ids
    ids = torch.tensor([prompt])
    out = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(base.stop_ids),
        pad_token_id=base.stop_ids[0],
    )
    new = out[0, len(prompt) :].tolist()
    ended = new[-1] in base.stop_ids
    return Answer(base.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True), not ended)


def lengths(answers: Sequence[Answer]) -> list[int]:
    return [len(a.text.split()) for a in answers]


class Silent(Drafter):
    """Guesses nothing."""

    def guess(self, memory: Memory, room: int, least: float) -> list[int]:
        return []


def passes(base: Base) -> AbstractContextManager[list[int]]:
    """The numbers of tokens of each forward pass inside."""

    @contextmanager
    def watch() -> Iterator[list[int]]:
        found: list[int] = []
        hook = base.model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            yield found
        finally:
            hook.remove()

    return watch()
