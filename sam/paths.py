"""Where the configs and the cache lie, and folders that are written whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sam


def conf_dir() -> Path:
    """The Hydra config folder: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(sam.__file__).parent
    beside = package.parent / "conf"
    return beside if (beside / "dataset").is_dir() else package / "conf"


def cache_dir() -> Path:
    """The folder for downloads: ``$SAM_CACHE``, else ``$XDG_CACHE_HOME/sam``, else ``~/.cache/sam``."""
    own = os.environ.get("SAM_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "sam"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that replaces it by rename when the block ends well.

    Its name starts with a dot: who lists the folder it lies in passes it over.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield stage
        stage.chmod(0o755)
        for file in stage.iterdir():
            file.chmod(0o644 if file.is_file() else 0o755)  # safetensors writes for the owner's eyes only
        if target.exists():
            # Out of the way whole: a run that is killed here leaves no half-deleted folder under the name.
            target.rename(stage.with_name(f"{stage.name}-old"))
        stage.rename(target)
    finally:
        for rest in (stage, stage.with_name(f"{stage.name}-old")):
            shutil.rmtree(rest, ignore_errors=True)
