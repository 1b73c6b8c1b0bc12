"""Predictions of merged models: merged and generated when they are first needed, kept and reused after that."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sam.experts.card import Pool
from sam.generation import Completion, CompletionCache, Generator, Request
from sam.merging import AdapterDeltas, Merge, linear, merge_modules, model_key
from sam.models.identity import Identity
from sam.task import Task
from sam.types import Prediction

SINGLE = Merge(linear)
"""The merge of a single expert: it gives that expert untouched, as every merge of one does."""

Asked = tuple[tuple[str, ...], str]
"""(requested types, text)."""


class Engine:
    """The merged models of one base model and one pool, one loaded at a time.

    ``seconds`` by stage (select, merge, generate; merging and generating for selection count in select too) and
    ``counts`` of completions (generated, reused) of the current job.
    """

    def __init__(
        self,
        pool: Pool,
        generator: Generator,
        cache: CompletionCache,
        base: Identity,
        task: Task,
        constrained: bool = False,
    ) -> None:
        """``base``: what the base model of ``generator`` is. ``constrained``: completions are held to the grammar."""
        self.pool, self.generator, self.cache, self.base = pool, generator, cache, base
        self.task, self.constrained = task, constrained
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._adapters: dict[str, AdapterDeltas] = {}
        self._loaded: str | None = None

    def begin(self, pool: Pool, cache: CompletionCache) -> None:
        """Serve another job: its own pool, cache, seconds and counts. The loaded model stays."""
        self.pool, self.cache = pool, cache
        self._adapters.clear()
        self.seconds.clear()
        self.counts.clear()

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

    def key(self, experts: Sequence[str], merge: Merge) -> str:
        """What names the merged model (see :func:`sam.merging.model_key`)."""
        return model_key(self.base.fingerprint, [self.adapter(e) for e in experts], list(experts), merge)

    def predict(
        self,
        experts: Sequence[str],
        merge: Merge,
        asked: Sequence[Asked],
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """What the merge of ``experts`` predicts for each (types, text); ``progress`` is called with numbers of texts
        done."""
        requests = [self.task.request(types, text, self.constrained) for types, text in asked]
        key = self.key(experts, merge)
        model = self.cache.model(
            key, {**self.generator.key(), "prompt": self.task.version, "settings": self.base.settings}
        )
        kept = self.cache.get(model, requests)
        known = {requests[i]: completion for i, completion in kept.items()}
        missing = list(dict.fromkeys(request for request in requests if request not in known))
        self._count("reused", len(requests) - len(missing), progress)
        if missing:
            for request, completion in self._generate(key, experts, merge, missing):
                known[request] = completion
                self.cache.put(model, request, completion)
                self._count("generated", 1, progress)
        return [
            self.task.parse(text, known[request].text, types, known[request].truncated)
            for (types, text), request in zip(asked, requests, strict=True)
        ]

    def _count(self, what: str, number: int, progress: Callable[[int], None] | None) -> None:
        self.counts[what] += number
        if progress:
            progress(number)

    def _generate(
        self, key: str, experts: Sequence[str], merge: Merge, requests: Sequence[Request]
    ) -> Iterator[tuple[Request, Completion]]:
        """Each request with its completion, as they are done."""
        if self._loaded != key:
            self._loaded = None
            with self.timed("merge"):
                adapters = [self.adapter(e) for e in experts]
                self.generator.load(merge_modules(adapters, list(experts), merge))
            self._loaded = key
        with self.timed("generate"):
            self._loaded = None  # a generator that fails may have lost its model
            for index, completion in self.generator.generate(requests):
                yield requests[index], completion
            self._loaded = key

    def close(self) -> None:
        """Free the model; it is loaded again when it is needed."""
        self._loaded = None
        self.generator.close()
