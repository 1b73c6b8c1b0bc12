"""Draws are a function of what they are for."""

from __future__ import annotations

import random

from sam.seeding import rng


def test_rng_is_the_same_in_every_process() -> None:
    # The first 8 bytes of sha256("(0, 'sentences')") seed it.
    assert rng(0, "sentences").random() == random.Random(int("3c3d588f4c604cb5", 16)).random()
    assert rng(0, "a").random() != rng(0, "b").random() != rng(1, "b").random()
