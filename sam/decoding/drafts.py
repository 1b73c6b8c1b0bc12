"""Guessing an answer's next tokens, so that the model verifies several in one pass (speculative decoding without a
draft model). A wrong guess costs time and changes no answer (in fp32 on a CPU; elsewhere rounding depends on what else
is in a pass, as it does on the batch).

Guesses come from the sentence, which answers copy from (prompt lookup); from an earlier answer to the same prompt, as
a sibling model's is much alike; and from what followed the same tokens in other answers: syntax and names of types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST = 12
ORDERS = (4, 3, 2, 1)  # how many tokens a look-up in the prompt or the earlier answer matches, the longest first
CONTEXTS = (4, 2)  # the same for what followed in other answers

MOST = 200_000  # contexts remembered, some 100 MB; then all are forgotten

Source = tuple[int, bool]
"""Where a guess came from: (tokens matched, whether there was an earlier answer); (0, False): other answers."""


class Memory:
    """The tokens of one prompt and its answer so far, and what followed what in them and in an earlier answer."""

    def __init__(self, suffix: Sequence[int], earlier: Sequence[int] = ()) -> None:
        self.has_earlier = bool(earlier)
        self.after: dict[tuple[int, ...], int] = {}
        self.context: list[int] = []
        for token in (*suffix, *earlier):
            self.append(token)
        # The answer goes on after the prompt.
        self.context = list(suffix)
        self.sources: list[Source] = []

    def append(self, token: int) -> None:
        """Take ``token`` as the next one."""
        for order in ORDERS:
            if len(self.context) >= order:
                self.after[tuple(self.context[-order:])] = token
        self.context.append(token)


@dataclass(slots=True)
class _Followers:
    """How often each token followed a context, and the most frequent one."""

    counts: dict[int, int] = field(default_factory=dict)
    total: int = 0
    best: int = -1

    def add(self, token: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1
        self.total += 1
        if self.counts[token] >= self.counts.get(self.best, 0):
            self.best = token


class Drafter:
    """Guesses, and how often each kind of guess has been right. One drafter may serve many models in turn."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], _Followers] = {}
        # (right, tried), from a start of "right half the time".
        self._rates: dict[Source, list[float]] = {
            (order, earlier): [2.0, 4.0] for order in ORDERS for earlier in (False, True)
        }

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
            context = [*context, token][-ORDERS[0] :]
        return draft

    def learn(self, memory: Memory, right: int, new: Sequence[int]) -> None:
        """``right`` tokens of the last guess were, and the answer went on with ``new``."""
        for place, source in enumerate(memory.sources[: right + 1]):
            if source[0]:
                rate = self._rates[source]
                rate[0] += place < right
                rate[1] += 1
        if len(self._followers) > MOST:
            self._followers.clear()
        for token in new:
            for order in CONTEXTS:
                if len(memory.context) >= order:
                    self._followers.setdefault(tuple(memory.context[-order:]), _Followers()).add(token)
            memory.append(token)

    def _next(self, memory: Memory, context: tuple[int, ...]) -> tuple[int, float, Source]:
        """The likeliest next token, its chance, and where it is from."""
        token, rate, source = -1, 0.0, (0, False)
        for order in ORDERS:
            found = memory.after.get(context[-order:]) if len(context) >= order else None
            if found is not None:
                source = (order, memory.has_earlier)
                right, tried = self._rates[source]
                token, rate = found, right / tried
                break
        for order in CONTEXTS:
            followers = self._followers.get(context[-order:]) if len(context) >= order else None
            if followers is not None:
                often = followers.counts[followers.best] / (followers.total + 1)
                if often > rate:
                    token, rate, source = followers.best, often, (0, False)
                break
        return token, rate, source
