"""Greedy decoding of many prompts at once: rows join and leave a running batch, their shared prefixes are run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam import grammar, prompts
from sam.base import Base
from sam.decoding.constrained import Automaton, Walk, walks
from sam.decoding.drafts import Drafter, Language, Memory
from sam.decoding.ragged import KeyValues, Pass, Row, ragged, rounded
from sam.decoding.spec import DecodeSpec
from sam.errors import SamError

ADMIT = 384
"""Prompt tokens let into one forward pass, at least one prompt's: enough to fill the processor, few enough not to
hold up the rows that are being answered."""


@dataclass(frozen=True)
class Answer:
    """A raw answer; ``truncated`` if it reached ``max_new_tokens`` before it ended."""

    text: str
    truncated: bool


def decode(base: Base, types: Sequence[str], texts: Sequence[str], spec: DecodeSpec) -> list[Answer]:
    """The model's greedy answer for each text, asked for ``types``, in the order of ``texts``.

    An answer does not depend on the other texts (see :mod:`sam.decoding.ragged`; half precision gives no such promise).
    """
    prefix = prompts.prefix(types)
    automata = grammar.automata((types, text) for text in texts) if spec.constrained else None
    return decode_prompts(base, [(prefix, prompts.suffix(text)) for text in texts], spec, automata)


def decode_prompts(
    base: Base, parts: Sequence[tuple[str, str]], spec: DecodeSpec, automata: Sequence[Automaton] | None = None
) -> list[Answer]:
    """As :func:`decode`, for prompts given as (prefix, suffix)."""
    answers = dict(stream(base, parts, spec, automata=automata))
    return [answers[i] for i in range(len(parts))]


def stream(
    base: Base,
    parts: Sequence[tuple[str, str]],
    spec: DecodeSpec,
    drafter: Drafter | None = None,
    earlier: Sequence[str] | None = None,
    automata: Sequence[Automaton] | None = None,
    known: Callable[[int], bool] | None = None,
    backwards: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """(index into ``parts``, answer) as each is done.

    ``known`` is asked right before a prompt's turn whether its answer is no longer wanted; ``backwards`` takes the
    prompts from the other end. So two processes that share their answers meet in the middle.

    ``drafter`` guesses tokens ahead, from ``earlier`` answers to the same prompts too ("" for none), such as a sibling
    model's; no answer depends on them. A model without packed layers works as well (see :mod:`sam.decoding.packed`).
    ``automata``: the language of each prompt's answer, which ``spec.constrained`` needs and nothing else may have.
    """
    if spec.constrained != (automata is not None):
        raise ValueError(f"constrained={spec.constrained} with {'no ' if automata is None else ''}automata")
    if not parts:
        return
    held = None if automata is None else walks(base, automata)
    run = _Run(base, parts, spec, drafter or Drafter(), earlier or [""] * len(parts), held, known, backwards)
    while run.waiting or run.rows:
        # Around each pass only: between two answers the model is the caller's.
        with ragged(base.model), torch.inference_mode():
            run.step()
        yield from run.done()


@dataclass
class _Row:
    """One prompt on its way: ``past`` of its tokens are in the cache, ``made`` is its answer so far."""

    index: int
    prefix: int
    suffix: list[int]
    walk: Walk | None = None
    memory: Memory = field(init=False)  # from when it joins the batch on
    past: int = 0
    made: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    ended: bool = False

    def feed(self) -> list[int]:
        """The tokens that the next pass takes."""
        return [*(self.made[-1:] or self.suffix), *self.draft]


class _Run:
    """The running batch: row n of ``rows`` has row n of the cache."""

    def __init__(
        self,
        base: Base,
        parts: Sequence[tuple[str, str]],
        spec: DecodeSpec,
        drafter: Drafter,
        earlier: Sequence[str],
        held: Sequence[Walk] | None,
        known: Callable[[int], bool] | None,
        backwards: bool,
    ) -> None:
        self.base, self.spec, self.drafter, self.known = base, spec, drafter, known
        self.texts, self.earlier = [text for _, text in parts], earlier
        self.language = Language(base.tokenizer, base.stop_ids)
        turn = -1 if backwards else 1
        heads = {prefix: number for number, prefix in enumerate(list(dict.fromkeys(p for p, _ in parts))[::turn])}
        self.prefixes = [_ids(base, prefix, special=True) for prefix in heads]
        waiting = []
        for index, (prefix, text) in enumerate(parts):
            waiting.append(_Row(index, heads[prefix], _ids(base, text), held[index] if held else None))

        # Prefix by prefix, the longest first: the peak of memory is met early, and neighbours are of a length.
        def order(row: _Row) -> tuple[int, int, int]:
            return row.prefix, -turn * len(row.suffix), turn * row.index

        self.waiting = sorted(waiting, key=order, reverse=True)
        self.rows: list[_Row] = []
        if not all(self.prefixes) or not all(row.suffix for row in waiting):
            raise SamError("a prompt has no tokens; give each a prefix and a suffix that are not empty")
        config = base.model.config.get_text_config()
        self.share = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        slots = max(len(self.prefixes[row.prefix]) + len(row.suffix) for row in waiting) + spec.max_new_tokens
        self.cache = KeyValues(min(spec.batch_size, len(parts)), slots)
        self.shared: dict[int, tuple[KeyValues, int]] = {}  # prefix -> where it was run, once for all rows with it
        self._ended: list[_Row] = []

    def step(self) -> None:
        """One forward pass: the rows under way go on, waiting ones join."""
        old = self.rows
        new = self._admit()
        self.rows = old + new
        if not self.rows:
            return
        least = _worth(len(self.rows), self.base.device)
        for row in self.rows:
            row.draft = self.drafter.guess(row.memory, self.spec.max_new_tokens - len(row.made) - 1, least)
            if row.walk:
                row.draft = row.walk.possible(row.draft)
        # Of a prompt only the last token's successor is asked for; of a draft, every token's.
        keep: list[int] = []
        at = 0
        for row in self.rows:
            at += len(row.feed())
            keep += range(at - len(row.draft) - 1, at)
        rows = [Row(len(row.feed()), row.past) for row in self.rows]
        logits = self._forward(self.cache, rows, [t for row in self.rows for t in row.feed()], keep)
        likeliest = logits.argmax(-1).tolist()
        at = 0
        for row in self.rows:
            asked = slice(at, at + 1 + len(row.draft))
            chosen = likeliest[asked]
            self._advance(row, row.walk.choose(row.draft, chosen, logits[asked]) if row.walk else chosen)
            at = asked.stop
        for place in reversed(range(len(self.rows))):
            if self.rows[place].ended:
                self._leave(place)

    def done(self) -> Iterator[tuple[int, Answer]]:
        """The answers that the last pass ended."""
        for row in self._ended:
            stopped = row.made[-1] in self.language.stops
            made = row.made[:-1] if stopped else row.made
            text = row.walk.text(made) if row.walk else self.base.tokenizer.decode(made, skip_special_tokens=True)
            yield row.index, Answer(text, truncated=not stopped)
        self._ended = []

    def _admit(self) -> list[_Row]:
        """Waiting rows for which there is room, their prefixes in the cache."""
        new: list[_Row] = []
        size = 0
        while self.waiting and len(self.rows) + len(new) < self.cache.rows:
            row = self.waiting[-1]
            if self.known and self.known(row.index):
                self.waiting.pop()
                continue
            size += len(row.suffix)
            if new and size > ADMIT:
                break
            self.waiting.pop()
            row.past = len(self.prefixes[row.prefix])
            row.memory = self._memory(row)
            heads, source = self._prefix(row.prefix)
            self.cache.copy_from(heads, source, len(self.rows) + len(new), row.past)
            new.append(row)
        return new

    def _memory(self, row: _Row) -> Memory:
        """What a row's guesses come from."""
        earlier = self.earlier[row.index]
        known = [*_ids(self.base, earlier), self.base.stop_ids[0]] if earlier else []
        return Memory(self.language, self.texts[row.index], row.suffix, known)

    def _prefix(self, number: int) -> tuple[KeyValues, int]:
        """Keys and values of a prefix, and their row; prefixes whose rows come next are run in the same pass."""
        if number not in self.shared:
            ids = self.prefixes[number : number + 1]
            # As many as a pass takes when all are as long as the longest: rows of the cache are.
            for other in self.prefixes[number + 1 :]:
                if (len(ids) + 1) * max(len(other), *map(len, ids)) > ADMIT:
                    break
                ids.append(other)
            heads = KeyValues(len(ids), max(map(len, ids)))
            self._forward(heads, [Row(len(i), 0) for i in ids], [t for i in ids for t in i], [0])
            self.shared = {number + row: (heads, row) for row in range(len(ids))}
        return self.shared[number]

    def _forward(self, cache: KeyValues, rows: Sequence[Row], ids: Sequence[int], keep: Sequence[int]) -> Tensor:
        """Run ``ids`` through the model; returns the logits [len(keep), vocabulary] after those at ``keep``."""
        device = self.base.device
        now = Pass(cache, rows, self.share, device)
        out = self.base.model(
            input_ids=torch.tensor([[*ids, *[ids[-1]] * now.spare]], device=device),
            position_ids=now.positions,
            use_cache=False,
            logits_to_keep=torch.tensor([*keep, *[keep[-1]] * (rounded(len(keep)) - len(keep))], device=device),
            sam_pass=now,
        )
        return out.logits[0, : len(keep)]

    def _advance(self, row: _Row, chosen: Sequence[int]) -> None:
        """Take what the pass found: the draft as far as it is what greedy decoding would write, and one token more."""
        right = 0
        while right < len(row.draft) and row.draft[right] == chosen[right]:
            right += 1
        row.past += (1 if row.made else len(row.suffix)) + right
        before = len(row.made)
        for token in chosen[: right + 1]:
            row.made.append(token)
            row.ended = token in self.language.stops or len(row.made) == self.spec.max_new_tokens
            if row.ended:
                break
        self.drafter.learn(row.memory, right, row.made[before:])

    def _leave(self, place: int) -> None:
        """Take an ended row out; the last row moves into its place."""
        self._ended.append(self.rows[place])
        last = self.rows.pop()
        if place < len(self.rows):
            self.cache.move(len(self.rows), place, last.past)
            self.rows[place] = last


def _worth(rows: int, device: str) -> float:
    """The chance of being right from which on a guess saves time, with ``rows`` in the batch.

    A pass has a cost of its own, that a row's share of falls with the number of rows; then each token has one.
    """
    return 0.05 if device != "cpu" else 1 / (1.4 + 48 / rows)


def _ids(base: Base, text: str, special: bool = False) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=special).input_ids)
