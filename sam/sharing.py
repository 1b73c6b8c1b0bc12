"""Jobs of one sweep, shared by the processes that run its command: a job is done by the one that comes to it first.

Start as many as there are devices, such as one per GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sam.console import console
from sam.results import STATUS

LOCK = ".lock"

ELSEWHERE: list[tuple[str, Path]] = []
"""(overrides, folder) of each job of the sweep that another process came to first."""

_BEGIN = time.time()
_ours: set[Path] = set()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold the job of ``folder`` for a block; False if another process holds it, or ended it while this sweep ran."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        free = folder in _ours or not _ended_meanwhile(folder)
        if free:
            _ours.add(folder)
        yield free
    finally:
        lock.release()


def _ended_meanwhile(folder: Path) -> bool:
    try:
        changed = (folder / STATUS).stat().st_mtime
    except OSError:
        return False
    return changed >= _BEGIN and outcome(folder)[0] in ("done", "failed")


def outcome(folder: Path) -> tuple[str, str]:
    """The job's state and error, from its status file; ("running", "") without one."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        return status["state"], status["error"] or ""
    except (OSError, ValueError):
        return "running", ""


def join() -> None:
    """Wait for the jobs that other processes still run."""
    if ELSEWHERE:
        from filelock import FileLock

        with console().status("Waiting for another process's job"):
            for _, folder in ELSEWHERE:
                with FileLock(folder / LOCK):
                    pass


def left_over() -> bool:
    """Whether a job that another process had was left by it, neither done nor failed; if so, going through the sweep
    once more does these and nothing else."""
    left = any(outcome(folder)[0] == "running" for _, folder in ELSEWHERE)
    if left:
        ELSEWHERE.clear()
        _ours.clear()
    return left


def failed_elsewhere() -> list[tuple[str, str]]:
    """(overrides, error) of the jobs that failed in another process."""
    ended = [(overrides, *outcome(folder)) for overrides, folder in ELSEWHERE]
    return [(overrides, error) for overrides, state, error in ended if state == "failed"]
