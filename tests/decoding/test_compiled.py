"""The layers compiled by OpenVINO: the same model as torch's, in fp32 as any processor has it; in bf16, int8 where they
are."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sam import prompts
from sam.base import Base, cores, has_amx, has_vnni, multiplies_bf16
from sam.decoding import DecodeSpec, compiled, packed
from sam.decoding.compiled import GROUP, Blocks, CompiledWeights, caches, compiles, group, weights_of
from sam.decoding.compiled import TYPES as COMPILED
from sam.decoding.drafts import Drafter
from sam.decoding.greedy import decode, stream
from sam.decoding.int8 import divisors, quantized
from sam.decoding.packed import GROUPS, HALF, INT8, LEAST, PackedWeights, compiled_in, products
from sam.decoding.ragged import KeyValues, Pass, Row
from sam.errors import SamError
from sam.merging import merged
from tests.decoding.conftest import sizes, sliding_models
from tests.decoding.oracle import TEXTS, TYPES, Silent, numbers, oracle

pytest.importorskip("openvino")
Q, UP, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"
SPEC = DecodeSpec(12, 4)
IDS = [5, 9, 31, 7, 44, 12, 8, 20, 63, 17, 5, 40]
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not there, reason=f"no processor that OpenVINO multiplies {kind} on"))
    for kind, there in (("bf16", multiplies_bf16() and cores() >= LEAST), ("int8", has_vnni() and not has_amx()))
]


class InFull(CompiledWeights):
    """In fp32, which every processor has."""

    KIND = "f32"


def models(vocab: int) -> dict[str, Any]:
    torch.manual_seed(0)
    common = sizes(vocab)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "llama": LlamaForCausalLM(
            LlamaConfig(**common, rope_parameters={**rope, "original_max_position_embeddings": 64})
        ).eval(),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**common)).eval(),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**common, head_dim=32)).eval(),
        **{f"{name}{'_text' * (name == 'gemma3')}": model for name, model in sliding_models(vocab).items()},
    }


def deltas(model: nn.Module, names: tuple[str, ...] = (Q, UP)) -> list[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    shapes = [model.get_submodule(name).weight.shape for name in names]
    return [(name, torch.randn(shape, generator=draw) * 0.3) for name, shape in zip(names, shapes, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED)
def test_answers_are_those_of_generate(tiny: Base, kind: str) -> None:
    """Also with a merge, and after it; each text's prefix is longer than the sliding models' windows."""
    model = models(len(tiny.tokenizer))[kind]
    assert model.config.model_type == kind and compiles(model.config)
    base = numbers(tiny, model=model)
    weights = InFull(model, "exact", all_logits=False)
    found = []
    for given in ([], deltas(model, (Q, UP, HEAD)), []):
        with merged(model, given):
            expected = [oracle(base, text, 12) for text in TEXTS]
        with weights:
            weights.apply(given)
            assert caches(model) is not KeyValues
            assert decode(base, TYPES, TEXTS, SPEC) == expected
        found.append(expected)
    assert found[0] == found[2] and found[0] != found[1]


def test_the_model_is_its_own_again_afterwards(tiny: Base) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    weights = InFull(tiny.model, "exact", all_logits=False)
    with weights:
        weights.apply(deltas(tiny.model))
        assert weights.applied == (Q, UP)
        with pytest.raises(SamError, match="only inside"):
            tiny.model(torch.tensor([[5, 6]]))
    assert caches(tiny.model) is KeyValues
    assert not [name for name, module in tiny.model.named_modules() if "forward" in vars(module)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert tiny.model(torch.tensor([[5, 6]])).logits.isfinite().all()


@pytest.mark.parametrize("fails", ["stream", "compiling", "norm"])
def test_a_merge_that_fails_leaves_the_base_as_it_was(tiny: Base, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    weights = InFull(tiny.model, "exact", all_logits=False)
    with weights:
        weights.apply([])
        expected = decode(tiny, TYPES, TEXTS[:3], SPEC)
    given = deltas(tiny.model)
    if fails == "norm":
        given.append(("model.norm", torch.ones(64)))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiling today")

    with (
        monkeypatch.context() as patch,
        pytest.raises((SamError, RuntimeError), match="no (module|compiling)|LlamaRMS"),
    ):
        if fails == "compiling":
            patch.setattr(compiled.Graph, "compile", broken)
        weights.apply([*given, *([("model.nowhere", torch.ones(2, 2))] if fails == "stream" else [])])
    assert caches(tiny.model) is KeyValues and not weights.applied
    with weights:
        weights.apply([])
        assert decode(tiny, TYPES, TEXTS[:3], SPEC) == expected


def test_rows_of_a_cache_move_with_what_they_hold() -> None:
    ours, theirs = (Blocks(rows, 70, [(2, 4), (2, 4)], "f32") for rows in (3, 1))
    for array in theirs._arrays:
        array[:] = torch.arange(array.size).reshape(array.shape).numpy()
    ours.copy_from(theirs, 0, 2, 40)  # two of its three blocks
    ours.move(2, 0, 40)
    for array, given in zip(ours._arrays, theirs._arrays, strict=True):
        assert (array[ours.first(0) :][:2] == given[:2]).all()
        assert not array[ours.first(0) + 2].any() and not array[ours.first(2) :][:3].any()
    assert sorted(ours.first(row) for row in range(3)) == [0, 3, 6] and ours.last == 9


def test_what_is_compiled(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenVINO is used: not by ``exact``, nor a model whose rotations follow the text or whose q, k and v may be
    fused."""
    config = tiny.model.config
    by = f"OpenVINO {version('openvino')}"
    for kind, amx, bf16, expected in (
        ("bf16", True, True, f"{HALF} in blocks, {by}"),
        ("int8", False, True, f"{HALF}, {by} {GROUPS}"),
        ("int8", False, False, f"{INT8}, {by} {GROUPS}"),
        (None, True, True, f"{HALF} in blocks"),
        (None, False, True, HALF),
        (None, False, False, INT8),
    ):
        with monkeypatch.context() as patch:
            for name, value in (("packs", True), ("multiplies_bf16", bf16), ("packs_int8", True), ("has_amx", amx)):
                patch.setattr(packed, name, lambda *_, value=value: value)
            for module in (packed, compiled):
                patch.setattr(module, "compiled_in", lambda kind=kind: kind)
            assert products("fast", "float32", "cpu") == expected
            assert products("exact", "float32", "cpu") == products("fast", "float32", "cuda") == "float32"
            assert isinstance(weights_of(tiny, "fast", constrained=False), CompiledWeights) == bool(kind)
            assert type(weights_of(tiny, "exact", constrained=False)) is PackedWeights
            patch.setattr(packed, "packs", lambda _: False)
            assert products("fast", "float32", "cpu") == "float32"
    assert compiles(config)
    rope = config.rope_parameters
    dynamic = [{**rope, "rope_type": "dynamic"}, {"full_attention": {**rope, "rope_type": "longrope"}}]
    changed = [*(("rope_parameters", each) for each in dynamic), ("hidden_size", 512), ("model_type", "gpt2")]
    for name, value in changed:
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value)
            assert not compiles(config)


def test_where_the_compiler_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: str) -> str:
        raise PackageNotFoundError

    def here(count: int, amx: bool, vnni: bool) -> str | None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
        monkeypatch.setattr(packed, "has_amx", lambda: amx)
        monkeypatch.setattr(packed, "has_vnni", lambda: vnni)
        monkeypatch.setattr(packed, "packs_int8", lambda: True)
        found: str | None = compiled_in.__wrapped__()
        return found

    assert here(2, True, True) == here(4, True, True) == "bf16"
    assert here(2, False, True) == "int8"
    assert here(2, False, False) is here(1, True, True) is here(1, False, True) is None
    monkeypatch.setattr(packed, "version", without)
    assert here(2, True, True) is None


def test_one_merge_at_a_time(tiny: Base) -> None:
    """Also where the first apply of all would have looked at a model that holds another's."""
    with PackedWeights(tiny.model, "exact", all_logits=False) as other:
        other.apply([])
        with pytest.raises(SamError, match="already holds a merge"):
            InFull(tiny.model, "exact", all_logits=False).apply([])


@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_its_company(
    tiny: Base, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, kind: str, family: str
) -> None:
    """Nor on the guesses that come with it, nor on how many threads there are; also where a window slides, and prefixes
    are of several lengths."""
    monkeypatch.setattr(CompiledWeights, "KIND", kind)
    model = models(len(tiny.tokenizer))[family]
    base = numbers(tiny, model=model)
    parts = [(prompts.prefix(types), prompts.suffix(t)) for t in TEXTS[:6] for types in (TYPES, ["x"] * 20, TYPES[:1])]
    spec = DecodeSpec(24, 1, "fast")
    with CompiledWeights(model, "fast", all_logits=False, sample=IDS) as weights:
        weights.apply(deltas(model))
        alone = dict(stream(base, parts, spec, Silent()))
        for size in (4, 16):
            assert dict(stream(base, parts, dataclasses.replace(spec, batch_size=size), Drafter())) == alone
        assert dict(stream(base, parts[::3], spec, Drafter())) == {n: alone[3 * n] for n in range(6)}
        for count in (1, 2, 4):  # with AMX two in place of one
            threads(count)
            weights.undo()
            weights.apply(deltas(model))
            assert dict(stream(base, parts, dataclasses.replace(spec, batch_size=16), Drafter())) == alone
    assert len({answer.text for answer in alone.values()}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fast_is_near_to_exact(smollm: Base, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(CompiledWeights, "KIND", kind)
    weights = CompiledWeights.of(smollm, "fast", constrained=False)
    with weights, PackedWeights.of(smollm, "exact", constrained=False) as exact:
        exact.apply([])
        expected = decode(smollm, TYPES, TEXTS, DecodeSpec(16, 4, "exact"))
        exact.undo()
        weights.apply([])
        found = decode(smollm, TYPES, TEXTS, DecodeSpec(16, 4, "fast"))
    # The first words are the same; later ones may differ by rounding.
    starts = [(a.text[:8], b.text[:8]) for a, b in zip(found, expected, strict=True)]
    assert sum(a == b for a, b in starts) >= 7


def test_groups_divide_all_layers_where_they_can() -> None:
    assert group([576, 1536]) == 96 and group([640, 1024, 2048]) == 128 and group([4096]) == 128
    assert group([64, 96, 128]) == 32 and group([16, 48]) == 16
    assert group([576, 100]) == group([8]) == GROUP


def test_fast_is_compiled_where_it_says_so(smollm: Base) -> None:
    said = "OpenVINO" in products("fast", "float32", "cpu")
    assert isinstance(weights_of(smollm, "fast", constrained=False), CompiledWeights) == said


@pytest.mark.skipif(not has_vnni() or has_amx(), reason="no processor that OpenVINO multiplies int8 on")
@pytest.mark.parametrize("size", [32, 48, 80])
@pytest.mark.parametrize("family", COMPILED)
def test_in_int8_groups_of_weights_and_inputs_are_rounded(
    tiny: Base, monkeypatch: pytest.MonkeyPatch, family: str, size: int
) -> None:
    """As torch says with its layers rounded so; a merge too, and inputs divided, with the weights multiplied. Layers
    have 64, 96 or 128 inputs: where a group does not divide them an output's weights have one step, and those that have
    fewer inputs are not rounded. The base alone is the same after a merge as before any."""
    monkeypatch.setattr(CompiledWeights, "KIND", "int8")
    monkeypatch.setattr(compiled, "UNIT", size)
    monkeypatch.setattr(compiled, "GROUP", size)
    model = models(len(tiny.tokenizer))[family]
    text = IDS[2:]  # with all of them an input or two lie in the middle of a step, and may fall to either side
    ids, given = torch.tensor([text]), deltas(model)
    divide = divisors(model, IDS)
    assert len(divide) > 10 and any((divisor != 1).any() for divisor in divide.values())

    def rounding(divisor: Tensor) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor]) -> Tensor:
            inputs = given[0] / divisor
            whole = inputs.shape[-1] < size
            return inputs if whole else torch.cat([quantized(part) for part in inputs.split(size, -1)], -1)

        return hook

    def by_steps(weight: Tensor) -> Tensor:
        each = weight.shape[1] if weight.shape[1] % size else size
        return quantized(weight.unflatten(1, (-1, each))).flatten(1)

    def states(weights: CompiledWeights, given: list[tuple[str, Tensor]]) -> Tensor:
        weights.undo()
        weights.apply(given)
        now = Pass(caches(model)(1, 40), [Row(len(text), 0)], 2, "cpu")
        padded = nn.functional.pad(ids, (0, now.spare))
        found = model.base_model(input_ids=padded, position_ids=now.positions, sam_pass=now)
        return found.last_hidden_state[0, : len(text)]

    with merged(model, given), torch.no_grad():
        exact = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        other, names = copy.deepcopy(model), {module: name for name, module in model.named_modules()}
        for layer, divisor in divide.items():
            same = other.get_submodule(names[layer])
            same.weight.copy_(by_steps(layer.weight * divisor))
            same.register_forward_pre_hook(rounding(divisor))
        expected = other.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    with CompiledWeights(model, "fast", all_logits=False, sample=IDS) as weights:
        alone = states(weights, [])
        found = states(weights, given)
        assert (found - expected).abs().mean() < 0.1 * (exact - expected).abs().mean()
        assert torch.equal(states(weights, []), alone) and not torch.equal(alone, found)
