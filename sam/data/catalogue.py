"""The datasets that the project knows: one config file each under ``conf/dataset``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

from omegaconf import OmegaConf

from sam.data.readers import Reader, make_reader
from sam.errors import SamError
from sam.paths import conf_dir


@dataclass(frozen=True)
class Split:
    """Which files, and which documents of them, make a split.

    paths: upstream paths or patterns of them (``*``). subset: the name that a metadata table gives the split.
    fold: only documents whose index mod 10 is one of these. sentences, mentions: counts as read, before drops.
    """

    paths: tuple[str, ...]
    sentences: int
    mentions: int
    subset: str | None = None
    fold: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Drop:
    """What is read and then left out.

    text: counter name -> regular expression; a sentence whose whole text matches is dropped.
    unannotated: drop sentences flagged as not annotated.
    without_mentions: drop sentences without mentions in files that match this pattern.
    """

    text: Mapping[str, str] = field(default_factory=dict)
    unannotated: bool = False
    without_mentions: str | None = None


@dataclass(frozen=True)
class Checksum:
    """sha256 of a file in the mirror and at its URL; they differ where the mirror holds another order."""

    mirror: str
    published: str | None


@dataclass(frozen=True)
class DatasetSpec:
    """One corpus: where its files lie, how they are read, what its labels mean.

    ``role``: source (experts are trained on it), target, or open (its sentences have types of their own, which are the
    labels). ``url`` is "embedded" where the files are in this package, in a folder called as ``mirror``.
    ``mark``: a token, cut off from what it belongs to and a mention of its own: joined with the mention after it.
    """

    id: str
    title: str
    domain: str
    role: str
    url: str
    mirror: str
    licence: str
    reader: Reader
    splits: Mapping[str, Split]
    labels: Mapping[str, str]
    drop: Drop
    files: Mapping[str, Checksum]
    mark: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether the files are part of this package."""
        return self.url == "embedded"

    @property
    def types(self) -> list[str]:
        """The distinct type names of all splits, in the order of the config."""
        return list(dict.fromkeys(self.labels.values()))

    def split(self, name: str) -> Split:
        """The split called ``name``. Raises SamError naming those there are."""
        if name not in self.splits:
            raise SamError(unknown(f"split of {self.id}", name, self.splits))
        return self.splits[name]

    def paths(self, name: str) -> list[str]:
        """Upstream paths of a split's files: patterns in order, the files of a pattern in byte order."""
        patterns = self.split(name).paths
        return list(dict.fromkeys(p for pattern in patterns for p in sorted(self.files) if fnmatchcase(p, pattern)))


def datasets() -> list[str]:
    """Ids of all datasets, sorted."""
    return sorted(path.stem for path in (conf_dir() / "dataset").glob("*.yaml"))


@cache
def spec(dataset_id: str) -> DatasetSpec:
    """The dataset called ``dataset_id``. Raises SamError naming those there are, or what is wrong in its config."""
    if dataset_id not in datasets():
        raise SamError(unknown("dataset", dataset_id, datasets()))
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dataset" / f"{dataset_id}.yaml"))
    try:
        return _spec(cast(dict[str, Any], config))
    except (KeyError, TypeError, ValueError) as error:
        raise SamError(f"conf/dataset/{dataset_id}.yaml: {error}") from None


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """One line: ``name`` is no ``what``, the nearest match if one is near, and those there are."""
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    return f"unknown {what}: '{name}'{hint} one of {', '.join(names)}"


def _spec(config: dict[str, Any]) -> DatasetSpec:
    config = dict(config)
    parts: dict[str, Any] = {
        "reader": make_reader(config.pop("format")),
        "splits": {name: _split(params) for name, params in config.pop("splits").items()},
        "drop": Drop(**config.pop("drop")),
        "files": {path: _checksum(value) for path, value in config.pop("files").items()},
    }
    return DatasetSpec(**config, **parts)


def _split(params: dict[str, Any]) -> Split:
    fold = params.pop("fold", None)
    return Split(paths=tuple(params.pop("paths")), fold=None if fold is None else tuple(fold), **params)


def _checksum(value: str | dict[str, str]) -> Checksum:
    if isinstance(value, str):
        return Checksum(value, value)
    return Checksum(value["mirror"], value.get("published"))
