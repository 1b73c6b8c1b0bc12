"""One reader a format; what differs between corpora of a format is a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam.data.readers.base import Draft, Reader, Source
from sam.data.readers.columns import Columns
from sam.data.readers.inline import Inline
from sam.data.readers.open_types import OpenTypes
from sam.data.readers.standoff import Standoff
from sam.data.readers.strings import Strings
from sam.errors import SamError

__all__ = ["Columns", "Draft", "Inline", "OpenTypes", "Reader", "Source", "Standoff", "Strings", "make_reader"]

_KINDS: dict[str, type[Columns] | type[Inline] | type[OpenTypes] | type[Standoff] | type[Strings]] = {
    "columns": Columns,
    "inline": Inline,
    "open_types": OpenTypes,
    "standoff": Standoff,
    "strings": Strings,
}


def make_reader(params: Mapping[str, Any]) -> Reader:
    """The reader that ``format:`` of a dataset's config describes. Raises SamError on a wrong kind or parameter."""
    rest = dict(params)
    kind = rest.pop("kind", None)
    if kind not in _KINDS:
        raise SamError(f"format.kind: '{kind}' is not one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**rest)
    except TypeError as error:
        raise SamError(f"format of kind {kind}: {error}") from None
