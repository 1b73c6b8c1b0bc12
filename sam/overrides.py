"""Overrides of a command line, checked against the config files before Hydra composes anything.

Imports nothing heavy, so that ``--help`` and mistakes take no time.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from sam.errors import SamError
from sam.extend import TARGET, config_dirs
from sam.paths import conf_dir

LABELS = {"merge": "name", "selector": "name", "combine": "rule"}
"""The key by which tables name the function of a section."""


@cache
def groups() -> dict[str, list[str]]:
    """The config groups, each with the names of its options."""
    names = [f.name for f in conf_dir().iterdir() if f.is_dir()]
    return {name: sorted({file.stem for file in _files(name)}) for name in names}


def _files(group: str) -> list[Path]:
    """The config files of a group, those in the folders of ``--config-dir`` among them."""
    folders = [conf_dir(), *config_dirs(sys.argv[1:])]
    return [file for folder in folders for file in sorted((folder / group).glob("*.yaml"))]


@cache
def keys(group: str) -> list[str]:
    """The names of the values in a group's section of the config; of the config itself for ``""``."""
    if group == "":
        files, others = [conf_dir() / "config.yaml"], ["hydra", *(g for g in groups() if g != "dataset")]
    else:
        files, others = _files(group), []
    names = [key for file in files for key in OmegaConf.load(file)]
    if group == "target":
        names += OmegaConf.load(conf_dir() / "target_defaults.yaml").target
    return sorted({*map(str, names), *others} - {"defaults"})


def check_overrides(argv: Sequence[str]) -> None:
    """Refuse what no config has, before Hydra composes anything.

    Raises SamError for an unknown option of a group, an unknown key (which Hydra would add after a plus sign, to no
    effect), and one that is taken away.
    """
    for argument in argv:
        name, equals, value = argument.lstrip("+~").partition("=")
        if argument.startswith("-") or not (equals or argument.startswith("~")):
            continue
        group, _, key = name.partition("@")[0].partition(".")
        if group.split("/")[0] == "hydra":
            continue
        if group == "dataset":
            raise SamError(f"{argument}: no run has a dataset by itself; {_as_target('ID')} makes a corpus a target")
        _check_known(group, "", keys(""))
        if key and group in groups() and group != "experiment":
            _check_known(key.split(".")[0], f"{group}.", keys(group))
        if key and group in groups() and group not in ("experiment", "target"):
            _check_option(group, key.split(".")[0], argv)
        if group in LABELS and key == TARGET:
            raise SamError(
                f"{argument}: its label would be another function's; choose {group}=NAME, of a file that names it"
            )
        if LABELS.get(group) == key:
            raise SamError(f"{argument}: {name} is the label of {group}={value}; choose {group}={value} itself")
        if argument.startswith("~") and not name.startswith("target.sets."):
            raise SamError(f"{argument}: every run needs {name}; give it another value")
        if name in groups():
            if name not in ("experiment", "target") and value.startswith("["):
                raise SamError(f"{argument}: a run has one {name}; a sweep over several: -m {name}=A,B")
            for choice in _names(value):
                if re.fullmatch(r"[\w-]+", choice):
                    _check_known(choice, f"{name}=", groups()[name])


def _check_option(group: str, key: str, argv: Sequence[str]) -> None:
    """Refuse an option of ``group`` that one of the chosen files does not have."""
    for name in _chosen(group, argv):
        options = _options(group, name)
        if options and key not in options:
            shown = ", ".join(sorted(options - {"name", LABELS.get(group), TARGET})) or "none"
            raise SamError(f"{group}.{key}: {group}={name} does not use it; its options: {shown}")


def _options(group: str, name: str) -> set[str]:
    """The keys of a config file, with those of the files of its group that it is made of."""
    configs = [OmegaConf.load(file) for file in _files(group) if file.stem == name]
    parts = [
        part
        for config in configs
        for part in OmegaConf.select(config, "defaults") or ()
        if part not in ("_self_", name)
    ]
    own = {str(key) for config in configs for key in config} - {"defaults"}
    return own.union(*(_options(group, part) for part in parts if isinstance(part, str)))


def _chosen(group: str, argv: Sequence[str]) -> list[str]:
    """The options of ``group`` that a command line chooses: its own, else its experiments', else the default."""
    (default,) = (d[group] for d in OmegaConf.load(conf_dir() / "config.yaml").defaults if group in d)
    experiments = [_of_experiment(group, name) or default for name in _given("experiment", argv)]
    return _given(group, argv) or [name for choice in experiments for name in _names(choice)] or [default]


def _given(group: str, argv: Sequence[str]) -> list[str]:
    """The options of ``group`` that are named on the command line."""
    values = [a.partition("=")[2] for a in argv if a.lstrip("+").startswith(f"{group}=")]
    return [name for value in values for name in _names(value)]


def _of_experiment(group: str, experiment: str) -> str | None:
    """What an experiment sweeps over, or sets, for ``group``."""
    choices = []
    for file in (file for file in _files("experiment") if file.stem == experiment):
        config, override = OmegaConf.load(file), f"override /{group}"
        choices.append(OmegaConf.select(config, f"hydra.sweeper.params.{group}"))
        choices += [d[override] for d in OmegaConf.select(config, "defaults") or () if override in d]
    return next((str(choice) for choice in choices if choice), None)


def _names(value: str) -> list[str]:
    """The names in a value such as ``a``, ``a,b`` or ``[a,b]``."""
    return [name for name in re.split(r"[,\[\]\s]+", value.strip("'\"")) if name]


def _check_known(name: str, before: str, allowed: Sequence[str]) -> None:
    if name in allowed:
        return
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {before if before.endswith('.') else ''}{near[0]}?" if near else ""
    if before == "target=" and name in groups()["dataset"]:
        hint = f"; {_as_target(name)} makes this corpus a target"
    raise SamError(f"{before}{name} is unknown; allowed: {', '.join(allowed)}{hint}")


def _as_target(dataset: str) -> str:
    parts = f"kind: corpus, dataset: {dataset}, split: dev, unlabelled: train"
    return f"target=custom '+target.sets.mine={{{parts}}}'"
