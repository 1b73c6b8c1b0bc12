"""The LightningModule that trains a LoRA adapter on answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model

from sam.experts.data import Recipe
from sam.experts.lean import lean
from sam.experts.packing import read
from sam.models.base import Base

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of the large products where it is not the weights', by Lightning's precision."""


class ExpertModule(L.LightningModule):
    """LoRA on all linear layers of the base model, cross-entropy on answer tokens, logits computed only there."""

    def __init__(self, base: Base, recipe: Recipe) -> None:
        super().__init__()
        self.base, self.recipe = base, recipe
        self.net: Any = None
        self.patches = ExitStack()
        self.losses: list[torch.Tensor] = []
        """Of each step since the beginning, also before a resumption."""
        self.seconds = 0.0
        """Spent in training, of all runs that led here."""
        self._since = 0.0
        # Checkpoints hold the trained tensors only; the frozen base is not in them.
        self.strict_loading = False

    def configure_model(self) -> None:
        """Inject the adapter; every expert starts from the same A factors (seeded by the recipe)."""
        if self.net is not None:
            return
        torch.manual_seed(self.recipe.seed)
        config = LoraConfig(
            r=self.recipe.r,
            lora_alpha=self.recipe.alpha,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        self.net = get_peft_model(self.base.model, config)

    def on_fit_start(self) -> None:
        """Lightning leaves a pretrained model in eval mode; training wants train mode throughout, and the lean way."""
        self._since = time.perf_counter() - self.seconds
        self.net.train()
        dtype = MIXED.get(str(self.trainer.precision), self.base.model.dtype)
        self.patches.enter_context(lean(self.net, dtype))

    def on_fit_end(self) -> None:
        """The model computes as PEFT has it again."""
        self.seconds = time.perf_counter() - self._since
        self.patches.close()

    def unload(self) -> None:
        """Take the adapter out: leaves the base model as it was, on its device and in eval mode."""
        self.patches.close()
        if self.net is not None:
            self.net.unload()
        # Lightning leaves the model on the CPU when it is done.
        self.base.model.eval().to(self.base.device)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the answer tokens of ``batch`` (see :func:`sam.experts.packing.collate`)."""
        causal = self.net.base_model.model
        hidden, targets = read(causal, batch)
        logits = causal.get_output_embeddings()(hidden).float()
        return torch.nn.functional.cross_entropy(logits, targets)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """One batch's loss."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay to zero over all steps."""
        trained = [p for p in self.net.parameters() if p.requires_grad]
        # A fused step would unscale gradients itself, after they were clipped.
        fused = self.trainer.precision != "16-mixed"
        optimizer = adamw(trained, self.recipe, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates(self.recipe, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm, also for a fused optimizer, which Lightning's own clipping refuses."""
        if gradient_clip_val:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained, and what the card will say of the way there."""
        checkpoint["spent"] = {"losses": [float(x) for x in self.losses], "seconds": time.perf_counter() - self._since}
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting where the run that was killed had come to."""
        self.losses = [torch.tensor(x) for x in checkpoint["spent"]["losses"]]
        self.seconds = checkpoint["spent"]["seconds"]

    def curve(self, points: int = 40) -> list[list[float]]:
        """``[step, mean loss since the point before]`` at about ``points`` steps."""
        losses = [float(x) for x in self.losses]
        size = -(-len(losses) // points) if losses else 1
        # What is left over is of the last point, not one of its own.
        bounds = [*range(0, len(losses) - size + 1, size), len(losses)]
        return [[end, round(sum(losses[start:end]) / (end - start), 4)] for start, end in pairwise(bounds)]


def adamw(trained: list[torch.nn.Parameter], recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """AdamW as the recipe has it; ``fused`` takes one step over all tensors, which are many and small."""
    return torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=fused)


def rates(recipe: Recipe, total: int) -> Callable[[int], float]:
    """The share of the learning rate at each of ``total`` steps: linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(recipe.warmup * total))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return scale
