"""Training on toy corpora, made to be killed: ``python -m tests.toy_training BASE OUT WORK MOMENT``."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sam import data as corpora
from sam.experts import Card, ExpertModule, Job, Recipe, train_expert
from sam.experts.training.recipe import OPEN
from sam.models.base import Base
from sam.models.base import load as load_base
from sam.models.spec import BaseSpec
from sam.types import Mention, Sentence
from tests.fakes import FakeGenerator, capitals
from tests.tiny import HashEncoder, config

NAMES = ["Ada", "Alan", "Grace", "Kurt", "Emmy", "Alonzo", "Noam", "Barbara"]
SIZES = {"small": 10, "middle": 50, "large": 200}
PLACES = ["London", "Paris", "Rome", "Berlin", "Oslo"]


def recipe(**changes: Any) -> Recipe:
    """The recipe of ``conf/train`` without open-type sentences, and with ``changes``."""
    return Recipe.from_config({**config("train", "default"), "open_sentences": 0, **changes})


RECIPE = recipe(
    sentences=24, epochs=2, batch_size=2, lr=5e-3, r=4, alpha=8, max_length=120, heldout=2, heldout_open=2, seed=3
)
STEPS = 24
"""24 sentences, in batches of 2, twice."""


def toy(dataset: str, split: str, n: int = 40) -> list[Sentence]:
    """``n`` sentences that differ, each with a person and a place."""
    draw = random.Random(f"{dataset} {split}")
    sentences = []
    for index in range(n):
        name, place = draw.choice(NAMES), draw.choice(PLACES)
        text = f"{name} saw {place}" + " again" * draw.randrange(6) + f" in {1900 + index}."
        start = text.index(place)
        mentions = (Mention(0, len(name), "person"), Mention(start, start + len(place), "location"))
        types = ("location", "animal", "person") if dataset == OPEN else None
        sentences.append(Sentence(f"{dataset}/{split}/{index}", text, mentions, types))
    return sentences


def use_toys(patch: pytest.MonkeyPatch, load: Callable[[str, str], list[Sentence]] = toy) -> None:
    """Put toy datasets in place of the corpora, each with the splits train and dev."""
    patch.setattr(corpora, "load", load)
    known = {"role": "source", "domain": "toys", "types": ["location", "person"], "licence": "CC0-1.0"}
    known |= {"files": {}, "paths": lambda split: []}
    spec = SimpleNamespace(splits={"train": None, "dev": None}, **known)
    patch.setattr(corpora, "spec", lambda dataset: spec)


def use_sized(patch: pytest.MonkeyPatch) -> None:
    """Toy datasets of the :data:`SIZES`."""
    use_toys(patch, lambda dataset, split: toy(dataset, split, SIZES[dataset]))


def opened_toys(dataset: str, split: str) -> list[Sentence]:
    """20 toys, but of the open types 12 sentences that each have types of their own."""
    if dataset != OPEN:
        return toy(dataset, split, 20)
    return [
        Sentence(f"{OPEN}/{split}/{i}", f"Beast {i} eats", (Mention(0, 5, f"beast {i}"),), (f"beast {i}", f"sea {i}"))
        for i in range(12)
    ]


def run(base: Base, out: Path, work: Path, every: int = 5, **options: Any) -> tuple[Path, Card]:
    """Train an expert on one toy dataset, in fp32 on the CPU, on one thread: sums are in one order everywhere."""
    defaults: dict[str, Any] = {
        "name": "toys",
        "role": "expert",
        "domains": [["toy"]],
        "recipe": RECIPE,
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False},
        "replace": False,
        "constrained": False,
    }
    job = Job(out=out, work=work, checkpoint_every=every, **(defaults | options))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return job.folder, train_expert(job, base, HashEncoder(), FakeGenerator(capitals))
    finally:
        torch.set_num_threads(threads)


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(patch: pytest.MonkeyPatch, moment: str, strike: Callable[[], None] = kill) -> None:
    """Have ``strike`` called at ``moment``: "step N", "save" (a checkpoint is being written) or "score"."""
    step, save, load = ExpertModule.training_step, torch.save, FakeGenerator.load
    steps = 0

    def struck_step(self: ExpertModule, batch: Any, batch_idx: int) -> Any:
        nonlocal steps
        steps += 1
        if moment == f"step {steps}":
            strike()
        return step(self, batch, batch_idx)

    def struck_save(checkpoint: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(checkpoint, file, *args, **kwargs)
        if moment == "save":
            strike()

    def struck_load(*args: Any) -> None:
        if moment == "score":
            strike()
        load(*args)

    patch.setattr(ExpertModule, "training_step", struck_step)
    patch.setattr(torch, "save", struck_save)
    patch.setattr(FakeGenerator, "load", struck_load)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_toys(monkeypatch)
        arrange(monkeypatch, sys.argv[4])
        tiny = load_base(BaseSpec("tiny", "local", location=sys.argv[1]), "cpu")
        run(tiny, Path(sys.argv[2]), Path(sys.argv[3]))
