"""Jobs of one sweep, shared by the processes that run its command: each job is whose process comes to it first.

Several may be started by hand, as one a GPU. On a CPU a sweep starts a second one by itself after its first job, whose
sampled answers both need: two processes on a core each do more than one on two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sam.console import console, say
from sam.errors import SamError
from sam.results import STATUS

HELPS = "SAM_HELPS"
"""Set in a process that another one started for its sweep: when that one began."""
LOG, LOCK = "helper.log", ".lock"
SPARE = 1.25
"""How many times the first job's peak of memory must be free for each further process."""

_BEGIN = float(os.environ.get(HELPS) or time.time())
_started: list[subprocess.Popen[bytes]] = []
_threads: list[int] = []


def helps() -> bool:
    """Whether another process started this one for its sweep."""
    return HELPS in os.environ


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold the job of ``folder`` for a block; False if it is another process's, or was while this sweep ran."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield not _ended_meanwhile(folder)
    finally:
        lock.release()


def _ended_meanwhile(folder: Path) -> bool:
    try:
        changed = (folder / STATUS).stat().st_mtime
    except OSError:
        return False
    return changed >= _BEGIN and outcome(folder)[0] in ("done", "failed")


def outcome(folder: Path) -> tuple[str, str]:
    """The job's state and error, as its status says; ("running", "") without one."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        return status["state"], status["error"] or ""
    except (OSError, ValueError):
        return "running", ""


def sweep_jobs(argv: Sequence[str], params: Sequence[str]) -> int:
    """How many jobs Hydra's basic sweeper makes of a command line, ``params`` being the config's own overrides."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [*params, *get_args_parser().parse_args(argv).overrides]
    return sum(map(len, BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)))


def wanted(asked: int | None, cpu: bool, threads: int, peak: float, free: float) -> int:
    """How many processes are to share a sweep: ``asked``, or two on a CPU with two threads and, beside the first one's
    ``peak``, memory ``free`` for another."""
    if asked is not None:
        return asked
    return 2 if cpu and threads >= 2 and free >= SPARE * peak else 1


def check_processes(asked: object) -> None:
    """Raises SamError unless it is null or a whole number from 1 on."""
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise SamError(f"processes={asked} must be a whole number, at least 1, or null")


def start(asked: int | None, accelerator: str, jobs_left: int, sweep: Path) -> None:
    """Let further processes share what is left of the sweep, if there are any to be and at least two jobs for them."""
    if _started or helps() or jobs_left < 2:
        return
    import psutil
    import torch

    from sam.base import device_of
    from sam.results import peak_memory_mb

    threads = torch.get_num_threads()
    free = psutil.virtual_memory().available / (1 << 20)
    cpu = device_of(accelerator) == "cpu"
    count = min(wanted(asked, cpu, threads, peak_memory_mb(), free), jobs_left)
    if count < 2:
        return
    each = max(1, threads // count)
    environment = {**os.environ, HELPS: str(_BEGIN), "OMP_NUM_THREADS": str(each)}
    # Given as it is: what the command makes it of may be the time.
    quoted = str(sweep).replace("\\", "\\\\").replace("'", "\\'")
    command = [sys.executable, *sys.orig_argv[1:], f"hydra.sweep.dir='{quoted}'"]
    with (sweep / LOG).open("ab") as out:
        for _ in range(count - 1):
            # It ends with this process, however that ends: the pipe is closed then.
            _started.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
            )
    _threads.append(threads)
    torch.set_num_threads(each)
    say(f"{count} processes share the jobs from here on, {each} thread(s) each; what the others say: {sweep / LOG}")


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def regain() -> None:
    """Take the threads of processes that have ended."""
    if _threads and all(process.poll() is not None for process in _started):
        import torch

        torch.set_num_threads(_threads.pop())


def join() -> None:
    """Wait for the processes that were started."""
    with console().status("Waiting for the other process's job"):
        for process in _started:
            process.wait()
