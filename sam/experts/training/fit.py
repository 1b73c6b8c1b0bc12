"""Fitting with Lightning, from the last checkpoint if there is one."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from peft import get_peft_model_state_dict

from sam.errors import SamError
from sam.experts.training.data import ExpertDataModule
from sam.experts.training.fused.module import FusedExpertModule
from sam.experts.training.module import ExpertModule
from sam.experts.training.recipe import Recipe
from sam.models.base import Base
from sam.models.device import multiplies_bf16

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Lightning's precisions that leave the base model's weights as they are (``bf16-true`` would cast them in place)."""

TRAINER = ("accelerator", "devices", "precision", "enable_progress_bar")
"""Lightning's options that a training takes: what is learnt is decided by the recipe, and written on the card."""


def trainer_settings(trainer: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Lightning's options with ``precision`` resolved; refuses those that would change what is learnt."""
    if further := [option for option in trainer if option not in TRAINER]:
        raise SamError(
            f"trainer.{further[0]} is no option of training, which takes {', '.join(TRAINER)}; what is learnt is set "
            "by train.*"
        )
    return {**trainer, "precision": resolved_precision(str(trainer.get("precision", "auto")), device)}


def resolved_precision(precision: str, device: str) -> str:
    """``auto``: bf16 autocast where the hardware multiplies bf16 itself, else fp32."""
    if precision not in PRECISIONS:
        raise SamError(f"trainer.precision={precision} is unknown; allowed: {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else multiplies_bf16()
    return "bf16-mixed" if native else "32-true"


def expert_module(base: Base, recipe: Recipe) -> ExpertModule:
    """The module that trains by ``recipe``."""
    return FusedExpertModule(base, recipe) if recipe.fused else ExpertModule(base, recipe)


def fit(
    module: ExpertModule, data: ExpertDataModule, settings: Mapping[str, Any], work: Path, every: int, logger: Any
) -> dict[str, torch.Tensor]:
    """Fit, with a checkpoint in ``work`` every so many steps; returns the adapter's tensors in PEFT's naming."""
    data.collate = module.collate
    saver = ModelCheckpoint(
        dirpath=work, filename="last", every_n_train_steps=every, save_top_k=1, enable_version_counter=False
    )
    bar = [TQDMProgressBar(refresh_rate=5)] if settings.get("enable_progress_bar", True) else []
    trainer = L.Trainer(
        **settings,
        max_epochs=1,
        gradient_clip_val=module.recipe.clip,
        callbacks=[saver, *bar],
        logger=logger,
        log_every_n_steps=10,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(work),
    )
    with warnings.catch_warnings():
        # Lightning asks the loader for its state; ours is the data module's.
        warnings.filterwarnings("ignore", message="(You're resuming from a checkpoint|Checkpoint directory .* exists)")
        trainer.fit(module, datamodule=data, ckpt_path=_checkpoint(work))
    return {k: v.detach().cpu() for k, v in get_peft_model_state_dict(module.net).items()}


def _checkpoint(work: Path) -> str | None:
    """The last checkpoint in ``work``, None if there is no whole one."""
    last = work / "last.ckpt"
    if not last.is_file():
        return None
    if not zipfile.is_zipfile(last):
        log.warning("%s is cut short; training starts anew", last)
        last.unlink()
        return None
    return str(last)
