"""A base model as an OpenVINO IR, converted once, whose weights can be replaced by those of a merged model.

The IR has the inputs and the states that OpenVINO GenAI expects (``input_ids``, ``attention_mask``, ``position_ids``,
``beam_idx``; keys and values as states), and its attention the form that GenAI's pass to paged attention recognises.
Optimum's exporter does the same, but pins an older transformers.
"""

from __future__ import annotations

import shutil
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import logging as hf_logging

from sam.errors import SamError
from sam.models.base import Base, load
from sam.models.identity import fingerprint, settings_hash
from sam.models.sources import folder
from sam.models.spec import BaseSpec
from sam.paths import cache_dir, staged

IR_VERSION = 1
"""Part of the folder's name: raise it with every change to the conversion."""
MODEL, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
ATTENTION = "sam_openvino"
OUTER = "self.model."
"""What the IR's names of weights begin with, before the base model's own."""
MODEL_TYPES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""The architectures whose conversion is tested."""
WINDOW = 2048
"""Tokens of the shortest sliding window that no prompt of a sentence, with its completion, is expected to exceed."""


@dataclass(frozen=True)
class Weight:
    """Where a weight lies in the IR's weights file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self, data: Any) -> Tensor:
        """The weight as a tensor over ``data``, the bytes of the whole file."""
        size = self.dtype.itemsize * int(np.prod(self.shape))
        return torch.frombuffer(data[self.offset : self.offset + size], dtype=self.dtype).view(self.shape)


def unsupported(config: Any) -> str | None:
    """Why OpenVINO GenAI does not take a model of ``config`` here, None if it does."""
    text = config.get_text_config()
    if text.model_type not in MODEL_TYPES:
        return f"its architecture {text.model_type} is none of {', '.join(MODEL_TYPES)}"
    window = sliding_window(text)
    if window is not None and window < WINDOW:
        return f"it attends to a sliding window of {window} tokens, and OpenVINO GenAI to all that came before"
    return None


def sliding_window(config: Any) -> int | None:
    """The length of a text model's sliding window, None if all its layers attend to everything."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return int(window) if window and sliding else None


def converted(spec: BaseSpec) -> Path:
    """The folder of the IR and its tokenizer, converted on first use; without the warm start, which is a delta."""
    from filelock import FileLock

    path = folder(spec)
    name = f"{fingerprint(path)[:16]}-{settings_hash(path)[:8]}-{spec.dtype}-{IR_VERSION}"
    target = cache_dir() / "openvino" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                from sam.console import console, say

                say(f"Converting {spec.name} to OpenVINO (once, into {target})")
                with console().status("Converting"):
                    base = load(BaseSpec(**{**vars(spec), "fold": None}), "cpu")
                    for rest in target.parent.glob(f".{target.name}-*"):
                        shutil.rmtree(rest, ignore_errors=True)  # of a conversion that was killed; the lock is ours
                    with staged(target) as stage:
                        write(base, stage)
    return target


def write(base: Base, stage: Path) -> None:
    """Convert ``base`` and its tokenizer into ``stage``."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    openvino.save_model(_stateful(base.model), stage / MODEL, compress_to_fp16=False)
    tokenizer, detokenizer = convert_tokenizer(base.tokenizer, with_detokenizer=True)
    openvino.save_model(tokenizer, stage / "openvino_tokenizer.xml")
    openvino.save_model(detokenizer, stage / "openvino_detokenizer.xml")


def weights(path: Path) -> dict[str, Weight]:
    """The weights of the IR at ``path`` by the names of their modules in the base model."""
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    by_module = {}
    for layer in ET.parse(path).iterfind("./layers/layer[@type='Const']"):
        name, data = layer.get("name", ""), layer.find("data")
        if name.startswith(OUTER) and name.endswith(".weight") and data is not None:
            shape = tuple(int(n) for n in data.get("shape", "").split(",") if n)
            module = name.removeprefix(OUTER).removesuffix(".weight")
            by_module[module] = Weight(dtypes[data.get("element_type", "f32")], shape, int(data.get("offset", "0")))
    return by_module


class _Steps(nn.Module):
    """A causal language model as a function of tensors: ids, mask, positions and the past keys and values by layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits [batch, tokens, vocabulary], then the present keys and values [batch, heads, length, dim] by layer."""
        length, count = mask.shape[1], ids.shape[1]
        query = torch.arange(count)[:, None] + (length - count)
        allowed = (torch.arange(length)[None] <= query)[None, None] & (mask[:, None, None] > 0)
        bias = torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, torch.finfo(torch.float32).min)
        present: list[Tensor] = []
        layers = {kind: bias for kind in getattr(self.model.config, "layer_types", None) or ()}
        out = cast(Any, self.model)(
            input_ids=ids,
            attention_mask=layers if len(layers) > 1 else bias,
            position_ids=positions,
            use_cache=False,
            sam_past=past,
            sam_present=present,
        )
        return (out.logits, *present)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sam_past: tuple[Tensor, ...] = (),
    sam_present: list[Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over the past and the present: query [batch, heads, tokens, dim] -> [batch, tokens, heads, dim].

    Written with the very operations that OpenVINO's pass to paged attention matches.
    """
    if sam_present is None:
        raise SamError(f"attention {ATTENTION} is only for the conversion to OpenVINO")
    share = query.shape[1] // key.shape[1]
    for part, past in zip((key, value), sam_past[2 * module.layer_idx :][:2], strict=True):
        sam_present.append(torch.cat((past, part), 2))
    keys, values = (
        whole.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2) if share > 1 else whole
        for whole in sam_present[-2:]
    )
    mask = None if attention_mask is None else attention_mask.to(query.dtype)
    out = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def _traced(model: Any, heads: int, dim: int) -> Any:
    """TorchScript of :class:`_Steps`, from an example with a past of 3 tokens."""
    config = model.config.get_text_config()
    past = [torch.zeros(2, heads, 3, dim, dtype=model.dtype) for _ in range(2 * config.num_hidden_layers)]
    positions = torch.arange(3, 7)[None].expand(2, -1)
    example = (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), positions, *past)
    before, verbosity = model.config._attn_implementation, hf_logging.get_verbosity()
    try:
        model.config._attn_implementation = ATTENTION
        hf_logging.set_verbosity_error()  # tracing reads attributes that warn
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(_Steps(model), example, check_trace=False)
    finally:
        hf_logging.set_verbosity(verbosity)
        model.config._attn_implementation = before


def _stateful(model: Any) -> Any:
    """``model`` as an ``openvino.Model`` with states."""
    import openvino
    from openvino import Type, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Not ``openvino.convert_model``, which does the same and reports its use to its makers.
    frontend = FrontEndManager().load_by_framework("pytorch")
    source = TorchScriptPythonDecoder(_traced(model, heads, dim))  # has to outlive what is done with it
    graph = frontend.convert(frontend.load(source))
    numbers = range(2 * config.num_hidden_layers)
    names = ["input_ids", "attention_mask", "position_ids", *(f"past.{n}" for n in numbers)]
    element = {torch.float32: Type.f32, torch.bfloat16: Type.bf16, torch.float16: Type.f16}[model.dtype]
    for given, name in zip(graph.get_parameters(), names, strict=True):
        is_past = name.startswith("past.")
        given.set_element_type(element if is_past else Type.i64)
        given.set_partial_shape(openvino.PartialShape([-1, heads, -1, dim] if is_past else [-1, -1]))
        given.set_friendly_name(name)
        given.output(0).get_tensor().set_names({name})
    for given, name in zip(graph.outputs, ["logits", *(f"present.{n}" for n in numbers)], strict=True):
        given.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    _reordered(graph, opset13, Type)
    apply_make_stateful_transformation(graph, {f"past.{n}": f"present.{n}" for n in numbers})
    _initialised(graph, opset13, (heads, 0, dim))
    graph.validate_nodes_and_infer_types()
    return graph


def _reordered(graph: Any, ops: Any, types: Any) -> None:
    """Let ``beam_idx`` choose the rows of the past."""
    beams = ops.parameter([-1], types.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    for past in (p for p in graph.get_parameters() if p.get_friendly_name().startswith("past.")):
        targets = past.output(0).get_target_inputs()
        chosen = ops.gather(past, beams, _whole(ops, 0))
        for target in targets:
            target.replace_source_output(chosen.output(0))
    graph.add_parameters([beams])
    graph.validate_nodes_and_infer_types()


def _initialised(graph: Any, ops: Any, rest: Iterable[int]) -> None:
    """Let the states begin with no tokens, for each row of ``input_ids``."""
    shape = ops.shape_of(graph.input("input_ids"), output_type="i64")
    rows = ops.gather(shape, _whole(ops, [0]), _whole(ops, 0))
    sizes = ops.concat([rows, *(_whole(ops, [n]) for n in rest)], axis=0)
    for state in (op for op in graph.get_ops() if op.get_type_name() == "ReadValue"):
        zero = ops.convert(ops.constant(np.float32(0)), state.get_output_element_type(0).to_string())
        state.set_arguments([ops.broadcast(zero, sizes)])


def _whole(ops: Any, value: Any) -> Any:
    return ops.constant(np.array(value, dtype=np.int64))
