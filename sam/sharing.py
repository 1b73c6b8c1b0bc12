"""Jobs of one sweep, shared by the processes that run its command: a job is done by the one that comes to it first.

Several may be started by hand, as one a GPU. On a CPU a sweep starts a second one by itself after its first job: two
processes on a core each do more than one on two. While two decode as one model, the one that was started begins at
the other end, and both take from the store what the other has answered, if answers are kept.
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
from typing import Any

from sam.console import console, say
from sam.errors import SamError
from sam.results import STATUS

HELPS = "SAM_HELPS"
"""Set in a process that another one started for its sweep: when that one began."""
LOG, LOCK = "helper.log", ".lock"
SPARE = 1.25
"""How many times the first job's peak of memory must be free for a second process."""
WORTH = 20.0
"""Seconds that a job must take to be worth a second process, which needs some ten to start."""

ELSEWHERE: list[tuple[str, Path]] = []
"""(overrides, folder) of each job of the sweep that another process came to first."""

_BEGIN = float(os.environ.get(HELPS) or time.time())
_started: list[subprocess.Popen[bytes]] = []
_threads: list[int] = []  # what this process had before it shared
_ours: set[Path] = set()


def helps() -> bool:
    """Whether another process started this one for its sweep."""
    return HELPS in os.environ


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, or wants it to."""

    def wait() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock a waiting thread would keep from the interpreter's end
        os._exit(0)  # as it should: nothing is said of it in a second pass over the sweep

    threading.Thread(target=wait, daemon=True).start()


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
    """The job's state and error, as its status says; ("running", "") without one."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        return status["state"], status["error"] or ""
    except (OSError, ValueError):
        return "running", ""


def check_processes(asked: object) -> None:
    """Raises SamError unless it is null or a whole number from 1 on."""
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise SamError(f"processes={asked} must be a whole number, at least 1, or null")


def wanted(asked: int | None, cpu: bool, threads: int, seconds: float, peak: float, free: float) -> int:
    """How many processes are to share a sweep: ``asked``, or two on a CPU with two threads if the first job took long
    enough and, beside its ``peak`` of memory, as much is ``free``."""
    if asked is not None:
        return asked
    return 2 if cpu and threads >= 2 and seconds >= WORTH and free >= SPARE * peak else 1


def share(hydra_cfg: Any, asked: int | None, accelerator: str, seconds: float) -> None:
    """After a job of ``seconds``, let further processes share what is left of the sweep, if there are to be any, two
    jobs are left, and the sweep is one that they can go through too."""
    parts = (hydra_cfg.sweeper._target_, "BasicSweeper"), (hydra_cfg.launcher._target_, "BasicLauncher")
    basic = all(target.endswith(name) for target, name in parts)
    if not basic or asked == 1 or _started or ELSEWHERE or helps():
        return
    params = [f"{key}={value}" for key, value in (hydra_cfg.sweeper.params or {}).items()]
    left = sweep_jobs(sys.argv[1:], params) - hydra_cfg.job.num - 1
    if left < 2:
        return
    import psutil
    import torch

    from sam.base import device_of
    from sam.results import peak_memory_mb

    threads, free = torch.get_num_threads(), psutil.virtual_memory().available / (1 << 20)
    count = wanted(asked, device_of(accelerator) == "cpu", threads, seconds, peak_memory_mb(), free)
    if count > 1:
        _start(min(count, left), threads, Path(hydra_cfg.sweep.dir).absolute(), hydra_cfg.runtime.cwd)


def sweep_jobs(argv: Sequence[str], params: Sequence[str]) -> int:
    """How many jobs Hydra's basic sweeper makes of a command line, ``params`` being the config's own overrides."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(
        [*params, *_overrides(argv)]
    )
    return sum(map(len, BasicSweeper.split_arguments(parsed, None)))


def _overrides(argv: Sequence[str]) -> list[str]:
    from hydra._internal.utils import get_args_parser

    return list(get_args_parser().parse_args(list(argv)).overrides)


def helper_argv(argv: Sequence[str], sweep: Path) -> list[str]:
    """``argv`` with the sweep's folder as it is (what the command makes it of may be the time), among its overrides."""
    from hydra.core.override_parser.types import Quote, QuotedString

    argv = [a for a in argv if not a.startswith("hydra.sweep.dir=")]
    first = argv.index(_overrides(argv)[0])
    return [*argv[:first], f"hydra.sweep.dir={QuotedString(str(sweep), Quote.single).with_quotes()}", *argv[first:]]


def _start(count: int, threads: int, sweep: Path, cwd: str) -> None:
    import torch

    each = max(1, threads // count)
    environment = {**os.environ, HELPS: str(_BEGIN), "OMP_NUM_THREADS": str(each)}
    environment.pop("WANDB_SERVICE", None)  # this process's own
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    command = [sys.executable, *before, *helper_argv(sys.argv[1:], sweep)]
    with (sweep / LOG).open("ab") as out:
        for _ in range(count - 1):
            # It ends with this process, however that ends: the pipe is closed then.
            _started.append(
                subprocess.Popen(
                    command, env=environment, cwd=cwd, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
                )
            )
    _threads.append(threads)
    torch.set_num_threads(each)
    say(f"{count} processes share the jobs from here on, {each} thread(s) each; what the others say: {sweep / LOG}")


def regain() -> None:
    """Take the threads of processes that have ended, and say of which that was not well."""
    if _threads and all(process.poll() is not None for process in _started):
        import torch

        torch.set_num_threads(_threads.pop())
        if any(process.returncode for process in _started):
            say("the other process has ended before its time; its log says why")


def join() -> None:
    """Wait for the jobs that other processes still run; then the processes that were started have nothing left."""
    if ELSEWHERE:
        from filelock import FileLock

        with console().status("Waiting for another process's job"):
            for _, folder in ELSEWHERE:
                with FileLock(folder / LOCK):
                    pass
    for process in _started:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


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
    found = [(overrides, *outcome(folder)) for overrides, folder in ELSEWHERE]
    return [(overrides, error) for overrides, state, error in found if state == "failed"]
