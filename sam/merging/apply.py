"""Adding a merge to a model in place and undoing it exactly.

The originals of the touched weights are copied first and copied back afterwards: adding and subtracting would drift
in bf16. The touched weights therefore need their memory twice, on the model's device, while a merge is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from sam.errors import SamError

_MARK = "_sam_merge_applied"


class MergedWeights:
    """Applies at most one merge to ``model`` at a time; as a context manager it undoes it at the exit.

    Works in ``torch.inference_mode`` and across its border. The model must not be trained while a merge is applied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._applied: list[str] = []
        self._originals: list[tuple[Tensor, Tensor]] = []  # (a weight, a copy of what it was)
        self._holds = False

    def apply(self, modules: Iterable[tuple[str, Tensor]]) -> None:
        """Set W = W0 + ΔW, added in fp32 and rounded once, for each (module name, ΔW of W's shape) of the stream.

        If anything fails, also the stream itself, all weights are restored before the error goes on. Raises SamError
        if a merge is already applied to the model, or if a module is unknown, comes twice, has no floating-point
        weight, shares its weight with another module, or has another shape than its delta.
        """
        if getattr(self.model, _MARK, False):
            raise SamError("the model already holds a merge; undo it before applying another")
        setattr(self.model, _MARK, True)
        self._holds = True
        try:
            shared = _shared_weights(self.model)
            for name, delta in modules:
                self._add(name, delta, shared)
                del delta  # before the next is made
        except BaseException:
            self._restore()
            raise

    def undo(self) -> None:
        """Copy the originals back, bit by bit; does nothing if this object has no merge applied."""
        if self._holds:
            self._restore()

    @property
    def applied(self) -> tuple[str, ...]:
        """The names of the modules that hold a merged weight."""
        return tuple(self._applied)

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _add(self, name: str, delta: Tensor, shared: dict[int, list[str]]) -> None:
        weight = _weight(self.model, name)
        check_fit(name, weight, delta, self._applied, shared.get(id(weight), ()))
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            exact = torch.promote_types(weight.dtype, torch.float32)
            merged = weight.detach().to(exact) + delta.to(device=weight.device, dtype=exact)
            self._set(self.model.get_submodule(name), weight, merged)
        self._applied.append(name)

    def _set(self, module: nn.Module, weight: Tensor, merged: Tensor) -> None:
        """Make ``module`` work with ``merged`` (fp32 at least) in place of ``weight``."""
        self._originals.append((weight, weight.detach().clone()))
        weight.copy_(merged)

    def _restore(self) -> None:
        for weight, original in self._originals:
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight.copy_(original)
        self._originals.clear()
        self._applied.clear()
        delattr(self.model, _MARK)
        self._holds = False


@contextmanager
def merged(model: nn.Module, modules: Iterable[tuple[str, Tensor]]) -> Iterator[nn.Module]:
    """``with merged(model, merge_modules(...)):`` the model holds the merge inside, and its own weights after."""
    weights = MergedWeights(model)
    weights.apply(modules)
    try:
        yield model
    finally:
        weights.undo()


def fold(model: nn.Module, modules: Iterable[tuple[str, Tensor]]) -> None:
    """Add each ΔW of the stream to ``model`` for good, in fp32 and rounded once; nothing is kept to undo it.

    Raises SamError as :meth:`MergedWeights.apply`; the model is of no use then.
    """
    done: list[str] = []
    shared = _shared_weights(model)
    for name, delta in modules:
        weight = _weight(model, name)
        check_fit(name, weight, delta, done, shared.get(id(weight), ()))
        with torch.no_grad():
            exact = torch.promote_types(weight.dtype, torch.float32)
            # Not in place: a weight that was read by mmap would first be copied, page by page.
            weight.data = (weight.to(exact) + delta.to(device=weight.device, dtype=exact)).to(weight.dtype)
        del delta  # before the next is made
        done.append(name)


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        weight = getattr(model.get_submodule(name), "weight", None)
    except AttributeError:
        raise no_module(name) from None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise SamError(f"module {name!r} has no floating-point weight; load the base model without quantisation")
    return weight


def no_module(name: str) -> SamError:
    """The error for a delta of a module that the base model lacks."""
    return SamError(f"the base model has no module {name!r}; the expert was trained on another base model")


def check_fit(name: str, weight: Tensor, delta: Tensor, done: Sequence[str], owners: Sequence[str]) -> None:
    """Raise SamError where module ``name`` was ``done`` already, its shape is another, or its weight has several
    ``owners`` (names of parameters)."""
    if name in done:
        raise SamError(f"module {name!r} comes twice in one merge; give one delta a module")
    if weight.shape != delta.shape:
        raise SamError(
            f"the delta of {name!r} has shape {list(delta.shape)}, the base model's weight {list(weight.shape)}; "
            "the expert was trained on another base model"
        )
    if len(owners) > 1:
        raise SamError(
            f"module {name!r} shares its weight with {', '.join(o for o in owners if o != f'{name}.weight')}, which "
            "the delta would change too; train the expert without it"
        )


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Parameter names by the identity of the parameter: tied weights have more than one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners
