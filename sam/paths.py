"""Where the configs and the cache lie."""

from __future__ import annotations

import os
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
