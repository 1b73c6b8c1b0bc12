"""A recipe's checks, and the hash by which a training is recognised."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from sam import data as corpora
from sam.errors import SamError
from sam.experts import Recipe
from sam.experts.training.recipe import recipe_hash
from sam.models.base import Base
from tests.tiny import config, one_line
from tests.toy_training import recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrate": 1}, "train.lrate is unknown; allowed: alpha, batch_size"),
        ({"epochs": 0}, "train.epochs=0 must be at least 1"),
        ({"open_sentences": -1}, "train.open_sentences=-1 must be at least 0"),
        ({"open_batch_size": 0}, "train.open_batch_size=0 must be at least 1"),
        ({"label_drop": 1.0}, "train.label_drop=1.0 must lie in"),
        ({"lr": 0.0}, "train.lr=0.0 must be above 0"),
        ({"clip": -1.0}, "train.clip=-1.0 must be at least 0"),
        ({"fused": 1}, "train.fused=1 must be true or false"),
    ],
)
def test_bad_recipe_is_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(SamError) as error:
        Recipe.from_config({**config("train", "default"), **change})
    assert one_line(error).startswith(message)


def test_missing_option_is_one_line() -> None:
    with pytest.raises(SamError) as error:
        Recipe.from_config({k: v for k, v in config("train", "default").items() if k != "lr"})
    assert one_line(error).startswith("train.lr is missing; train needs sentences, ")


def test_hash_of_a_recipe_is_fixed_and_tells_all_that_is_learnt(tiny: Base) -> None:
    base = dataclasses.replace(tiny, fingerprint="f" * 64)
    first = recipe(sentences=5000, lr=2e-3)

    def digest(**changes: Any) -> str:
        return recipe_hash(base, [["a", "b"]], dataclasses.replace(first, **changes), "32-true")

    # Experts that are already trained are known by it.
    assert digest() == digest(heldout=1, heldout_open=1) == "faddd4264799abd4"
    others = [
        recipe_hash(tiny, [["a", "b"]], first, "32-true"),
        recipe_hash(base, [["a"], ["b"]], first, "32-true"),
        recipe_hash(base, [["b", "a"]], first, "32-true"),
        recipe_hash(base, [["a", "b"]], first, "bf16-mixed"),
        *(
            digest(**{name: value + 1})
            for name, value in first.to_dict().items()
            if name not in ("heldout", "heldout_open", "open_batch_size")
        ),
        digest(open_sentences=2),
        digest(open_sentences=1, open_batch_size=2),
        digest(fused=False),
    ]
    assert len({digest(), *others}) == len(others) + 1


def test_hash_of_a_recipe_follows_the_open_sentences_files(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(sha: str, open_sentences: int) -> str:
        files = {"a": SimpleNamespace(mirror=sha), "held": SimpleNamespace(mirror=f"held {sha}")}
        spec = SimpleNamespace(files=files, paths=lambda split: {"train": ["a"], "dev": ["held"]}[split])
        monkeypatch.setattr(corpora, "spec", lambda dataset: spec)
        return recipe_hash(tiny, [["toy"]], recipe(open_sentences=open_sentences), "32-true")

    assert digest("1", 5) == digest("1", 5) != digest("2", 5)
    assert digest("1", 0) == digest("2", 0)
