"""A corpus's files: from a mirror folder, or downloaded once into the cache. Nothing unverified is handed out."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import quote

import pooch
import requests
from rich.progress import track

from sam.data.catalogue import DatasetSpec
from sam.errors import SamError
from sam.paths import cache_dir

MIRROR = "SAM_MIRROR"
AT_ONCE = 4
ATTEMPTS = 3


def fetch(dataset: DatasetSpec, path: str) -> Path:
    """A verified local copy of ``path``, an upstream path of ``dataset``.

    An embedded dataset is read from this package. With ``$SAM_MIRROR`` set the file is
    ``$SAM_MIRROR/<mirror>/<path>`` and nothing is downloaded; else it is downloaded into
    ``cache_dir()/corpora/<id>/<path>`` unless it is there.
    Raises SamError where the file is missing, cannot be had, or has another sha256 than the config pins.
    """
    return _fetch(dataset, path, progress=True)


def fetch_all(dataset: DatasetSpec, paths: Sequence[str]) -> dict[str, Path]:
    """``fetch`` for each path, in order; missing files are downloaded a few at a time, with a progress bar."""
    local = dataset.embedded or os.environ.get(MIRROR)
    missing = [] if local else [p for p in paths if not (_folder(dataset) / p).is_file()]
    if len(missing) > 1:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(_fetch, dataset, path, progress=False) for path in missing]
            try:
                for job in track(as_completed(jobs), f"{dataset.id}: {len(jobs)} files", len(jobs), transient=True):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
    return {path: fetch(dataset, path) for path in paths}


def _fetch(dataset: DatasetSpec, path: str, progress: bool) -> Path:
    if path not in dataset.files:
        raise SamError(f"{dataset.id}: no file '{path}' under files: in conf/dataset/{dataset.id}.yaml")
    mirror = str(Path(__file__).parent) if dataset.embedded else os.environ.get(MIRROR)
    return _from_mirror(dataset, path, Path(mirror).expanduser()) if mirror else _download(dataset, path, progress)


def _folder(dataset: DatasetSpec) -> Path:
    return cache_dir() / "corpora" / dataset.id


def _from_mirror(dataset: DatasetSpec, path: str, root: Path) -> Path:
    file = root / dataset.mirror / path
    if not file.is_file():
        raise SamError(f"{file}: not there; {MIRROR} must name a folder that holds {dataset.mirror}/{path}")
    pinned = dataset.files[path]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest not in (pinned.mirror, pinned.published):
        raise SamError(_wrong(file, pinned.mirror, digest))
    return file


def _download(dataset: DatasetSpec, path: str, progress: bool) -> Path:
    """Pooch keeps a file whose checksum is right, and gives its name only to what it has verified."""
    pinned = dataset.files[path].published
    url = dataset.url.format(path=quote(path))
    if pinned is None:
        raise SamError(
            f"{url}: the checksum of the published file is not pinned; set {MIRROR} to a folder that holds "
            f"{dataset.mirror}/{path}"
        )
    pooch.get_logger().setLevel(logging.WARNING)
    store = pooch.create(
        _folder(dataset), base_url="", registry={path: pinned}, urls={path: url}, retry_if_failed=ATTEMPTS - 1
    )
    # Files of one folder are fetched at once, and pooch would have each of them make it.
    (_folder(dataset) / path).parent.mkdir(parents=True, exist_ok=True)
    try:
        return Path(store.fetch(path, downloader=pooch.HTTPDownloader(progressbar=progress)))
    except (requests.RequestException, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"HTTP {status}" if status else type(error).__name__
        raise SamError(
            f"{url}: cannot be downloaded ({why}); check the network, or set {MIRROR} to a folder that holds "
            f"{dataset.mirror}/{path}"
        ) from None
    except ValueError as error:  # pooch's word for a wrong checksum
        raise SamError(f"{url}: {' '.join(str(error).split())}") from None


def _wrong(file: Path, expected: str, digest: str) -> str:
    return f"{file}: sha256 is {digest}, expected {expected}; the file is damaged or another version, fetch it again"
