import itertools
from typing import Any

import pytest

from sam.errors import SamError
from sam.ner.combine import combine, intersection, union, vote
from sam.ner.parsing import predict
from sam.task import Rule
from sam.types import Mention, Prediction
from tests.tiny import written

TEXT = "Ada of New York met Bob"
TYPES = ["person", "place"]
ONE = predict(TEXT, written({"person": ["Ada", "Eve"], "place": ["York"]}), TYPES)
SECOND = written({"person": ["Bob", "Ada"], "place": ["New York", "Ada"], "date": ["Bob"]})
TWO = predict(TEXT, SECOND, TYPES, truncated=True)
BROKEN = predict(TEXT, "nothing", TYPES)


def test_union_keeps_the_first_models_pairs_and_adds_new_ones() -> None:
    got = combine([ONE, TWO], TEXT, union, TYPES)
    assert got.pairs == (
        ("person", "Ada"),
        ("person", "Eve"),
        ("place", "York"),
        ("person", "Bob"),
        ("place", "New York"),
        ("place", "Ada"),
        ("date", "Bob"),
    )
    assert got.mentions == (Mention(0, 3, "person"), Mention(7, 15, "place"), Mention(20, 23, "person"))
    assert (got.not_in_sentence, got.not_asked, got.completion) == (1, 1, "")


def test_a_span_under_two_types_goes_to_the_first_model() -> None:
    person, place = (predict(TEXT, written({t: ["Ada"]}), TYPES) for t in TYPES)
    assert combine([person, place], TEXT, union, TYPES).mentions == (Mention(0, 3, "person"),)
    assert combine([place, person], TEXT, union, TYPES).mentions == (Mention(0, 3, "place"),)
    assert combine([place, person], TEXT, union, TYPES).pairs == (("place", "Ada"), ("person", "Ada"))


def test_intersection_keeps_what_all_found() -> None:
    got = combine([ONE, TWO], TEXT, intersection, TYPES)
    assert got.pairs == (("person", "Ada"),)
    assert got.mentions == (Mention(0, 3, "person"),)
    assert (got.not_in_sentence, got.not_asked) == (0, 0)
    assert combine([ONE, TWO, BROKEN], TEXT, intersection, TYPES).pairs == ()


def test_vote_keeps_what_two_voices_found() -> None:
    three = predict(TEXT, written({"person": ["Bob", "Bob"], "place": ["York"]}), TYPES)
    assert combine([ONE, TWO, three], TEXT, vote, TYPES).pairs == (
        *(("person", "Ada"), ("place", "York"), ("person", "Bob")),
    )
    # A model merged of three speaks for three: all it found stays, and a single model alone adds nothing.
    got = combine([ONE, TWO, three], TEXT, vote, TYPES, [3, 1, 1])
    assert got.pairs == (*ONE.pairs, ("person", "Bob"))
    assert combine([ONE, TWO], TEXT, vote, TYPES, [3, 3]) == combine([ONE, TWO], TEXT, union, TYPES)


def test_flags() -> None:
    assert combine([ONE, TWO], TEXT, union, TYPES).truncated
    assert not combine([BROKEN, ONE], TEXT, union, TYPES).unparsable
    assert combine([BROKEN, BROKEN], TEXT, union, TYPES).unparsable


@pytest.mark.parametrize("rule", [union, intersection, vote])
def test_one_model_combines_to_itself(rule: Rule) -> None:
    got = combine([TWO], TEXT, rule, TYPES)
    assert got == Prediction(TWO.pairs, TWO.mentions, "", False, True, TWO.not_in_sentence, TWO.not_asked)


@pytest.mark.parametrize("rule", [union, intersection, vote])
def test_the_set_of_pairs_does_not_depend_on_the_order_of_models(rule: Rule) -> None:
    orders = itertools.permutations([ONE, TWO, BROKEN])
    assert len({frozenset(combine(order, TEXT, rule, TYPES).pairs) for order in orders}) == 1


def test_no_predictions_are_refused() -> None:
    with pytest.raises(SamError, match="no predictions"):
        combine([], TEXT, union, TYPES)


@pytest.mark.parametrize("returned", [None, "person", ["person"], [("person", "Ada", 1)]])
def test_what_a_rule_returns_is_checked(returned: Any) -> None:
    with pytest.raises(SamError, match="must return a list of"):
        combine([ONE, TWO], TEXT, lambda predictions, voices: returned, TYPES)
