"""Completions on disk, kept under everything that can change them and reused within a run and across runs.

One folder per model and generator settings; in it one append-only file of JSON lines per writing process. Nobody
changes another's file and there are no locks, so that several processes and machines can share the folder on a network
file system, and a process that is killed loses at most the line that it was writing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sam.generation.api import Completion, Request

log = logging.getLogger(__name__)


class CompletionCache:
    """Completions by model and request. ``folder`` None: kept in memory, for as long as the cache lives."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._known: dict[str, dict[str, tuple[float, Completion]]] = {}  # with the time when it was written
        self._read: dict[Path, int] = {}  # how many bytes of a file have been read
        self._open: tuple[str, BinaryIO] | None = None

    @staticmethod
    def model(weights: str, settings: Mapping[str, Any]) -> str:
        """The name of a model's folder: ``weights`` identify it, ``settings`` are those of its generator."""
        return _hash([weights, dict(settings)])

    def get(self, model: str, requests: Sequence[Request]) -> dict[int, Completion]:
        """The kept completions by index of their request."""
        self._refresh(model)
        known = self._known.get(model, {})
        keys = ((i, request_key(r)) for i, r in enumerate(requests))
        return {i: known[key][1] for i, key in keys if key in known}

    def put(self, model: str, request: Request, completion: Completion) -> None:
        """Keep a completion. The first one of a request stays, also of several processes: in half precision another
        may differ."""
        key, written = request_key(request), time.time()
        _keep(self._known.setdefault(model, {}), key, written, completion)
        if self._folder is not None:
            record = {
                "key": key,
                "time": written,
                "text": completion.text,
                "truncated": completion.truncated,
                "logprobs": completion.logprobs,
                "ends": completion.ends,
            }
            file = self._file(model)
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            file.flush()

    def close(self) -> None:
        """Close the file that is being written."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _file(self, model: str) -> BinaryIO:
        if self._open is None or self._open[0] != model:
            self.close()
            assert self._folder is not None
            path = self._folder / model / self._name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = (model, path.open("ab"))
        return self._open[1]

    def _refresh(self, model: str) -> None:
        """Read what this and other processes have added to a model's files."""
        if self._folder is None:
            return
        known = self._known.setdefault(model, {})
        for path in sorted((self._folder / model).glob("*.jsonl")):
            for key, written, completion in self._new(path):
                _keep(known, key, written, completion)

    def _new(self, path: Path) -> Iterator[tuple[str, float, Completion]]:
        """(key, time, completion) of each whole line that was added to a file since it was last read."""
        begin = self._read.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(begin)
                new = file.read()
        except OSError as error:
            log.warning("%s cannot be read (%s); its completions are generated again", path, error.strerror)
            return
        whole = new[: new.rfind(b"\n") + 1]  # the last line may still be being written
        self._read[path] = begin + len(whole)
        damaged = 0
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                yield str(record["key"]), float(record.get("time", 0)), _completion(record)
            except (ValueError, KeyError, TypeError):
                damaged += 1
        if damaged:
            log.warning("%s: %d damaged line(s) ignored; their completions are generated again", path, damaged)


def request_key(request: Request) -> str:
    """The hash of a request."""
    return _hash([request.prefix, request.suffix, request.grammar])


def _keep(known: dict[str, tuple[float, Completion]], key: str, written: float, completion: Completion) -> None:
    """The completion that was written first stays, in whatever order files are read."""
    if key not in known or written < known[key][0]:
        known[key] = (written, completion)


def _completion(record: Mapping[str, Any]) -> Completion:
    text, truncated = record["text"], record["truncated"]
    if not isinstance(text, str) or not isinstance(truncated, bool):
        raise TypeError("not a completion")
    return Completion(text, truncated, tuple(map(float, record["logprobs"])), tuple(map(int, record["ends"])))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
