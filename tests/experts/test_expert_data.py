"""Training data: which sentences are drawn, how they are rendered, and the batches that they end up in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sam import data as corpora
from sam.errors import SamError
from sam.experts import ExpertDataModule, Recipe
from sam.experts.data import (
    OPEN,
    SCIENTIFIC,
    Batch,
    Renderer,
    ResumableSampler,
    draw_open,
    draw_sentences,
    foreign_types,
    rng,
)
from sam.experts.detokenise import detokenised
from sam.models.base import Base
from sam.ner import parsing, prompts
from sam.types import Mention, Sentence
from tests.tiny import config, one_line
from tests.toy_training import toy, use_toys

SIZES = {"small": 10, "middle": 50, "large": 200}


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy datasets ``small``, ``middle`` and ``large``."""
    use_toys(monkeypatch, lambda dataset, split: toy(dataset, split, SIZES[dataset]))


def counts(drawn: dict[str, tuple[list[Sentence], list[str]]]) -> dict[str, int]:
    return {name: len(sentences) for name, (sentences, _) in drawn.items()}


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (30, {"large": 10, "small": 10, "middle": 10}),
        (31, {"large": 11, "small": 10, "middle": 10}),
        (90, {"large": 40, "small": 10, "middle": 40}),  # small lacks 20: the others share them
        (150, {"large": 90, "small": 10, "middle": 50}),
        (500, {"large": 200, "small": 10, "middle": 50}),
    ],
)
def test_equal_shares_and_what_one_lacks_the_others_fill(budget: int, expected: dict[str, int]) -> None:
    drawn = draw_sentences(["large", "small", "middle"], "train", Recipe(sentences=budget))
    assert counts(drawn) == expected
    assert list(drawn) == ["large", "small", "middle"]
    assert all(types == ["location", "person"] for _, types in drawn.values())


@pytest.mark.usefixtures("sized")
def test_draw_is_by_the_seed_alone() -> None:
    def ids(seed: int, *datasets: str) -> list[str]:
        drawn = draw_sentences(datasets, "train", Recipe(sentences=20, seed=seed))
        return [s.id for s in drawn["large"][0]]

    assert ids(1, "large") == ids(1, "large") != ids(2, "large")
    assert ids(1, "large", "middle") == ids(1, "middle", "large") == ids(1, "large")[:10]
    assert len(set(ids(1, "large"))) == 20


@pytest.mark.usefixtures("sized")
def test_refused_sentences_are_not_drawn_and_too_few_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    drawn = draw_sentences(["small"], "train", Recipe(sentences=8), lambda s, types, dataset: int(s.id[-1]) % 2 == 0)
    assert {int(s.id[-1]) % 2 for s in drawn["small"][0]} == {0} and counts(drawn) == {"small": 5}
    assert "only 5 of 8 sentences could be drawn" in caplog.text


def test_repeated_texts_are_drawn_once_and_few_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(dataset: str, split: str) -> list[Sentence]:
        full = toy(dataset, split, 30)
        empty = [Sentence(f"empty/{i}", f"nothing {i}", ()) for i in range(60)]
        return [*full, *(replace(s, id=f"again/{s.id}") for s in full), *empty]

    use_toys(monkeypatch, load)
    drawn = draw_sentences(["x"], "train", Recipe(sentences=30, max_empty=0.2))["x"][0]
    assert len({s.text for s in drawn}) == len(drawn) == 30
    assert sum(not s.mentions for s in drawn) == 6  # 0.2 of 30
    # A share that the dataset does not fill: the empty ones are a fifth of what it has.
    short = draw_sentences(["x"], "train", Recipe(sentences=300, max_empty=0.2))["x"][0]
    assert (len(short), sum(not s.mentions for s in short)) == (37, 7)
    assert not [s for s in draw_sentences(["x"], "train", Recipe(sentences=30, max_empty=0))["x"][0] if not s.mentions]


TYPES = [f"type {c}" for c in "abcdefghij"]
SENTENCE = Sentence("s/0", "Ada saw London.", (Mention(0, 3, "type a"), Mention(8, 14, "type b")))


def asked(text: str) -> list[str]:
    """The types that a rendered prompt names."""
    return text.partition("\n")[0].removeprefix("Entity types: ").split(", ")


def texts_of(tokenizer: Any, batch: Batch) -> list[tuple[str, str]]:
    """The (whole prompt, answer without its end) of each example."""
    prompts_ = [tokenizer.decode([*batch.prefix, *e.ids[: -e.answer]]) for e in batch.examples]
    return [(p, tokenizer.decode(e.ids[-e.answer : -1])) for p, e in zip(prompts_, batch.examples, strict=True)]


def test_batch_is_the_prompts_and_the_answers_to_the_types_they_name(tiny: Base) -> None:
    renderer = Renderer(tiny.tokenizer, 0, Recipe(label_drop=0.5))
    second = Sentence("s/1", "London saw us.", (Mention(0, 6, "type c"),))
    for epoch in range(40):
        batch = renderer([SENTENCE, second], TYPES, epoch)
        shown = texts_of(tiny.tokenizer, batch)
        names = asked(shown[0][0])
        assert set(names) <= set(TYPES) and len(names) == len(set(names))
        for sentence, (prompt, answer), example in zip((SENTENCE, second), shown, batch.examples, strict=True):
            assert prompt == prompts.prefix(names) + prompts.suffix(sentence.text)
            assert answer == prompts.answer(sentence, names)
            assert {t for t, _ in parsing.parse(answer).pairs} == {t for t, _ in sentence.pairs} & set(names)
            assert example.ids[-1] == 0
            # Tokenised apart, as the decoder does it.
            ids = tiny.tokenizer(prompts.suffix(sentence.text), add_special_tokens=False).input_ids
            assert list(example.ids[: -example.answer]) == ids
        assert list(batch.prefix) == tiny.tokenizer(prompts.prefix(names), add_special_tokens=False).input_ids


def prompt_of(tiny: Base, renderer: Renderer, sentence: Sentence, epoch: int, foreign: Sequence[str] = ()) -> str:
    """The prompt of a batch of one."""
    return texts_of(tiny.tokenizer, renderer([sentence], TYPES, epoch, foreign))[0][0]


def test_label_drop_is_a_types_chance_to_be_left_out(tiny: Base) -> None:
    renderer = Renderer(tiny.tokenizer, 0, Recipe(label_drop=0.3))
    n = 600
    seen: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for i in range(n):
        names = asked(prompt_of(tiny, renderer, replace(SENTENCE, id=f"s/{i}"), 0))
        seen.update(names)
        first[names[0]] += 1
    for t in TYPES:
        assert seen[t] / n == pytest.approx(0.7, abs=0.08)  # four standard deviations
        assert first[t] / n == pytest.approx(0.1, abs=0.05)


def test_at_most_max_types_and_at_least_one(tiny: Base) -> None:
    few = Renderer(tiny.tokenizer, 0, Recipe(label_drop=0.0, max_types=3))
    none = Renderer(tiny.tokenizer, 0, Recipe(label_drop=0.999))
    assert {len(asked(prompt_of(tiny, few, SENTENCE, e))) for e in range(10)} == {3}
    assert {len(asked(prompt_of(tiny, none, SENTENCE, e))) for e in range(10)} == {1}


def test_rendering_is_by_seed_first_sentence_and_epoch_alone(tiny: Base) -> None:
    one = Renderer(tiny.tokenizer, 0, Recipe(seed=1))
    random.seed(5)
    batch = one([SENTENCE], TYPES, 2)
    random.seed(6)
    assert Renderer(tiny.tokenizer, 0, Recipe(seed=1))([SENTENCE], TYPES, 2) == batch
    others = [one([SENTENCE], TYPES, 3), one([replace(SENTENCE, id="s/1")], TYPES, 2)]
    others.append(Renderer(tiny.tokenizer, 0, Recipe(seed=2))([SENTENCE], TYPES, 2))
    assert batch not in others
    assert one([SENTENCE, replace(SENTENCE, id="s/1")], TYPES, 2).prefix == batch.prefix


def test_rng_is_the_same_in_every_process() -> None:
    # The first 8 bytes of sha256("(0, 'sentences')") seed it.
    assert rng(0, "sentences").random() == random.Random(int("3c3d588f4c604cb5", 16)).random()
    assert rng(0, "a").random() != rng(0, "b").random() != rng(1, "b").random()


def test_sampler_goes_on_where_it_starts() -> None:
    assert list(ResumableSampler(5)) == [0, 1, 2, 3, 4]
    assert list(ResumableSampler(5, 3)) == [3, 4] and len(ResumableSampler(5, 3)) == 5
    assert list(ResumableSampler(5, 5)) == []


@pytest.mark.usefixtures("sized")
def test_data_module_draws_a_budget_for_each_domain(tiny: Base) -> None:
    recipe = Recipe(sentences=20, epochs=3, batch_size=4, max_length=120, detokenise=0.0)
    data = ExpertDataModule([["small", "middle"], ["large"]], tiny.tokenizer, 0, recipe)
    data.setup()
    found = Counter(s.id.split("/")[0] for s in data.sentences)
    assert found == {"small": 10, "middle": 10, "large": 20} and data.types == ["location", "person"]
    epochs = [data.plan[i : i + 11] for i in (0, 11, 22)]
    for batches in epochs:  # of 10, 10 and 20 sentences
        assert Counter(len(b.examples) for b in batches) == {4: 9, 2: 2} and len(data.plan) == 33
        for batch in batches:
            read = {t.split("Text: ")[1].split("\n")[0] for t, _ in texts_of(tiny.tokenizer, batch)}
            assert any(read <= {s.text for s in data.sentences if s.id.split("/")[0] == name} for name in SIZES)
    texts = [sorted(t for b in batches for t, _ in texts_of(tiny.tokenizer, b)) for batches in epochs]
    shown = [sorted(t.split("Text:")[1].split("\n")[0] for t in of_epoch) for of_epoch in texts]
    assert shown[0] == shown[1] == shown[2]  # each sentence once an epoch, rendered anew
    assert texts[0] != texts[1]
    sets = [{frozenset(b.examples) for b in batches} for batches in epochs]
    assert len(sets[0] & sets[1]) < 3
    for batches in epochs:  # of the datasets in turns
        texts_in_turn = [texts_of(tiny.tokenizer, b)[0][0].split("Text: ")[1].split("\n")[0] for b in batches]
        of = {s.text: s.id.split("/")[0] for s in data.sentences}
        changes = sum(of[a] != of[b] for a, b in zip(texts_in_turn, texts_in_turn[1:], strict=False))
        assert changes > 3
    plan = data.plan
    data.setup()
    assert data.plan is plan
    again = ExpertDataModule([["small", "middle"], ["large"]], tiny.tokenizer, 0, recipe)
    again.setup()
    assert again.plan == plan


@pytest.mark.usefixtures("sized")
def test_a_dataset_of_two_domains_counts_for_both(tiny: Base) -> None:
    recipe = Recipe(sentences=20, max_length=120)
    data = ExpertDataModule([["small", "middle"], ["middle"]], tiny.tokenizer, 0, recipe)
    data.setup()
    assert Counter(s.id.split("/")[0] for s in data.sentences) == {"small": 10, "middle": 10 + 20}
    assert sum(len(b.examples) for b in data.plan) == 40


@pytest.mark.usefixtures("sized")
def test_long_sentences_are_left_out_and_none_left_is_refused(tiny: Base) -> None:
    data = ExpertDataModule([["large"]], tiny.tokenizer, 0, Recipe(sentences=50, max_length=55, label_drop=0.0))
    data.setup()
    assert len(data.sentences) > 0 and all(len(e.ids) <= 55 for b in data.plan for e in b.examples)
    assert max(len(s.text) for s in data.sentences) < max(len(s.text) for s in toy("large", "train", 200))
    with pytest.raises(SamError) as error:
        ExpertDataModule([["large"], ["small"]], tiny.tokenizer, 0, Recipe(max_length=8)).setup()
    assert one_line(error) == "train.max_length=8 leaves no sentence of large, small; raise it"


@pytest.mark.usefixtures("sized")
def test_loader_goes_on_after_the_batches_done(tiny: Base) -> None:
    data = ExpertDataModule([["small"]], tiny.tokenizer, 0, Recipe(sentences=10, batch_size=2, max_length=120))
    data.setup()
    full = [b["input_ids"].tolist() for b in data.train_dataloader()]
    assert {len(rows) for rows in full} == {1}
    data.most_packed = 0
    assert {len(b["input_ids"]) for b in data.train_dataloader()} == {2}
    data.most_packed = 512
    data.load_state_dict({"start": 3})
    assert [b["input_ids"].tolist() for b in data.train_dataloader()] == full[3:]
    assert data.state_dict() == {"start": 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lrate": 1}, "train.lrate is unknown; allowed: alpha, batch_size"),
        ({"epochs": 0}, "train.epochs=0 must be at least 1"),
        ({"open_sentences": -1}, "train.open_sentences=-1 must be at least 0"),
        ({"open_batch_size": 0}, "train.open_batch_size=0 must be at least 1"),
        ({"label_drop": 1.0}, "train.label_drop=1.0 must lie in"),
        ({"lr": 0.0}, "train.lr=0.0 must be above 0"),
        ({"clip": -1.0}, "train.clip=-1.0 must be at least 0"),
    ],
)
def test_bad_recipe_is_one_line(change: dict[str, float], said: str) -> None:
    with pytest.raises(SamError) as error:
        Recipe.from_config({**Recipe().to_dict(), **change})
    assert one_line(error).startswith(said)


def test_shipped_recipe_is_one() -> None:
    assert Recipe.from_config(config("train", "default")).sentences > 0


def test_negatives_are_foreign_types_without_gold(tiny: Base) -> None:
    renderer = Renderer(tiny.tokenizer, 0, Recipe(label_drop=0.0, negatives=3))
    foreign = ["gene", "drug", "cell", "organ"]
    added: Counter[int] = Counter()
    for epoch in range(200):
        ((text, answer),) = texts_of(tiny.tokenizer, renderer([SENTENCE], TYPES, epoch, foreign))
        assert set(TYPES) <= set(asked(text)) <= {*TYPES, *foreign}
        added[len(asked(text)) - len(TYPES)] += 1
        assert answer == prompts.answer(SENTENCE, asked(text)) and not set(foreign) & {
            t for t, _ in parsing.parse(answer).pairs
        }
    assert set(added) == {0, 1, 2, 3} and min(added.values()) > 30
    one = Renderer(tiny.tokenizer, 0, Recipe(label_drop=0.0, negatives=3, max_types=10))
    assert {len(asked(prompt_of(tiny, one, SENTENCE, e, foreign))) for e in range(20)} == {10}


SOURCES = [name for name in corpora.datasets() if corpora.spec(name).role == "source"]


@pytest.mark.parametrize("dataset", SOURCES)
def test_foreign_types_contradict_no_source_of_a_domain(dataset: str) -> None:
    """Types of the other side of everyday and scientific text, that no dataset of its own side marks."""
    foreign = set(foreign_types(dataset))
    domain = corpora.spec(dataset).domain
    for other in SOURCES:
        if corpora.spec(other).domain == domain:
            assert not foreign & set(corpora.spec(other).types)
    general = {"person", "location", "date", "city"}
    assert foreign >= (general if domain in SCIENTIFIC else {"gene or protein", "chemical", "material"})
    assert not foreign & ({"organization"} | (set() if domain in SCIENTIFIC else general))
    assert not foreign & {"restaurant name", "political party", "astronomical object"}  # of targets alone


def test_examples_with_negatives_keep_to_max_length(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch)
    monkeypatch.setattr("sam.experts.data.foreign_types", lambda dataset: ["a rather long name of a type", "gene"])
    longest = 0
    for limit in (90, 60):
        recipe = Recipe(sentences=40, negatives=2, detokenise=0.5, max_length=limit)
        module = ExpertDataModule([["toy"]], tiny.tokenizer, 0, recipe)
        module.setup()
        longest = max(len(e.ids) for batch in module.plan for e in batch.examples)
        assert longest <= limit
    assert longest > 30


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
    found = detokenised(Sentence("s/0", tokens, gold))
    assert found.text == expected
    if mentions is None:
        assert found.mentions is None
    else:
        assert [found.surface(m) for m in found.mentions or ()] == [m.replace(" + +", "++") for m in mentions]
    assert detokenised(found) == found


def test_detokenise_is_a_chance(tiny: Base) -> None:
    sentence = replace(SENTENCE, text="Ada saw London .")
    for chance, shown in ((0.0, {False}), (0.5, {False, True}), (1.0, {True})):
        renderer = Renderer(tiny.tokenizer, 0, Recipe(detokenise=chance))
        texts = [prompt_of(tiny, renderer, sentence, e) for e in range(30)]
        assert {"London.\n" in text for text in texts} == shown
    together = Renderer(tiny.tokenizer, 0, Recipe(detokenise=0.5))([sentence] * 30, TYPES, 0)
    assert {"London.\n" in text for text, _ in texts_of(tiny.tokenizer, together)} == {False, True}


def opened(dataset: str, split: str, n: int = 12) -> list[Sentence]:
    """Sentences of types of their own, beside the toys."""
    if dataset != OPEN:
        return toy(dataset, split, 20)
    return [
        Sentence(f"{OPEN}/{split}/{i}", f"Beast {i} eats", (Mention(0, 5, f"beast {i}"),), (f"beast {i}", f"sea {i}"))
        for i in range(n)
    ]


def test_open_sentences_are_each_asked_for_their_own_types(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch, opened)
    recipe = Recipe(
        sentences=8, open_sentences=7, open_batch_size=3, epochs=2, max_length=120, label_drop=0.9, detokenise=1.0
    )
    data = ExpertDataModule([["large"]], tiny.tokenizer, 0, recipe)
    data.setup()
    batches = [b for b in data.plan if not b.prefix]
    assert [len(b.examples) for b in batches].count(3) == 2 * 2 and len(batches) == 2 * 3
    assert {s.id.split("/")[0] for s in data.sentences} == {"large"} and len(data.opened) == 7
    shown = Counter(text for b in batches for text, _ in texts_of(tiny.tokenizer, b))
    assert sum(shown.values()) == 2 * 7
    for batch in batches:
        for text, answer in texts_of(tiny.tokenizer, batch):
            number = text.split("Beast ")[1].split()[0]
            # Nothing is dropped or added, only shuffled.
            assert sorted(asked(text)) == [f"beast {number}", f"sea {number}"]
            assert answer == f' {{" Beast":" beast {number}"}}'


def test_fewer_open_sentences_are_among_more_and_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch, opened)

    def ids(n: int, seed: int = 0) -> list[str]:
        return [s.id for s in draw_open(Recipe(open_sentences=n, seed=seed), lambda s: not s.id.endswith("/3"))]

    assert ids(0) == [] and ids(4) == ids(9)[:4] and ids(9) != ids(9, seed=1)
    assert f"{OPEN}/train/3" not in ids(11) and len(set(ids(11))) == 11
    with pytest.raises(SamError) as error:
        ids(12)
    assert one_line(error) == "train.open_sentences=12: open_types has 11 that fit; ask for fewer"
