"""The rim between Hydra and the tasks: one-line errors, job status, sweep folders, the sweep's summary.

Imports nothing heavy, so that ``--help`` and mistakes take no time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from sam import sharing
from sam.console import print_table, say
from sam.errors import SamError, one_line
from sam.extend import TARGET
from sam.overrides import LABELS, check_overrides
from sam.paths import conf_dir
from sam.results import RESULT, STATUS, write_status
from sam.tracking import check_logger

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sam.runs.run import Models

log = logging.getLogger(__name__)

FAILED: list[tuple[str, str]] = []
"""(overrides, error) of each job that failed."""
SWEEP: list[Path] = []


def register_resolvers() -> None:
    """The resolvers that the configs use."""
    OmegaConf.register_new_resolver("project", lambda: str(conf_dir().parent), replace=True)
    OmegaConf.register_new_resolver("sweep_name", lambda: sweep_name(sys.argv[1:]), replace=True)
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)


def compose(*overrides: str) -> dict[str, Any]:
    """The plain config that ``python run.py *overrides`` would run, for notebooks and tests.

    Raises SamError for what no config has.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    check_overrides(overrides)
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir().absolute())):
        return plain(hydra_compose("config", overrides=list(overrides)))


def sweep_name(argv: Sequence[str]) -> str:
    """A name that the same sweep command always gives, so that running it again goes on: ``k-merge-1a2b3c4d``."""
    overrides = sorted(a for a in argv if not a.startswith("-") and not a.startswith("hydra."))
    swept = [re.split(r"[=+~]", a.lstrip("+~"))[0] for a in overrides if "," in re.sub(r"\[[^]]*\]", "", a)]
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]
    return "-".join([*swept, digest])


def job_name(overrides: str) -> str:
    """A job's folder name from its overrides: ``k=1,merge=ties``.

    What all jobs of a sweep share is left out where the sweep's own name covers it: a name that is given (by
    ``sweep=`` or an experiment) covers nothing else. Characters that a path cannot have are replaced,
    and a hash keeps the name unique.
    """
    namers = [a for a in sys.argv[1:] if a.lstrip("+").startswith(("sweep=", "experiment="))]
    shared = set(namers or sys.argv[1:])
    parts = [part for part in re.split(r",(?=[\w./+~@-]+=)", overrides) if part not in shared]
    # What differs from job to job comes first, where a long name is not cut.
    kept = ",".join(sorted(parts, key=lambda part: part in sys.argv)) or "job"
    safe = re.sub(r"[^\w=,.+-]", "_", kept)
    if safe == kept and len(safe) <= 120:
        return safe
    return f"{safe[:100]}-{hashlib.sha256(kept.encode()).hexdigest()[:8]}"


def arranged(argv: Sequence[str]) -> list[str]:
    """The arguments with ``-m`` first: Hydra takes it before or after all overrides, but not among them."""
    multirun = [a for a in argv if a in ("-m", "--multirun")]
    return [*multirun[:1], *(a for a in argv if a not in multirun)]


def fail(message: str) -> None:
    """Print one line and exit with 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def job(cfg: DictConfig) -> float:
    """Run the task of ``cfg``; a failure is logged, kept in ``status.json``, and does not stop a sweep.

    A sweep's job that another process came to first is left to it, and gives NaN.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    quiet()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return _run_job(cfg, folder, overrides, None)
    SWEEP[:] = [Path(hydra_cfg.sweep.dir).absolute()]
    with sharing.claimed(folder) as ours:
        if not ours:
            say(f"job {hydra_cfg.job.num}: {' '.join(overrides)}: another process's")
            sharing.ELSEWHERE.append((" ".join(overrides), folder))
            return float("nan")
        say(f"job {hydra_cfg.job.num}: {' '.join(overrides)}")
        return _run_job(cfg, folder, overrides, SWEEP[0].name)


def _run_job(cfg: DictConfig, folder: Path, overrides: list[str], group: str | None) -> float:
    config = None
    try:
        config = plain(cfg)
        if not read_finished(folder):
            write_status(folder, "running", overrides, config=config)
        value = run_task(config, folder, overrides, group)
    except Exception as caught:
        # What a path in the config cannot be read or written for is the user's to mend.
        named = isinstance(caught, OSError) and caught.filename
        error = SamError(f"{caught.filename}: {caught.strerror}") if named else caught  # type: ignore[attr-defined]
        # The exception holds the job's frames, and with them a model: only its text is kept.
        message = one_line(error)
        log.debug("traceback", exc_info=True)
        if not isinstance(error, SamError) or os.environ.get("HYDRA_FULL_ERROR"):
            log.exception("the job failed")
        write_status(folder, "failed", overrides, message, config)
        FAILED.append((" ".join(overrides) or "job", message))
        say(f"error: {message}")
        return float("nan")
    write_status(folder, "done", overrides, config=config)
    return value


def read_finished(folder: Path) -> bool:
    """Whether the folder holds a result already."""
    return (folder / RESULT).is_file() and (folder / STATUS).is_file()


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values; a missing value is a one-line error."""
    from omegaconf.errors import OmegaConfBaseException

    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise SamError(f"{missing[0]} has no value; give {missing[0]}=…")
    try:
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise SamError(f"the config does not resolve: {one_line(error)}") from None
    for section, key in LABELS.items():
        if TARGET in config.get(section, {}):  # what tables call it
            config[section].setdefault(key, config[section][TARGET])
    return config


def run_task(config: dict[str, Any], folder: Path, overrides: list[str], group: str | None) -> float:
    """Call the task that ``task.name`` names."""
    with cache_at(config.get("cache")):
        return _run_task(config, folder, overrides, group)


@contextmanager
def cache_at(folder: str | None) -> Iterator[None]:
    """Keep the cache in ``folder`` for a block; None leaves it where it is."""
    before = os.environ.get("SAM_CACHE")
    if folder:
        os.environ["SAM_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("SAM_CACHE", None)
        if before is not None:
            os.environ["SAM_CACHE"] = before


def _run_task(config: dict[str, Any], folder: Path, overrides: list[str], group: str | None) -> float:
    if config["trainer"]["devices"] != 1:
        raise SamError(f"trainer.devices={config['trainer']['devices']} must be 1; run one job a device instead")
    check_logger(config["logger"])
    if config["task"]["name"] == "train":
        from sam.runs.train import train

        return train(config, folder, group)
    from sam.runs.run import run

    return run(config, folder, overrides, group, held())


@cache
def held() -> Models:
    """What the jobs of this process share."""
    from sam.runs.run import Models

    return Models()


def quiet() -> None:
    """Keep libraries' notes off the terminal; our own log goes on."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings(
        "ignore", message=r".*(LeafSpec|num_workers|does not have many workers|is_gradient_checkpointing).*"
    )
    # Importing Lightning resets its own loggers to INFO, but not those below them.
    for name in ("lightning.pytorch.utilities.rank_zero", "httpx", "sentence_transformers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def left_over() -> bool:
    """After all jobs of this process: wait for those of others; whether one of these did not do its job to the end."""
    sharing.join()
    return sharing.left_over()


def finish() -> int:
    """After all jobs: the sweep's table and the list of failures. Returns the exit status."""
    if SWEEP:
        FAILED.extend(failed for failed in sharing.failed_elsewhere() if failed not in FAILED)
        print_summary(SWEEP[0])
    elif FAILED:
        return 1
    if FAILED:
        say("\n  ".join([f"{len(FAILED)} of the sweep's jobs failed:", *grouped(FAILED)]))
    return 1 if FAILED else 0


def grouped(failed: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each message of failed jobs, given as (job, message): the first job that has it, and how many more."""
    jobs: dict[str, list[str]] = {}
    for name, message in failed:
        jobs.setdefault(message, []).append(name)
    more = {message: f" (and {len(names) - 1} more)" if len(names) > 1 else "" for message, names in jobs.items()}
    return [f"{names[0]}{more[message]}: {message}" for message, names in jobs.items()]


def print_summary(sweep: Path) -> None:
    """One row a job of the sweep: its overrides, mean P/R/F1 over its targets, seconds, or its error.

    The overrides that all jobs share are in the title.
    """
    rows = []
    statuses = {path: json.loads(path.read_text()) for path in sweep.glob("*/" + STATUS)}
    common = set.intersection(*(set(s["overrides"]) for s in statuses.values())) if len(statuses) > 1 else set()
    for status_file, status in statuses.items():
        name = " ".join(o for o in status["overrides"] if o not in common)
        result_file = status_file.with_name(RESULT)
        if status["state"] == "done" and result_file.is_file():
            result = json.loads(result_file.read_text())
            if "overall" not in result:
                continue
            overall, seconds = result["overall"], result["seconds"]["total"]
            cells = [f"{100 * overall[m]:.1f}" if overall else "–" for m in ("precision", "recall", "f1")]
            rows.append([name, *cells, f"{seconds:.0f}", "" if overall else "no gold"])
        elif status["state"] != "done":
            rows.append([name, "–", "–", "–", "–", f"{status['state']}: {status['error'] or ''}"])
    if rows:
        head = ["job", "P", "R", "F1", "seconds", *(["note"] if any(r[-1] for r in rows) else [])]
        rows.sort(key=lambda row: natural(row[0]))
        print_table(" ".join([str(sweep), *sorted(common)]), head, [r[: len(head)] for r in rows])


def natural(name: str) -> list[Any]:
    """A sort key in which numbers count as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
