"""The batches that an expert is trained on, and where a resumed run goes on."""

from __future__ import annotations

from collections import Counter

import pytest

from sam.errors import SamError
from sam.experts import ExpertDataModule
from sam.experts.training import data as training_data
from sam.models.base import Base
from tests.experts.training.test_render import asked, texts_of
from tests.tiny import one_line
from tests.toy_training import SIZES, opened_toys, recipe, toy, use_sized, use_toys


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    use_sized(monkeypatch)


@pytest.mark.usefixtures("sized")
def test_data_module_draws_a_budget_for_each_domain(tiny: Base) -> None:
    few = recipe(sentences=20, epochs=3, batch_size=4, max_length=120, detokenise=0.0)
    data = ExpertDataModule([["small", "middle"], ["large"]], tiny.tokenizer, 0, few)
    data.setup()
    drawn = Counter(s.id.split("/")[0] for s in data.sentences)
    assert drawn == {"small": 10, "middle": 10, "large": 20} and data.types == ["location", "person"]
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
    again = ExpertDataModule([["small", "middle"], ["large"]], tiny.tokenizer, 0, few)
    again.setup()
    assert again.plan == plan


@pytest.mark.usefixtures("sized")
def test_a_dataset_of_two_domains_counts_for_both(tiny: Base) -> None:
    few = recipe(sentences=20, max_length=120)
    data = ExpertDataModule([["small", "middle"], ["middle"]], tiny.tokenizer, 0, few)
    data.setup()
    assert Counter(s.id.split("/")[0] for s in data.sentences) == {"small": 10, "middle": 10 + 20}
    assert sum(len(b.examples) for b in data.plan) == 40


@pytest.mark.usefixtures("sized")
def test_long_sentences_are_left_out_and_none_left_is_refused(tiny: Base) -> None:
    data = ExpertDataModule([["large"]], tiny.tokenizer, 0, recipe(sentences=50, max_length=55, label_drop=0.0))
    data.setup()
    assert len(data.sentences) > 0 and all(len(e.ids) <= 55 for b in data.plan for e in b.examples)
    assert max(len(s.text) for s in data.sentences) < max(len(s.text) for s in toy("large", "train", 200))
    with pytest.raises(SamError) as error:
        ExpertDataModule([["large"], ["small"]], tiny.tokenizer, 0, recipe(max_length=8)).setup()
    assert one_line(error) == "train.max_length=8 leaves no sentence of large, small; raise it"


@pytest.mark.usefixtures("sized")
def test_loader_goes_on_after_the_batches_done(tiny: Base) -> None:
    data = ExpertDataModule([["small"]], tiny.tokenizer, 0, recipe(sentences=10, batch_size=2, max_length=120))
    data.setup()
    full = [b["input_ids"].tolist() for b in data.train_dataloader()]
    assert {len(rows) for rows in full} == {2}
    data.load_state_dict({"start": 3})
    assert [b["input_ids"].tolist() for b in data.train_dataloader()] == full[3:]
    assert data.state_dict() == {"start": 3}


def test_examples_with_negatives_keep_to_max_length(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch)
    monkeypatch.setattr(training_data, "foreign_types", lambda dataset: ["a rather long name of a type", "gene"])
    longest = 0
    for limit in (90, 60):
        few = recipe(sentences=40, negatives=2, detokenise=0.5, max_length=limit)
        module = ExpertDataModule([["toy"]], tiny.tokenizer, 0, few)
        module.setup()
        longest = max(len(e.ids) for batch in module.plan for e in batch.examples)
        assert longest <= limit
    assert longest > 30


def test_open_sentences_are_each_asked_for_their_own_types(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch, opened_toys)
    few = recipe(
        sentences=8, open_sentences=7, open_batch_size=3, epochs=2, max_length=120, label_drop=0.9, detokenise=1.0
    )
    data = ExpertDataModule([["large"]], tiny.tokenizer, 0, few)
    data.setup()
    batches = [b for b in data.plan if not b.prefix]
    assert [len(b.examples) for b in batches].count(3) == 2 * 2 and len(batches) == 2 * 3
    assert {s.id.split("/")[0] for s in data.sentences} == {"large"} and len(data.opened) == 7
    shown = Counter(text for b in batches for text, _ in texts_of(tiny.tokenizer, b))
    assert sum(shown.values()) == 2 * 7
    for batch in batches:
        for text, completion in texts_of(tiny.tokenizer, batch):
            number = text.split("Beast ")[1].split()[0]
            # Nothing is dropped or added, only shuffled.
            assert sorted(asked(text)) == [f"beast {number}", f"sea {number}"]
            assert completion == f' {{" Beast":" beast {number}"}}'
