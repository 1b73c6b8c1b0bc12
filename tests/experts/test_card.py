"""Cards and pools: what is read, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sam.errors import SamError
from sam.experts import Card, Pool
from sam.experts.modelcard import write_readme
from sam.launch import compose
from sam.models.base import Base
from sam.models.identity import fold_hash, identity
from sam.models.spec import BaseSpec
from sam.ner.prompts import PROMPT_VERSION
from sam.paths import staged
from tests.tiny import make_card, one_line

MakePool = Callable[..., Pool]


@pytest.fixture
def pool(tiny_pool: MakePool, tmp_path: Path) -> Pool:
    """news, social, biomedical and the unified model."""
    return tiny_pool(tmp_path / "pool", n=3)


def edit(folder: Path, **changes: object) -> None:
    """Change keys of the card in ``folder``; None takes a key out."""
    card = json.loads((folder / "expert.json").read_text())
    card = {k: v for k, v in {**card, **changes}.items() if v is not None}
    (folder / "expert.json").write_text(json.dumps(card))


def test_card_survives_writing_and_reading(tmp_path: Path) -> None:
    card = make_card("stem", "abc", types=("célula", "line\nbreak"), scores={"datasets": {"x": {"f1": 0.5, "n": 3}}})
    card.write(tmp_path)
    assert Card.read(tmp_path) == card
    assert "célula" in (tmp_path / "expert.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": None}, "is not an expert card ('types'); train the expert again"),
        ({"base": None}, "missing 1 required positional argument: 'base'"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
        ({"centroid": 3}, "is not an expert card"),
        ({"role": "boss"}, "role 'boss' is unknown; allowed: expert, unified"),
    ],
)
def test_broken_card_is_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    make_card("stem", "abc").write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(SamError) as error:
        Card.read(tmp_path)
    assert str(tmp_path / "expert.json") in one_line(error) and message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"card"'])
def test_card_that_is_no_object_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "expert.json").write_text(text)
    with pytest.raises(SamError, match="is not an expert card") as error:
        Card.read(tmp_path)
    one_line(error)


def test_pool_reads_cards_in_order_and_ranks_no_unified_model(pool: Pool) -> None:
    assert list(pool.cards) == ["biomedical", "news", "social", "unified"]
    assert pool.names == ["biomedical", "news", "social"]
    assert pool.folder("unified") == pool.path / "unified"
    assert pool.cards["news"] == Card.read(pool.path / "news")


def test_good_pool_passes(pool: Pool, tiny: Base) -> None:
    pool.check(tiny.fingerprint, PROMPT_VERSION)
    pool.check(tiny.fingerprint, PROMPT_VERSION, ["unified"])


def test_adding_a_folder_adds_an_expert_and_other_files_are_passed_over(pool: Pool) -> None:
    (pool.path / "notes").mkdir()
    (pool.path / "README.md").touch()
    (pool.path / "geology").mkdir()
    make_card("geology", "abc").write(pool.path / "geology")
    assert Pool(pool.path).names == ["biomedical", "geology", "news", "social"]


def test_expert_in_the_making_is_not_in_the_pool(pool: Pool) -> None:
    with staged(pool.path / "geology") as stage:
        (stage / "adapter_config.json").touch()
        assert Pool(pool.path).names == ["biomedical", "news", "social"]
        make_card("geology", "abc").write(stage)
        assert Pool(pool.path).names == ["biomedical", "news", "social"]
    assert Pool(pool.path).names == ["biomedical", "geology", "news", "social"]


def test_missing_and_empty_pools_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SamError) as error:
        Pool(tmp_path / "absent")
    assert one_line(error).startswith(f"experts.path={tmp_path / 'absent'} is not a folder")
    with pytest.raises(SamError) as error:
        _ = Pool(tmp_path).names
    assert one_line(error) == f"experts.path={tmp_path} holds no expert; train some with `run.py task=train`"


def test_what_is_no_pool_but_near_one_is_said(tmp_path: Path, shared_pool: Pool) -> None:
    pool = Path(shutil.copytree(shared_pool.path, tmp_path / "pools" / "mine"))
    with pytest.raises(SamError) as error:
        assert Pool(pool.parent).cards
    assert one_line(error) == f"experts.path={pool.parent} holds no expert; it holds pools: {pool}"
    with pytest.raises(SamError) as error:
        assert Pool(pool / "news").cards
    assert one_line(error).endswith(f"holds no expert; it is one itself: give its parent, {pool}")
    card = shared_pool.cards["news"]
    (pool / "start").mkdir()
    make_card("start", card.base_fingerprint, role="start").write(pool / "start")
    make_card("news", "0" * 64, base_fold="1" * 64).write(pool / "news")
    with pytest.raises(SamError) as error:
        Pool(pool).check(card.base_fingerprint, PROMPT_VERSION, ["news"])
    assert "with an adapter baked in (111111111111)" in one_line(error)
    assert f"base.fold={pool / 'start'}" in one_line(error)


def test_unknown_name_lists_those_there_are(pool: Pool) -> None:
    with pytest.raises(SamError) as error:
        pool.check("f", PROMPT_VERSION, ["nwes"])
    assert one_line(error) == f"expert 'nwes' is not in {pool.path}; it holds: biomedical, news, social, unified"


def test_folder_without_its_card_and_renamed_folder_are_refused(pool: Pool) -> None:
    (pool.path / "news").rename(pool.path / "press")
    with pytest.raises(SamError, match="the card says 'news'; an expert's folder bears its name") as error:
        _ = pool.cards
    one_line(error)
    (pool.path / "press" / "expert.json").unlink()
    with pytest.raises(SamError, match="press has no expert.json") as error:
        _ = pool.cards
    one_line(error)


def test_other_base_and_other_prompt_are_refused(pool: Pool, tiny: Base) -> None:
    with pytest.raises(SamError) as error:
        pool.check("0123456789abcdef", PROMPT_VERSION)
    assert one_line(error) == (
        f"expert 'biomedical' was trained on base tiny ({tiny.fingerprint[:12]}), not on this one (0123456789ab); "
        "choose base=tiny and base.fold=null, or a pool trained on this base"
    )
    with pytest.raises(SamError, match=f"trained with prompt version {PROMPT_VERSION}, this is 99") as error:
        pool.check(tiny.fingerprint, "99")
    one_line(error)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights_are_refused(pool: Pool, tiny: Base, keep: int) -> None:
    path = pool.path / "news" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SamError) as error:
        pool.check(tiny.fingerprint, PROMPT_VERSION)
    assert one_line(error).startswith(f"{path} is missing or corrupt")
    pool.check(tiny.fingerprint, PROMPT_VERSION, ["biomedical", "social"])


@pytest.mark.parametrize(
    ("file", "said"), [("adapter_model.safetensors", "is missing or corrupt"), ("adapter_config.json", "has no")]
)
def test_missing_file_is_refused(pool: Pool, tiny: Base, file: str, said: str) -> None:
    (pool.path / "news" / file).unlink()
    with pytest.raises(SamError, match=said) as error:
        pool.check(tiny.fingerprint, PROMPT_VERSION)
    assert str(pool.path / "news") in one_line(error) and file in str(error.value)


SCORES = {"split": "test", "n": 30, "precision": 0.5, "recall": 0.3809, "f1": 0.4321, "unparsable": 1, "truncated": 2}


def test_readme_states_data_licences_and_scores(tmp_path: Path) -> None:
    recipe = {"r": 8, "alpha": 16, "epochs": 2, "batch_size": 2, "lr": 0.001, "seed": 5, "label_drop": 0.15}
    card = make_card("stem", "0123456789abcdef", scores={"datasets": {"stem_one": SCORES}, "mean_f1": 0.4321})
    write_readme(tmp_path, dataclasses.replace(card, recipe={**recipe, "precision": "bf16-mixed"}))
    text = (tmp_path / "README.md").read_text()
    assert "| stem_one | CC-BY-4.0 | 30 of test | 50.0 | 38.1 | 43.2 | 1 | 2 |\n" in text
    assert "| stem_two | not stated | not measured | – | – | – | – | – |\n" in text
    for part in (
        "r=8, alpha=16",
        "Mean F1 43.2.",
        "`epochs=2`, `batch_size=2`, `lr=0.001`, `seed=5`, `label_drop=0.15`.",
        "with precision bf16-mixed",
        "fingerprint 0123456789ab)",
        "location, person",
        "5 steps in\n61 s on cpu.",
        "| step | 5 |\n| --- | ---: |\n| loss | 2.50 |",
        "1,200 parameters",
    ):
        assert part in text
    for role, kind in (("start", "The common start"), ("unified", "The unified baseline")):
        write_readme(tmp_path, dataclasses.replace(card, role=role, recipe={**recipe, "precision": "32-true"}))
        assert kind in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("points", "shown"),
    [
        (0, []),
        (1, ["| step | 32 |", "| loss | 0.10 |"]),
        (2, ["| step | 32 | 64 |", "| loss | 0.10 | 0.20 |"]),
        (
            39,
            [
                "| step | 32 | 192 | 384 | 544 | 736 | 896 | 1088 | 1248 |",
                "| loss | 0.10 | 0.60 | 1.20 | 1.70 | 2.30 | 2.80 | 3.40 | 3.90 |",
            ],
        ),
    ],
)
def test_a_curve_is_shown_from_its_first_to_its_last_point(tmp_path: Path, points: int, shown: list[str]) -> None:
    card = make_card("stem", "0123456789abcdef")
    training = {**card.training, "curve": [[32 * i, i / 10] for i in range(1, points + 1)]}
    recipe = {"r": 8, "alpha": 16, "precision": "32-true"}
    write_readme(tmp_path, dataclasses.replace(card, training=training, recipe=recipe))
    text = (tmp_path / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith(("| step", "| loss"))] == shown
    assert "Mean F1" not in text  # nothing was held out


def test_shipped_readmes_say_what_the_cards_do(tmp_path: Path) -> None:
    for name, card in Pool(compose()["experts"]["path"]).cards.items():
        write_readme(tmp_path, card)
        shipped = Path(compose()["experts"]["path"]) / name / "README.md"
        assert shipped.read_text() == (tmp_path / "README.md").read_text(), name


def test_shipped_experts_belong_to_the_shipped_base(smollm: Base) -> None:
    """The common start on the bare model, all others on the model with it baked in; nothing is left over."""
    config = compose()
    spec, pool = BaseSpec.from_config(config["base"]), Pool(config["experts"]["path"])
    roles = {name: card.role for name, card in pool.cards.items()}
    assert set(roles) == {*pool.names, "start", "unified", "unified_small"} and len(pool.names) == 6
    pool.check(smollm.fingerprint, PROMPT_VERSION, ["start"])
    pool.check(identity(spec), PROMPT_VERSION, [name for name in roles if name != "start"])
    assert {pool.cards[name].base_fold for name in roles if name != "start"} == {fold_hash(spec)}
    with pytest.raises(SamError, match="with an adapter baked in"):
        pool.check(smollm.fingerprint, PROMPT_VERSION)
