"""The LightningModule that trains an adapter: its loss, what it trains, and its learning rate."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from sam.base import Base
from sam.experts import ExpertModule, Recipe
from sam.experts.data import Example, collate

BATCH = collate([Example(tuple(range(3, 25)), 6), Example(tuple(range(40, 51)), 4), Example((7, 8, 9), 1)], pad_id=1)
EXPECTED_TOKENS = 6 + 4 + 1


@pytest.fixture
def module(tiny: Base) -> Iterator[ExpertModule]:
    """On a copy of the tiny base model, its B drawn so that the adapter does something."""
    base = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model))
    found = ExpertModule(base, Recipe(r=4, alpha=8))
    found.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in found.net.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    yield found


def test_loss_is_that_of_the_whole_models_logits_on_answer_tokens(module: ExpertModule) -> None:
    loss = module.loss(BATCH)
    whole = module.net(**BATCH).loss
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    logits = module.net(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits.log_softmax(-1)
    rows, columns = (BATCH["labels"] != -100).nonzero(as_tuple=True)
    by_hand = [-logits[r, c - 1, BATCH["input_ids"][r, c]].item() for r, c in zip(rows, columns, strict=True)]
    assert len(by_hand) == EXPECTED_TOKENS
    assert loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_gradients_are_those_of_the_whole_models_loss(module: ExpertModule) -> None:
    trained = [p for p in module.net.parameters() if p.requires_grad]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads add up in another order, beyond this bound
    try:
        found = torch.autograd.grad(module.loss(BATCH), trained)
        expected = torch.autograd.grad(module.net(**BATCH).loss, trained)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7) and a.abs().sum() > 0


def test_padding_changes_no_loss(module: ExpertModule) -> None:
    wide = {k: torch.nn.functional.pad(v, (0, 9), value=-100 if k == "labels" else 0) for k, v in BATCH.items()}
    assert module.loss(wide).item() == pytest.approx(module.loss(BATCH).item(), rel=1e-6)


def test_only_lora_on_all_linear_layers_but_the_head_is_trained(module: ExpertModule) -> None:
    trained = {name for name, p in module.net.named_parameters() if p.requires_grad}
    linear = {n for n, m in module.base.model.named_modules() if n.endswith("_proj")}
    assert len(linear) == 14  # 7 in each of 2 layers
    assert len(trained) == 2 * 14 and all(".lora_A." in n or ".lora_B." in n for n in trained)
    net = module.net
    module.configure_model()
    assert module.net is net


def test_every_expert_starts_from_the_same_factors_drawn_by_the_seed(tiny: Base) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        module = ExpertModule(dataclasses.replace(tiny, model=copy.deepcopy(tiny.model)), Recipe(seed=seed))
        torch.rand(seed + 3)
        module.configure_model()
        return {n: p for n, p in module.net.named_parameters() if p.requires_grad}

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(bool((p == 0).all()) for n, p in first.items() if "lora_B" in n)
    assert all(not torch.equal(p, other[n]) for n, p in first.items() if "lora_A" in n)


def test_learning_rate_warms_up_and_decays_to_nothing(module: ExpertModule) -> None:
    module.recipe = dataclasses.replace(module.recipe, lr=0.1, warmup=0.2, weight_decay=0.5)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, precision="32-true")  # type: ignore[assignment]
    found = module.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Two steps up; then half a cosine over the other eight: cos 45° = 0.7071 at its quarter.
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[4] == pytest.approx(0.1 * (1 + 0.70710678) / 2)
    assert rates[6] == pytest.approx(0.05) and rates[10] == pytest.approx(0, abs=1e-9)
    assert optimizer.defaults["weight_decay"] == 0.5 and found["lr_scheduler"]["interval"] == "step"


def test_a_checkpoint_holds_only_what_is_trained(module: ExpertModule) -> None:
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    kept = sum(t.numel() for t in checkpoint["state_dict"].values())
    assert kept == sum(p.numel() for p in module.parameters() if p.requires_grad)
    # r (in + out) of each linear layer of a block, twice: q, o 64-64; k, v 64-32; gate, up, down 64-112.
    assert kept == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 176)
