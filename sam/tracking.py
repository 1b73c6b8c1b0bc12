"""Weights & Biases: one run a job, opened and closed by us; offline unless asked otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam.errors import SamError


def check_logger(logger: Mapping[str, Any]) -> None:
    """Raise SamError for a mode that W&B has not."""
    if logger["name"] != "none" and logger["mode"] not in ("offline", "online"):
        raise SamError(f"logger.mode={logger['mode']} is unknown; allowed: offline, online (or logger=none)")


@contextmanager
def tracked(config: Mapping[str, Any], folder: Path, group: str | None, name: str) -> Iterator[Any]:
    """A W&B run for this job (None with logger=none); an exception inside marks the run as failed.

    Raises SamError where W&B does not start.
    """
    logger = config["logger"]
    if logger["name"] == "none":
        yield None
        return
    check_logger(logger)
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    folder.mkdir(parents=True, exist_ok=True)
    try:
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
    except wandb.Error as error:
        why = " ".join(str(error).split())
        raise SamError(f"W&B does not start ({why}); `wandb login`, or logger.mode=offline, or logger=none") from None
    # Not `with run`: at an error that prints a traceback, also of a user's mistake.
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
