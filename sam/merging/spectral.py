"""Merging in the space of singular vectors: Iso-C and KnOTS.

Both work on factors ΔW = B A of a module: a LoRA adapter's own (B with its scale), or, of a plain tensor, the tensor
itself and the identity. A decomposition then costs a QR of the stacked factors and an SVD of the size of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sam.errors import SamError
from sam.merging.checks import check_lam
from sam.merging.deltas import AdapterDeltas
from sam.merging.stream import DeltaSet, Merged, module_names, of_module

Pair = tuple[Tensor, Tensor]
"""B [out, r] and A [r, in], fp32."""


def factored(sets: Sequence[DeltaSet], module: str) -> dict[int, Pair]:
    """By index, the factors of the experts that have ``module``. Raises SamError if their deltas differ in shape, or
    are no matrices."""
    pairs = {index: _pair(one, module) for index, one in enumerate(sets) if module in one}
    shapes = [[b.shape[0], a.shape[1]] for b, a in pairs.values()]
    if any(shape != shapes[0] for shape in shapes):
        raise SamError(f"deltas{of_module(module)} have shapes {shapes}; merge experts of the same base model")
    return pairs


def _pair(one: DeltaSet, module: str) -> Pair:
    if isinstance(one, AdapterDeltas):
        factors = one.factors(module)
        b, a = factors.b * factors.scale, factors.a
        return (a.T, b.T) if factors.transposed else (b, a)
    delta = one[module].detach().to(torch.float32)
    if delta.dim() != 2:
        raise SamError(
            f"a delta{of_module(module)} has shape {list(delta.shape)}; merging singular vectors takes matrices"
        )
    return delta, torch.eye(delta.shape[1], device=delta.device)


def isotropic(sets: Sequence[DeltaSet], lam: float) -> Merged:
    """``lam`` · σ̄ U Vᵀ per module; see :func:`sam.merging.iso_c`."""
    check_lam(lam)
    return ((module, _flattened(list(factored(sets, module).values())).mul_(lam)) for module in module_names(sets))


def _flattened(pairs: Sequence[Pair]) -> Tensor:
    """σ̄ U Vᵀ of the sum of B A: its singular vectors, each with the mean of the nonzero singular values."""
    left, core_left = torch.linalg.qr(torch.cat([b for b, _ in pairs], 1))
    right, core_right = torch.linalg.qr(torch.cat([a for _, a in pairs], 0).T)
    u, sigma, v = torch.linalg.svd(core_left @ core_right.T)
    rank = _rank(sigma)
    mean = sigma[:rank].mean() if rank else 0.0
    return (left @ u[:, :rank]) @ (v[:rank] @ right.T) * mean


def aligned(sets: Sequence[DeltaSet]) -> tuple[dict[str, Tensor], list[Mapping[str, Tensor]]]:
    """The SVD of every module's deltas side by side, [ΔW_1 … ΔW_n] = U Σ [V_1ᵀ … V_nᵀ]: U [out, rank] by module, and
    a delta set of Σ V_iᵀ [rank, in] per expert."""
    bases: dict[str, Tensor] = {}
    parts: list[Mapping[str, Tensor]] = [{} for _ in sets]
    for module in module_names(sets):
        pairs = factored(sets, module)
        bases[module], coordinates = _shared_basis(list(pairs.values()))
        for index, own in zip(pairs, coordinates, strict=True):
            parts[index][module] = own  # type: ignore[index]
    return bases, parts


def _shared_basis(pairs: Sequence[Pair]) -> tuple[Tensor, list[Tensor]]:
    left, core = torch.linalg.qr(torch.cat([b for b, _ in pairs], 1))
    cores = core.split([b.shape[1] for b, _ in pairs], 1)
    rows = [own @ a for own, (_, a) in zip(cores, pairs, strict=True)]  # ΔW_i = left @ rows[i]
    u, sigma, _ = torch.linalg.svd(torch.cat(rows, 1), full_matrices=False)
    u = u[:, : _rank(sigma)]
    return left @ u, [u.T @ row for row in rows]


def _rank(sigma: Tensor) -> int:
    """How many of the descending singular values differ from 0 in fp32."""
    return int((sigma > sigma.max() * len(sigma) * torch.finfo(sigma.dtype).eps).sum()) if len(sigma) else 0
