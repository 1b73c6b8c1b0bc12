"""Weights & Biases: one run a job, opened and closed by us; offline unless asked otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam.errors import SamError


@contextmanager
def tracked(config: Mapping[str, Any], folder: Path, group: str | None, name: str) -> Iterator[Any]:
    """A W&B run for this job (None with logger=none); an exception inside marks the run as failed."""
    logger = config["logger"]
    if logger["name"] == "none":
        yield None
        return
    if logger["mode"] not in ("offline", "online"):
        raise SamError(f"logger.mode={logger['mode']} is unknown; allowed: offline, online (or logger=none)")
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=logger["project"],
        entity=logger["entity"],
        tags=list(logger["tags"]),
        group=group,
        job_type=config["task"]["name"],
        name=name,
        config=dict(config),
        mode=logger["mode"],
        dir=str(folder),
        id=hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16],
        resume="allow",
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off"),
    )
    # Not `with run`: at an error that prints a traceback, also of a user's mistake.
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
