"""What a run asks of a language model: completions of requests, from a generator (one file per backend)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sam.errors import SamError

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Request:
    """A prompt in two parts, tokenised separately: ``prefix`` is shared by many requests and is computed once.

    ``grammar``: EBNF in xgrammar's dialect; the completion is then a sentence of that language.
    """

    prefix: str
    suffix: str
    grammar: str | None = None


@dataclass(frozen=True)
class Completion:
    """The greedy continuation of a prompt, without its end token.

    ``truncated``: it reached the limit of new tokens. ``logprobs``: of each generated token (the end token too);
    ``ends``: how many characters of ``text`` are written once that token is.
    """

    text: str
    truncated: bool = False
    logprobs: tuple[float, ...] = ()
    ends: tuple[int, ...] = ()


class Generator(Protocol):
    """Greedy decoding with one model at a time: the base model, or the base model plus deltas."""

    def key(self) -> dict[str, Any]:
        """Everything of this generator that can change a completion, other than weights and requests."""
        ...

    def load(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model by the base model plus ``deltas``: (module name, fp32 ΔW of its weight's shape).

        No delta gives the base model. Raises SamError for a delta that does not fit; no model is loaded then.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index of the request, completion) as each is done, in any order."""
        ...

    def close(self) -> None:
        """Free the model; :meth:`load` makes the generator usable again."""
        ...


def check_precision(precision: str) -> None:
    """Raise SamError unless ``precision`` is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise SamError(f"generator.precision={precision} is unknown; allowed: {', '.join(PRECISIONS)}")


def dtype_of(precision: str, own: str) -> str:
    """The torch dtype that ``precision`` means for a base model of dtype ``own``; raises SamError as
    :func:`check_precision`."""
    check_precision(precision)
    return {"auto": own, "fp32": "float32", "bf16": "bfloat16"}[precision]


def encode(tokenizer: Any, requests: Sequence[Request]) -> list[list[int]]:
    """The token ids of each prompt: special tokens only before the prefix."""
    prefixes = {r.prefix: list(tokenizer(r.prefix).input_ids) for r in requests}
    return [prefixes[r.prefix] + list(tokenizer(r.suffix, add_special_tokens=False).input_ids) for r in requests]


def completion(tokenizer: Any, ids: Sequence[int], logprobs: Sequence[float], stop_ids: Sequence[int]) -> Completion:
    """The completion that ``ids`` spell, up to and including the first stop token."""
    end = next((n for n, token in enumerate(ids) if token in stop_ids), None)
    tokens = list(ids[:end])
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [len(tokenizer.decode(tokens[: n + 1], skip_special_tokens=True)) for n in range(len(tokens))]
    ends += [] if end is None else [len(text)]
    return Completion(text, end is None, tuple(round(float(x), 4) for x in logprobs[: len(ends)]), tuple(ends))
