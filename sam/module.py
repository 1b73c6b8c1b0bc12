"""SamModule: selection, merging, decoding and scoring of one target, as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from sam.combine import check_rule, combine
from sam.encoder import Encoder
from sam.engine import SINGLE, Engine
from sam.errors import SamError
from sam.merging import MergeSpec
from sam.ner import Prediction, Sentence
from sam.scoring import Scores, score
from sam.selection import Query, Selection, check, select
from sam.targets import Target

BATCH = 64
"""Sentences that Lightning hands over at a time."""


class SamModule(L.LightningModule):
    """``Trainer.test(module)`` scores the target, ``Trainer.predict(module)`` returns its predictions, longest first.

    Selection happens in ``setup``; then there is one dataloader a task model, so that each merge is applied once.
    After a run, ``selections``, ``predictions`` (model -> sentence id -> prediction), ``combined()`` and ``scores()``
    hold what was found. ``named`` selections take ``experts``.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        target: Target,
        *,
        selector: str = "sam",
        k: int = 3,
        sample_size: int = 10,
        merge: MergeSpec,
        rule: str = "union",
        seed: int = 0,
        names: Sequence[str] | None = None,
        experts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        pool_names = list(engine.pool.names if names is None else names)
        check(selector, k, sample_size, pool_names, engine.pool, experts)
        merge.validate()
        check_rule(rule)
        self.engine, self.target, self.merge, self.rule, self.selector = engine, target, merge, rule, selector
        self.query = Query(
            target, engine.pool, pool_names, encoder, self._ask, k, sample_size, seed, experts=tuple(experts)
        )
        self.selections: dict[str, Selection] = {}
        self.predictions: dict[str, dict[str, Prediction]] = {}

    def _ask(self, expert: str, texts: Sequence[str]) -> list[Prediction]:
        """What one expert alone finds, for selection."""
        return self.engine.predict([expert], SINGLE, [(self.target.types_of_text(text), text) for text in texts])

    def setup(self, stage: str) -> None:
        """Select, once. Raises SamError where a target without gold is to be scored."""
        if stage == "test" and not self.target.scored:
            raise SamError(f"target {self.target.name} has no gold to score against; use Trainer.predict")
        if not self.selections:
            with self.engine.timed("select"):
                self.selections = select(self.selector, self.query)
            self.predictions = {name: {} for name in self.selections}

    def _loaders(self, sentences: Sequence[Sentence]) -> list[DataLoader]:
        # Longest first: batches of similar length.
        ordered = sorted(sentences, key=lambda s: (-len(s.text), s.id))
        return [DataLoader(ordered, batch_size=BATCH, collate_fn=list) for _ in self.selections]  # type: ignore[arg-type]

    def test_dataloader(self) -> list[DataLoader]:
        """The sentences with gold, once a task model."""
        return self._loaders(self.target.scored)

    def predict_dataloader(self) -> list[DataLoader]:
        """All sentences, once a task model."""
        return self._loaders(self.target.sentences)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Sentences have no device; the engine puts token ids on the base model's."""
        return batch

    def _step(self, batch: list[Sentence], loader: int) -> list[Prediction]:
        name = list(self.selections)[loader]
        asked = [(self.target.types_of(s), s.text) for s in batch]
        found = self.engine.predict(self.selections[name].experts, self.merge, asked)
        self.predictions[name].update({s.id: p for s, p in zip(batch, found, strict=True)})
        return found

    def test_step(self, batch: list[Sentence], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Decode a chunk with one task model."""
        self._step(batch, dataloader_idx)

    def predict_step(self, batch: list[Sentence], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Decode a chunk with one task model; returns a dict a sentence: id, model, and the prediction's fields.

        Plain values, as Lightning copies what it collects, and cannot copy a frozen dataclass.
        """
        found, model = self._step(batch, dataloader_idx), list(self.selections)[dataloader_idx]
        return [{"id": s.id, "model": model, **asdict(p)} for s, p in zip(batch, found, strict=True)]

    def on_test_epoch_end(self) -> None:
        """Log precision, recall and F1 of each task model and of the combination."""
        for name, scores in self.scores().items():
            for metric in ("precision", "recall", "f1", "span_f1"):
                self.log(f"{self.target.name}/{name}/{metric}", getattr(scores, metric))

    def combined(self) -> dict[str, Prediction]:
        """Sentence id -> the task models' predictions combined, for the sentences that all have answered."""
        models = list(self.predictions.values())
        voices = [len(self.selections[name].experts) for name in self.predictions]
        done = [s for s in self.target.sentences if all(s.id in predicted for predicted in models)]
        return {
            s.id: combine([m[s.id] for m in models], s.text, self.rule, self.target.types_of(s), voices) for s in done
        }

    def scores(self) -> dict[str, Scores]:
        """The scores of each task model and, under ``combined``, of their combination.

        Scored are the sentences with gold that all task models have answered; ``n`` says how many.
        """
        found: dict[str, Any] = {**self.predictions, "combined": self.combined()}
        scored = [s for s in self.target.scored if s.id in found["combined"]]
        return {name: score(scored, [predicted[s.id] for s in scored]) for name, predicted in found.items()}
