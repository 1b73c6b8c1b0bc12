"""Experts: LoRA adapters with their cards, the pool to choose from, and how one is trained."""

from typing import TYPE_CHECKING

from sam.experts.card import Card, Pool

if TYPE_CHECKING:
    from sam.experts.data import ExpertDataModule, Recipe
    from sam.experts.module import ExpertModule
    from sam.experts.train import train_expert

__all__ = ["Card", "ExpertDataModule", "ExpertModule", "Pool", "Recipe", "train_expert"]


def __getattr__(name: str) -> object:
    # Lightning and PEFT take seconds to import: only who trains pays for them.
    homes = {"ExpertDataModule": "data", "Recipe": "data", "ExpertModule": "module", "train_expert": "train"}
    if name not in homes:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"sam.experts.{homes[name]}"), name)
