"""Reading ΔW of each module from a LoRA adapter folder as PEFT writes it (safetensors only)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sam.errors import SamError
from sam.merging.trim import Cut

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Options of PEFT's LoRA that make the adapter more than scale · B A on the weights of linear layers.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
)
# Initialisations that change the base weights, so that B A is not the difference from the base model.
_REFUSED_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """One module's LoRA: ``a`` [r, in] and ``b`` [out, r], fp32; ΔW = scale · b @ a, transposed if ``transposed``."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of ΔW."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    def product(self, out: Tensor | None = None) -> Tensor:
        """ΔW, fp32, of the shape of the module's weight; written into ``out`` if given, contiguous, of that shape."""
        scaled = self.b * self.scale
        if not self.transposed:
            return torch.mm(scaled, self.a, out=out)
        delta = (scaled @ self.a).T
        return delta.contiguous() if out is None else out.copy_(delta)


class AdapterDeltas:
    """The deltas of one adapter; the factors are held in fp32, a delta is computed each time it is asked for.

    It is a delta set (``adapter[module]``, ``module in adapter``, iteration over module names).
    """

    def __init__(self, folder: Path, factors: dict[str, Factors]) -> None:
        self.folder = folder
        self._factors = dict(sorted(factors.items()))
        self.cuts: dict[float, Cut] = {}
        """By density: where a global trim cuts this adapter, as far as that has been searched."""

    @classmethod
    def open(cls, folder: str | Path) -> AdapterDeltas:
        """Read ``folder`` (``adapter_config.json`` and ``adapter_model.safetensors``).

        Raises SamError if a file is missing or damaged, or if the adapter is not plain LoRA on linear layers: DoRA,
        biases, whole trained modules, embeddings, parameters, initialisations that change the base weights, ….
        """
        folder = Path(folder)
        config = _read_config(folder)
        sides = _sort_tensors(folder, _read_tensors(folder))
        return cls(folder, {module: _factors(folder, module, pair, config) for module, pair in sides.items()})

    def modules(self) -> list[str]:
        """The names, in the base model, of the modules with a delta, sorted."""
        return list(self._factors)

    def shape(self, module: str) -> tuple[int, int]:
        """The shape of the module's ΔW."""
        return self.factors(module).shape

    def factors(self, module: str) -> Factors:
        """The module's A, B and scale. Raises SamError for a module without a delta."""
        if module not in self._factors:
            raise SamError(f"adapter {self.folder} has no delta for module {module!r}; it has {_some(self.modules())}")
        return self._factors[module]

    def delta(self, module: str, out: Tensor | None = None) -> Tensor:
        """ΔW = scale · B A of ``module``, fp32 [out, in] ([in, out] with ``fan_in_fan_out``), as PEFT computes it.

        Written into ``out`` if given: a contiguous fp32 tensor of that shape.
        """
        return self.factors(module).product(out)

    def __getitem__(self, module: str) -> Tensor:
        return self.delta(module)

    def __contains__(self, module: object) -> bool:
        return module in self._factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __repr__(self) -> str:
        return f"AdapterDeltas({str(self.folder)!r}, {len(self._factors)} modules)"

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over each module's name, A, B (as fp32), scale and orientation: all that ΔW depends on."""
        digest = hashlib.sha256()
        for module, factors in self._factors.items():
            head = [module, list(factors.a.shape), list(factors.b.shape), factors.scale, factors.transposed]
            digest.update(json.dumps(head).encode())
            digest.update(factors.a.numpy().tobytes())
            digest.update(factors.b.numpy().tobytes())
        return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SamError(f"cannot read {path}: {error.strerror}; an adapter folder holds {CONFIG_FILE}") from error
    except ValueError as error:
        raise SamError(f"{path} is not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise SamError(f"{path} holds no JSON object; save the adapter again")
    _check_config(path, config)
    return config


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise SamError(f"{path}: peft_type={config.get('peft_type')!r} is not supported; only 'LORA' is")
    for option in _REFUSED:
        if config.get(option):
            raise SamError(f"{path}: {option} is not supported; only plain LoRA on linear layers is, train without it")
    if config.get("bias", "none") != "none":
        raise SamError(f"{path}: bias={config['bias']!r} is not supported; train with bias='none'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_REFUSED_INIT):
        raise SamError(
            f"{path}: init_lora_weights={init!r} changes the base weights; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise SamError(f"{path}: lora_alpha={config.get('lora_alpha')!r} is not a number; save the adapter again")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise SamError(f"{path} is missing; an adapter folder holds {TENSOR_FILE} (pickled .bin files are not read)")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SamError(f"{path} is damaged ({str(error).splitlines()[0]}); save or copy the adapter again") from error


def _sort_tensors(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and side ("A", "B"); every tensor has to be one of a pair."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise SamError(
                f"{folder / TENSOR_FILE}: tensor {name!r} is not supported; only lora_A and lora_B of linear layers are"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise SamError(f"{folder / TENSOR_FILE} holds no LoRA tensors; save the adapter again")
    return sides


def _factors(folder: Path, module: str, pair: dict[str, Tensor], config: dict[str, Any]) -> Factors:
    where = f"{folder / TENSOR_FILE}: module {module}"
    for side in "AB":
        if side not in pair:
            raise SamError(f"{where} has no lora_{side}; save the adapter again")
        if pair[side].dim() != 2:
            raise SamError(f"{where}: lora_{side} has shape {list(pair[side].shape)}; only linear layers are supported")
        if not torch.isfinite(pair[side]).all():
            raise SamError(f"{where}: lora_{side} holds NaN or infinity; its training diverged, train it again")
    a, b = (pair[side].to(torch.float32).contiguous() for side in "AB")
    if a.shape[0] != b.shape[1]:
        raise SamError(f"{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} differ in rank; save it again")
    return Factors(a, b, _scale(module, a.shape[0], config), bool(config.get("fan_in_fan_out")))


def _scale(module: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / √r for rsLoRA; the first key of ``alpha_pattern`` that matches the module's name wins.

    The match is that of PEFT's ``get_pattern_key``, rewritten because importing PEFT takes seconds. ``rank_pattern``
    is not read: the rank is that of the tensor.
    """
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")
