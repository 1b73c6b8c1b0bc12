"""Answers, kept under everything that can change them, and reused within a run and across runs."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from sam.errors import SamError


class AnswerStore:
    """A SQLite file of raw answers; several processes may use it at once."""

    def __init__(self, path: Path | None) -> None:
        """``path`` None: in memory, for as long as the store lives."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite does not wait for its turn to change the journal's mode, whatever the timeout.
        turn = nullcontext() if path is None else FileLock(f"{path}.lock")
        with turn:
            self._db = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                # No waiting for the disk (3 ms an answer): a power failure may lose the last ones, and nothing else.
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT, truncated INTEGER)"
                )
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
        found: dict[str, tuple[str, bool]] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            rows = self._db.execute(f"SELECT key, answer, truncated FROM answers WHERE key IN ({marks})", list(part))
            found.update({key: (answer, bool(truncated)) for key, answer, truncated in rows})
        return found

    def put(self, key: str, answer: str, truncated: bool) -> None:
        """Keep an answer: other processes see it at once, and it survives the end of this one."""
        self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, answer, int(truncated)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
