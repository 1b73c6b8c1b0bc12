"""Greedy decoding of many prompts at once: rows join and leave a running batch, their shared prefixes are run once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from sam import grammar, prompts
from sam.base import Base, cores
from sam.decoding.compiled import caches
from sam.decoding.constrained import Automaton, Walk, walks
from sam.decoding.drafts import Drafter, Language, Memory
from sam.decoding.malloc import keep_freed
from sam.decoding.packed import RANGE, packs
from sam.decoding.ragged import KeyValues, Pass, Row, ragged, rounded
from sam.decoding.spec import DecodeSpec
from sam.errors import SamError

ADMIT = 768
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
) -> Generator[tuple[int, Answer], None, None]:
    """(index into ``parts``, answer) as each is done.

    ``known`` is asked right before a prompt's turn, in any thread, one at a time, whether its answer is no longer
    wanted; ``backwards`` takes the prompts from the other end. So two processes that share their answers meet in the
    middle.

    A CPU's threads work in two lanes, a running batch each, if there is more than one batch to do in fp32 and the model
    is not compiled: half the threads on each of two products lose less in waiting for each other than all of them on
    one. The model is the lanes' until the iterator has ended or is closed.

    On a CPU glibc keeps, in the whole process from then on, memory that is freed, unless the user has set its
    ``MALLOC_…`` variables.

    ``drafter`` guesses tokens ahead, from ``earlier`` answers to the same prompts too ("" for none), such as a sibling
    model's; no answer depends on them. A model without packed layers works as well (see :mod:`sam.decoding.packed`).
    ``automata``: the language of each prompt's answer, which ``spec.constrained`` needs and nothing else may have.
    """
    if spec.constrained != (automata is not None):
        raise ValueError(f"constrained={spec.constrained} with {'no ' if automata is None else ''}automata")
    if not parts:
        return
    if torch.device(base.device).type == "cpu":
        keep_freed()
    held = None if automata is None else walks(base, automata)
    waiting = _Waiting(base, parts, earlier or [""] * len(parts), held, known, backwards)
    drafter = drafter or Drafter()
    lanes = [_Lane(base, waiting, spec, drafter) for _ in range(_lanes(base, spec, len(parts)))]
    if len(lanes) > 1:
        with ragged(base.model):
            yield from _side_by_side(lanes, torch.get_num_threads())
        return
    while lanes[0].busy():
        # Around each pass only: between two answers the model's attention is the caller's.
        with ragged(base.model):
            found = lanes[0].step()
        yield from found


def _lanes(base: Base, spec: DecodeSpec, count: int) -> int:
    """How many for ``count`` prompts: two where that pays, unless rounding hangs on which of them share a batch, as it
    may but in packed layers."""
    if torch.device(base.device).type != "cpu" or torch.get_num_threads() < 2 or count <= spec.batch_size:
        return 1
    in_torch = caches(base.model) is KeyValues  # what is compiled has all threads
    return 2 if cores() > 1 and in_torch and base.model.dtype == torch.float32 and packs(torch.float32) else 1


def _side_by_side(lanes: Sequence[_Lane], threads: int) -> Iterator[tuple[int, Answer]]:
    """What the lanes answer, each in a thread of its own with its share of the ``threads`` of this one."""
    found: SimpleQueue[tuple[int, Answer] | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def work(lane: _Lane, share: int) -> None:
        try:
            torch.set_num_threads(share)  # of this thread
            while lane.busy() and not stop.is_set():
                for answer in lane.step():
                    found.put(answer)
        except BaseException as error:
            found.put(error)
        finally:
            found.put(None)

    shares = [(threads + number) // len(lanes) for number in range(len(lanes))]
    workers = [threading.Thread(target=work, args=each, daemon=True) for each in zip(lanes, shares, strict=True)]
    try:
        for worker in workers:
            worker.start()
        at_work = len(workers)
        while at_work:
            what = found.get()
            if isinstance(what, BaseException):
                raise what
            if what is None:
                at_work -= 1
            else:
                yield what
    finally:
        stop.set()
        _await(workers)
        torch.set_num_threads(threads)  # what threads that are yet to come begin with


def _await(workers: Sequence[threading.Thread]) -> None:
    """Wait for all that were started, at most a pass; until then also a Ctrl-C waits, as the model is theirs."""
    interrupt: KeyboardInterrupt | None = None
    while any(worker.is_alive() for worker in workers):
        try:
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        except KeyboardInterrupt as again:
            interrupt = again
    if interrupt:
        raise interrupt


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


class _Waiting:
    """The prompts whose turn is to come, for one or more lanes."""

    def __init__(
        self,
        base: Base,
        parts: Sequence[tuple[str, str]],
        earlier: Sequence[str],
        held: Sequence[Walk] | None,
        known: Callable[[int], bool] | None,
        backwards: bool,
    ) -> None:
        self.texts, self.earlier, self.known = [text for _, text in parts], earlier, known
        turn = -1 if backwards else 1
        heads = {prefix: number for number, prefix in enumerate(list(dict.fromkeys(p for p, _ in parts))[::turn])}
        self.prefixes = [_ids(base, prefix, special=True) for prefix in heads]
        rows = []
        for index, (prefix, text) in enumerate(parts):
            rows.append(_Row(index, heads[prefix], _ids(base, text), held[index] if held else None))

        # Prefix by prefix, the longest first: the peak of memory is met early, and neighbours are of a length.
        def order(row: _Row) -> tuple[int, int, int]:
            return row.prefix, -turn * len(row.suffix), turn * row.index

        self.rows = sorted(rows, key=order, reverse=True)
        if not all(self.prefixes) or not all(row.suffix for row in rows):
            raise SamError("a prompt has no tokens; give each a prefix and a suffix that are not empty")
        self.longest = max(len(self.prefixes[row.prefix]) + len(row.suffix) for row in rows)
        self._turn = threading.Lock()

    def next(self, room: int | None) -> _Row | None:
        """The next row, if it brings at most ``room`` tokens (None: any number) beside its prefix's."""
        with self._turn:
            while self.rows and (room is None or len(self.rows[-1].suffix) <= room):
                row = self.rows.pop()
                if not (self.known and self.known(row.index)):
                    return row
        return None


class _Lane:
    """A running batch: row n of ``rows`` has row n of the cache."""

    def __init__(self, base: Base, waiting: _Waiting, spec: DecodeSpec, drafter: Drafter) -> None:
        self.base, self.waiting, self.spec, self.drafter = base, waiting, spec, drafter
        self.language = Language(base.tokenizer, base.stop_ids)
        self.rows: list[_Row] = []
        config = base.model.config.get_text_config()
        self.share = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        slots = waiting.longest + spec.max_new_tokens
        self.caches = caches(base.model)
        self.cache = self.caches(min(spec.batch_size, len(waiting.rows)), slots)
        self.shared: dict[int, tuple[Any, int]] = {}  # prefix -> where it was run, once for all rows with it

    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting.rows or self.rows)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Answer]]:
        """One forward pass: the rows under way go on, waiting ones join. Returns the answers that it ends."""
        self.rows = self.rows + self._admit()
        if not self.rows:
            return []
        least = _worth(len(self.rows), self.base.device)
        for row in [row for row in self.rows if row.made or self.cache.guesses_at_once]:
            row.draft = self.drafter.guess(row.memory, self.spec.max_new_tokens - len(row.made) - 1, least)
            if row.walk:
                row.draft = row.walk.possible(row.draft)
        # Of a prompt only the last token's successor is asked for; of a draft, every token's.
        keep: list[int] = []
        at = 0
        for row in self.rows:
            at += len(row.feed())
            keep += range(at - len(row.draft) - 1, at)
        rows = [Row(len(row.feed()), row.past, bool(row.made)) for row in self.rows]
        logits = self._forward(self.cache, rows, [t for row in self.rows for t in row.feed()], keep)
        likeliest = _likeliest(logits).tolist()
        at = 0
        for row in self.rows:
            asked = slice(at, at + 1 + len(row.draft))
            chosen = likeliest[asked]
            self._advance(row, row.walk.choose(row.draft, chosen, logits[asked]) if row.walk else chosen)
            at = asked.stop
        ended = [place for place, row in enumerate(self.rows) if row.ended]
        return [self._leave(place) for place in reversed(ended)]

    def _admit(self) -> list[_Row]:
        """Waiting rows for which there is room, their prefixes in the cache."""
        new: list[_Row] = []
        size = 0
        while len(self.rows) + len(new) < self.cache.rows:
            row = self.waiting.next(ADMIT - size if new else None)
            if row is None:
                break
            size += len(row.suffix)
            row.past = len(self.waiting.prefixes[row.prefix])
            row.memory = self._memory(row)
            heads, source = self._prefix(row.prefix)
            self.cache.copy_from(heads, source, len(self.rows) + len(new), row.past)
            new.append(row)
        return new

    def _memory(self, row: _Row) -> Memory:
        """What a row's guesses come from."""
        earlier = self.waiting.earlier[row.index]
        known = [*_ids(self.base, earlier), self.base.stop_ids[0]] if earlier else []
        return Memory(self.language, self.waiting.texts[row.index], row.suffix, known)

    def _prefix(self, number: int) -> tuple[Any, int]:
        """Keys and values of a prefix, and their row; prefixes whose rows come next are run in the same pass."""
        if number not in self.shared:
            ids = self.waiting.prefixes[number : number + 1]
            # As many as a pass takes when all are as long as the longest: rows of the cache are.
            for other in self.waiting.prefixes[number + 1 :]:
                if (len(ids) + 1) * max(len(other), *map(len, ids)) > ADMIT:
                    break
                ids.append(other)
            heads = self.caches(len(ids), max(map(len, ids)))
            self._forward(heads, [Row(len(i), 0) for i in ids], [t for i in ids for t in i], [0])
            self.shared = {number + row: (heads, row) for row in range(len(ids))}
        return self.shared[number]

    def _forward(self, cache: Any, rows: Sequence[Row], ids: Sequence[int], keep: Sequence[int]) -> Tensor:
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

    def _leave(self, place: int) -> tuple[int, Answer]:
        """Take an ended row out, for its answer; the last row moves into its place."""
        row, last = self.rows[place], self.rows.pop()
        if place < len(self.rows):
            self.cache.move(len(self.rows), place, last.past)
            self.rows[place] = last
        stopped = row.made[-1] in self.language.stops
        made = row.made[:-1] if stopped else row.made
        text = row.walk.text(made) if row.walk else self.base.tokenizer.decode(made, skip_special_tokens=True)
        return row.index, Answer(text, truncated=not stopped)


def _likeliest(logits: Tensor) -> Tensor:
    """Where each row's largest is, the first of equal ones: [rows]. ``amax`` is vectorised on a CPU, ``argmax`` is not,
    which so looks for the range of :data:`~sam.decoding.packed.RANGE` logits that has it, and then within that."""
    if logits.shape[-1] % RANGE:
        return logits.argmax(-1)
    ranges = logits.unflatten(-1, (-1, RANGE))
    best = ranges.amax(-1).argmax(-1)
    return best * RANGE + ranges[torch.arange(len(best), device=best.device), best].argmax(-1)


def _worth(rows: int, device: str) -> float:
    """The chance of being right from which on a guess saves time, with ``rows`` in the batch.

    A pass has a cost of its own, that a row's share of falls with the number of rows; then each token has one.
    """
    return 0.05 if device != "cpu" else 1 / (1.4 + 48 / rows)


def _ids(base: Base, text: str, special: bool = False) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=special).input_ids)
