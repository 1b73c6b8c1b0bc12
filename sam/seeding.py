"""Randomness that is a function of what it is for."""

from __future__ import annotations

import hashlib
import random


def rng(*parts: object) -> random.Random:
    """A generator seeded by the values of ``parts``: the same in every process, whatever else drew before."""
    return random.Random(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big"))
