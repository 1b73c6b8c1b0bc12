"""Linear layers in int8: what is rounded, and how inputs and weights are evened out before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sam.decoding.packed as packed
from sam import prompts
from sam.base import Base
from sam.decoding import compiled, int8
from sam.decoding.int8 import divisors, packed_int8, packs_int8
from sam.decoding.packed import PackedWeights
from sam.errors import SamError
from sam.merging import merged

in_int8 = pytest.mark.skipif(not packs_int8(), reason="torch has no int8 layers for this processor")
LAYER = "model.layers.0.self_attn"


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fast`` in int8 also where there is better."""
    monkeypatch.setattr(packed, "products", lambda mode, dtype, device: packed.INT8 if mode == "fast" else dtype)


def rounded(values: Tensor, steps: Tensor) -> Tensor:
    """Exactly, once it is known to which step."""
    return (values / steps).round().double() * steps.double()


@in_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [1536, 97])
def test_weights_are_rounded_by_their_neighbours_and_tokens_to_eight_bits(
    bias: bool, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the ends of the range too, where a processor without VNNI would cut sums off; of rows of zeros zeros."""
    monkeypatch.setattr(int8, "AT_ONCE", 20)  # of 48
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, inputs, generator=generator), torch.randn(2, 5, inputs, generator=generator)
    weight[0], weight[1], weight[2], x[0, 0], x[0, 1], x[0, 2] = 3.1, -3.1, 0.0, 5.0, -5.0, 0.0
    weight[3], weight[4] = (torch.tensor(pair).repeat(inputs)[:inputs] for pair in ([2.9, 0.1], [-3.0, 3.0]))
    offset = torch.randn(48, generator=generator) if bias else None
    scales = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    expected = rounded(x, scales) @ rounded(weight, int8.paired_steps(weight)).T
    expected = expected if offset is None else expected + offset
    found = packed_int8(weight, offset, torch.float32)(x)
    assert found.shape == (2, 5, 48) and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0, 2], torch.zeros(48) if offset is None else offset)
    assert packed_int8(weight, offset, torch.float32)(x[:, :0]).shape == (2, 0, 48)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e30])
def test_neighbouring_weights_fit_in_sixteen_bits(scale: float) -> None:
    weight = torch.randn(400, 62, generator=torch.Generator().manual_seed(0)) ** 3 * scale
    weight[0, 0], weight[0, 1:], weight[1] = scale, 0, scale * torch.tensor([1.0, -1.0]).repeat(31)
    steps = int8.paired_steps(weight)
    whole = (weight / steps).round()
    assert whole.abs().amax(1).min() > 63 and whole.abs().max() <= 127
    tokens = torch.tensor([[0, 0], [0, 255], [255, 0], [255, 255]]).float()
    sums = whole.unflatten(1, (-1, 2)) @ tokens.T
    assert sums.min() >= -(2**15) and sums.max() < 2**15
    seven_bits = weight.abs().amax(1, keepdim=True) / 63
    assert (steps <= seven_bits * 1.001).all() and (steps / seven_bits).mean() < 0.7
    # of one output alone, of an odd number of inputs, and of nothing but zeros
    assert int8.paired_steps(torch.tensor([[2.0, -1.0, 4.0]])).item() == pytest.approx(4 / 127)
    assert int8.paired_steps(torch.tensor([[2.0, 1.0, 1.0]])).item() == pytest.approx(3 / 127)
    assert int8.paired_steps(torch.zeros(1, 4)).item() > 0


@in_int8
@pytest.mark.parametrize("divisor", [None, torch.full((64,), 2.0)])
def test_what_is_multiplied_stays_as_it_is(divisor: Tensor | None) -> None:
    x = torch.randn(5, 64)
    before = x.clone()
    packed_int8(torch.randn(16, 64), None, torch.float32, divisor)(x)
    assert torch.equal(x, before)


@in_int8
def test_large_inputs_are_evened_out_with_their_weights() -> None:
    """Outliers that are in the same inputs of all tokens, as in most language models, cost the others little."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 96, generator=generator), torch.randn(64, 96, generator=generator)
    x[:, [3, 50]] *= 60
    weight[:, 7], x[:, 8] = 0, 0
    inputs, weights, expected = x.pow(2).mean(0).sqrt(), weight.abs().amax(0), x @ weight.T
    divisor = int8._divisor(inputs, weights)

    def error(divisor: Tensor | None) -> float:
        found = packed_int8(weight, None, torch.float32, divisor)(x)
        return float((found - expected).norm() / expected.norm())

    assert error(divisor) < error(None) / 2
    assert torch.equal(divisor.log2().round(), divisor.log2())
    assert divisor[3] > divisor[0] and divisor[7] > divisor[0] > divisor[8]
    for dead in (int8._divisor(torch.zeros(96), weights), int8._divisor(inputs, torch.zeros(96))):
        assert dead.isfinite().all() and (1 / dead).isfinite().all()
    assert torch.equal(int8._divisor(torch.zeros(4), torch.zeros(4)), torch.ones(4))


class Reader(nn.Module):
    """Linear layers that are called once, twice, with no rows, with a single one, and never."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.once, self.twice, self.empty, self.flat, self.never = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids)
        self.empty(x[:, :0])
        self.flat(x[0, 0])
        return self.twice(self.once(x)) + self.twice(3 * x)


def test_every_call_of_a_layer_counts_and_layers_that_read_nothing_are_left_alone() -> None:
    model = Reader()
    found = int8._read(model, [1, 2, 3])
    x = model.embed(torch.tensor([1, 2, 3])).detach()
    assert found.keys() == {model.once, model.twice, model.flat}
    assert torch.allclose(found[model.once], x.pow(2).mean(0).sqrt())
    assert torch.allclose(found[model.flat], x[0].abs())
    both = torch.cat([model.once(x), 3 * x]).detach()
    assert torch.allclose(found[model.twice], both.pow(2).mean(0).sqrt(), atol=1e-6)
    assert divisors(model, [1, 2, 3]).keys() == found.keys() and divisors(model, []) == {}


def test_layers_of_one_input_are_divided_alike_on_any_number_of_threads(
    smollm: Base, threads: Callable[[int], None]
) -> None:
    sample = smollm.tokenizer(prompts.SAMPLE).input_ids
    found = []
    for number in (1, 2):
        threads(number)
        found.append(divisors(smollm.model, sample))
        assert torch.get_num_threads() == number
    assert len(found[0]) == 7 * 30 and all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])
    q, k, o = (found[0][smollm.model.get_submodule(f"{LAYER}.{name}_proj")] for name in "qko")
    assert torch.equal(q, k) and not torch.equal(q, o) and len(q.unique()) > 2
    assert not any(module._forward_pre_hooks for module in smollm.model.modules())


def test_a_look_that_fails_leaves_nothing_behind(smollm: Base, two_threads: None, forced: None) -> None:
    weights = PackedWeights(smollm.model, "fast", all_logits=False, sample=[10**9])
    with pytest.raises(IndexError):
        weights.apply([])
    assert not any(module._forward_pre_hooks for module in smollm.model.modules())
    assert torch.get_num_threads() == 2 and not weights.applied
    with merged(smollm.model, []):
        pass  # nothing holds the model


@in_int8
def test_the_base_alone_is_looked_at_once(smollm: Base, forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is merged first; never while another merge is applied, and not for ``exact``."""
    looks: list[list[str]] = []

    def look(model: nn.Module, sample: list[int]) -> dict[nn.Module, Tensor]:
        looks.append([name for name, module in model.named_modules() if "forward" in vars(module)])
        return divisors(model, sample)

    monkeypatch.setattr(packed, "divisors", look)
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")
    deltas = [(name, torch.randn(1536, 576)) for name in names]
    weights = PackedWeights.of(smollm, "fast", constrained=False)
    with merged(smollm.model, deltas), pytest.raises(SamError, match="already holds a merge"):
        weights.apply([])
    assert not looks
    for _ in range(2):
        with weights:
            weights.apply(deltas)
    assert looks == [[]]  # nothing was packed yet
    with PackedWeights.of(smollm, "exact", constrained=False) as exact:
        exact.apply(deltas)
    assert len(looks) == 1


@in_int8
def test_no_order_of_the_merged_modules_changes_a_bit(tiny: Base, forced: None) -> None:
    """Also when another parent's comes in between, so that layers of one input are multiplied apart."""
    names = (f"{LAYER}.q_proj", f"{LAYER}.k_proj", "model.layers.1.mlp.up_proj")
    generator = torch.Generator().manual_seed(0)
    deltas = {
        name: torch.randn(tiny.model.get_submodule(name).weight.shape, generator=generator)  # type: ignore[union-attr, arg-type]
        for name in names
    }
    ids, found = torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), []
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)):
        with PackedWeights.of(tiny, "fast", constrained=False) as weights, torch.no_grad():
            weights.apply((names[number], deltas[names[number]]) for number in order)
            found.append(tiny.model(ids).logits)
    assert all(torch.equal(one, found[0]) for one in found)


@in_int8
def test_int8_is_nearer_to_fp32_by_the_sample(smollm: Base, forced: None) -> None:
    text = prompts.render(["person", "city"], "Ada Lovelace met Charles Babbage in London.")
    ids = smollm.tokenizer(text, return_tensors="pt").input_ids

    @torch.no_grad()
    def chances() -> Tensor:
        return torch.as_tensor(smollm.model(ids).logits).log_softmax(-1)

    expected = chances()

    def divergence(weights: PackedWeights) -> float:
        with weights:
            weights.apply([])
            return float((expected.exp() * (expected - chances())).sum(-1).mean())

    plain = PackedWeights(smollm.model, "fast", all_logits=False)
    assert divergence(PackedWeights.of(smollm, "fast", constrained=False)) < 0.7 * divergence(plain)


def test_what_int8_looks_at_is_in_its_name() -> None:
    """The names are in the key of answers: if this fails, rename both, and then change the digest here."""
    digest = hashlib.sha256(prompts.SAMPLE.encode()).hexdigest()[:16]
    assert (packed.INT8, digest) == ("int8 products, logits bounded, balanced", "e2190d8d9d88931c")
    assert (packed.GROUPS, compiled.GROUP, compiled.UNIT) == ("int8 by groups of at most 128, balanced", 128, 16)
