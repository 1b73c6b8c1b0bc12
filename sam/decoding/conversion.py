"""A model's layers as OpenVINO's graph, attention as its paged attention (see :mod:`sam.decoding.compiled`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import logging as hf_logging

from sam.errors import SamError

NAME = "sam_compiled"
PARTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
"""What tells of a pass's sequences, as OpenVINO names it."""
OUTER = "self.decoder."
"""How the names of the graph's weights begin, in front of the model's own."""
TRACED = 4  # tokens of the example that shows what the model does; any number of several would do


def converted(model: Any) -> tuple[Any, list[tuple[int, int]]]:
    """Embeddings, layers and the last norm of ``model`` as a graph of token ids, positions [1, tokens], ``PARTS``, the
    most slots of a sequence and the cache's tensors; and (heads, dim) of each of those, keys and values in turn."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    traced, shapes = _traced(model)
    # Not ``openvino.convert_model``, which does the same and reports its use to its makers.
    frontend = FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(ConversionExtension("sam::attend", _paged_attention))
    source = TorchScriptPythonDecoder(traced)  # has to outlive what is done with it
    return frontend.convert(frontend.load(source)), shapes


class _Layers(nn.Module):
    """A model's layers as a function of tensors: those of a pass, and the cache's."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, positions: Tensor, *given: Tensor) -> Tensor:
        found: Tensor = self.decoder(
            input_ids=ids, position_ids=positions, use_cache=False, sam_given=given
        ).last_hidden_state
        return found


def _traced(model: Any) -> tuple[Any, list[tuple[int, int]]]:
    """The layers of ``model`` as TorchScript, and (heads, dim) of each layer's keys and values in turn."""
    shapes: list[tuple[int, int]] = []
    layers = model.config.get_text_config().num_hidden_layers
    number = torch.tensor(TRACED, dtype=torch.int32)
    given = [number[None]] * len(PARTS) + [number] + [torch.zeros(1, 1, 1, 1)] * (2 * layers)
    before, verbosity = model.config._attn_implementation, hf_logging.get_verbosity()
    _SHAPES.append(shapes)
    try:
        model.config._attn_implementation = NAME
        hf_logging.set_verbosity_error()  # tracing looks at attributes that warn
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            positions = torch.arange(TRACED)[None]
            example = (torch.zeros_like(positions), positions, *given)
            return torch.jit.trace(_Layers(model.base_model), example, check_trace=False), shapes
    finally:
        _SHAPES.pop()
        hf_logging.set_verbosity(verbosity)
        model.config._attn_implementation = before


_SHAPES: list[list[tuple[int, int]]] = []  # of what is being traced


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sam_given: Sequence[Tensor] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function under ``NAME``, while a model is traced: query [1, heads, tokens, dim] -> [1, tokens,
    heads, dim]."""
    if not _SHAPES:
        raise SamError(f"attention {NAME} works only inside sam.decoding")
    parts, (keys, values) = sam_given[: len(PARTS) + 1], sam_given[len(PARTS) + 1 :][2 * module.layer_idx :][:2]
    _SHAPES[-1].extend((int(x.shape[1]), int(x.shape[-1])) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = tuple(map(int, (query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])))
    found = torch.ops.sam.attend(query, key, value, keys, values, *parts, float(scale), sliding_window or 0, *sizes)
    return cast(Tensor, found), None


AttentionInterface.register(NAME, _attention)

# What is traced for it; OpenVINO's own stands for it in the graph.
_LIBRARY = torch.library.Library("sam", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor past_lens, "
    "Tensor subsequence_begins, Tensor block_indices, Tensor block_indices_begins, Tensor most, float scale, "
    "int window, int heads, int key_heads, int dim, int value_dim) -> Tensor"
)
_LIBRARY.impl(
    "attend",
    lambda query, key, value, *_: query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]),
    "CompositeExplicitAutograd",
)


def _paged_attention(context: Any) -> list[Any]:
    """The nodes for one call of ``sam::attend``."""
    from openvino import op, opset13

    query, key, value, *rest = (context.get_input(number) for number in range(10))
    scale, window, heads, key_heads, dim, value_dim = map(context.get_values_from_const_input, range(10, 16))

    def constant(number: Any, dtype: Any) -> Any:
        return opset13.constant(np.array(number, dtype=dtype)).output(0)

    def flat(x: Any, width: int) -> Any:  # [1, heads, tokens, dim] -> [tokens, heads x dim]
        turned = opset13.transpose(x, constant([0, 2, 1, 3], np.int64))
        return opset13.reshape(turned, constant([-1, width], np.int64), False).output(0)

    keys, values, *parts, most = rest
    empty: list[int] = []
    whole, real = np.int32, np.float32
    # Alibi slopes; then scores, cache rotation, sparse attention, sinks, eviction, speculative trees: none of them.
    unused = [
        *[constant(empty, whole)] * 3,
        *[constant(empty, real)] * 2,
        *[constant(0, whole)] * 2,
        constant(np.zeros([0] * 4), real),
        constant(0, whole),
        *[constant(empty, whole)] * 4,
        constant(empty, np.uint8),
        constant(empty, whole),
    ]
    found = op._PagedAttentionExtension(
        [
            *(flat(query, heads * dim), flat(key, key_heads * dim), flat(value, key_heads * value_dim)),
            *(keys, values, *parts),
            *(constant(scale, real), constant(window, whole), constant(empty, real), most),
            *unused,
        ]
    )
    sizes = {"num_k_heads": key_heads, "num_v_heads": key_heads, "k_head_size": dim, "v_head_size": value_dim}
    for name, size in sizes.items():
        found.get_rt_info()[name] = size
    return [opset13.reshape(found.output(0), constant([1, -1, heads, value_dim], np.int64), False).output(0)]
