"""SamModule: a run of one target under Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from sam import pipeline
from sam.data.targets import Target
from sam.engine import Engine
from sam.errors import SamError
from sam.models.encoder import Encoder
from sam.selection import Selection
from sam.types import Prediction, Sentence

BATCH = 64
"""Sentences that Lightning hands over at a time."""


class SamModule(L.LightningModule):
    """``Trainer.test(module)`` scores the target, ``Trainer.predict(module)`` returns its predictions, longest first.

    The numbers are those of :func:`sam.pipeline.run`. Selection happens in ``setup``; then there is one dataloader per
    task model, so that each is merged once. ``selections``, ``predictions`` and ``result()`` hold the outcome.
    """

    def __init__(self, engine: Engine, encoder: Encoder, target: Target, method: pipeline.Method) -> None:
        super().__init__()
        method.check(engine.pool)
        self.engine, self.encoder, self.target, self.method = engine, encoder, target, method
        self.selections: dict[str, Selection] = {}
        self.predictions: dict[str, dict[str, Prediction]] = {}

    def setup(self, stage: str) -> None:
        """Select, once. Raises SamError where a target without gold is to be scored."""
        if stage == "test" and not self.target.scored:
            raise SamError(f"target {self.target.name} has no gold to score against; use Trainer.predict")
        if not self.selections:
            with self.engine.timed("select"):
                self.selections = pipeline.select_for(self.method, self.target, self.engine, self.encoder)
            self.predictions = {name: {} for name in self.selections}

    def _loaders(self, sentences: Sequence[Sentence]) -> list[DataLoader]:
        # Longest first: batches of similar length.
        ordered = sorted(sentences, key=lambda s: (-len(s.text), s.id))
        return [DataLoader(ordered, batch_size=BATCH, collate_fn=list) for _ in self.selections]  # type: ignore[arg-type]

    def test_dataloader(self) -> list[DataLoader]:
        """The sentences with gold, once per task model."""
        return self._loaders(self.target.scored)

    def predict_dataloader(self) -> list[DataLoader]:
        """All sentences, once per task model."""
        return self._loaders(self.target.sentences)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Sentences have no device."""
        return batch

    def _step(self, batch: list[Sentence], loader: int) -> list[Prediction]:
        name = list(self.selections)[loader]
        asked = [(self.target.types_of(s), s.text) for s in batch]
        made = self.engine.predict(self.selections[name].experts, self.method.merge, asked)
        self.predictions[name].update({s.id: p for s, p in zip(batch, made, strict=True)})
        return made

    def test_step(self, batch: list[Sentence], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Predict a batch with one task model."""
        self._step(batch, dataloader_idx)

    def predict_step(self, batch: list[Sentence], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Predict a batch with one task model; one dict per sentence: id, model, and the prediction's fields.

        Plain values, as Lightning copies what it collects, and cannot copy a frozen dataclass.
        """
        made, model = self._step(batch, dataloader_idx), list(self.selections)[dataloader_idx]
        return [{"id": s.id, "model": model, **asdict(p)} for s, p in zip(batch, made, strict=True)]

    def on_test_epoch_end(self) -> None:
        """Log precision, recall and F1 of each task model and of the combination."""
        for name, scores in self.result().scores.items():
            values = scores.to_dict()
            for metric in ("precision", "recall", "f1", "span_f1"):
                self.log(f"{self.target.name}/{name}/{metric}", values[metric])

    def result(self) -> pipeline.TargetResult:
        """Selections, predictions and scores so far, of the sentences that all task models have predictions for."""
        return pipeline.result(self.method, self.engine.task, self.target, self.selections, self.predictions)
