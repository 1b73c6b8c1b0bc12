"""A section of the config as a dataclass, its keys and the types of its values checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sam.errors import SamError

T = TypeVar("T")

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def options(kind: type[T], config: Mapping[str, Any], section: str) -> T:
    """The dataclass ``kind`` from a plain mapping; lists become tuples.

    Raises SamError, with the option's name on the command line, for a key that ``kind`` has not, one that it needs, and
    a value of another type: integers are numbers, nothing else is taken for something that it is not.
    """
    hints, known = get_type_hints(kind), [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(config) - set(known)):
        raise SamError(f"{section}.{unknown[0]} is unknown; allowed: {', '.join(sorted(known))}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in config]:
        raise SamError(f"{section}.{missing[0]} is missing; {section} needs {', '.join(needed)}")
    for name, value in config.items():
        if not _fits(value, hints[name]):
            raise SamError(f"{section}.{name}={'null' if value is None else value} must be {_worded(hints[name])}")
    return kind(**{name: _taken(value, hints[name]) for name, value in config.items()})


def _taken(value: Any, hint: Any) -> Any:
    """``value`` in the type of ``hint``: hashes distinguish 1 and 1.0."""
    if isinstance(hint, UnionType):
        return value if value is None else _taken(value, next(h for h in get_args(hint) if _fits(value, h)))
    if get_origin(hint) is tuple:
        return tuple(_taken(one, get_args(hint)[0]) for one in value)
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _worded(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_worded(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list with {WORDS[get_args(hint)[0]]} in each place"
    return WORDS[hint]
