"""A lean forward and backward for LoRA training: the arithmetic of PEFT and transformers, with less around it.

A step on a small model spends much of its time beside the large matrix products: autocast casts every frozen weight
anew, PEFT's layers cast, scale and add in steps of their own, and short sentences make every small operation count.
Here the frozen weights are cast once, projections of one input are multiplied together, and what the backward pass
needs is written out by hand (Hu et al., LoRA, arXiv 2106.09685, eq. 3: ``h = W x + s B A x``).

What is not recognised (other layers, norms, attention variants) stays as PEFT and transformers have it, so every model
trains; the results differ by rounding only.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sam.base import SIBLINGS
from sam.experts.packing import additive

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
"""Norms that compute ``w * x / rms(x)`` and whose output only linear layers read."""

ATTENTION = "sam_short"

MADV_PAGEOUT = 21
"""Linux, ``madvise(2)``."""


class LoraProduct(torch.autograd.Function):
    """``x -> x Wᵀ + b + s (x Aᵀ) Bᵀ`` for layers that share the input ``x``, their outputs side by side.

    ``w`` [sum of out, in] and ``bias`` are frozen and in the dtype to compute in; ``factors`` are the A [r, in] of each
    layer, then the B [out, r]. Only ``x`` and ``s x Aᵀ`` are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        half = len(factors) // 2
        rows = x.reshape(-1, x.shape[-1]).to(w.dtype)
        a = torch.cat(factors[:half]).to(w.dtype)
        b = _diagonal(factors[half:], w.dtype)
        down = (rows @ a.t()).mul_(scale)
        out = rows @ w.t() if bias is None else torch.addmm(bias, rows, w.t())
        out.addmm_(down, b.t())
        ctx.save_for_backward(rows, w, down, a, b)
        ctx.scale, ctx.shape, ctx.dtype, ctx.blocks = scale, x.shape, x.dtype, [f.shape for f in factors[half:]]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, w, down, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, len(w)).to(w.dtype)
        grads_b = _blocks((grad.t() @ down).float(), ctx.blocks)
        up = (grad @ b).mul_(ctx.scale)
        grads_a = (up.t() @ rows).float().split([rank for _, rank in ctx.blocks])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ w).addmm_(up, a).to(ctx.dtype).view(ctx.shape)
        return grad_x, None, None, None, *grads_a, *grads_b


def _diagonal(blocks: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The matrix with ``blocks`` on its diagonal: one product for all, as small ones cost more to start than to do."""
    if len(blocks) == 1:
        return blocks[0].to(dtype)
    whole = blocks[0].new_zeros([sum(sizes) for sizes in zip(*(b.shape for b in blocks), strict=True)], dtype=dtype)
    for part, block in zip(_blocks(whole, [b.shape for b in blocks]), blocks, strict=True):
        part.copy_(block)
    return whole


def _blocks(whole: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The blocks of these shapes on the diagonal of ``whole``."""
    rows, columns = (list(sizes) for sizes in zip(*shapes, strict=True))
    return [part.split(columns, 1)[i] for i, part in enumerate(whole.split(rows))]


class Norm(torch.autograd.Function):
    """``w * x / rms(x)`` in fp32, with a frozen ``w``; the result is in ``dtype``, as a linear layer wants it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, scale)
        return (x * scale).mul_(w).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, scale = ctx.saved_tensors
        unit = x * scale
        grad = (grad * w).to(unit.dtype)
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(x.shape[-1])
        return grad.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), None, None, None


class Attention(torch.autograd.Function):
    """Softmax attention by batched products: for short sentences faster on a CPU than the blocks of SDPA.

    ``q`` [batch, heads, length, width]; ``k``, ``v`` [batch, groups, length, width]: query heads of a group follow one
    another. ``mask`` [batch, 1, length, length] is added to the scores. The softmax is in fp32, the products in
    ``dtype``. Returns [batch, length, heads, width].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        batch, heads, length, width = q.shape
        groups = k.shape[1]
        q = (q * scale).to(dtype).reshape(batch * groups, -1, width)
        k, v = (t.to(dtype).reshape(batch * groups, length, width) for t in (k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, length) + mask
        p = scores.softmax(-1).to(dtype).view(batch * groups, -1, length)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.heads = scale, heads
        return torch.bmm(p, v).view(batch, heads, length, width).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        batch, length, heads, width = grad.shape
        grad = grad.transpose(1, 2).reshape(q.shape).to(p.dtype)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_p = torch.bmm(grad, v.transpose(1, 2))
        scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q = torch.bmm(scores, k).mul_(ctx.scale).view(batch, heads, length, width)
        grad_k = torch.bmm(scores.transpose(1, 2), q).view(batch, -1, length, width)
        return grad_q, grad_k, grad_v.view(batch, -1, length, width), None, None, None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """:class:`Attention` as transformers calls it; what it does not do (dropout, no mask) goes to SDPA."""
    if attention_mask is None or dropout or scaling is None or key.shape != value.shape:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    return Attention.apply(query, key, value, attention_mask, scaling, dtype), None


def additive_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """The mask of SDPA as numbers to add to the scores."""
    allowed = sdpa_mask(*args, **options)
    return None if allowed is None else additive(allowed)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, additive_mask)


def page_out(tensor: torch.Tensor) -> None:
    """Let the system take back the memory of a tensor that is not read for a while; reading it brings it back.

    Weights are mapped from their file: what has been cast would otherwise stay in memory beside its copy. Only a hint:
    nothing is lost, and systems other than Linux go without it.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT)


def cast(layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> torch.Tensor:
    """The weights of ``layers``, one above the other, in ``dtype``; a single one in that dtype is not copied."""
    weights = [layer.weight.detach() for layer in layers]
    if len(weights) == 1 and weights[0].dtype == dtype:
        return weights[0]
    found = weights[0].new_empty((sum(len(w) for w in weights), weights[0].shape[1]), dtype=dtype)
    for part, weight in zip(found.split([len(w) for w in weights]), weights, strict=True):
        part.copy_(weight)
        page_out(weight)
    return found


class Group:
    """LoRA layers of one module that are called on the same input: the first call computes for all of them."""

    def __init__(self, layers: Sequence[LoraLinear], dtype: torch.dtype) -> None:
        bases: list[Any] = [layer.get_base_layer() for layer in layers]
        self.weight = cast(bases, dtype)
        self.bias = torch.cat([base.bias.detach() for base in bases]).to(dtype) if bases[0].bias is not None else None
        self.widths = [base.out_features for base in bases]
        self.scale = layers[0].scaling["default"]
        self.factors = [layer.lora_A["default"].weight for layer in layers]
        self.factors += [layer.lora_B["default"].weight for layer in layers]
        self.input: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer ``index`` for ``x``."""
        if self.input is not x or index not in self.outputs:
            together = LoraProduct.apply(x, self.weight, self.bias, self.scale, *self.factors)
            self.input, self.outputs = x, dict(enumerate(together.split(self.widths, -1)))
        found = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return found


def is_plain(layer: Any) -> bool:
    """Whether ``layer`` is LoRA as published on ``nn.Linear``, of the adapter ``default`` alone, without dropout."""
    return (
        type(layer) is LoraLinear
        and type(layer.get_base_layer()) is torch.nn.Linear
        and layer.active_adapters == ["default"]
        and not (layer.lora_variant or layer.merged or layer.disable_adapters or layer.lora_bias["default"])
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
    )


def groups(net: torch.nn.Module, dtype: torch.dtype) -> Iterator[list[LoraLinear]]:
    """All plain LoRA layers of ``net``, those that share an input together where they can be.

    Weights that are in ``dtype`` already are not put together: that would take a copy.
    """
    for module in net.modules():
        layers: dict[str, Any] = {name: child for name, child in module.named_children() if is_plain(child)}
        for names in SIBLINGS:
            found = [layers[name] for name in names if name in layers]
            kinds = {_kind(layer) for layer in found}
            if len(found) == len(names) and len(kinds) == 1 and found[0].get_base_layer().weight.dtype != dtype:
                yield found
                layers = {name: layer for name, layer in layers.items() if name not in names}
        yield from ([layer] for layer in layers.values())


def _kind(layer: Any) -> tuple[int, float, bool, torch.dtype]:
    """What layers must have in common to be multiplied together."""
    base = layer.get_base_layer()
    return base.in_features, layer.scaling["default"], base.bias is None, base.weight.dtype


@contextmanager
def _instead(module: Any, name: str, value: Any) -> Iterator[None]:
    """``value`` in place of a method of ``module`` while the block lasts."""
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)


@contextmanager
def lean(net: Any, dtype: torch.dtype) -> Iterator[None]:
    """Train the PEFT model ``net`` the lean way while the block lasts, computing in ``dtype``.

    Only ``forward`` of modules and the attention's name are exchanged; no weight is touched. Enter it when the model is
    on its device: it holds a copy of the frozen linear weights where theirs is another dtype.
    """
    causal = net.base_model.model
    head, config = causal.get_output_embeddings(), causal.get_decoder().config
    with ExitStack() as stack:
        for layers in groups(net, dtype):
            group = Group(layers, dtype)
            for index, layer in enumerate(layers):
                stack.enter_context(_instead(layer, "forward", partial(group.forward, index)))
        for module in net.modules():
            if type(module).__name__ in NORMS:
                stack.enter_context(_instead(module, "forward", partial(_norm, module, dtype)))
        if type(head) is torch.nn.Linear:
            stack.enter_context(_instead(head, "forward", partial(_frozen, cast([head], dtype), head.bias)))
        before = config._attn_implementation
        if before == "sdpa" and head.weight.device.type == "cpu":
            config._attn_implementation = ATTENTION
            stack.callback(setattr, config, "_attn_implementation", before)
        yield


def _norm(module: Any, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return Norm.apply(x, module.weight, module.variance_epsilon, dtype)


def _frozen(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
