"""Applying a merge in place and undoing it exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sam.errors import SamError
from sam.merging import AdapterDeltas, Merge, MergedWeights, linear, merge_modules, merged

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
LINEAR = Merge(linear)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


def some_deltas() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(Q, torch.randn(64, 64, generator=generator)), (UP, torch.randn(112, 64, generator=generator) * 1e-3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_adds_in_fp32_and_undo_restores_bit_by_bit(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = model.to(dtype)  # type: ignore[arg-type]
    before = weights(model)
    deltas = some_deltas()
    with merged(model, deltas) as same_model:
        assert same_model is model
        for name, delta in deltas:
            w0 = before[f"{name}.weight"]
            expected = (
                (w0.double() + delta.double()).to(dtype) if dtype == torch.float64 else (w0.float() + delta).to(dtype)
            )
            assert torch.equal(model.get_parameter(f"{name}.weight"), expected)
        assert sorted(n for n, t in model.state_dict().items() if not torch.equal(t, before[n])) == [
            f"{Q}.weight",
            f"{UP}.weight",
        ]
    assert same(model, before)


def test_many_merges_leave_no_trace_in_bf16(
    model: LlamaForCausalLM, three: tuple[list[AdapterDeltas], list[str]]
) -> None:
    model = model.to(torch.bfloat16)  # type: ignore[arg-type]
    before = weights(model)
    for _ in range(3):
        with merged(model, merge_modules(*three, LINEAR)):
            assert not same(model, before)
    assert same(model, before)


def test_merges_in_turn_start_from_the_weights_as_they_are_then(model: LlamaForCausalLM) -> None:
    merge, weight = MergedWeights(model), model.get_submodule(UP).weight
    with merge:
        merge.apply(some_deltas())
    with torch.no_grad():
        weight.mul_(2)  # trained on, say, between two merges
    before = weights(model)
    with merge:
        merge.apply(some_deltas())
    assert same(model, before)
    model.to(torch.bfloat16)  # type: ignore[call-arg]
    before = weights(model)
    with merge:
        merge.apply(some_deltas())
        assert not same(model, before)
    assert same(model, before)


def test_weights_stay_the_same_parameters(model: LlamaForCausalLM) -> None:
    parameter = model.get_submodule(Q).weight
    with merged(model, some_deltas()):
        assert model.get_submodule(Q).weight is parameter
    assert parameter.requires_grad and parameter.is_leaf and parameter.grad is None


def test_restored_after_an_error_inside(model: LlamaForCausalLM) -> None:
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), merged(model, some_deltas()):
        raise KeyboardInterrupt
    assert same(model, before)
    with merged(model, some_deltas()):
        pass


def breaking() -> Iterator[tuple[str, Tensor]]:
    yield from some_deltas()
    raise RuntimeError("the disk is gone")


def test_restored_when_the_stream_breaks(model: LlamaForCausalLM) -> None:
    before = weights(model)
    merge = MergedWeights(model)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        merge.apply(breaking())
    assert same(model, before) and merge.applied == ()
    merge.apply(some_deltas())
    assert merge.applied == (Q, UP)
    merge.undo()
    assert same(model, before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            ("model.layers.9.q", torch.ones(2)),
            "the base model has no module 'model.layers.9.q'; the expert was trained on",
        ),
        ((UP, torch.ones(64, 112)), f"the delta of '{UP}' has shape [64, 112], the base model's weight [112, 64]"),
        ((Q, torch.ones(64, 64)), f"module '{Q}' comes twice in one merge"),
        (("model.layers.0.self_attn", torch.ones(2)), "module 'model.layers.0.self_attn' has no floating-point weight"),
    ],
)
def test_misfits_are_named_and_all_is_restored(model: LlamaForCausalLM, bad: tuple[str, Tensor], message: str) -> None:
    before = weights(model)
    with pytest.raises(SamError, match=re.escape(message)):
        MergedWeights(model).apply([some_deltas()[0], bad])
    assert same(model, before)
    with merged(model, some_deltas()):  # and the model is free again
        pass


def test_quantised_weight_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SamError, match="load the base model without quantisation"):
        MergedWeights(net).apply([("0", torch.ones(2, 2))])


def test_tied_weight_is_refused() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "other": nn.Linear(3, 3)})
    net["head"].weight = net["embed"].weight
    with pytest.raises(
        SamError, match="module 'head' shares its weight with embed.weight, which the delta would change"
    ):
        MergedWeights(net).apply([("head", torch.ones(5, 3))])
    with merged(net, [("other", torch.ones(3, 3))]):
        pass


def test_one_merge_at_a_time(model: LlamaForCausalLM) -> None:
    first, second = MergedWeights(model), MergedWeights(model)
    before = weights(model)
    first.apply(some_deltas())
    inside = weights(model)
    for merge in (first, second):
        with pytest.raises(SamError, match="the model already holds a merge; undo it before applying another"):
            merge.apply(some_deltas())
        assert same(model, inside)
    second.undo()  # not its merge
    assert same(model, inside)
    first.undo()
    first.undo()
    assert same(model, before)


def test_an_empty_merge_is_the_base(model: LlamaForCausalLM) -> None:
    before = weights(model)
    for _ in range(2):
        with merged(model, []):
            assert same(model, before)


def test_object_form_undoes_at_exit(model: LlamaForCausalLM) -> None:
    before = weights(model)
    with pytest.raises(ValueError, match="inside"), MergedWeights(model) as merge:
        merge.apply(some_deltas())
        raise ValueError("inside")
    assert same(model, before)


def test_across_the_border_of_inference_mode(
    model: LlamaForCausalLM, three: tuple[list[AdapterDeltas], list[str]]
) -> None:
    before = weights(model)
    with torch.inference_mode(), merged(model, merge_modules(*three, LINEAR)):
        model(torch.arange(6).view(1, 6))
    assert same(model, before)
    merge = MergedWeights(model)
    with torch.inference_mode():
        merge.apply(merge_modules(*three, LINEAR))
    merge.undo()
    assert same(model, before)
    merge.apply(some_deltas())
    with torch.inference_mode():
        merge.undo()
    assert same(model, before)
    model(torch.arange(6).view(1, 6)).logits.sum().backward()  # the weights can still be trained
    assert model.get_submodule(Q).weight.grad is not None


def test_model_made_under_inference_mode() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(3, 3))
    before = weights(net)
    with merged(net, [("0", torch.ones(3, 3))]):
        assert torch.equal(net.get_parameter("0.weight"), before["0.weight"] + 1)
    assert same(net, before)
