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
from sam.decoding.packed import Linear, packed, packs
from sam.experts.packing import additive

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
"""Norms that compute ``w * x / rms(x)`` and whose output only linear layers read."""

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""Attention that turns queries and keys by their positions (RoPE) and does nothing else to them."""

GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""``down(act(gate(x)) * up(x))``, made lean where ``act`` is SiLU."""

SILU = ("SiLU", "SiLUActivation")

ATTENTION = "sam_short"

MADV_PAGEOUT = 21
"""Linux, ``madvise(2)``."""


class Frozen:
    """A weight [out, in] that is not trained, as what multiplies with it and with its transpose.

    A copy is packed for both where the processor's library can: to lay the weight out anew takes longer than to
    multiply a short sentence with it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, copied: bool) -> None:
        self.dtype, self.out = weight.dtype, len(weight)
        if copied and weight.device.type == "cpu" and packs(weight.dtype):
            self.forward: Linear = packed(weight, bias, weight.dtype, steady=False)
            self.backward: Linear = packed(weight.t().contiguous(), None, weight.dtype, steady=False)
        else:
            self.forward = partial(torch.nn.functional.linear, weight=weight, bias=bias)
            self.backward = partial(torch.matmul, other=weight)


class LoraProduct(torch.autograd.Function):
    """``x -> x Wᵀ + b + s (x Aᵀ) Bᵀ`` for layers that share the input ``x``, their outputs side by side.

    ``frozen`` has W [sum of out, in] and b, in the dtype to compute in; ``factors`` are the A [r, in] of each layer,
    then the B [out, r]. Only ``x`` and ``s x Aᵀ`` are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Frozen, scale: float, *factors: torch.Tensor) -> torch.Tensor:
        half = len(factors) // 2
        rows = x.reshape(-1, x.shape[-1]).to(frozen.dtype)
        a = torch.cat(factors[:half]).to(rows.dtype)
        b = _diagonal(factors[half:], rows.dtype)
        down = (rows @ a.t()).mul_(scale)
        out = frozen.forward(rows).addmm_(down, b.t())
        ctx.save_for_backward(rows, down, a, b)
        ctx.frozen, ctx.scale, ctx.shape, ctx.dtype = frozen, scale, x.shape, x.dtype
        ctx.blocks = [f.shape for f in factors[half:]]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, down, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, ctx.frozen.out).to(rows.dtype)
        grads_b = _blocks((grad.t() @ down).float(), ctx.blocks)
        up = (grad @ b).mul_(ctx.scale)
        grads_a = (up.t() @ rows).float().split([rank for _, rank in ctx.blocks])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.backward(grad).addmm_(up, a).to(ctx.dtype).view(ctx.shape)
        return grad_x, None, None, *grads_a, *grads_b


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
        out, ctx.kept = _attention(*(t.to(dtype) for t in (q, k, v)), mask, scale)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_attention_backward(grad, ctx.kept, ctx.scale), None, None, None


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """:class:`Attention` of tensors in one dtype, and what its backward pass reads."""
    batch, heads, length, width = q.shape
    q = q.reshape(batch * k.shape[1], -1, width)
    k, v = (t.reshape(len(q), length, width) for t in (k, v))
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
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
        out, ctx.kept = _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale)
        ctx.angles, ctx.scale, ctx.groups, ctx.shape, ctx.dtype = (cos, sin), scale, groups, parts.shape, qkv.dtype
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.angles
        grad = grad.view(*ctx.shape[:2], -1, ctx.shape[-1])
        grad_q, grad_k, grad_v = _attention_backward(grad, ctx.kept, ctx.scale)
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
        bias = torch.cat([base.bias.detach() for base in bases]).to(dtype) if bases[0].bias is not None else None
        self.frozen = Frozen(cast(bases, dtype), bias, bases[0].weight.dtype != dtype)
        self.widths = [base.out_features for base in bases]
        self.scale = layers[0].scaling["default"]
        self.factors = [layer.lora_A["default"].weight for layer in layers]
        self.factors += [layer.lora_B["default"].weight for layer in layers]
        self.input: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def together(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers for ``x``, side by side."""
        return LoraProduct.apply(x, self.frozen, self.scale, *self.factors)

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer ``index`` for ``x``."""
        if self.input is not x or index not in self.outputs:
            self.input, self.outputs = x, dict(enumerate(self.together(x).split(self.widths, -1)))
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
    before = config._attn_implementation
    short = before == "sdpa" and head.weight.device.type == "cpu"
    with ExitStack() as stack:
        together: dict[Any, Group] = {}
        for layers in groups(net, dtype):
            group = Group(layers, dtype)
            for index, layer in enumerate(layers):
                stack.enter_context(_instead(layer, "forward", partial(group.forward, index)))
            if len(layers) > 1:
                together[layers[0]] = group
        for module in net.modules():
            kind, way = type(module).__name__, None
            if kind in NORMS:
                way = partial(_norm, module, dtype)
            elif kind in ATTENTIONS and short and module.q_proj in together:
                way = partial(_rotary, module, together[module.q_proj], dtype)
            elif kind in GATED and type(module.act_fn).__name__ in SILU and module.gate_proj in together:
                way = partial(_gated, module, together[module.gate_proj])
            if way is not None:
                stack.enter_context(_instead(module, "forward", way))
        if type(head) is torch.nn.Linear:
            stack.enter_context(_instead(head, "forward", partial(_frozen, cast([head], dtype), head.bias)))
        if short:
            config._attn_implementation = ATTENTION
            stack.callback(setattr, config, "_attn_implementation", before)
        yield


def _norm(module: Any, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return Norm.apply(x, module.weight, module.variance_epsilon, dtype)


def _rotary(
    module: Any,
    group: Group,
    dtype: torch.dtype,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The forward pass of attention; with a cache, dropout or no mask, transformers' own."""
    if attention_mask is None or past_key_values is not None or (module.training and module.attention_dropout):
        own = type(module).forward
        return own(module, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    kept = group.widths[1] // module.head_dim
    qkv = group.together(hidden_states)
    out = RotaryAttention.apply(qkv, *position_embeddings, attention_mask, kept, module.scaling, dtype)
    return module.o_proj(out), None


def _gated(module: Any, group: Group, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(SwiGLU.apply(group.together(x)))


def _frozen(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
