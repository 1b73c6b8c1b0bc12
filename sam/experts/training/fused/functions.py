"""LoRA layers, norms, attention and SwiGLU with their backward passes written by hand.

Each is one node of the graph where PyTorch would make many, computes in the dtype that it is given, and keeps no more
than its backward pass reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sam.experts.training.fused.packing import additive


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
    another. ``mask`` [batch, 1, length, length] is added to the scores. The products are in ``dtype``, the softmax
    reads and writes that and computes in fp32. Returns [batch, length, heads, width].
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
        out, kept = _attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, scale)
        ctx.save_for_backward(*kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_attention_backward(grad, ctx.saved_tensors, ctx.scale), None, None, None


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """:class:`Attention` of tensors in one dtype, and what its backward pass reads."""
    batch, heads, length, width = q.shape
    q = q.reshape(batch * k.shape[1], -1, width)
    k, v = (t.contiguous().view(len(q), length, width) for t in (k, v))  # no view that would keep the whole it is of
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask.dtype == torch.bool:
        mask = additive(mask)
    mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)  # not -inf: a row that may look nowhere has no NaN
    p = scores.view(batch, heads, length, length).add_(mask).softmax(-1).view_as(scores)
    return torch.bmm(p, v).view(batch, heads, length, width).transpose(1, 2).contiguous(), (q, k, v, p)


def _attention_backward(grad: torch.Tensor, kept: Sequence[torch.Tensor], scale: float) -> tuple[torch.Tensor, ...]:
    """The gradients of q [batch, heads, length, width], k and v [batch, groups, length, width]."""
    q, k, v, p = kept
    batch, length, heads, width = grad.shape
    grad = grad.to(p.dtype).transpose(1, 2).reshape(q.shape)
    grad_v = torch.bmm(p.transpose(1, 2), grad)
    scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
    grad_q = torch.baddbmm(q.new_empty(()), scores, k, beta=0, alpha=scale).view(batch, heads, length, width)
    grad_k = torch.baddbmm(q.new_empty(()), scores.transpose(1, 2), q, beta=0, alpha=scale)
    return grad_q, *(t.view(batch, -1, length, width) for t in (grad_k, grad_v))


class RotaryAttention(torch.autograd.Function):
    """:class:`Attention` of queries, keys and values that lie side by side, turned by their positions first.

    ``qkv`` [batch, length, (heads + 2 groups) width], ``cos`` and ``sin`` [batch or 1, length, width] (Su et al.,
    RoFormer, arXiv 2104.09864, eq. 34, in the halves of transformers' Llama). Returns [batch, length, heads width].
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        groups: int,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        parts = qkv.view(*qkv.shape[:2], -1, cos.shape[-1])
        turned = _turn(parts[:, :, :-groups], cos, sin).to(dtype)
        heads = turned.shape[2] - groups
        q, k, v = turned[:, :, :heads], turned[:, :, heads:], parts[:, :, -groups:].to(dtype)
        out, kept = _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale)
        ctx.save_for_backward(cos, sin, *kept)
        ctx.scale, ctx.groups, ctx.shape, ctx.dtype = scale, groups, parts.shape, qkv.dtype
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *kept = ctx.saved_tensors
        grad = grad.reshape(*ctx.shape[:2], -1, ctx.shape[-1])
        grad_q, grad_k, grad_v = _attention_backward(grad, kept, ctx.scale)
        turned = torch.cat([grad_q, grad_k], 1).transpose(1, 2)
        out = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        out[:, :, : -ctx.groups] = _turn(turned, cos, sin.roll(sin.shape[-1] // 2, -1).neg_())
        out[:, :, -ctx.groups :] = grad_v.transpose(1, 2)
        return out.flatten(2), *[None] * 6


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x cos + rotate_half(x) sin`` of ``x`` [batch, length, heads, width], in the angles' dtype."""
    x, cos, sin = x.to(cos.dtype), cos.unsqueeze(2), sin.unsqueeze(2)
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer, arXiv 2002.05202) of the halves of ``x`` [..., 2 width]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out
