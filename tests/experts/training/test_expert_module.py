"""The LightningModule that trains an adapter: its loss, what it trains, and its learning rate."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from sam.experts import ExpertModule
from sam.experts.training.batch import Batch, Example
from sam.experts.training.fit import expert_module
from sam.models.base import Base
from tests.toy_training import recipe

EXAMPLES = (Example(tuple(range(3, 25)), 6), Example(tuple(range(40, 51)), 4), Example((7, 8, 9), 1))
PREFIX = (1, 30, 31, 2)
BATCH = Batch(PREFIX, EXAMPLES)


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def module(tiny: Base, request: pytest.FixtureRequest) -> ExpertModule:
    """On a copy of the tiny base model, its B drawn so that the adapter does something."""
    base = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model))
    made = expert_module(base, recipe(r=4, alpha=8, fused=request.param))
    made.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in made.net.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return made


def apart(module: ExpertModule) -> torch.Tensor:
    """The loss of the examples read one by one, each with the prefix before it."""
    of_tokens = []
    for example in EXAMPLES:
        ids = torch.tensor([[*PREFIX, *example.ids]])
        logits = module.net(input_ids=ids).logits[0, -example.completion - 1 : -1].log_softmax(-1)
        of_tokens.append(-logits[torch.arange(example.completion), ids[0, -example.completion :]])
    return torch.cat(of_tokens).mean()


def test_loss_is_the_mean_of_all_tokens_of_completions_read_apart(module: ExpertModule) -> None:
    assert module.loss(module.collate(BATCH)).item() == pytest.approx(apart(module).item(), rel=1e-5)


def test_gradients_are_those_of_examples_read_apart(module: ExpertModule) -> None:
    trained = [p for p in module.net.parameters() if p.requires_grad]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads add up in another order, beyond this bound
    try:
        gradients = torch.autograd.grad(module.loss(module.collate(BATCH)), trained)
        expected = torch.autograd.grad(apart(module), trained)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and a.abs().sum() > 0


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
        module = ExpertModule(dataclasses.replace(tiny, model=copy.deepcopy(tiny.model)), recipe(seed=seed))
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
    settings = module.configure_optimizers()
    optimizer, schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Two steps up; then half a cosine over the other eight: cos 45° = 0.7071 at its quarter.
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[4] == pytest.approx(0.1 * (1 + 0.70710678) / 2)
    assert rates[6] == pytest.approx(0.05) and rates[10] == pytest.approx(0, abs=1e-9)
    assert optimizer.defaults["weight_decay"] == 0.5 and settings["lr_scheduler"]["interval"] == "step"


def test_curve_has_no_point_of_the_few_steps_left_over(tiny: Base) -> None:
    module = ExpertModule(tiny, recipe())
    assert module.curve() == []
    module.losses = [torch.tensor(float(i)) for i in range(11)]
    assert module.curve(points=3) == [[4, 1.5], [11, 7.0]]
    assert module.curve(points=5) == [[3, 1.0], [6, 4.0], [11, 8.0]]
    assert module.curve(points=40) == [[i + 1, float(i)] for i in range(11)]
    module.losses = module.losses[:1]
    assert module.curve(points=3) == [[1, 0.0]]
