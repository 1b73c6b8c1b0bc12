"""The base model's layers compiled by OpenVINO, in place of torch's: ``fast`` on a processor with AMX or VNNI.

There torch spends much of a pass (with AMX most of it) between the products, which OpenVINO fuses. It has paged
attention (Kwon et al. 2023, arXiv 2309.06180): keys and values lie in blocks, and a pass is a list of sequences, each
with a past. Embeddings, layers and the last norm are compiled; the output layer stays torch's.

With AMX all is in bf16. With VNNI alone the weights of linear layers are in int8, and so are their inputs as they are
multiplied, a step for each group of neighbours (see :func:`group`), once inputs are evened out with their weights as in
:mod:`sam.decoding.int8`; the rest is in fp32.

A token's result is the same to the bit whatever else is in the pass, as

- a prompt comes in one pass and is one sequence. A token of an answer is a sequence of its own, though it may come with
  guesses of what follows: OpenVINO sums otherwise for one token than for several. It keeps all new keys and values of a
  pass before it attends, so that a guess sees those before it;
- what fills a pass up is a sequence of several tokens, as it sums otherwise in a pass in which all have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sam.base import Base, has_amx
from sam.decoding.conversion import OUTER, PARTS, converted
from sam.decoding.int8 import steps
from sam.decoding.packed import LEAST, PackedWeights, compiled_in, products
from sam.decoding.ragged import KeyValues, Pass, rounded
from sam.errors import SamError

TYPES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Of the models that are compiled: those that the tests compile."""
SIZE = 32  # slots of a block, as OpenVINO has them on a CPU
GROUP = 128  # neighbours of one step in int8 at most: more err more, and are hardly faster
UNIT = 16  # what OpenVINO has groups in multiples of
FUSED = 256  # where a hidden state is a multiple of it, q, k and v may be multiplied as one


def weights_of(base: Base, mode: str, *, constrained: bool) -> PackedWeights:
    """What merges are applied by for answers of ``base``, as :meth:`PackedWeights.of`."""
    model = base.model
    found = products(mode, str(model.dtype).removeprefix("torch."), torch.device(base.device).type)
    compiled = "OpenVINO" in found and compiles(model.config)
    return (CompiledWeights if compiled else PackedWeights).of(base, mode, constrained=constrained)


def compiles(config: Any) -> bool:
    """Whether a model of ``config`` is compiled: not if its rotations hang on how long the text is, nor if OpenVINO may
    multiply queries, keys and values as one, which it does for some numbers of threads, rounding otherwise."""

    def kinds(rope: object) -> Iterable[object]:
        if isinstance(rope, Mapping):
            yield rope.get("rope_type")
            for inner in rope.values():
                yield from kinds(inner)

    rotations = set(kinds(getattr(config, "rope_parameters", None)))
    return config.model_type in TYPES and config.hidden_size % FUSED != 0 and not rotations & {"dynamic", "longrope"}


def group(inputs: Iterable[int]) -> int:
    """How many neighbours share a step in int8 where layers have so many ``inputs``: the most, in multiples of ``UNIT``
    and up to ``GROUP``, that divide all of these.

    If none do, it is ``GROUP``. Of a layer that it does not divide, the last group of inputs is smaller and an output's
    weights share one step; a layer with fewer inputs is multiplied in fp32.
    """
    common = math.gcd(*inputs)
    return max((size for size in range(UNIT, GROUP + 1, UNIT) if common % size == 0), default=GROUP)


def caches(model: Any) -> Callable[[int, int], KeyValues | Blocks]:
    """What makes a cache (rows, slots) for ``model`` as it is now."""
    forward = vars(model.base_model).get("forward")
    return forward.cache if isinstance(forward, Compiled) else KeyValues


class Blocks:
    """Keys and values by layer, [blocks, heads, SIZE, dim] each, zero at first. A row has a share of the blocks, what
    fills a pass up the last block."""

    guesses_at_once = False  # OpenVINO clears what follows a prompt in its last block after all new tokens are kept

    def __init__(self, rows: int, slots: int, shapes: Sequence[tuple[int, int]], kind: str) -> None:
        """``shapes``: (heads, dim) of each tensor; ``kind``: OpenVINO's name of their dtype."""
        import openvino

        self.rows, self.each = rows, -(-slots // SIZE)
        dtype, numpy_dtype = {"bf16": (openvino.Type.bf16, np.uint16), "f32": (openvino.Type.f32, np.float32)}[kind]
        self._shares = list(range(rows))
        self.last = rows * self.each
        # Of memory that is new only where it is written.
        self._arrays = [np.zeros((self.last + 1, heads, SIZE, dim), dtype=numpy_dtype) for heads, dim in shapes]
        self.tensors = [openvino.Tensor(a.reshape(-1), openvino.Shape(a.shape), dtype) for a in self._arrays]

    def first(self, row: int) -> int:
        """The first of a row's blocks; the others follow."""
        return self._shares[row] * self.each

    def move(self, source: int, to: int, slots: int) -> None:
        """Give a row, of any number of ``slots``, the place of another one, which gets its place."""
        self._shares[source], self._shares[to] = self._shares[to], self._shares[source]

    def copy_from(self, other: Blocks, source: int, to: int, slots: int) -> None:
        """Copy the first ``slots`` of row ``source`` of ``other`` into a row here."""
        count, theirs, ours = -(-slots // SIZE), other.first(source), self.first(to)
        for array, given in zip(self._arrays, other._arrays, strict=True):
            array[ours : ours + count] = given[theirs : theirs + count]


class Graph:
    """The layers of a model as OpenVINO's graph, whose weights can be set before it is compiled."""

    def __init__(self, model: Any, kind: str, divide: Mapping[nn.Module, Tensor] | None = None) -> None:
        """``kind``: what is computed in, ``bf16`` or ``f32``, or, with all else in fp32, what is multiplied in,
        ``int8``. ``divide``: by what the inputs of linear layers are divided before, and their weights multiplied."""
        from openvino import PartialShape, Type

        self._kind, self._int8 = "f32" if kind == "int8" else kind, kind == "int8"
        self._divide = divide or {}
        self._decoder: nn.Module = model.base_model
        self._model, self._shapes = converted(model)
        inputs = self._model.get_parameters()
        types = [Type.i64, Type.i64, *[Type.i32] * (len(PARTS) + 1)]
        shapes: list[list[int]] = [[1, -1], [1, -1], *[[-1]] * len(PARTS), []]
        for heads, dim in self._shapes:
            types.append(getattr(Type, self._kind))
            shapes.append([-1, heads, SIZE, dim])
        for given, type_, shape in zip(inputs, types, shapes, strict=True):
            given.set_element_type(type_)
            given.set_partial_shape(PartialShape(shape))
        self._model.validate_nodes_and_infer_types()
        self._nodes = self._own()
        self._group = group(module.in_features for module in self._nodes if isinstance(module, nn.Linear))
        self._balance()
        self._merged: dict[nn.Module, Any] = {}

    def _own(self) -> dict[nn.Module, Any]:
        """The node that gives each layer's weight: the model's own, of its memory in place of a copy."""
        found = {node.get_friendly_name(): node for node in self._model.get_ops() if node.get_type_name() == "Constant"}
        nodes: dict[nn.Module, Any] = {}
        for name, module in self._decoder.named_modules():
            node = found.get(f"{OUTER}{name}.weight")
            if isinstance(module, nn.Linear | nn.Embedding) and node is not None:
                if list(node.shape) != list(module.weight.shape):
                    raise SamError(f"OpenVINO changed the weight of {name}; uninstall openvino, or decode=exact")
                nodes[module] = _constant(cast(Tensor, module.weight))
                node.output(0).replace(nodes[module].output(0))
        return nodes

    def _node(self, module: nn.Module, weight: Tensor) -> Any:
        """The node that gives ``weight`` to ``module``."""
        if not self._int8 or isinstance(module, nn.Embedding):
            return _constant(weight)
        from openvino import opset13

        size = weight.shape[1] if weight.shape[1] % self._group else self._group
        parts = (weight.detach() * self._divide.get(module, 1)).unflatten(1, (-1, size))
        step = steps(parts)
        whole = opset13.convert(_constant(parts.div_(step).round_().to(torch.int8)), "f32")
        shape = opset13.constant(np.array(weight.shape, dtype=np.int64))
        return opset13.reshape(opset13.multiply(whole, _constant(step)), shape, False)

    def _balance(self) -> None:
        """Divide the inputs of linear layers, once for those that share one."""
        from openvino import opset13

        divided: dict[tuple[str, int, int], Any] = {}
        for module, divisor in self._divide.items():
            for target in self._nodes[module].output(0).get_target_inputs() if module in self._nodes else ():
                given = target.get_node().input(0)
                source = given.get_source_output()
                key = (source.get_node().get_name(), source.get_index(), id(divisor))
                if key not in divided:
                    divided[key] = opset13.multiply(source, _constant(1 / divisor)).output(0)
                given.replace_source_output(divided[key])

    def set(self, module: nn.Module, weight: Tensor) -> None:
        """Let ``module`` have ``weight`` (of its shape) in what is compiled next. Raises SamError for a module that is
        not part of the graph."""
        if module not in self._nodes:
            raise SamError(
                f"OpenVINO compiles no {type(module).__name__} of its own weight where the expert has one; use "
                "decode=exact, or uninstall openvino"
            )
        before, self._merged[module] = self._merged.get(module, self._nodes[module]), self._node(module, weight.float())
        before.output(0).replace(self._merged[module].output(0))

    def reset(self) -> None:
        """Give all modules the model's own weights back."""
        for module, node in self._merged.items():
            node.output(0).replace(self._nodes[module].output(0))
        self._merged.clear()

    def compile(self, threads: int) -> Compiled:
        """The model with the weights as they are set, whose memory it may keep; in int8 its own are set where none are,
        and rounded each time, as most merges leave none of them."""
        from openvino import Core

        if self._int8:
            for module in self._nodes:
                if module not in self._merged and isinstance(module, nn.Linear):
                    self.set(module, module.weight)
        amx = has_amx()
        # Not pinned, as another process may be at work; logical processors count as torch counts them.
        settings = {
            "INFERENCE_PRECISION_HINT": self._kind,
            "KV_CACHE_PRECISION": self._kind,
            "INFERENCE_NUM_THREADS": max(LEAST, threads) if amx else threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "ENABLE_HYPER_THREADING": True,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self._group if self._int8 else 0,
        }
        made = Core().compile_model(self._model, "CPU", settings)
        if amx and self._kind == "bf16" and (found := made.get_property("INFERENCE_NUM_THREADS")) < LEAST:
            raise SamError(
                f"OpenVINO takes {found} thread here and needs {LEAST} to multiply in bf16 with AMX; unset "
                "OMP_PROC_BIND if it is set, or decode=exact, or uninstall openvino"
            )
        return Compiled(made.create_infer_request(), self._shapes, self._kind)


class Compiled:
    """The ``forward`` of a model's layers, for passes whose cache is one of :meth:`cache`."""

    def __init__(self, request: Any, shapes: Sequence[tuple[int, int]], kind: str) -> None:
        self._request, self._shapes, self._kind = request, shapes, kind
        self._bound: Blocks | None = None

    def cache(self, rows: int, slots: int) -> Blocks:
        """A cache for ``rows`` of at most ``slots`` tokens each."""
        return Blocks(rows, slots, self._shapes, self._kind)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, sam_pass: Pass | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        """input_ids, position_ids [1, tokens] -> the last hidden states [1, tokens or more, dim] of the pass."""
        if sam_pass is None:
            raise SamError("a compiled model works only inside sam.decoding")
        import openvino

        count = len(sam_pass.rows)
        spare = rounded(count + 2) - count  # two at least
        self._bind(cast(Any, sam_pass.cache))
        ids, positions = (nn.functional.pad(x[:, :count], (0, spare)).numpy() for x in (input_ids, position_ids))
        *parts, most = _sequences(sam_pass, spare)
        numbers = [ids, positions, *(np.array(part, dtype=np.int32) for part in (*parts, most))]
        for number, given in enumerate(numbers):
            self._request.set_input_tensor(number, openvino.Tensor(given))
        self._request.infer()
        return BaseModelOutputWithPast(
            last_hidden_state=torch.from_numpy(self._request.get_output_tensor(0).data.copy())
        )

    def _bind(self, blocks: Blocks) -> None:
        if blocks is not self._bound:
            for number, tensor in enumerate(blocks.tensors, start=len(PARTS) + 3):
                self._request.set_input_tensor(number, tensor)
            self._bound = blocks


def _sequences(now: Pass, spare: int) -> tuple[list[int], list[int], list[int], list[int], int]:
    """Of a pass's sequences, and one of ``spare`` tokens: the past of each, where its tokens begin, its blocks, where
    they begin; and the most slots that one has."""
    blocks = cast(Blocks, now.cache)
    pasts: list[int] = []
    indices: list[int] = []
    begins, firsts, most = [0], [0], spare

    def add(first: int, past: int, count: int) -> None:
        nonlocal most
        pasts.append(past)
        begins.append(begins[-1] + count)
        indices.extend(range(first, first - (-(past + count) // SIZE)))
        firsts.append(len(indices))
        most = max(most, past + count)

    for number, row in enumerate(now.given):
        for past, count in [(row.past + n, 1) for n in range(row.count)] if row.answers else [(row.past, row.count)]:
            add(blocks.first(number), past, count)
    add(blocks.last, 0, spare)
    return pasts, begins, indices, firsts, most


class CompiledWeights(PackedWeights):
    """As :class:`PackedWeights`, with the layers compiled while a merge is applied: nothing but decoding works then.

    All merged weights are held until they are compiled, in fp32, or in int8 with all others.
    """

    KIND: str | None = None  # as Graph has it; None: what this processor does
    _graph: Graph | None = None

    def __init__(self, model: nn.Module, mode: str, *, all_logits: bool, sample: Sequence[int] = ()) -> None:
        super().__init__(model, mode, all_logits=all_logits, sample=sample)
        self._kind = self.KIND or cast(str, compiled_in())
        if self._kind == "int8":
            self._half, self._int8 = False, True  # the output layer too

    def apply(self, modules: Iterable[tuple[str, Tensor]]) -> None:
        """As :meth:`PackedWeights.apply`. Raises SamError for a module that is not compiled."""
        super().apply(modules)
        try:
            graph = cast(Graph, self._graph)
            vars(self.model.base_model)["forward"] = graph.compile(torch.get_num_threads())
            graph.reset()
        except BaseException:
            self._restore()
            raise

    def _look(self) -> None:
        super()._look()
        if self._graph is None:
            self._graph = Graph(self.model, self._kind, self._divisors)

    def _set(self, module: nn.Module, weight: Tensor, merged: Tensor) -> None:
        if module is self._head:
            super()._set(module, weight, merged)
        else:
            cast(Graph, self._graph).set(module, merged)

    def _can_pack(self, module: nn.Module) -> bool:
        return module is self._head and super()._can_pack(module)

    def _restore(self) -> None:
        vars(self.model.base_model).pop("forward", None)
        if self._graph:
            self._graph.reset()
        super()._restore()


def _constant(weight: Tensor) -> Any:
    """A node of the memory of ``weight``."""
    from openvino import op

    return op.Constant(weight.detach().contiguous().numpy(), shared_memory=True)
