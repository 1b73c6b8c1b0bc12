"""Linear layers in int8, for x86 processors that do not multiply bf16, or multiply int8 faster.

A token has a scale and an output's weights have one, as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), but no
outlier is kept in 16 bits, which it found large models to need. Before that, inputs that are large are made smaller and
their weights larger, as in SmoothQuant (Xiao et al. 2023, arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sam.base import SIBLINGS

LARGEST = 127
"""The largest int8 value of a token and, before rounding, of two neighbouring weights of one sign together. A processor
without VNNI adds the products of two neighbours in 16 bits, which hold 255 times 128: a token's values are shifted by
128 to have no sign, and rounding may add half a step to each weight. (63 for each weight would fit as well, in larger
steps.)"""
EVEN = 0.01
"""The share of the mean that is added to how large an input, or its weights, are: none of them counts for nothing."""
TINY = 1e-30  # in place of 0, where something is divided by it
AT_ONCE = 1024
"""Outputs whose weights are rounded at once: of all of an output layer's what lies between is as large as itself."""


@cache
def packs_int8() -> bool:
    """Whether this torch, on this processor, has such layers, and adds in 16 bits what :data:`LARGEST` is made for."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    try:
        return all(_is_right(rows, inputs) for rows, inputs in ((1, 16), (2, 97), (64, 512)))
    except (AttributeError, RuntimeError):
        return False


def _is_right(rows: int, inputs: int) -> bool:
    """Whether the sums of the largest tokens with the largest neighbouring weights are not cut off."""
    weight = torch.tensor([100.0, 28.0, 64.0, 64.0]).repeat(16, inputs)[:, :inputs]
    found, expected = packed_int8(weight, None, torch.float32)(torch.ones(rows, inputs)), weight.sum(1)
    return bool(((found - expected).abs() < 0.02 * expected).all())


def packed_int8(
    weight: Tensor, bias: Tensor | None, result: torch.dtype, divisor: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """``x -> x Wᵀ + b``, of weights [outputs, inputs] and tokens rounded to int8, given as ``result``.

    The sums of their products are exact, in any order. ``divisor`` [inputs]: of the inputs; their weights are
    multiplied by it.
    """
    width, count = weight.shape
    factor = 1.0 if divisor is None else 1 / divisor
    whole, scale = torch.empty(width, count, dtype=torch.int8), torch.empty(width, dtype=torch.float32)
    for start in range(0, width, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        part = weight[some].detach() if divisor is None else weight[some].detach() * divisor
        step = paired_steps(part)
        whole[some], scale[some] = (part / step).round_(), step[:, 0]
    laid = torch.ops.onednn.qlinear_prepack(whole, [256, count])
    zeros = torch.zeros(width, dtype=torch.int32)

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, count).float() * factor  # a tensor of its own, also where it is x times 1
        step = steps(rows)
        # The sign bit turned over adds 128: oneDNN multiplies tokens without a sign twice as fast.
        tokens = rows.div_(step).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        found = torch.ops.onednn.qlinear_pointwise(
            tokens, 1.0, 128, laid, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        ).mul_(step)
        if bias is not None:
            found += bias
        return found.to(result).view(*x.shape[:-1], width)

    return forward


def steps(rows: Tensor) -> Tensor:
    """The step of the values of each row [..., values], of tokens or of weights that no neighbours are added to:
    [..., 1]."""
    return rows.abs().amax(-1, keepdim=True).clamp_min_(TINY).div_(LARGEST)


def paired_steps(weight: Tensor) -> Tensor:
    """The step of each output's weights, such that neighbours add up as :data:`LARGEST` asks: [outputs, 1]."""
    pairs = nn.functional.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    return torch.maximum(steps(weight), steps(pairs[..., 0] + pairs[..., 1]))


def quantized(rows: Tensor, weights: bool = False) -> Tensor:
    """Tokens, or the weights of outputs, as :func:`packed_int8` multiplies them."""
    step = paired_steps(rows) if weights else steps(rows)
    return (rows / step).round_().mul_(step)


def divisors(model: nn.Module, sample: Sequence[int]) -> dict[nn.Module, Tensor]:
    """For the linear layers that read the token ids of ``sample``, by what int8 should divide each input: [inputs].

    Layers of one input have the same. It follows from the model as it is: one that merges are added to later has the
    same for all of them. One thread computes it, so that no answer hangs on how many there are.
    """
    if not sample:
        return {}
    read = _read(model, sample)
    found: dict[nn.Module, Tensor] = {}
    for team in _teams(model, read):
        weights = torch.stack([layer.weight.detach().float().abs().amax(0) for layer in team]).amax(0)
        found |= dict.fromkeys(team, _divisor(read[team[0]], weights))
    return found


def _divisor(inputs: Tensor, weights: Tensor) -> Tensor:
    """What makes inputs of a size (root of the mean square) and their weights (the largest) even, each [inputs]: powers
    of two, which round nothing and seldom tell in what order sums were made."""
    large, heavy = ((size + EVEN * size.mean()).clamp_min(TINY) for size in (inputs, weights))
    return (large / heavy).log2().div(2).round().exp2()


def _teams(model: nn.Module, layers: dict[nn.Linear, Tensor]) -> Iterator[list[nn.Linear]]:
    """Those of ``layers`` that are called on the same input, together."""
    for parent in model.modules():
        left = {name: child for name, child in parent.named_children() if child in layers}
        for names in SIBLINGS:
            found = [left[name] for name in names if name in left]
            if len(found) == len(names) and len({layer.in_features for layer in found}) == 1:
                yield found
                left = {name: child for name, child in left.items() if name not in names}
        yield from ([layer] for layer in left.values())


def _read(model: nn.Module, sample: Sequence[int]) -> dict[nn.Linear, Tensor]:
    """The root of the mean square of each input of the linear layers that take part in reading ``sample``: [inputs]."""
    squares: dict[nn.Linear, Tensor] = {}
    counts: dict[nn.Linear, int] = {}

    def look(layer: nn.Linear, given: tuple[Tensor, ...]) -> None:
        rows = given[0].float().reshape(-1, layer.in_features)
        squares[layer] = squares.get(layer, 0) + rows.pow(2).sum(0)
        counts[layer] = counts.get(layer, 0) + len(rows)

    threads, hooks = torch.get_num_threads(), []
    try:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                hooks.append(layer.register_forward_pre_hook(look))
        torch.set_num_threads(1)
        with torch.no_grad():
            # Without the output layer, where it can be told apart: in trials evening it out made its results worse.
            getattr(model, "base_model", model)(input_ids=torch.tensor([list(sample)]), use_cache=False)
    finally:
        torch.set_num_threads(threads)
        for hook in hooks:
            hook.remove()
    return {layer: (total / counts[layer]).sqrt() for layer, total in squares.items() if counts[layer]}
