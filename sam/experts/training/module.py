"""The LightningModule that trains a LoRA adapter on target completions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model

from sam.experts.training.batch import Batch, padded
from sam.experts.training.recipe import Recipe
from sam.models.base import Base


class ExpertModule(L.LightningModule):
    """LoRA on all linear layers of the base model by PEFT, cross-entropy on the tokens of target completions."""

    def __init__(self, base: Base, recipe: Recipe) -> None:
        super().__init__()
        self.base, self.recipe = base, recipe
        self.net: Any = None
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
        """Lightning leaves a pretrained model in eval mode; training wants train mode throughout."""
        self._since = time.perf_counter() - self.seconds
        self.net.train()

    def on_fit_end(self) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._since

    def unload(self) -> None:
        """Take the adapter out: leaves the base model as it was, on its device and in eval mode."""
        if self.net is not None:
            self.net.unload()
        # Lightning leaves the model on the CPU when it is done.
        self.base.model.eval().to(self.base.device)

    def collate(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The tensors that :meth:`loss` takes."""
        return padded(batch)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over the tokens of target completions."""
        return self.net(**batch).loss

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """One batch's loss."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay to zero over all steps."""
        optimizer = self.adamw([p for p in self.net.parameters() if p.requires_grad])
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates(self.recipe, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def adamw(self, trained: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """AdamW as the recipe has it."""
        lr, decay = self.recipe.lr, self.recipe.weight_decay
        return torch.optim.AdamW(trained, lr=lr, weight_decay=decay, betas=(0.9, 0.98), **options)

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


def rates(recipe: Recipe, total: int) -> Callable[[int], float]:
    """The share of the learning rate at each of ``total`` steps: linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(recipe.warmup * total))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return scale
