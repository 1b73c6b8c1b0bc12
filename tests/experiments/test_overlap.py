"""Overlap of type names, with an encoder whose similarities are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from experiments.overlap import markdown, overlap, summary
from sam.data.targets import Target
from sam.types import Mention, Sentence

ANGLES = {"bee": 0, "insect": 30, "cat": 90, "pet": 150}


class Angles:
    def embed(self, names: Sequence[str]) -> np.ndarray:
        turned = np.radians([ANGLES[name] for name in names])
        return np.stack([np.cos(turned), np.sin(turned)], axis=1)


def test_shares_and_similarities_are_weighted_by_gold_pairs() -> None:
    mentions = (Mention(0, 3, "bee"), Mention(4, 7, "bee"), Mention(8, 11, "bee"), Mention(12, 15, "cat"))
    target = Target("t", ("bee", "cat"), (Sentence("s", "Ann Ben Cyd Tom", mentions),), ())
    frame = overlap([target], {"sources": ["insect", "pet"], "with open types": ["bee", "insect", "pet"]}, Angles())
    assert list(frame["nearest"]) == [
        "insect",
        "insect",
        "bee",
        "insect",
    ]  # cat: 60 degrees from either; the first wins
    table = summary(frame)
    sources, opened = table.loc[("t", "sources")], table.loc[("t", "with open types")]
    assert (sources["exact"], opened["exact"]) == (0.0, 75.0) and sources["pairs"] == 4
    assert sources["similarity"] == pytest.approx((3 * np.cos(np.radians(30)) + 0.5) / 4)
    assert opened["similarity"] == pytest.approx((3 * 1.0 + 0.5) / 4)
    assert markdown(frame).splitlines()[2] == "| t | 4 | 0.0 | 0.77 | 75.0 | 0.88 |"
