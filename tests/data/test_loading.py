"""What is mended between a file and its sentences."""

from __future__ import annotations

from collections import Counter

import pytest

from sam.data.loading import joined
from sam.data.readers import Draft
from sam.types import Mention


@pytest.mark.parametrize(
    ("text", "spans", "new", "surfaces"),
    [
        ("hi @ Ada , @ Bo", [(3, 4, "P"), (5, 8, "P"), (11, 12, "P"), (13, 15, "P")], "hi @Ada , @Bo", ["@Ada", "@Bo"]),
        ("@ Ada Bo", [(0, 1, "P"), (2, 5, "P"), (6, 8, "P")], "@Ada Bo", ["@Ada", "Bo"]),
        ("@ Ada", [(0, 1, "P"), (2, 5, "Q")], "@ Ada", ["@", "Ada"]),  # another label
        ("@ , Ada", [(0, 1, "P"), (4, 7, "P")], "@ , Ada", ["@", "Ada"]),  # not next to it
        ("at Ada @", [(3, 6, "P"), (7, 8, "P")], "at Ada @", ["Ada", "@"]),
        ("at @ home", [], "at @ home", []),
    ],
)
def test_a_mark_is_joined_with_the_mention_that_it_belongs_to(
    text: str, spans: list[tuple[int, int, str]], new: str, surfaces: list[str]
) -> None:
    counts: Counter[str] = Counter()
    found = joined(Draft(text, tuple(Mention(*span) for span in spans), "f"), "@", counts)
    assert (found.text, [found.text[m.start : m.end] for m in found.mentions]) == (new, surfaces)
    assert counts["marks_joined"] == len(spans) - len(surfaces)
