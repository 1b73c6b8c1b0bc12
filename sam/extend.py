"""Code named by ``_target_`` in a config: a user's own selector, merge method, combine rule or generator.

``python run.py --config-dir FOLDER merge=mine`` reads ``FOLDER/merge/mine.yaml``; modules in FOLDER can be imported.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from sam.errors import SamError, one_line

TARGET = "_target_"


def function_of(config: Mapping[str, Any], section: str) -> Callable[..., Any]:
    """What the ``_target_`` of a config section names. Raises SamError where it cannot be imported or called."""
    from hydra.utils import get_object

    if TARGET not in config:
        raise SamError(f"{section}.{TARGET} is missing; it names a function, such as sam.merging.ties")
    target = str(config[TARGET])
    try:
        named = get_object(target)
    except Exception as error:
        raise SamError(f"{section}.{TARGET}={target} cannot be imported ({one_line(error)})") from None
    if not callable(named):
        raise SamError(f"{section}.{TARGET}={target} is no function")
    return named  # type: ignore[no-any-return]


def options_of(
    config: Mapping[str, Any], function: Callable[..., Any], section: str, given: int, ours: Collection[str]
) -> dict[str, Any]:
    """The section's options for ``function``, which takes ``given`` arguments beside them, without the keys ``ours``.

    Raises SamError for an option that it does not take, or one that it needs.
    """
    options = {str(key): value for key, value in config.items() if key not in (TARGET, *ours)}
    try:
        inspect.signature(function).bind(*[None] * given, **options)
    except (TypeError, ValueError) as error:
        raise SamError(f"{section}: {config[TARGET]} does not take these options ({error})") from None
    return options


@dataclass(frozen=True)
class Configured:
    """A function that a config section names by ``_target_``, and the options that it is called with."""

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""

    @classmethod
    def read(cls, config: Mapping[str, Any], section: str, given: int, labels: Collection[str]) -> Self:
        """From a config section, whose options are all keys but ``labels``; the function takes ``given`` arguments
        before them. Raises SamError for an option that it does not take, or one that it needs."""
        function = function_of(config, section)
        return cls(function, options_of(config, function, section, given, labels), str(config[TARGET]))

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **self.options)

    @property
    def ours(self) -> bool:
        """Whether the function is one of this project's."""
        # A function of another's that is wrapped in ours has the module of ours.
        return (self.target or str(getattr(self.function, "__module__", ""))).startswith("sam.")

    @property
    def name(self) -> str:
        """The function's name without its module."""
        return self.shown.rpartition(".")[2]

    @property
    def shown(self) -> str:
        """The function as results name it: without its module if it is ours."""
        own = str(getattr(self.function, "__name__", self.function))
        return own if self.ours or not self.target else self.target

    def content(self) -> dict[str, Any]:
        """What identifies the function and its options, as plain values for JSON; of one that is not ours, its source
        too."""
        if self.ours:  # whose options all are None by default, if they may be None
            return {"name": self.name, **{name: value for name, value in self.options.items() if value is not None}}
        return identity(self.target, self.function, self.options)


def identity(target: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a function: its name, the hash of the source files that it and its name are in, and its options.

    Raises SamError for what has no source file, as a change of it could not be noticed.
    """
    inner: Any = inspect.unwrap(function)  # of decorators, which lie in other files
    while isinstance(inner, partial):
        inner = inspect.unwrap(inner.func)
    if not (inspect.isroutine(inner) or inspect.isclass(inner)):
        inner = type(inner)
    try:
        files = {inspect.getfile(inner), *_module_file(target)}
        source = b"".join(Path(file).read_bytes() for file in sorted(files))
    except (OSError, TypeError):
        raise SamError(
            f"{target} has no source file by which a change of it is noticed; name a Python function"
        ) from None
    return {"target": target, "source": hashlib.sha256(source).hexdigest()[:16], "options": dict(options)}


def _module_file(target: str) -> list[str]:
    """The file of the module in which ``target`` is: what it names there may be made of a function of another file."""
    parts = target.split(".")
    modules = [sys.modules.get(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1)]
    module = next((module for module in modules if module is not None), None)
    return [module.__file__] if module is not None and module.__file__ else []


def config_dirs(argv: Sequence[str]) -> list[Path]:
    """The folders that ``--config-dir`` (or ``-cd``) names on the command line."""
    folders: list[str] = []
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            folders += [value] if equals else list(argv[i + 1 : i + 2])
    return [Path(folder).absolute() for folder in folders]


def importable(argv: Sequence[str]) -> None:
    """Let modules in the folders of ``--config-dir`` be imported."""
    sys.path[:0] = [str(folder) for folder in config_dirs(argv) if str(folder) not in sys.path]
