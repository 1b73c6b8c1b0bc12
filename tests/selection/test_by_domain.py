"""Domain similarity on centroids made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.encoder import Encoder, EncoderSpec
from sam.selection import by_domain as domain
from tests.tiny import make_card, one_line


class PlaneEncoder(Encoder):
    """A text is its own embedding: ``"3 4"`` is (0.6, 0.8)."""

    def __init__(self, name: str = "plane") -> None:
        super().__init__(EncoderSpec(name, "local", "nowhere", "0" * 64, None, None))

    def embed(self, texts: Sequence[str]) -> Any:
        rows = np.array([[float(x) for x in text.split()] for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pool_of(folder: Path, centroids: dict[str, tuple[float, float]], encoder: str = f"plane:{16 * '0'}") -> Pool:
    for name, centroid in centroids.items():
        (folder / name).mkdir(parents=True)
        make_card(name, "f", encoder=encoder, centroid=centroid).write(folder / name)
    return Pool(folder)


def test_experts_are_ranked_by_the_cosine_of_centroids(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, {"away": (-1.0, 0.0), "aside": (0.0, 1.0), "near": (0.6, 0.8), "ahead": (1.0, 0.0)})
    # The two texts average to (1, 1) / sqrt(2).
    ranking = domain.rank(["1 0", "0 1"], pool.names, pool, PlaneEncoder())
    assert ranking.experts == ("near", "ahead", "aside", "away")
    half = math.sqrt(0.5)
    expected = {"near": 1.4 * half, "ahead": half, "aside": half, "away": -half}
    assert ranking.scores == pytest.approx(expected, abs=1e-6)


def test_equal_similarity_goes_by_the_seed_and_not_by_the_order_asked(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, {"b": (1.0, 0.0), "a": (1.0, 0.0), "c": (1.0, 0.0)})
    orders = [
        {
            domain.rank(["1 0"], names, pool, PlaneEncoder(), seed).experts
            for names in (["c", "b", "a"], ["a", "b", "c"])
        }
        for seed in range(8)
    ]
    assert all(len(found) == 1 for found in orders) and len(set.union(*orders)) > 1


def test_only_the_names_asked_for_are_ranked(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, {"a": (1.0, 0.0), "b": (0.0, 1.0)})
    assert domain.rank(["1 0"], ["b"], pool, PlaneEncoder()).experts == ("b",)


def test_a_centroid_of_another_encoder_is_refused(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, {"a": (1.0, 0.0)}, encoder="minilm")
    with pytest.raises(SamError) as error:
        domain.rank(["1 0"], ["a"], pool, PlaneEncoder("mpnet"))
    message = one_line(error)
    assert "'a'" in message
    assert "encoder=minilm" in message
    assert "not mpnet:0000000000000000;" in message


def test_a_target_without_text_is_refused(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, {"a": (1.0, 0.0)})
    with pytest.raises(SamError, match="at least one sentence"):
        domain.rank([], ["a"], pool, PlaneEncoder())
