"""Training data of an expert: sentences of a domain's datasets, cut into batches and rendered.

A batch is of one dataset and asks for the same types in all its sentences, so that the prompt's shared part can be
computed once; in a batch of open-type sentences each is asked for its own types. Everything random is drawn by seed,
epoch and the names of datasets and sentences, so that the batches of a run are a function of its recipe alone and a
resumed run meets the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from sam.errors import SamError
from sam.experts.training.batch import Batch, padded
from sam.experts.training.draw import draw_open, draw_sentences, foreign_types
from sam.experts.training.recipe import OPEN, Recipe
from sam.experts.training.render import Renderer
from sam.seeding import rng
from sam.types import Sentence


class ResumableSampler(Sampler[int]):
    """Indices ``start`` .. ``total - 1`` in order; its length is ``total``, as Lightning counts resumed batches."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class ExpertDataModule(L.LightningDataModule):
    """The training batches of one expert, all epochs in one pass, and where in them a resumed run goes on."""

    def __init__(self, domains: Sequence[Sequence[str]], tokenizer: Any, stop_id: int, recipe: Recipe) -> None:
        """``domains``: lists of dataset ids, one for an expert, all for the unified model; the budget is a domain's."""
        super().__init__()
        self.domains = [list(d) for d in domains]
        self.recipe, self.renderer = recipe, Renderer(tokenizer, stop_id, recipe)
        self.sentences: list[Sentence] = []
        """Of the domains: those of the open types are in ``opened``."""
        self.opened: list[Sentence] = []
        self.types: list[str] = []
        self.plan: list[Batch] = []
        self.collate: Callable[[Batch], dict[str, torch.Tensor]] = padded
        """Makes tensors of a batch of the plan."""
        self.start = 0

    def setup(self, stage: str | None = None) -> None:
        """Draw and render; the same for the same recipe."""
        if self.plan:
            return
        drawn = [
            (name, sentences, types)
            for datasets in self.domains
            for name, (sentences, types) in draw_sentences(datasets, self.recipe, self._fits).items()
        ]
        self.sentences = [s for _, sentences, _ in drawn for s in sentences]
        if not self.sentences:
            names = ", ".join(d for datasets in self.domains for d in datasets)
            raise SamError(f"train.max_length={self.recipe.max_length} leaves no sentence of {names}; raise it")
        self.types = sorted({t for _, sentences, types in drawn if sentences for t in types})
        self.opened = draw_open(self.recipe, self._fits)
        for epoch in range(self.recipe.epochs):
            batches = [b for part in drawn for b in self._batches(*part, epoch)]
            batches += self._open_batches(epoch)
            rng(self.recipe.seed, "batches", epoch).shuffle(batches)
            self.plan += batches

    def _batches(self, dataset: str, sentences: Sequence[Sentence], types: Sequence[str], epoch: int) -> list[Batch]:
        size, foreign = self.recipe.batch_size, foreign_types(dataset) if self.recipe.negatives else []
        order = rng(self.recipe.seed, "order", dataset, epoch).sample(sentences, len(sentences))
        return [self.renderer(order[i : i + size], types, epoch, foreign) for i in range(0, len(order), size)]

    def _open_batches(self, epoch: int) -> list[Batch]:
        size = self.recipe.open_batch_size
        order = rng(self.recipe.seed, "order", OPEN, epoch).sample(self.opened, len(self.opened))
        return [self.renderer.open_batch(order[i : i + size], epoch) for i in range(0, len(order), size)]

    def _fits(self, sentence: Sentence, types: Sequence[str]) -> bool:
        # Character counts bound token counts well enough to skip most of the tokenising.
        if len(sentence.text) > 6 * self.recipe.max_length:
            return False
        return len(self.renderer.example(sentence, types).ids) <= self.recipe.max_length

    def train_dataloader(self) -> DataLoader:
        """One item = one batch of the plan."""
        sampler = ResumableSampler(len(self.plan), self.start)
        return DataLoader(
            self.plan,  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,
            collate_fn=self.collate,  # type: ignore[arg-type]
        )

    def state_dict(self) -> dict[str, int]:
        """How many batches have been trained on."""
        return {"start": self.trainer.global_step if self.trainer else self.start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches already trained on."""
        self.start = state_dict["start"]
