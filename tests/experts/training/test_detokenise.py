"""Ordinary spacing in place of a corpus's tokens."""

from __future__ import annotations

import pytest

from sam.experts.training.detokenise import detokenised
from sam.types import Mention, Sentence


@pytest.mark.parametrize(
    ("tokens", "expected", "mentions"),
    [
        ("He saw Bath , Rome ( Italy ) .", "He saw Bath, Rome (Italy).", ["Bath", "Rome", "Italy"]),
        ("C + + and C are old .", "C++ and C are old.", ["C + +", "C"]),
        ('It is " Up " , they did n\'t say .', 'It is "Up", they didn\'t say.', ["Up"]),
        ("Ada 's 5 % of Ltd. , Inc .", "Ada's 5% of Ltd., Inc.", ["Ada", "Ltd."]),
        ("Already fine.", "Already fine.", ["fine"]),
        (". start and end (", ". start and end (", ["start"]),
        ('hello : ) 2 . 5 and : see ; 6 " tall', 'hello :) 2.5 and: see; 6 " tall', ["hello", "tall"]),
        ("no gold , here", "no gold, here", None),
    ],
)
def test_detokenised_text_keeps_its_mentions(tokens: str, expected: str, mentions: list[str] | None) -> None:
    gold = None
    if mentions is not None:
        gold = tuple(Mention(tokens.index(m), tokens.index(m) + len(m), "t") for m in mentions)
    shown = detokenised(Sentence("s/0", tokens, gold))
    assert shown.text == expected
    if mentions is None:
        assert shown.mentions is None
    else:
        assert [shown.surface(m) for m in shown.mentions or ()] == [m.replace(" + +", "++") for m in mentions]
    assert detokenised(shown) == shown
