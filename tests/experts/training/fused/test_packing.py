"""A batch in one row or in several: the same to every model, and one row only to those that read it so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from sam.experts.training.batch import Batch, Example, padded
from sam.experts.training.fused.packing import MOST, collate, most_packed, packed
from sam.experts.training.fused.patches import fused
from tests.experts.training.fused.test_patches import (
    BATCH,
    EXAMPLES,
    MODELS,
    PREFIX,
    SIZES,
    assert_close,
    expert,
    learn,
)

WHOLE = Batch(PREFIX, EXAMPLES)
WINDOWLESS: dict[str, Any] = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2}


def test_packed_by_hand() -> None:
    tensors = packed((5, 6), [[Example((7, 8, 9), 1), Example((7, 4), 1)]])
    assert tensors["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 4] + [0] * 9]
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3] + [0] * 9]
    assert tensors["labels"].tolist() == [[-100] * 4 + [9, -100, 4] + [-100] * 9]
    (((mask),),) = tensors["attention_mask"].tolist()
    assert [[place for place, seen in enumerate(row) if seen] for row in mask[:7]] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 5],
        [0, 1, 5, 6],
    ]
    assert all(row[i] for i, row in enumerate(mask))  # none is empty, also of what fills up
    assert packed((1,) * 10, [[Example((2,) * 6, 1)]])["input_ids"].shape == (1, 16)


def test_examples_without_a_shared_prefix_do_not_see_one_another() -> None:
    batch = packed((), [[Example((7, 8, 9), 1), Example((5, 4), 1)]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 4] + [0] * 11]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1] + [0] * 11]
    (((mask),),) = batch["attention_mask"].tolist()
    assert [[place for place, seen in enumerate(row) if seen] for row in mask[:5]] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [3],
        [3, 4],
    ]


def test_rows_are_filled_up_to_a_length() -> None:
    length = len(PREFIX) + sum(len(e.ids) for e in EXAMPLES)  # 4 + 22 + 11 + 3
    assert [len(collate(WHOLE, most)["input_ids"]) for most in (length, length - 1, 26)] == [1, 2, 2]
    two = collate(WHOLE, 26)  # [22], [11, 3]
    assert two["labels"].tolist()[1][: 4 + 11 + 3] == [-100] * 11 + [47, 48, 49, 50] + [-100] * 2 + [9]
    assert two["attention_mask"].shape == (2, 1, 32, 32) and two["attention_mask"].any(-1).all()
    apart = collate(WHOLE, 25)  # the first alone is longer
    assert len(apart["input_ids"]) == 3 and apart["attention_mask"].ndim == 2
    wide = Batch(PREFIX, EXAMPLES * 40)
    lengths = collate(wide, 64)["attention_mask"].any(-2).sum(-1)
    assert int(lengths.max()) <= 64 and sum((collate(wide, 64)["labels"] != -100).sum(1)) == 40 * 11


@pytest.mark.parametrize("way", ["plain", "fused", "eager", "fused eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_few_rows_teach_what_one_for_each_does(kind: str, way: str) -> None:
    module = expert(kind)
    config = module.base.model.config
    if kind == "gemma3":
        assert most_packed(module.base.model) == config.sliding_window == 8
        config.sliding_window = 64
        for layer in module.base.model.model.layers:
            layer.self_attn.sliding_window = 64
    if kind == "mistral":
        config.sliding_window = 64
    if "eager" in way:
        module.base.model.set_attn_implementation("eager")
    assert most_packed(module.base.model) == min(MOST, getattr(config, "sliding_window", None) or MOST)
    dtype = torch.float32 if "fused" in way else None
    expected = learn(module, dtype, batch=padded(WHOLE))
    for most in (MOST, 26):
        assert_close(learn(module, dtype, batch=collate(WHOLE, most)), expected)


OTHERS = {
    "recurrent": lambda: MambaForCausalLM(MambaConfig(**WINDOWLESS, state_size=4)),
    "positions from the mask": lambda: MptForCausalLM(MptConfig(vocab_size=60, d_model=64, n_heads=4, n_layers=2)),
    "two-dimensional masks alone": lambda: BloomForCausalLM(BloomConfig(**WINDOWLESS, n_head=4)),
    "alibi": lambda: FalconForCausalLM(FalconConfig(**WINDOWLESS, num_attention_heads=4, alibi=True)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_read_a_row_otherwise_get_several(kind: str) -> None:
    torch.manual_seed(0)
    assert most_packed(OTHERS[kind]().eval()) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: FalconForCausalLM(FalconConfig(**WINDOWLESS, num_attention_heads=4)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=64)),
    ],
)
def test_models_with_attention_of_their_own(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon asks for SDPA by its name, Gemma 2 is eager by default."""
    monkeypatch.setitem(MODELS, "own", make)
    module = expert("own")
    assert most_packed(module.base.model) > 40
    expected = learn(module, batch=padded(WHOLE))
    for dtype in (None, torch.float32):
        assert_close(learn(module, dtype, batch=collate(WHOLE, MOST)), expected)
    with fused(module.net, torch.float32):
        assert module.loss(BATCH).item() == pytest.approx(expected["loss"].item(), rel=1e-5)
