"""Packed linear layers: the same model as in place, and the base as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam.decoding.packed as packed
from sam.base import Base
from sam.decoding import DecodeSpec
from sam.decoding.greedy import decode
from sam.decoding.int8 import packed_int8, packs_int8
from sam.decoding.packed import PackedWeights, packs, products
from sam.errors import SamError
from sam.merging import merged

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
FAST = products("fast", "float32", "cpu")
in_bf16 = pytest.mark.skipif(not FAST.startswith(packed.HALF), reason="the processor does not multiply bf16")


@pytest.fixture(params=[packed.HALF, packed.INT8])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``fast``, in each of the two ways that this machine has."""
    name: str = request.param
    if not (FAST.startswith(name) if name == packed.HALF else packs_int8()):
        pytest.skip(f"no {name} on this machine")
    if not FAST.startswith(name):
        monkeypatch.setattr(packed, "products", lambda mode, dtype, device: name if mode == "fast" else dtype)
    return name


def some_deltas() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(Q, torch.randn(64, 64, generator=generator)), (UP, torch.randn(112, 64, generator=generator) * 0.1)]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("deltas", [[], some_deltas()])
def test_exact_is_the_merge_in_place(tiny: Base, deltas: list[tuple[str, Tensor]]) -> None:
    with merged(tiny.model, deltas):
        expected = logits(tiny.model)
    plain = logits(tiny.model)
    with PackedWeights(tiny.model, "exact", all_logits=False) as weights:
        weights.apply(deltas)
        assert torch.allclose(logits(tiny.model), expected, atol=1e-4, rtol=1e-5)
        assert weights.applied == tuple(name for name, _ in deltas)
    assert torch.equal(logits(tiny.model), plain)
    assert not replaced(tiny.model)
    assert (expected - plain).abs().max() > 0.1 or not deltas


@pytest.mark.skipif(not packs(torch.float32), reason="torch has no oneDNN")
def test_packing_leaves_the_weights_alone(tiny: Base) -> None:
    before = copy.deepcopy(tiny.model.state_dict())
    with PackedWeights(tiny.model, "exact", all_logits=False) as weights:
        weights.apply(some_deltas())
        assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
        linears = [n for n, m in tiny.model.named_modules() if isinstance(m, nn.Linear)]
        assert replaced(tiny.model) == linears and "lm_head" in linears


def test_several_merges_in_turn(tiny: Base) -> None:
    weights = PackedWeights(tiny.model, "exact", all_logits=False)
    for deltas in (some_deltas(), [], some_deltas()[1:], some_deltas()):
        with merged(tiny.model, deltas):
            expected = logits(tiny.model)
        weights.apply(deltas)
        with pytest.raises(SamError, match="already holds a merge"):
            weights.apply(deltas)
        found = logits(tiny.model)
        weights.undo()
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)


def test_an_error_in_the_stream_leaves_nothing_behind(tiny: Base) -> None:
    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield some_deltas()[0]
        raise RuntimeError("half way")

    plain = logits(tiny.model)
    with pytest.raises(RuntimeError, match="half way"):
        PackedWeights(tiny.model, "exact", all_logits=False).apply(breaks())
    assert not replaced(tiny.model) and torch.equal(logits(tiny.model), plain)


def test_fast_is_close_and_keeps_a_small_head_exact(tiny: Base, fast: str) -> None:
    with merged(tiny.model, some_deltas()):
        expected = logits(tiny.model)
    with PackedWeights(tiny.model, "fast", all_logits=False) as weights:
        weights.apply(some_deltas())
        found = logits(tiny.model)
        hidden = torch.randn(3, 64)
        # its 400 tokens are no multiple of packed.RANGE: all of its logits are exact
        assert torch.allclose(tiny.model.lm_head(hidden), hidden @ tiny.model.lm_head.weight.T, atol=1e-5)
        layer = tiny.model.get_submodule(UP)
        exact = hidden @ (layer.weight + some_deltas()[1][1]).T
        difference = (layer(hidden) - exact).abs().max() / exact.abs().max()
        assert 1e-5 < difference < (3e-2 if fast == packed.INT8 else 1e-2)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < (0.15 if fast == packed.INT8 else 0.05)


class Headed(nn.Module):
    """An output layer whose neighbours differ too little for bf16 or int8."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.head = nn.Linear(48, tokens, bias=False)
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(tokens // 8, 48, generator=draw).repeat_interleave(8, 0)
        with torch.no_grad():
            self.head.weight.copy_(rows * (1 + 1e-3 * torch.randn(rows.shape, generator=draw)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def whole(model: Headed, x: Tensor) -> Tensor:
    """All logits, by the plain layer."""
    return x @ model.head.weight.T


def test_the_largest_logits_are_those_of_fp32(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Headed(512), torch.randn(4, 25, 48, generator=torch.Generator().manual_seed(1))
    expected = model.head(x)
    if fast == packed.INT8:
        rough = packed_int8(model.head.weight, None, torch.float32)(x)
    else:
        rough = (x.bfloat16() @ model.head.weight.bfloat16().T).float()
    assert (rough.argmax(-1) != expected.argmax(-1)).sum() > 50
    shifted = x.clone()  # the largest logits lie around 0
    with torch.no_grad():
        model.head.weight[:, 0] = 1
    shifted[..., 0] -= model.head(x).amax(-1)
    expected = model.head(x)
    with PackedWeights(model, "fast", all_logits=False) as weights:
        weights.apply([])
        found = model.head(x)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        assert torch.allclose(found.amax(-1), expected.amax(-1), atol=1e-5)
        assert not torch.allclose(found, expected, atol=1e-3)
        assert torch.equal(model.head(shifted).argmax(-1), whole(model, shifted).argmax(-1))
        for size in (10, 1000):  # so that int8 rounds all other inputs to a few numbers, or to none
            outlier = x.clone()
            outlier[..., 5] *= size
            assert torch.equal(model.head(outlier).argmax(-1), whole(model, outlier).argmax(-1))
        monkeypatch.setattr(packed, "PICKS", 3)
        assert torch.equal(model.head(x), found)
        assert model.head(x[:, :0]).shape == (4, 0, 512)
        for size in (1, 2, 7, 24):
            assert torch.equal(model.head(x[:2, :size]), found[:2, :size])
    for others in (PackedWeights(model, "fast", all_logits=True), PackedWeights(model, "exact", all_logits=False)):
        with others:
            others.apply([])
            assert torch.allclose(model.head(x), expected, atol=1e-5)
    odd = Headed(520)  # no multiple of the range
    with PackedWeights(odd, "fast", all_logits=False) as weights:
        weights.apply([])
        assert torch.allclose(odd.head(x), x @ odd.head.weight.T, atol=1e-5)


@pytest.mark.parametrize("rough", ["inputs", "weights", "sums"])
def test_the_largest_are_found_whatever_is_rough(rough: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "AT_ONCE", 100)
    draw = torch.Generator().manual_seed(0)
    kinds, x = torch.randn(64, 48, generator=draw), torch.randn(200, 48, generator=draw)
    weight = kinds.repeat(8, 1) + 1e-3 * torch.randn(512, 48, generator=draw)

    def few_bits(tensor: Tensor) -> Tensor:
        return (4 * tensor).round() / 4

    def same(tensor: Tensor) -> Tensor:
        return tensor

    stored, rounded = few_bits(weight) if rough == "weights" else weight, few_bits if rough == "inputs" else same

    def product(rows: Tensor) -> Tensor:
        found = rounded(rows) @ stored.T
        wrong = 2**-9 * (2 * torch.rand(found.shape, generator=torch.Generator().manual_seed(1)) - 1)
        return found + found * wrong if rough == "sums" else found

    expected = (x @ weight.T).argmax(-1)
    errors = packed._errors(weight, few_bits if rough == "weights" else same)
    found = packed._largest(weight, product, errors, rounded, 1)(x)
    assert torch.equal(found.argmax(-1), expected)
    assert (product(x).argmax(-1) != expected).sum() > 20


def test_fast_gives_a_token_the_same_bits_in_any_company(smollm: Base, fast: str) -> None:
    check_company(smollm, "fast")


def test_exact_gives_a_token_the_same_bits_in_any_company(smollm: Base) -> None:
    check_company(smollm, "exact")


def check_company(smollm: Base, mode: str) -> None:
    with PackedWeights.of(smollm, mode, constrained=False) as weights:
        weights.apply([])
        for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj"):
            layer = smollm.model.get_submodule(f"model.layers.3.{name}")
            x = torch.randn(300, layer.in_features)
            whole = layer(x)
            for size in (2, 3, 16, 64, 208):  # the engine never asks for one token alone
                assert torch.equal(layer(x[:size]), whole[:size]), (name, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_leaves_the_fp32_layers_of_a_half_precision_base_alone(tiny: Base, dtype: torch.dtype) -> None:
    """The key of its answers does not tell fast from exact."""
    model = copy.deepcopy(tiny.model).to(dtype)
    layer = model.get_submodule(UP).float()
    x, found = torch.randn(5, 64), []
    for mode in ("exact", "fast"):
        with PackedWeights(model, mode, all_logits=False) as weights:
            weights.apply([])
            found.append(layer(x))
    assert torch.equal(*found) and torch.allclose(found[0], x @ layer.weight.T, atol=1e-5)


@pytest.mark.skipif(not packs(torch.bfloat16), reason="torch has no oneDNN in bf16")
@pytest.mark.parametrize("shape", [(1, 2), (4, 0), (3, 1), (1, 64), (5, 13), (2, 97)])
def test_in_blocks_a_product_is_the_product(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    """As it is computed where few rows are summed up in another order than many: with AMX, of these sizes."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(960, 576).bfloat16(), torch.randn(960), torch.randn(*shape, 576)
    monkeypatch.setattr(packed, "has_amx", lambda: True)
    found = packed._packed(weight, bias, torch.float32)(x)
    assert found.shape == (*shape, 960)
    assert torch.allclose(found, x.bfloat16().float() @ weight.float().T + bias, atol=0.5)
    more = torch.cat([x.flatten(0, 1), torch.randn(300, 576)])
    assert torch.equal(packed._packed(weight, bias, torch.float32)(more)[: len(more) - 300], found.flatten(0, 1))


class Three(nn.Module):
    """Layers of one input, of different sizes, as in a decoder's attention; the head is another."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, n, bias=bias) for n in (32, 16, 8))
        self.head = nn.Linear(8, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", [[], ["k_proj"], ["q_proj", "k_proj", "v_proj"], ["k_proj", "head", "q_proj"]])
def test_layers_of_one_input_give_each_its_own(bias: bool, names: list[str]) -> None:
    """In any order, asked twice, on another input in between, and whichever of them an expert touches."""
    model = Three(bias)
    layers = [model.q_proj, model.k_proj, model.v_proj]
    deltas = [(name, torch.randn_like(model.get_submodule(name).weight)) for name in names]
    x, y = torch.randn(5, 32), torch.randn(7, 32)
    with merged(model, deltas):
        expected = {(i, len(z)): layer(z) for i, layer in enumerate(layers) for z in (x, y)}
    with PackedWeights(model, "exact", all_logits=False) as weights:
        weights.apply(deltas)
        for number, asked in ((0, x), (1, x), (2, x), (2, x), (1, x), (0, y), (2, x), (1, y), (1, y), (0, x)):
            found = layers[number](asked)
            assert torch.allclose(found, expected[number, len(asked)], atol=1e-5)


def test_a_forward_of_somebody_elses_is_left_alone(tiny: Base) -> None:
    layer = tiny.model.get_submodule(UP)
    own = type(layer).forward.__get__(layer)
    layer.forward = own
    try:
        with PackedWeights(tiny.model, "exact", all_logits=False) as weights:
            weights.apply(some_deltas()[:1])
            assert layer.forward is own
        assert layer.forward is own
    finally:
        del layer.forward


def test_without_onednn_merges_are_added_in_place(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "packs", lambda dtype: False)
    with merged(tiny.model, some_deltas()):
        expected = logits(tiny.model)
    with PackedWeights(tiny.model, "fast", all_logits=False) as weights:
        weights.apply(some_deltas())
        assert torch.equal(logits(tiny.model), expected)
        assert not replaced(tiny.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_stays_so(tiny: Base, dtype: torch.dtype) -> None:
    """Packed where the processor has it, in place elsewhere."""
    model = copy.deepcopy(tiny.model).to(dtype)
    with merged(model, some_deltas()):
        expected = logits(model)
    with PackedWeights(model, "fast", all_logits=False) as weights:
        weights.apply(some_deltas())
        found = logits(model)
    assert found.dtype == dtype and not replaced(model)
    assert (found.float() - expected.float()).norm() / expected.float().norm() < 0.05


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each weight that is packed from here on, in order."""
    rows: list[int] = []

    def counting(real: Callable[..., packed.Linear]) -> Callable[..., packed.Linear]:
        def counted(weight: Tensor, *rest: Any, **options: Any) -> packed.Linear:
            rows.append(len(weight))
            return real(weight, *rest, **options)

        return counted

    for name in ("_packed", "packed_int8"):
        monkeypatch.setattr(packed, name, counting(getattr(packed, name)))
    return rows


@pytest.mark.skipif(not packs(torch.float32), reason="torch has no oneDNN")
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_layers_of_one_input_are_multiplied_as_one_with_the_same_bits(smollm: Base, mode: str, made: list[int]) -> None:
    attention = smollm.model.get_submodule("model.layers.3.self_attn")
    kind = FAST if mode == "fast" else "float32"
    dtype = torch.bfloat16 if kind.startswith(packed.HALF) else torch.float32
    pack = packed_int8 if kind.startswith(packed.INT8) else packed._packed
    x = torch.randn(37, attention.q_proj.in_features)
    with PackedWeights(smollm.model, mode, all_logits=False) as weights:
        weights.apply([])
        assert made[1:5] == [576 + 192 + 192, 576, 2 * 1536, 576]  # after the head
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert torch.equal(layer(x).float(), pack(layer.weight.to(dtype), None, torch.float32)(x))


@pytest.mark.skipif(not packs(torch.float32), reason="torch has no oneDNN")
def test_layers_of_one_input_are_packed_once_whatever_of_their_block_comes_between(tiny: Base, made: list[int]) -> None:
    """Adapters hold their modules by name: k, o, q, v."""
    names = [name for name, m in tiny.model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    with PackedWeights(tiny.model, "exact", all_logits=False) as weights:
        weights.apply((name, torch.zeros_like(tiny.model.get_submodule(name).weight)) for name in sorted(names))
    layers = len(tiny.model.model.layers)
    assert len(made) == 4 * layers + 1  # qkv, o, gate and up, down; and the head


@pytest.mark.skipif(not packs(torch.float32), reason="torch has no oneDNN")
def test_few_merged_weights_wait_at_a_time(tiny: Base) -> None:
    """Where experts touch q and v only, a layer is packed when the next one comes."""
    weights, waiting = PackedWeights(tiny.model, "exact", all_logits=False), []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(len(tiny.model.model.layers)):
            for name in ("q_proj", "v_proj"):
                module = f"model.layers.{number}.self_attn.{name}"
                yield module, torch.randn_like(tiny.model.get_submodule(module).weight)
                waiting.append(len(weights._merged))

    with weights:
        weights.apply(stream())
        assert not weights._merged
    assert len(waiting) >= 4 and max(waiting) == 2


@in_bf16
def test_results_stay_in_bf16_only_inside_a_block_that_is_packed_whole(tiny: Base) -> None:
    """What is not packed gets the model's own precision, so that it works with its own weights."""
    attention, mlp = (tiny.model.get_submodule(f"model.layers.0.{name}") for name in ("self_attn", "mlp"))
    x = torch.randn(3, 64)
    with taken(attention.o_proj), PackedWeights(tiny.model, "fast", all_logits=False) as weights:
        weights.apply([])
        assert {layer(x).dtype for layer in (attention.q_proj, attention.v_proj)} == {torch.float32}
        assert {layer(x).dtype for layer in (mlp.gate_proj, mlp.up_proj)} == {torch.bfloat16}
        assert {layer(x).dtype for layer in (mlp, tiny.model.lm_head)} == {torch.float32}


@contextmanager
def taken(layer: nn.Module) -> Iterator[None]:
    """``layer`` with a forward of somebody else's."""
    layer.forward = type(layer).forward.__get__(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_becomes_somebody_elses_leaves_its_team(tiny: Base, mode: str, name: str, number: int) -> None:
    texts, spec = ["Ada of Turin", "the river Po"], DecodeSpec(6, 2, mode)
    error = 1e-4 if mode == "exact" else 0.15 if FAST.startswith(packed.INT8) else 0.05
    weights = PackedWeights(tiny.model, mode, all_logits=False)
    with weights:
        weights.apply([])
        decode(tiny, ["person"], texts, spec)
    plain = logits(tiny.model)
    with taken(tiny.model.get_submodule(f"model.layers.{number}.{name}")), weights:
        weights.apply([])
        assert (logits(tiny.model) - plain).norm() < error * plain.norm()
        assert len(decode(tiny, ["person"], texts, spec)) == 2
