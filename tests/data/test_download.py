"""Files come from the mirror or over HTTP (a server on this machine), and never with a wrong checksum."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sam.data import download
from sam.data.catalogue import Checksum, DatasetSpec, Drop
from sam.data.download import fetch, fetch_all
from sam.data.readers import Columns
from sam.errors import SamError

GOOD, OTHER = b"Ada\tB-PER\n", b"Bob\tB-PER\n"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dataset(url: str = "http://127.0.0.1:9/{path}", **files: Checksum) -> DatasetSpec:
    files = {name.replace("__", "/") + ".tsv": value for name, value in files.items()}
    return DatasetSpec("toy", "Toy", "news", "source", url, "to-y", "none", Columns(tag=1), {}, {}, Drop(), files)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAM_MIRROR", str(tmp_path))
    (tmp_path / "to-y" / "d").mkdir(parents=True)
    (tmp_path / "to-y" / "d" / "a.tsv").write_bytes(GOOD)
    return tmp_path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL pattern of a server that holds d/a.tsv and d/b c.tsv; the cache is ``tmp_path/cache``."""
    monkeypatch.delenv("SAM_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    (tmp_path / "www" / "d").mkdir(parents=True)
    (tmp_path / "www" / "d" / "a.tsv").write_bytes(GOOD)
    (tmp_path / "www" / "d" / "b.tsv").write_bytes(OTHER)
    handler = partial(_Quiet, directory=str(tmp_path / "www"))
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/{{path}}"
    http.shutdown()
    http.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_mirror(mirror: Path) -> None:
    toy = dataset(d__a=Checksum(sha(GOOD), sha(GOOD)))
    assert fetch(toy, "d/a.tsv") == mirror / "to-y" / "d" / "a.tsv"


def test_mirror_may_hold_the_published_order(mirror: Path) -> None:
    assert fetch(dataset(d__a=Checksum(sha(OTHER), sha(GOOD))), "d/a.tsv").read_bytes() == GOOD


def test_mirror_with_a_wrong_checksum_is_refused(mirror: Path) -> None:
    with pytest.raises(SamError, match=rf"d/a.tsv: sha256 is {sha(GOOD)}, expected {sha(OTHER)}"):
        fetch(dataset(d__a=Checksum(sha(OTHER), None)), "d/a.tsv")


def test_mirror_without_the_file(mirror: Path) -> None:
    with pytest.raises(SamError, match=r"z.tsv: not there; SAM_MIRROR must name a folder that holds to-y/z.tsv"):
        fetch(dataset(z=Checksum(sha(GOOD), sha(GOOD))), "z.tsv")


def test_a_file_that_is_not_listed_is_refused(mirror: Path) -> None:
    with pytest.raises(SamError, match=r"toy: no file '../x' under files:"):
        fetch(dataset(), "../x")


def test_downloads_once_into_the_cache(server: str, tmp_path: Path) -> None:
    toy = dataset(server, d__a=Checksum(sha(GOOD), sha(GOOD)), d__b=Checksum(sha(OTHER), sha(OTHER)))
    cache = tmp_path / "cache" / "corpora" / "toy"
    files = fetch_all(toy, ["d/b.tsv", "d/a.tsv"])
    assert files == {"d/b.tsv": cache / "d" / "b.tsv", "d/a.tsv": cache / "d" / "a.tsv"}
    assert list(files) == ["d/b.tsv", "d/a.tsv"]
    assert (cache / "d" / "a.tsv").read_bytes() == GOOD
    (tmp_path / "www" / "d" / "a.tsv").unlink()
    assert fetch(toy, "d/a.tsv").read_bytes() == GOOD


def test_a_damaged_file_in_the_cache_is_fetched_again(server: str, tmp_path: Path) -> None:
    toy = dataset(server, d__a=Checksum(sha(GOOD), sha(GOOD)))
    fetch(toy, "d/a.tsv").write_bytes(b"cut")
    assert fetch(toy, "d/a.tsv").read_bytes() == GOOD


def test_the_published_checksum_counts_for_a_download(server: str) -> None:
    assert fetch(dataset(server, d__a=Checksum(sha(OTHER), sha(GOOD))), "d/a.tsv").read_bytes() == GOOD


def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(SamError, match=rf"/d/a.tsv: .*{sha(OTHER)}.*{sha(GOOD)}") as caught:
        fetch(dataset(server, d__a=Checksum(sha(GOOD), sha(OTHER))), "d/a.tsv")
    assert "\n" not in str(caught.value)
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]


def test_a_download_without_a_pinned_checksum_is_refused(server: str) -> None:
    with pytest.raises(SamError, match=r"checksum of the published file is not pinned; set SAM_MIRROR"):
        fetch(dataset(server, d__a=Checksum(sha(GOOD), None)), "d/a.tsv")


def test_missing_at_the_url(server: str) -> None:
    toy = dataset(server, a=Checksum(sha(GOOD), sha(GOOD)), b=Checksum(sha(GOOD), sha(GOOD)))
    with pytest.raises(SamError, match=r"^http://127.*/[ab].tsv: cannot be downloaded \(HTTP 404\); .* set SAM_MIRROR"):
        fetch_all(toy, ["a.tsv", "b.tsv"])


def test_without_a_network_the_url_and_the_setting_are_named(server: str) -> None:
    with pytest.raises(SamError, match=r"^http://127.0.0.1:9/a.tsv: cannot be .* set SAM_MIRROR") as caught:
        fetch(dataset(a=Checksum(sha(GOOD), sha(GOOD))), "a.tsv")
    assert "\n" not in str(caught.value)
