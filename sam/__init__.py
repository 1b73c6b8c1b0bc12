"""SaM: named entity recognition with LLMs, adapted by selecting and merging LoRA experts (arXiv 2506.22813)."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam.module import SamModule

# How long OpenMP's threads spin while they wait, read when torch is imported: short, so that processes side by side do
# not starve each other, and long enough for the steps of one merge.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
__all__ = ["SamModule"]


def __getattr__(name: str) -> object:
    # Lightning takes seconds to import: only who runs SaM pays for it.
    if name != "SamModule":
        raise AttributeError(name)
    from sam.module import SamModule

    return SamModule
