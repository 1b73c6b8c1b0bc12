"""The LightningModule that learns what its parent learns, faster."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from sam.experts.training.batch import Batch
from sam.experts.training.fused.packing import collate, most_packed, read
from sam.experts.training.fused.patches import fused
from sam.experts.training.module import ExpertModule
from sam.experts.training.recipe import Recipe
from sam.models.base import Base

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of the large products where it is not the weights', by Lightning's precision."""


class FusedExpertModule(ExpertModule):
    """Several sentences in a row, forward and backward passes of our own, logits only where the loss is, and an
    optimizer that takes one step over all tensors, which are many and small."""

    def __init__(self, base: Base, recipe: Recipe) -> None:
        super().__init__(base, recipe)
        self.patches = ExitStack()
        self.most_packed = 0
        """Tokens that a row of several sentences may have."""

    def configure_model(self) -> None:
        """Inject the adapter, after asking what rows the bare model reads rightly."""
        if self.net is None:
            self.most_packed = most_packed(self.base.model)
        super().configure_model()

    def on_fit_start(self) -> None:
        """Exchange the forward passes, now that the model is on its device."""
        super().on_fit_start()
        dtype = MIXED.get(str(self.trainer.precision), self.base.model.dtype)
        self.patches.enter_context(fused(self.net, dtype))

    def on_fit_end(self) -> None:
        """The model computes as PEFT has it again."""
        super().on_fit_end()
        self.patches.close()

    def unload(self) -> None:
        """As the parent; also after an error in the midst of training."""
        self.patches.close()
        super().unload()

    def collate(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Several sentences in a row where the model reads that rightly, else a row for each."""
        return collate(batch, self.most_packed)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the tokens of target completions, logits computed only there."""
        causal = self.net.base_model.model
        hidden, targets = read(causal, batch)
        logits = causal.get_output_embeddings()(hidden).float()
        return torch.nn.functional.cross_entropy(logits, targets)

    def adamw(self, trained: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """AdamW in one kernel, but with fp16: there it would unscale gradients itself, after they were clipped."""
        return super().adamw(trained, fused=self.trainer.precision != "16-mixed", **options)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm, also for a fused optimizer, which Lightning's own clipping refuses."""
        if gradient_clip_val:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, gradient_clip_val)
