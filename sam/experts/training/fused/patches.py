"""Forward passes for LoRA training in place of a model's own: the arithmetic of PEFT and transformers, with less
around it.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sam.experts.training.fused.functions import Attention, LoraProduct, Norm, RotaryAttention, SwiGLU
from sam.experts.training.fused.packing import additive
from sam.models.base import SIBLINGS

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
"""Norms that compute ``w * x / rms(x)`` and whose output only linear layers read."""

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""Attention that turns queries and keys by their positions (RoPE) and does nothing else to them."""

GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""``down(act(gate(x)) * up(x))``, exchanged where ``act`` is SiLU."""

SILU = ("SiLU", "SiLUActivation")

ATTENTION = "sam_short"
"""The name of :func:`attend` among transformers' attention functions."""

MADV_PAGEOUT = 21
"""Linux, ``madvise(2)``."""


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
    stacked = weights[0].new_empty((sum(len(w) for w in weights), weights[0].shape[1]), dtype=dtype)
    for part, weight in zip(stacked.split([len(w) for w in weights]), weights, strict=True):
        part.copy_(weight)
        page_out(weight)
    return stacked


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

    def together(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers for ``x``, side by side."""
        return LoraProduct.apply(x, self.weight, self.bias, self.scale, *self.factors)

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer ``index`` for ``x``."""
        if self.input is not x or index not in self.outputs:
            self.input, self.outputs = x, dict(enumerate(self.together(x).split(self.widths, -1)))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output


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
            siblings = [layers[name] for name in names if name in layers]
            alike = len(siblings) == len(names) and len({_kind(layer) for layer in siblings}) == 1
            if alike and siblings[0].get_base_layer().weight.dtype != dtype:
                yield siblings
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
def fused(net: Any, dtype: torch.dtype) -> Iterator[None]:
    """Train the PEFT model ``net`` by the passes of this file while the block lasts, computing in ``dtype``.

    Only ``forward`` of modules and the attention's name are exchanged; no weight is touched. Enter it when the model is
    on its device: it holds a copy of the frozen linear weights where theirs is another dtype.
    """
    causal = net.base_model.model
    head, config = causal.get_output_embeddings(), causal.get_decoder().config
    before = config._attn_implementation
    short = before == "sdpa" and head.weight.device.type == "cpu"
    together: dict[Any, Group] = {}
    with ExitStack() as stack:
        for layers in groups(net, dtype):
            group = Group(layers, dtype)
            for index, layer in enumerate(layers):
                stack.enter_context(_instead(layer, "forward", partial(group.forward, index)))
            if len(layers) > 1:
                together[layers[0]] = group
        for module in net.modules():
            if (forward := _forward(module, together, dtype, short)) is not None:
                stack.enter_context(_instead(module, "forward", forward))
        if type(head) is torch.nn.Linear:
            stack.enter_context(_instead(head, "forward", partial(_frozen, cast([head], dtype), head.bias)))
        if short:
            AttentionInterface.register(ATTENTION, attend)
            AttentionMaskInterface.register(ATTENTION, additive_mask)
            config._attn_implementation = ATTENTION
            stack.callback(setattr, config, "_attn_implementation", before)
        yield


def _forward(module: Any, together: Mapping[Any, Group], dtype: torch.dtype, short: bool) -> partial[Any] | None:
    """The forward pass to put in place of that of ``module``, None to leave it. ``together``: the groups of more than
    one layer, by their first; ``short``: attention may be exchanged too."""
    kind = type(module).__name__
    if kind in NORMS:
        return partial(_norm, module, dtype)
    if kind in ATTENTIONS and short and module.q_proj in together:
        return partial(_rotary, module, together[module.q_proj], dtype)
    if kind in GATED and type(module.act_fn).__name__ in SILU and module.gate_proj in together:
        return partial(_gated, module, together[module.gate_proj])
    return None


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
    """The forward pass of attention; with a cache, dropout, no mask or a part unturned, transformers' own."""
    dropout = module.training and module.attention_dropout
    part = position_embeddings[0].shape[-1] != module.head_dim
    if attention_mask is None or past_key_values is not None or dropout or part:
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
