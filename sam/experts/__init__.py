"""Experts: LoRA adapters with their cards, the pool to choose from, and how one is trained."""

from typing import TYPE_CHECKING

from sam.experts.card import Card, Pool

if TYPE_CHECKING:
    from sam.experts.training.data import ExpertDataModule
    from sam.experts.training.module import ExpertModule
    from sam.experts.training.recipe import Recipe
    from sam.experts.training.train import Job, train_expert

__all__ = ["Card", "ExpertDataModule", "ExpertModule", "Job", "Pool", "Recipe", "train_expert"]

HOMES = {
    "ExpertDataModule": "data",
    "ExpertModule": "module",
    "Recipe": "recipe",
    "Job": "train",
    "train_expert": "train",
}
"""The modules of ``sam.experts.training``; Lightning and PEFT take seconds to import: only who trains pays for them."""


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"sam.experts.training.{HOMES[name]}"), name)
