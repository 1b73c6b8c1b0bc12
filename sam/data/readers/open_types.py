"""JSON lines whose sentences are each annotated with entity types of their own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sam.data.readers.base import Draft, Source
from sam.errors import SamError
from sam.ner.alignment import align


@dataclass(frozen=True)
class OpenTypes:
    """``{"text", "mentions": [[type, surface], …], "absent": [type, …]}`` per line; ``absent`` are types without a
    mention in the text.

    A pair is marked wherever its surface occurs as whole words outside of a longer mention.
    """

    def read(self, source: Source, counts: Counter[str]) -> Iterator[Draft]:
        """The sentences of all files, in order; a file is a document. ``counts["pairs_without_occurrence"]``: pairs
        that occur only inside a longer mention. Raises SamError, with file and line, for a line of another form."""
        for number, path in enumerate(source.files):
            for n, line in enumerate(source.text(path).split("\n"), start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    text, pairs = record["text"], [(kind, surface) for kind, surface in record["mentions"]]
                    types = tuple(dict.fromkeys([*(kind for kind, _ in pairs), *record["absent"]]))
                    if not all(isinstance(one, str) for one in (text, *types, *(surface for _, surface in pairs))):
                        raise TypeError("text, types and surfaces must be strings")
                except (ValueError, KeyError, TypeError) as error:
                    raise SamError(f"{path}:{n}: not an object with text, mentions and absent: {error}") from None
                mentions = align(text, pairs)
                marked = {(m.type, text[m.start : m.end]) for m in mentions}
                counts["pairs_without_occurrence"] += len(set(pairs) - marked)
                yield Draft(text, mentions, path, number, types=types)
