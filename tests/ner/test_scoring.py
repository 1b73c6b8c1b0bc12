import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from sam.errors import SamError
from sam.ner.parsing import predict
from sam.ner.prompts import answer
from sam.ner.scoring import flatten, score
from sam.types import Mention, Prediction, Sentence
from tests.tiny import written

TYPES = ["person", "place"]


@pytest.fixture(autouse=True)
def _no_warning() -> None:
    warnings.simplefilter("error")


def sentence(text: str, *mentions: tuple[int, int, str]) -> Sentence:
    return Sentence("s1", text, tuple(Mention(*mention) for mention in mentions))


def of_spans(*mentions: Mention) -> Prediction:
    return Prediction((), tuple(sorted(mentions)), "")


ADA = sentence("Ada of New York met Bob", (0, 3, "person"), (7, 15, "place"), (20, 23, "person"))
EMPTY = sentence("Nothing here")


def test_hand_worked_scores() -> None:
    sentences = [ADA, EMPTY, EMPTY, sentence("Rome", (0, 4, "place"))]
    answers = [
        written({"person": ["Ada", "Eve"], "place": ["York"], "date": ["Bob"]}),  # 1 of 4 right, 2 of 3 missed
        "{}",
        written({"place": ["here"]}),
        "no idea",
    ]
    predictions = [predict(s.text, a, TYPES, truncated=a == "{}") for s, a in zip(sentences, answers, strict=True)]
    got = score(sentences, predictions)
    assert (got.n, got.gold, got.predicted, got.tp) == (4, 4, 5, 1)
    assert (got.precision, got.recall, got.f1) == pytest.approx((1 / 5, 1 / 4, 2 / 9))
    # Spans: "Ada", "York" and "here" are predicted; "Eve" has no place and "Bob" has a type not asked for.
    assert (got.span_precision, got.span_recall, got.span_f1) == pytest.approx((1 / 3, 1 / 4, 2 / 7))
    assert (got.unparsable, got.truncated, got.not_in_sentence, got.not_asked, got.nested_gold) == (1, 1, 1, 1, 0)
    person = {"gold": 2, "predicted": 2, "tp": 1, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    place = {"gold": 2, "predicted": 2, "tp": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    date = {"gold": 0, "predicted": 1, "tp": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert got.per_type == {"date": date, "person": person, "place": place}
    assert json.loads(json.dumps(got.to_dict()))["per_type"]["person"]["f1"] == 0.5


def test_gold_answers_score_one() -> None:
    got = score([ADA, EMPTY], [predict(s.text, answer(s, TYPES), TYPES) for s in (ADA, EMPTY)])
    assert (got.f1, got.span_f1, got.tp, got.precision, got.span_recall) == (1.0, 1.0, 3, 1.0, 1.0)


def test_empty_for_empty_is_no_true_positive() -> None:
    got = score([EMPTY, EMPTY], [predict(EMPTY.text, "{}", TYPES)] * 2)
    assert (got.tp, got.precision, got.recall, got.f1, got.span_f1, got.per_type) == (0, 0.0, 0.0, 0.0, 0.0, {})


def test_no_sentences() -> None:
    assert (score([], []).n, score([], []).f1, score([], []).span_f1) == (0, 0.0, 0.0)


def test_nothing_predicted_and_nothing_gold() -> None:
    nothing = predict(ADA.text, "{}", TYPES)
    got = score([ADA], [nothing])
    assert (got.precision, got.recall, got.f1, got.span_precision, got.span_recall) == (0.0, 0.0, 0.0, 0.0, 0.0)
    got = score([EMPTY], [predict(EMPTY.text, written({"place": ["here"]}), TYPES)])
    assert (got.precision, got.recall, got.span_precision, got.span_recall) == (0.0, 0.0, 0.0, 0.0)


def test_a_text_counts_once_a_sentence_as_pair_and_each_time_as_span() -> None:
    twice = sentence("Ada and Ada", (0, 3, "person"), (8, 11, "person"))
    got = score(
        [twice, twice],
        [predict(twice.text, written({"person": ["Ada", "Ada"]}), TYPES), of_spans(Mention(8, 11, "person"))],
    )
    assert (got.gold, got.predicted, got.tp) == (2, 1, 1)
    assert (got.span_precision, got.span_recall) == pytest.approx((1.0, 3 / 4))


def test_case_and_punctuation_count_and_whitespace_does_not() -> None:
    gold = sentence("C++, U.S.\nArmy", (0, 3, "a"), (5, 14, "a"))
    assert score([gold], [predict(gold.text, written({"a": ["C++", "U.S. Army"]}), ["a"])]).f1 == 1.0
    assert score([gold], [predict(gold.text, written({"a": ["c", "us army", "C"]}), ["a"])]).tp == 0


def test_the_type_must_match() -> None:
    got = score([sentence("Ada", (0, 3, "person"))], [predict("Ada", written({"place": ["Ada"]}), TYPES)])
    assert (got.tp, got.span_f1) == (0, 0.0)


def test_neighbouring_and_inner_spans_are_told_apart() -> None:
    gold = sentence("NewYorkCity", (0, 3, "a"), (3, 7, "a"))
    assert score([gold], [of_spans(Mention(0, 7, "a"))]).span_f1 == 0.0
    assert score([gold], [of_spans(Mention(0, 3, "a"), Mention(3, 6, "a"))]).span_f1 == 0.5


def test_nested_gold_is_flattened_longest_first_and_counted() -> None:
    gold = sentence("New York Times", (0, 8, "place"), (0, 14, "paper"), (0, 14, "place"))
    got = score([gold], [of_spans(Mention(0, 14, "paper"))])
    assert (got.nested_gold, got.span_f1, got.gold) == (2, 1.0, 3)


def test_flatten() -> None:
    assert flatten([Mention(2, 5, "a"), Mention(0, 3, "a"), Mention(4, 8, "a"), Mention(5, 6, "b")]) == [
        Mention(0, 3, "a"),
        Mention(4, 8, "a"),
    ]


@pytest.mark.parametrize("names", [("a-b", "b"), ("-a", "a"), ("a-", "-"), ("", "_"), ("I-x", "B-x"), ("O", "x y")])
def test_any_type_name_is_kept_apart_in_span_scores(names: tuple[str, str]) -> None:
    gold = sentence("Ada", (0, 3, names[0]))
    assert score([gold], [of_spans(Mention(0, 3, names[0]))]).span_f1 == 1.0
    assert score([gold], [of_spans(Mention(0, 3, names[1]))]).span_f1 == 0.0


flat_spans = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["a", "b-c", "c"])), max_size=5)


def flat(parts: list[tuple[int, int, str]]) -> list[Mention]:
    """Spans that do not overlap, out of (gap before, length, type)."""
    mentions: list[Mention] = []
    for gap, length, entity_type in parts:
        start = (mentions[-1].end if mentions else 0) + gap
        mentions.append(Mention(start, start + length, entity_type))
    return mentions


@settings(max_examples=200)
@given(st.lists(st.tuples(flat_spans, flat_spans), max_size=4))
def test_span_scores_are_those_of_sets_on_flat_data(data: list[tuple[list, list]]) -> None:
    pairs = [(flat(gold), flat(predicted)) for gold, predicted in data]
    sentences = [Sentence(str(i), "x" * 25, tuple(gold)) for i, (gold, _) in enumerate(pairs)]
    got = score(sentences, [of_spans(*predicted) for _, predicted in pairs])
    gold_spans = {(i, m) for i, (gold, _) in enumerate(pairs) for m in gold}
    predicted_spans = {(i, m) for i, (_, predicted) in enumerate(pairs) for m in predicted}
    tp = len(gold_spans & predicted_spans)
    assert got.span_precision == pytest.approx(tp / len(predicted_spans) if predicted_spans else 0.0)
    assert got.span_recall == pytest.approx(tp / len(gold_spans) if gold_spans else 0.0)
    total = len(gold_spans) + len(predicted_spans)
    assert got.span_f1 == pytest.approx(2 * tp / total if total else 0.0)
    assert got.nested_gold == 0


def test_span_f1_is_that_of_seqevals_public_strict_mode() -> None:
    gold = sentence("Ada of New York met Bob", (0, 3, "P"), (7, 15, "L"), (20, 23, "P"))
    predicted = of_spans(Mention(0, 3, "P"), Mention(11, 15, "L"), Mention(20, 23, "P"))
    true, guess = [["B-P", "O", "B-L", "I-L", "O", "B-P"]], [["B-P", "O", "O", "B-L", "O", "B-P"]]
    expected = f1_score(true, guess, average="micro", mode="strict", scheme=IOB2)
    assert expected == pytest.approx(2 / 3)
    assert score([gold], [predicted]).span_f1 == pytest.approx(expected)


def test_mistakes_are_named() -> None:
    nothing = predict("", "{}", TYPES)
    with pytest.raises(SamError, match="1 predictions for 2 sentences"):
        score([ADA, EMPTY], [nothing])
    with pytest.raises(SamError, match="'u7' has no gold"):
        score([Sentence("u7", "text")], [nothing])
    with pytest.raises(SamError, match="1 predictions for 0 sentences"):
        score([], [nothing])
    with pytest.raises(SamError, match="predicted spans of sentence 's1' overlap"):
        score([ADA], [of_spans(Mention(0, 3, "a"), Mention(2, 5, "a"))])


@pytest.mark.parametrize("span", [(2, 2), (3, 2), (-1, 2), (2, 9), (3, 4), (8, 9)])
def test_gold_that_covers_no_text_is_a_mistake(span: tuple[int, int]) -> None:
    with pytest.raises(SamError, match=f"gold mention {span[0]}:{span[1]} of sentence 's1'"):
        score([sentence("Ada met", (*span, "a"))], [predict("Ada met", "{}", TYPES)])
