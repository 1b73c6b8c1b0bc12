"""One base model that answers as any merge of its experts; the model is loaded when the first answer is missing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

from sam import grammar, prompts
from sam.base import Base, BaseSpec, device_of, folder, identity, load, settings_hash
from sam.decoding import AnswerStore, DecodeSpec
from sam.decoding.compiled import weights_of
from sam.decoding.drafts import Drafter
from sam.decoding.greedy import stream
from sam.decoding.packed import PackedWeights
from sam.experts.card import Pool
from sam.merging import AdapterDeltas, MergeSpec, merge_modules, model_key
from sam.ner import Prediction

SINGLE = MergeSpec("linear")
"""The merge of a single expert: it gives that expert untouched, as every merge of one does."""


class Engine:
    """Answers of merged models, kept and reused. ``seconds`` and ``counts`` say what was spent and saved; the stages
    load, merge and decode of a selection count in ``select`` too. Without a ``store`` nothing is kept, and no answer
    of another model is a guess.

    At most one merge is applied to the base at a time; :meth:`reset` undoes it bit for bit.
    """

    def __init__(
        self,
        spec: BaseSpec,
        pool: Pool,
        decoding: DecodeSpec,
        store: AnswerStore | None,
        device: str = "auto",
        backwards: bool = False,
    ) -> None:
        """``backwards``: begin at the last prompt, as the second of two processes with one store should."""
        self.spec, self.pool, self.decoding, self.store = spec, pool, decoding, store
        self.backwards = backwards
        self.device = device_of("auto") if device == "auto" else device
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._adapters: dict[str, AdapterDeltas] = {}
        self._weights: PackedWeights | None = None
        self._applied: str | None = None
        self._drafter = Drafter()

    def begin(self, pool: Pool, store: AnswerStore | None) -> None:
        """Serve another job: its own cards (of the same adapters), store, seconds and counts."""
        self.pool, self.store = pool, store
        self.seconds.clear()
        self.counts.clear()

    @cached_property
    def fingerprint(self) -> str:
        """The base model's fingerprint, without loading the model where it is known."""
        return identity(self.spec)

    @cached_property
    def settings(self) -> str:
        """The hash of the base model's tokenizer and config."""
        return settings_hash(folder(self.spec))

    @cached_property
    def base(self) -> Base:
        """The base model."""
        with self.timed("load"):
            return load(self.spec, self.device)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to ``seconds[stage]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def adapter(self, name: str) -> AdapterDeltas:
        """The expert's deltas, opened once."""
        if name not in self._adapters:
            self._adapters[name] = AdapterDeltas.open(self.pool.folder(name))
        return self._adapters[name]

    def key(self, experts: Sequence[str], merge: MergeSpec) -> str:
        """What names the merged model (see :func:`sam.merging.model_key`)."""
        return model_key(self.fingerprint, [self.adapter(e) for e in experts], list(experts), merge)

    def predict(
        self,
        experts: Sequence[str],
        merge: MergeSpec,
        types: Sequence[str],
        texts: Sequence[str],
    ) -> list[Prediction]:
        """What the merge of ``experts`` finds in each text."""
        return self.predict_all(experts, merge, [(tuple(types), text) for text in texts])

    def predict_all(
        self,
        experts: Sequence[str],
        merge: MergeSpec,
        asked: Sequence[tuple[tuple[str, ...], str]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """As :meth:`predict`, for (types, text) that may differ in their types.

        ``progress`` is called with numbers of texts done, from more than one thread.
        """
        key, canonical = self.key(experts, merge), self._decoding()
        shown = [prompts.render(types, text) for types, text in asked]
        names = [
            # Where a type holds a comma, other types can give the same prompt, but not the same language of answers.
            AnswerStore.key(key, prompt, {**canonical, "types": types} if self.decoding.constrained else canonical)
            for prompt, (types, _) in zip(shown, asked, strict=True)
        ]
        kept = self.store.get(names) if self.store else {}
        missing = {name: one for name, one in zip(names, asked, strict=True) if name not in kept}
        self.counts["reused"] += len(asked) - len(missing)
        if progress:
            progress(len(asked) - len(missing))
        if missing:
            kept.update(self._answer(key, experts, merge, missing, progress))
        return [
            prompts.predict(text, kept[name][0], types, kept[name][1])
            for (types, text), name in zip(asked, names, strict=True)
        ]

    def _answer(
        self,
        key: str,
        experts: Sequence[str],
        merge: MergeSpec,
        asked: Mapping[str, tuple[tuple[str, ...], str]],
        progress: Callable[[int], None] | None,
    ) -> dict[str, tuple[str, bool]]:
        """Decode what is ``asked`` (name to types and text), each answer kept as it comes: a killed run loses at most
        those of the last pass."""
        answers: dict[str, tuple[str, bool]] = {}
        names = list(asked)

        def known(index: int) -> bool:
            """Another process may have answered since."""
            found = self.store.get([names[index]]) if self.store else {}
            answers.update(found)
            self.counts["reused"] += len(found)
            if found and progress:
                progress(1)
            return bool(found)

        parts = [(prompts.prefix(types), prompts.suffix(text)) for types, text in asked.values()]
        # Another model's answer to the same prompt is a guess at this one's.
        shown = [AnswerStore.prompt_key(self.fingerprint, prefix + suffix) for prefix, suffix in parts]
        siblings = self.store.nearest(shown, experts) if self.store else {}
        earlier = [siblings.get(prompt, "") for prompt in shown]
        automata = grammar.automata(asked.values()) if self.decoding.constrained else None
        try:
            self._apply(key, experts, merge)
            with self.timed("decode"):
                run = stream(self.base, parts, self.decoding, self._drafter, earlier, automata, known, self.backwards)
                with closing(run):  # before the weights are given back
                    for index, answer in run:
                        answers[names[index]] = (answer.text, answer.truncated)
                        self.counts["decoded"] += 1
                        if self.store:
                            self.store.put(names[index], answer.text, answer.truncated)
                            self.store.relate(names[index], shown[index], experts)
                        if progress:
                            progress(1)
        except BaseException:
            # Whatever stops a run, the base model is handed back as it was.
            self.reset()
            raise
        return answers

    def _decoding(self) -> dict[str, Any]:
        canonical = self.decoding.canonical(self.spec.dtype, self.device)
        return {**canonical, "prompt": prompts.PROMPT_VERSION, "settings": self.settings}

    def _apply(self, key: str, experts: Sequence[str], merge: MergeSpec) -> None:
        if self._applied == key:
            return
        self.reset()
        if self._weights is None:
            self._weights = weights_of(self.base, self.decoding.mode, constrained=self.decoding.constrained)
        with self.timed("merge"):
            adapters = [self.adapter(e) for e in experts]
            self._weights.apply(merge_modules(adapters, list(experts), merge))
        self._applied = key

    def reset(self) -> None:
        """Give the base its own weights back, bit for bit."""
        if self._weights is not None:
            self._weights.undo()
        self._applied = None
