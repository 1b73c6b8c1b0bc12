"""Training an expert from end to end on toy corpora: what is saved, what stays as it was, and being killed."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sam import data as corpora
from sam.errors import SamError
from sam.experts import Card, ExpertModule, Pool, Recipe, train
from sam.experts.train import auto_precision, draw_heldout, recipe_hash
from sam.merging import AdapterDeltas
from sam.models.base import Base
from sam.ner.prompts import PROMPT_VERSION, answer
from sam.types import Mention, Sentence
from tests.fakes import FakeGenerator
from tests.tiny import one_line
from tests.toy_training import RECIPE, STEPS, arrange, run, toy, use_toys

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toys(monkeypatch)


@pytest.fixture(scope="module")
def whole(tiny_loaded: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an expert that was trained without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_toys(patch)
        return run(tiny_loaded, folder / "out", folder / "work")[0]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def timeless(card: Card) -> Card:
    """The card without the time that training took."""
    return dataclasses.replace(card, training={**card.training, "seconds": None})


def steps_of(patch: pytest.MonkeyPatch) -> list[float]:
    """A list that every training step adds its loss to."""
    losses: list[float] = []
    step = ExpertModule.training_step

    def counted(self: ExpertModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    patch.setattr(ExpertModule, "training_step", counted)
    return losses


def test_loss_falls_and_the_base_model_stays(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = steps_of(monkeypatch)
    run(tiny, tmp_path / "out", tmp_path / "work")
    assert len(losses) == STEPS
    assert sum(losses[-6:]) / 6 < 0.8 * sum(losses[:6]) / 6
    assert not any("lora" in name for name, _ in tiny.model.named_modules())
    assert not any(p.requires_grad for p in tiny.model.parameters())


def test_training_twice_on_one_base_is_the_same_and_warns_of_nothing(tiny: Base, whole: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(second time|multiple adapters|peft_config).*")
        folder, _ = run(tiny, tmp_path / "out", tmp_path / "work")
    assert weights(folder) == weights(whole)
    assert (tmp_path / "work").is_dir() and not list((tmp_path / "work").iterdir())


def test_card_says_what_was_done(tiny: Base, whole: Path) -> None:
    card = Card.read(whole)
    assert (card.name, card.role, card.domain, card.base) == ("toys", "expert", "toys", "tiny")
    assert card.datasets == ("toy",) and card.types == ("location", "person") and card.sentences == 24
    assert card.base_fingerprint == tiny.fingerprint and card.prompt_version == PROMPT_VERSION
    assert card.encoder == "minilm" and sum(x * x for x in card.centroid) == pytest.approx(1, abs=1e-3)
    assert card.recipe == {
        **RECIPE.to_dict(),
        "precision": "32-true",
        "hash": recipe_hash(tiny, [["toy"]], RECIPE, "32-true"),
    }
    assert card.scores["datasets"]["toy"]["n"] == 2 and card.licences == {"toy": "CC0-1.0"}
    training = card.training
    assert training["steps"] == STEPS and training["seconds"] > 0
    assert training["parameters"] == sum(t.numel() for t in load_file(whole / "adapter_model.safetensors").values())
    assert [step for step, _ in training["curve"]] == list(range(1, STEPS + 1))
    assert training["curve"][0][1] > training["curve"][-1][1] > 0
    assert "| toy | CC0-1.0 | 2 of dev |" in (whole / "README.md").read_text()
    assert sorted(p.name for p in whole.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "expert.json",
    ]
    Pool(whole.parent).check(tiny.fingerprint, PROMPT_VERSION)


def test_peft_alone_loads_the_folder_and_finds_the_same_deltas(tiny: Base, whole: Path) -> None:
    assert {t.dtype for t in load_file(whole / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((whole / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        peft_model = PeftModel.from_pretrained(copy.deepcopy(tiny.model), str(whole))
    deltas = AdapterDeltas.open(whole)
    assert len(deltas.modules()) == 14
    for name in deltas.modules():
        layer: Any = peft_model.get_base_model().get_submodule(name)
        assert torch.allclose(layer.get_delta_weight("default"), deltas.delta(name), atol=1e-7)
        assert deltas.delta(name).abs().max() > 0


def test_finished_expert_is_kept_and_another_recipe_takes_its_place_only_if_told_to(
    tiny: Base, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = steps_of(monkeypatch)
    out, work = tmp_path / "out", tmp_path / "work"
    folder, card = run(tiny, out, work)
    made = (folder / "expert.json").stat().st_mtime_ns
    assert run(tiny, out, work) == (folder, card)
    assert len(losses) == STEPS and (folder / "expert.json").stat().st_mtime_ns == made
    slower = dataclasses.replace(RECIPE, lr=1e-3)
    with pytest.raises(SamError) as error:
        run(tiny, out, work, recipe=slower)
    assert f"holds an expert of another recipe (train.lr={RECIPE.lr}, now 0.001)" in one_line(error)
    assert len(losses) == STEPS and weights(folder) == weights(whole)
    _, other = run(tiny, out, work, recipe=slower, replace_other=True)
    assert len(losses) == 2 * STEPS and other.recipe["lr"] == 1e-3
    assert weights(folder) != weights(whole) and Card.read(folder) == other


def test_another_number_of_heldout_sentences_only_measures(
    tiny: Base, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = steps_of(monkeypatch)
    shutil.copytree(whole, tmp_path / "out" / "toys")
    (tmp_path / "out" / "toys" / "notes.txt").write_text("mine")
    few = dataclasses.replace(RECIPE, heldout=1)
    folder, card = run(tiny, tmp_path / "out", tmp_path / "work", recipe=few)
    assert not losses and weights(folder) == weights(whole)
    before = Card.read(whole)
    assert Card.read(folder) == card and card.recipe == {**before.recipe, "heldout": 1}
    assert [d["n"] for d in card.scores["datasets"].values()] == [1]
    assert dataclasses.replace(card, recipe=before.recipe, scores=before.scores) == before
    assert {f.name for f in folder.iterdir()} == {*(f.name for f in whole.iterdir()), "notes.txt"}
    _, unasked = run(tiny, tmp_path / "out", tmp_path / "work", recipe=dataclasses.replace(RECIPE, heldout=0))
    assert unasked == card
    _, again = run(tiny, tmp_path / "out", tmp_path / "work")
    assert again == before


@pytest.mark.parametrize("damage", ["expert.json", "adapter_config.json", "adapter_model.safetensors"])
def test_damaged_expert_is_trained_again(tiny: Base, whole: Path, tmp_path: Path, damage: str) -> None:
    folder, _ = run(tiny, tmp_path / "out", tmp_path / "work")
    if damage == "expert.json":
        (folder / damage).write_text("{")
    else:
        (folder / damage).unlink()
    run(tiny, tmp_path / "out", tmp_path / "work")
    assert weights(folder) == weights(whole) and timeless(Card.read(folder)) == timeless(Card.read(whole))


class Struck(Exception):  # noqa: N818
    """What a test has happen in the midst of training."""


def strike() -> None:
    raise Struck


def interrupted(base: Base, tmp_path: Path, moment: str, **options: Any) -> None:
    """Start a training that an exception ends at ``moment``."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Struck):
        arrange(patch, moment, strike)
        run(base, tmp_path / "out", tmp_path / "work", **options)


@pytest.mark.parametrize(
    ("moment", "every", "left"),
    [("step 2", 5, STEPS), ("step 13", 5, STEPS - 10), ("step 20", 5, STEPS - 15), ("score", 5, 4), ("score", 6, 0)],
)
def test_exception_leaves_the_base_model_and_the_next_run_goes_on(
    tiny: Base, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, every: int, left: int
) -> None:
    before = copy.deepcopy(tiny.model.state_dict())
    interrupted(tiny, tmp_path, moment, every=every)
    after = tiny.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert not tiny.model.training and not list((tmp_path / "out").glob("*"))
    losses = steps_of(monkeypatch)
    folder, card = run(tiny, tmp_path / "out", tmp_path / "work", every=every)
    assert len(losses) == left
    assert weights(folder) == weights(whole)
    assert timeless(card) == timeless(Card.read(whole))
    assert card.training["seconds"] > 0 and len(card.training["curve"]) == STEPS
    assert not list((tmp_path / "work").iterdir())


def test_in_bf16_too_the_next_run_goes_on_to_the_same_weights(tiny: Base, whole: Path, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed", "enable_progress_bar": False}
    folder, _ = run(tiny, tmp_path / "once" / "out", tmp_path / "once" / "work", trainer=trainer)
    before = copy.deepcopy(tiny.model.state_dict())
    interrupted(tiny, tmp_path, "step 13", trainer=trainer)
    assert all(torch.equal(tiny.model.state_dict()[n], before[n]) for n in before)
    resumed, card = run(tiny, tmp_path / "out", tmp_path / "work", trainer=trainer)
    assert weights(resumed) == weights(folder) != weights(whole)
    assert card.recipe["precision"] == "bf16-mixed"


def test_keyboard_interrupt_ends_training_without_an_expert(tiny: Base, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        arrange(patch, "step 7", interrupt)
        run(tiny, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out" / "toys").exists()


def test_checkpoint_holds_trained_tensors_only(tiny: Base, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path, "step 9")
    (path,) = (tmp_path / "work").rglob("*.ckpt")
    assert path.name == "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 5
    assert checkpoint["state_dict"] and all(".lora_" in name for name in checkpoint["state_dict"])
    trained = sum(t.nbytes for t in checkpoint["state_dict"].values())
    frozen = sum(p.nbytes for p in tiny.model.parameters())
    assert path.stat().st_size < 3 * trained + 50_000 < frozen  # with AdamW's two moments


def test_another_recipe_does_not_go_on_from_a_checkpoint(
    tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(RECIPE, lr=1e-3)
    alone, _ = run(tiny, tmp_path / "alone", tmp_path / "else", recipe=other)
    interrupted(tiny, tmp_path, "step 13")
    losses = steps_of(monkeypatch)
    folder, _ = run(tiny, tmp_path / "out", tmp_path / "work", recipe=other)
    assert len(losses) == STEPS and weights(folder) == weights(alone)


def test_truncated_checkpoint_starts_anew(
    tiny: Base, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tiny, tmp_path, "step 13")
    (path,) = (tmp_path / "work").rglob("last.ckpt")
    path.write_bytes(path.read_bytes()[:-100])
    folder, _ = run(tiny, tmp_path / "out", tmp_path / "work")
    assert "is cut short; training starts anew" in caplog.text and weights(folder) == weights(whole)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(tiny_base: Path, whole: Path, tmp_path: Path) -> None:
    """Real processes, one after the other, each killed at a worse moment; the last is left alone."""

    def start(moment: str) -> int:
        command = [sys.executable, "-m", "tests.toy_training", str(tiny_base), str(out), str(tmp_path / "work"), moment]
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=900).returncode

    out = tmp_path / "out"
    # The first leaves a checkpoint at step 5, the second dies while it writes that at 10, the third has learnt all.
    assert [start(moment) for moment in ("step 9", "save", "score")] == [-signal.SIGKILL] * 3
    assert not list(out.glob("[!.]*"))
    assert start("never") == 0
    assert weights(out / "toys") == weights(whole)


def test_hash_of_a_recipe_is_fixed_and_tells_all_that_is_learnt(tiny: Base) -> None:
    base = dataclasses.replace(tiny, fingerprint="f" * 64)
    plain = recipe_hash(base, [["a", "b"]], Recipe(), "32-true")
    # Experts that are already trained are known by it.
    assert plain == "faddd4264799abd4"
    others = [
        recipe_hash(tiny, [["a", "b"]], Recipe(), "32-true"),
        recipe_hash(base, [["a"], ["b"]], Recipe(), "32-true"),
        recipe_hash(base, [["b", "a"]], Recipe(), "32-true"),
        recipe_hash(base, [["a", "b"]], Recipe(), "bf16-mixed"),
        *(
            recipe_hash(base, [["a", "b"]], dataclasses.replace(Recipe(), **{name: value + 1}), "32-true")
            for name, value in Recipe().to_dict().items()
            if name not in ("heldout", "heldout_open", "open_batch_size")
        ),
        recipe_hash(base, [["a", "b"]], Recipe(open_sentences=2), "32-true"),
        recipe_hash(base, [["a", "b"]], Recipe(open_sentences=1, open_batch_size=2), "32-true"),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert recipe_hash(base, [["a", "b"]], Recipe(heldout=1, heldout_open=1), "32-true") == plain


def test_hash_of_a_recipe_follows_the_open_sentences_files(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(sha: str, open_sentences: int) -> str:
        files = {"a": SimpleNamespace(mirror=sha), "held": SimpleNamespace(mirror=f"held {sha}")}
        spec = SimpleNamespace(files=files, paths=lambda split: {"train": ["a"], "dev": ["held"]}[split])
        monkeypatch.setattr(corpora, "spec", lambda dataset: spec)
        return recipe_hash(tiny, [["toy"]], Recipe(open_sentences=open_sentences), "32-true")

    assert digest("1", 5) == digest("1", 5) != digest("2", 5)
    assert digest("1", 0) == digest("2", 0)


def test_what_is_not_scored_anew_keeps_its_scores(tiny: Base, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out" / "toys")
    before = Card.read(whole)
    for changes in ({"heldout": 0, "heldout_open": 1}, {"heldout": 1, "heldout_open": 0}):
        _, card = run(tiny, tmp_path / "out", tmp_path / "work", recipe=dataclasses.replace(RECIPE, **changes))
    assert [d["n"] for d in card.scores["datasets"].values()] == [1] and card.scores["open"]["dev"]["n"] == 1
    assert (card.recipe["heldout"], card.recipe["heldout_open"]) == (1, 1)
    assert before.scores["open"]["dev"]["n"] == 2


def test_trainer_options_that_change_what_is_learnt_are_refused(tiny: Base, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "accumulate_grad_batches": 2}
    with pytest.raises(SamError) as error:
        run(tiny, tmp_path / "out", tmp_path / "work", trainer=trainer)
    assert one_line(error) == (
        "trainer.accumulate_grad_batches is no option of training, which takes accelerator, devices, precision, "
        "enable_progress_bar; what is learnt is set by train.*"
    )
    assert not (tmp_path / "work").exists()


def test_precisions_that_would_cast_the_base_model_are_refused(tiny: Base, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "bf16-true", "enable_progress_bar": False}
    with pytest.raises(SamError) as error:
        run(tiny, tmp_path / "out", tmp_path / "work", trainer=trainer)
    assert one_line(error) == ("trainer.precision=bf16-true is unknown; allowed: auto, 32-true, bf16-mixed, 16-mixed")
    assert auto_precision("16-mixed", "cpu") == "16-mixed"
    assert auto_precision("auto", "cpu") in ("32-true", "bf16-mixed")


def test_bf16_autocast_leaves_the_base_model_and_trains_in_fp32(tiny: Base, whole: Path, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed", "enable_progress_bar": False}
    folder, card = run(tiny, tmp_path / "out", tmp_path / "work", trainer=trainer)
    assert card.recipe["precision"] == "bf16-mixed" and weights(folder) != weights(whole)


def test_heldout_sentences_come_from_dev_or_test_never_from_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(*splits: str) -> Any:
        return type("Spec", (), {"splits": dict.fromkeys(splits)})()

    monkeypatch.setattr(corpora, "load", lambda dataset, split: toy(dataset, split, 10))
    for splits, expected in [(("train", "dev", "test"), "test"), (("dev", "train"), "dev")]:
        monkeypatch.setattr(corpora, "spec", lambda dataset, splits=splits: spec(*splits))
        drawn = draw_heldout("toy", RECIPE)
        assert len(drawn) == 2 and {s.id.split("/")[1] for s in drawn} == {expected}
        assert drawn == draw_heldout("toy", RECIPE)
        assert not {s.text for s in draw_heldout("toy", RECIPE, {drawn[0].text})} & {drawn[0].text}
    monkeypatch.setattr(corpora, "spec", lambda dataset: spec("train"))
    assert draw_heldout("toy", RECIPE) == []


def test_what_is_missing_is_missed_before_training(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(dataset: str, split: str) -> Any:
        if split == "dev":
            raise SamError("no such file")
        return toy(dataset, split)

    losses = steps_of(monkeypatch)
    use_toys(monkeypatch, load)
    with pytest.raises(SamError, match="no such file"):
        run(tiny, tmp_path / "out", tmp_path / "work")
    assert not losses


def test_scores_are_those_of_the_saved_adapter(
    tiny: Base, whole: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions that name what is there score 1, and they are those of the saved weights."""
    caplog.set_level(logging.INFO)
    sentences = toy("toy", "dev", 4)
    monkeypatch.setattr(corpora, "load", lambda dataset, split: sentences)
    types, by_text = ["location", "person"], {s.text: s for s in sentences}

    def perfect(number: int, asked: Sequence[str], text: str) -> str:
        assert list(asked) == types
        return answer(by_text[text], types)

    generator = FakeGenerator(perfect)
    scores = train.score_heldout(generator, whole, {"toy": sentences, "none": []}, {})
    assert scores["mean_f1"] == 1.0 and set(scores["datasets"]) == {"toy"}
    toys = scores["datasets"]["toy"]
    assert (toys["split"], toys["n"], toys["precision"], toys["recall"], toys["unparsable"]) == ("dev", 4, 1.0, 1.0, 0)
    other = FakeGenerator(perfect)
    adapter = AdapterDeltas.open(whole)
    other.load((name, adapter.delta(name)) for name in adapter)
    assert generator.loads == other.loads != [0] and generator.closed == 1


def test_open_sentences_are_scored_on_their_own_types_and_unseen_ones_apart(
    tiny: Base, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Ada keeps bees and a parrot"
    mentions = (Mention(0, 3, "person"), Mention(10, 14, "insect"), Mention(21, 27, "bird"))
    first = Sentence("a", text, mentions, ("person", "insect", "bird", "fish"))
    second = Sentence("b", "Rome again", (Mention(0, 4, "capital"),), ("capital",))
    monkeypatch.setattr(train, "training_types", lambda: frozenset({"person", "bird"}))

    def reply(number: int, types: Sequence[str], of: str) -> str:
        assert (of, tuple(types)) in {(first.text, first.types), (second.text, second.types)}
        return ' {" Ada":" person"," bees":" insect"," parrot":" fish"}' if of == text else " {}"

    scores = train.score_heldout(FakeGenerator(reply), whole, {}, {"dev": [first, second]})
    opened = scores["open"]["dev"]
    assert (opened["n"], opened["precision"], opened["recall"]) == (2, 2 / 3, 2 / 4)
    # insect and capital stand in no training set; one of their two pairs was found.
    assert (opened["unseen_types"], opened["unseen_gold"], opened["unseen_recall"]) == (2, 2, 0.5)
    assert scores["datasets"] == {} and scores["mean_f1"] == 0.0


def test_an_expert_with_open_sentences_counts_its_domain_alone(tiny: Base, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, open_sentences=6, open_batch_size=4)
    folder, card = run(tiny, tmp_path / "out", tmp_path / "work", recipe=recipe)
    assert card.training["steps"] == STEPS + 2 * 2  # 6 in batches of 4, twice
    assert (card.sentences, card.types, card.datasets) == (24, ("location", "person"), ("toy",))
    assert set(card.licences) == {"toy", "open_types"} and card.recipe["open_sentences"] == 6
    assert card.scores["open"]["dev"]["n"] == 2
    assert "| open_types/dev | 2 |" in (folder / "README.md").read_text()
    plain = recipe_hash(tiny, [["toy"]], RECIPE, "32-true")
    assert card.recipe["hash"] != plain
