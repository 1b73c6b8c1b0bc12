"""Answers, kept under everything that can change them, and reused within a run and across runs; what
other models answered to a prompt is found by it, for guesses."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from sam.errors import SamError

SEPARATOR = "\n"
TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT, truncated INTEGER);
CREATE TABLE IF NOT EXISTS siblings (prompt BLOB, experts TEXT, key TEXT, UNIQUE (prompt, experts));
"""
"""``siblings``: of a prompt (and base model) and a set of experts, the key of the last answer of a merge of them."""


class AnswerStore:
    """A SQLite file of raw answers; several processes, and threads of one, may use it at once."""

    def __init__(self, path: Path | None) -> None:
        """``path`` None: in memory, for as long as the store lives."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite does not wait for its turn to change the journal's mode, whatever the timeout.
        self._turn = threading.Lock()  # one connection: a query is read to its end before the next begins
        turn = nullcontext() if path is None else FileLock(f"{path}.lock")
        with turn:
            self._db = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                # No waiting for the disk (3 ms an answer): a power failure may lose the last ones, and nothing else.
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(TABLES)
            except sqlite3.DatabaseError as error:
                self._db.close()
                raise SamError(f"{path} cannot be opened ({error}); delete it, or set answers=fresh") from None

    @staticmethod
    def key(model_key: str, prompt: str, decoding: Mapping[str, Any]) -> str:
        """The hash of all that makes an answer: the weights, the whole prompt, the decoding."""
        parts = json.dumps([model_key, prompt, dict(decoding)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(parts.encode()).hexdigest()

    def get(self, keys: Sequence[str]) -> dict[str, tuple[str, bool]]:
        """The kept ones among ``keys``: key -> (answer, truncated)."""
        rows = self._rows("SELECT key, answer, truncated FROM answers WHERE key IN ({marks})", keys)
        return {key: (answer, bool(truncated)) for key, answer, truncated in rows}

    def put(self, key: str, answer: str, truncated: bool) -> None:
        """Keep an answer: other processes see it at once, and it survives the end of this one."""
        self._write("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, answer, int(truncated)))

    def relate(self, key: str, prompt: bytes, experts: Collection[str]) -> None:
        """Let the answer of ``key`` be found by :meth:`nearest`: it is that of a merge of ``experts`` to ``prompt``."""
        joined = SEPARATOR.join(sorted(experts))
        self._write("INSERT OR REPLACE INTO siblings VALUES (?, ?, ?)", (prompt, joined, key))

    @staticmethod
    def prompt_key(base: str, prompt: str) -> bytes:
        """What names a prompt to the base model of fingerprint ``base``."""
        return hashlib.sha256(f"{base} {prompt}".encode()).digest()[:16]

    def nearest(self, prompts: Sequence[bytes], experts: Collection[str]) -> dict[bytes, str]:
        """To each of ``prompts`` that any merge has answered, the answer of the most similar experts (Jaccard), of
        equals the latest."""
        found: dict[bytes, tuple[float, str]] = {}
        asked = set(experts)
        query = (
            "SELECT prompt, experts, answer FROM siblings JOIN answers USING (key) "
            "WHERE prompt IN ({marks}) ORDER BY siblings.rowid"
        )
        for prompt, joined, answer in self._rows(query, prompts):
            others = set(joined.split(SEPARATOR))
            similarity = len(others & asked) / len(others | asked)
            if prompt not in found or similarity >= found[prompt][0]:
                found[prompt] = (similarity, answer)
        return {prompt: answer for prompt, (_, answer) in found.items()}

    def _rows(self, query: str, values: Sequence[str] | Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        """What ``query`` gives with ``values`` for its ``{marks}``, as many at a time as SQLite takes."""
        for start in range(0, len(values), 500):
            part = values[start : start + 500]
            with self._turn:
                rows = self._db.execute(query.format(marks=",".join("?" * len(part))), list(part)).fetchall()
            yield from rows

    def _write(self, query: str, values: tuple[Any, ...]) -> None:
        with self._turn:
            self._db.execute(query, values)

    def close(self) -> None:
        """Close the file."""
        self._db.close()
