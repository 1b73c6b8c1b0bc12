"""What leaves a run: ``result.json`` (written last, by rename), ``predictions.jsonl`` and ``status.json``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sam

SCHEMA = 1
SCORES_VERSION = 4
"""Part of every result's hash: raise it with every change to how completions are read, ranked, combined or scored."""
RESULT, PREDICTIONS, STATUS = "result.json", "predictions.jsonl", "status.json"
PACKAGES = ("torch", "transformers", "peft", "lightning", "sentence-transformers", "seqeval", "hydra-core")


def versions() -> dict[str, str]:
    """The versions of Python, this package and the libraries that can change a result."""
    installed = {"python": platform.python_version(), "sam": sam.__version__}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def git_commit() -> str | None:
    """The checkout's commit, with ``+dirty`` if files differ from it; None outside a checkout of this project."""
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment may lie within the checkout of another project.
    ours = git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = git("rev-parse", "HEAD") if ours else None
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "-uno") else commit


def forget_peak_memory() -> None:
    """Start a new peak, where the system can: jobs of a sweep share one process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> int:
    """The process's peak resident memory in MiB, since :func:`forget_peak_memory` on Linux, else since its start."""
    with contextlib.suppress(OSError):
        peak_kb = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if peak_kb:
            return round(int(peak_kb[1]) / 1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def write_json(path: Path, value: Any) -> None:
    """Write by rename, so that a file that is there is whole."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines by rename."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{os.getpid()}")
    stage.write_text(text, encoding="utf-8")
    stage.replace(path)


def read_done(folder: Path, digest: str) -> dict[str, Any] | None:
    """The result in ``folder`` if it is of this config hash, else None."""
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    same = isinstance(result, dict) and (result.get("config_hash"), result.get("schema")) == (digest, SCHEMA)
    return result if same else None


def write_status(
    folder: Path,
    state: str,
    overrides: Iterable[str],
    error: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """``state``: running | failed | done, for the sweep's summary and for tables; ``config``: the composed one."""
    status = {"state": state, "error": error, "overrides": list(overrides), "config": config}
    write_json(folder / STATUS, json.loads(json.dumps(status, default=str)))
