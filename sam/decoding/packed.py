"""Linear layers in the form that the processor multiplies fastest, for the time of decoding.

``exact`` lays the weights out for oneDNN in the model's own precision: fp32 then runs up to twice as fast as in the
plain layout. ``fast`` multiplies in bf16 where the processor does so itself; all else, the output layer included, stays
in fp32. Either way a token's result is the same to the bit whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from sam.base import multiplies_bf16
from sam.merging import MergedWeights

Linear = Callable[[Tensor], Tensor]


class PackedWeights(MergedWeights):
    """As :class:`MergedWeights`, with all linear layers packed while a merge is applied; the base stays as it is.

    Where there is no oneDNN (on a GPU), and for layers that are not ``nn.Linear``, merges are added in place.
    """

    def __init__(self, model: nn.Module, mode: str) -> None:
        super().__init__(model)
        self._on_cpu = next(model.parameters()).device.type == "cpu"
        self._head = cast(Any, model).get_output_embeddings()
        self._half = mode == "fast" and halves()
        self._unmerged: dict[str, Linear] = {}  # layers that no expert touches, packed once
        self._packed: list[nn.Module] = []

    def apply(self, modules: Iterable[tuple[str, Tensor]]) -> None:
        """As :meth:`MergedWeights.apply`; no module at all gives the base model itself, packed."""
        super().apply(modules)
        try:
            for name, module in self.model.named_modules():
                if self._can_pack(module):  # a merged layer is packed already
                    if name not in self._unmerged:
                        self._unmerged[name] = self._pack(module, module.weight)
                    self._replace(module, self._unmerged[name])
        except BaseException:
            self._restore()
            raise

    def _set(self, module: nn.Module, weight: Tensor, merged: Tensor) -> None:
        if self._can_pack(module):
            self._replace(module, self._pack(module, merged.to(weight.dtype)))
        else:
            super()._set(module, weight, merged)

    def _can_pack(self, module: nn.Module) -> bool:
        """Whether it is a plain linear layer, with no ``forward`` of somebody else's, of a kind that oneDNN packs."""
        plain = self._on_cpu and type(module) is nn.Linear and "forward" not in vars(module)
        return plain and packs(cast(Tensor, module.weight).dtype)

    def _pack(self, module: Any, weight: Tensor) -> Linear:
        half = self._half and module is not self._head and weight.dtype == torch.float32
        return _packed(weight.detach(), module.bias, torch.bfloat16 if half else weight.dtype)

    def _replace(self, module: nn.Module, forward: Linear) -> None:
        module.forward = forward  # type: ignore[method-assign]
        self._packed.append(module)

    def _restore(self) -> None:
        for module in self._packed:
            vars(module).pop("forward", None)
        self._packed.clear()
        super()._restore()


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch, on this processor, has oneDNN's packed linear layers in ``dtype``."""
    try:
        return bool(_packed(torch.ones(16, 16), None, dtype)(torch.ones(1, 16, dtype=dtype)).sum() == 256)
    except (AttributeError, RuntimeError):
        return False


def halves() -> bool:
    """Whether ``fast`` multiplies fp32 layers in bf16 on this machine's CPU."""
    return packs(torch.float32) and packs(torch.bfloat16) and multiplies_bf16()


def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    # The number is the tokens to expect; other numbers give the same result.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 256)
    offset = None if bias is None else bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, offset, "none", [], "").to(x.dtype)

    return forward
