"""Guessing an answer's next tokens, so that the model verifies several in one pass (speculative decoding without a
draft model). A wrong guess costs time and changes no answer (in fp32 on a CPU; elsewhere rounding depends on what else
is in a pass, as it does on the batch).

Guesses come from the sentence, which answers copy from (prompt lookup); from an earlier answer to the same prompt, as
a sibling model's is much alike; and from what followed the same tokens in other answers: syntax and names of types.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST = 12
ORDERS = (4, 3, 2, 1)  # how many tokens a look-up in the prompt or the earlier answer matches, the longest first
CONTEXTS = (4, 2, 1)  # the same for what followed in other answers

COPIED = 32  # characters from a word's first on that are kept as they are written without a space before them
MOST = 200_000  # contexts remembered, some 100 MB; then all are forgotten

PROMPT, EARLIER, ANSWER = range(3)

Kind = tuple[bool, bool, bool]
"""Of a token, as the tokenizer spells it: whether a space comes first, and whether what follows is alphanumeric, and a
capital."""

Source = tuple[int, int, Kind] | None
"""Where a guess came from: (tokens matched, PROMPT, EARLIER or ANSWER, the guess's kind); None: other answers. That a
word goes on is surer than that a name goes on with a further word."""


class Language:
    """What drafts have to know of a model's tokens; ``stops`` end an answer."""

    def __init__(self, tokenizer: Any, stops: Collection[int]) -> None:
        self.stops = frozenset(stops)
        self._tokenizer = tokenizer
        self._kinds: dict[int, Kind] = {}

    def kind(self, token: int) -> Kind:
        """The token's kind."""
        if token not in self._kinds:
            text = str(self._tokenizer.convert_ids_to_tokens(token) or "")
            spaced = text[:1] in ("Ġ", "▁")  # how byte-level BPE and SentencePiece write a space
            first = text[spaced : spaced + 1]
            self._kinds[token] = (spaced, first.isalnum(), first.isupper())
        return self._kinds[token]

    def unspaced(self, text: str) -> list[list[int]]:
        """The tokens from each word of ``text`` on, as most tokenizers write them after a quote."""
        starts = [match.start() for match in re.finditer(r"(?<=\s)\S", text)]
        if not starts:
            return []
        copies = self._tokenizer([text[start : start + COPIED] for start in starts], add_special_tokens=False).input_ids
        return [list(ids[:-1]) for ids in copies]  # the last token may be cut


class Memory:
    """The tokens of one prompt and its answer so far, and what followed what in them and in an earlier answer."""

    def __init__(self, language: Language, text: str, suffix: Sequence[int], earlier: Sequence[int] = ()) -> None:
        """``suffix``: the tokens of ``text``, which ends the prompt."""
        self.language = language
        self.after: dict[tuple[int, ...], tuple[int, int]] = {}
        """What came last after a context, and of which origin it was."""
        self.context: list[int] = []
        for copy in language.unspaced(text):
            self.context = []
            self._extend(copy, PROMPT)
        self.context = []
        self._extend(suffix, PROMPT)
        self._extend(earlier, EARLIER)
        # The answer goes on after the prompt.
        self.context = list(suffix)
        self.sources: list[Source] = []

    def _extend(self, tokens: Sequence[int], origin: int) -> None:
        for token in tokens:
            self.append(token, origin)

    def append(self, token: int, origin: int = ANSWER) -> None:
        """Take ``token`` as the next one."""
        for order in ORDERS:
            if len(self.context) >= order:
                self.after[tuple(self.context[-order:])] = (token, origin)
        self.context.append(token)


@dataclass(slots=True)
class _Followers:
    """How often each token followed a context, and the most frequent one."""

    counts: dict[int, int] = field(default_factory=dict)
    total: int = 0
    best: int = -1

    def add(self, token: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.counts[token] >= self.counts.get(self.best, 0):
            self.best = token
        self.total += 1  # last: another thread may be looking


class Drafter:
    """Guesses, and how often each kind of guess has been right. One drafter may serve many models in turn, all of one
    tokenizer, and several threads at once (which may lose a count, as only guesses hang on)."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], _Followers] = {}
        self._rates: dict[Source, list[float]] = {}  # [right, tried]

    def guess(self, memory: Memory, room: int, least: float) -> list[int]:
        """At most ``room`` next tokens, as long as all of them together are right with a chance of ``least``."""
        draft: list[int] = []
        memory.sources = []
        context = memory.context[-ORDERS[0] :]
        chance = 1.0
        while len(draft) < min(room, LONGEST):
            token, rate, source = self._next(memory, tuple(context))
            chance *= rate
            if chance < least:
                break
            draft.append(token)
            memory.sources.append(source)
            if token in memory.language.stops:
                break
            context = [*context, token][-ORDERS[0] :]
        return draft

    def learn(self, memory: Memory, right: int, new: Sequence[int]) -> None:
        """``right`` tokens of the last guess were, and the answer went on with ``new``."""
        for place, source in enumerate(memory.sources[: right + 1]):
            if source:
                rate = self._rate(source)
                rate[0] += place < right
                rate[1] += 1
        if len(self._followers) > MOST:
            self._followers.clear()
        for token in new:
            for order in CONTEXTS:
                if len(memory.context) >= order:
                    self._followers.setdefault(tuple(memory.context[-order:]), _Followers()).add(token)
            memory.append(token)

    def _rate(self, source: Source) -> list[float]:
        """[right, tried] of a source, from a start of "right half the time"."""
        return self._rates.setdefault(source, [2.0, 4.0])

    def _next(self, memory: Memory, context: tuple[int, ...]) -> tuple[int, float, Source]:
        """The likeliest next token, its chance, and where it is from."""
        token, rate, source = -1, 0.0, None
        for order in ORDERS:
            found = memory.after.get(context[-order:]) if len(context) >= order else None
            if found is not None:
                token, origin = found
                source = (order, origin, memory.language.kind(token))
                right, tried = self._rate(source)
                rate = right / tried
                break
        for order in CONTEXTS:
            followers = self._followers.get(context[-order:]) if len(context) >= order else None
            if followers is not None and followers.total:
                often = followers.counts[followers.best] / (followers.total + 1)
                if often > rate:
                    token, rate, source = followers.best, often, None
        return token, rate, source
