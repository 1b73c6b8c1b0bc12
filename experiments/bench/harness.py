"""What every benchmark needs: contestants in alternating rounds, medians, ratios, peak memory, a table and JSON.

Contestants take turns (ours, peer A, peer B, ours, …), so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sam.console import print_table, say
from sam.errors import SamError
from sam.results import forget_peak_memory, git_commit, versions, write_json

RESULTS = Path("experiments/results/bench")
PEAK = "peak_mb"
"""The figure that holds a contestant's peak memory in MiB, above what its process held before the round."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Options:
    """How to run a benchmark: ``quick`` asks for a workload of seconds, whose figures mean nothing."""

    rounds: int = 5
    quick: bool = False


@dataclass(frozen=True)
class Contestant:
    """One way to do the work. ``run`` does one round and returns its figures, such as seconds and ``PEAK``."""

    name: str
    run: Callable[[], Figures]
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """All figures of one workload: ``rounds`` holds, by contestant, one record of figures a round."""

    name: str
    metric: str
    higher_is_better: bool
    rounds: dict[str, list[Figures]]
    ours: str | None

    def medians(self, contestant: str) -> Figures:
        """The median of each of the contestant's figures."""
        records = self.rounds[contestant]
        return {figure: median(record[figure] for record in records) for figure in records[0]}

    @property
    def peers(self) -> list[str]:
        return [name for name in self.rounds if name != self.ours]

    @property
    def best_peer(self) -> str | None:
        """The peer with the best median of the metric."""
        pick = max if self.higher_is_better else min
        return pick(self.peers, key=lambda name: self.medians(name)[self.metric], default=None)

    def ratio(self, contestant: str) -> float | None:
        """How many times as good as the best peer, by medians of the metric: above 1 is better. None without peers."""
        if self.best_peer is None or self.ours is None:
            return None
        value, peer = self.medians(contestant)[self.metric], self.medians(self.best_peer)[self.metric]
        return value / peer if self.higher_is_better else peer / value

    def record(self) -> dict[str, Any]:
        """The case as plain values: medians, ratio, memory and every single figure."""
        peaks = {name: self.medians(name).get(PEAK) for name in self.rounds}
        return {
            "case": self.name,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "ours": self.ours and {"name": self.ours, **self.medians(self.ours)},
            "peers": [{"name": name, **self.medians(name)} for name in self.peers],
            "best_peer": self.best_peer,
            "ratio": self.ratio(self.ours) if self.ours else None,
            "memory": {name: peak for name, peak in peaks.items() if peak is not None},
            "rounds": self.rounds,
        }


@dataclass(frozen=True)
class Report:
    """What a benchmark found: its cases, and ``notes`` (name to value) that say what the figures stand on."""

    cases: tuple[Case, ...]
    name: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def show(self) -> None:
        """Print a table a case, then the notes, the versions and the machine."""
        for case in self.cases:
            print_table(case.name or self.name, *_table(case))
        for label, facts in (("notes", self.notes), ("versions", versions()), ("machine", self.machine)):
            if facts:
                print(f"{label}: " + "; ".join(f"{key} {value}" for key, value in facts.items()))

    def write(self, out: Path) -> Path:
        """Write ``<out>/<name>-<machine>.json``, and return its path."""
        path = out / f"{self.name}-{self.machine['slug']}.json"
        record = {
            "name": self.name,
            "machine": self.machine,
            "versions": versions(),
            "git_commit": git_commit(),
            "notes": self.notes,
            "cases": [case.record() for case in self.cases],
        }
        write_json(path, record)
        return path


def compete(
    contestants: Sequence[Contestant],
    rounds: int,
    metric: str,
    higher_is_better: bool,
    *,
    case: str = "",
    warmup: int = 0,
    device: str = "auto",
) -> Report:
    """Run all contestants ``rounds`` times in turn; a report of one case, for :func:`joined` to make one of several.

    ``warmup`` rounds come first and are not kept. ``device``: see :func:`machine`. Raises SamError for names that are
    not different, more than one that is ours, and rounds whose figures lack ``metric``.
    """
    names = [one.name for one in contestants]
    ours = [one.name for one in contestants if one.ours]
    if len(set(names)) != len(names) or len(ours) > 1:
        raise SamError(f"contestants {names} must have different names, and at most one be ours, not {ours}")
    records: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for one in contestants:
            say(f"{case or 'benchmark'}: round {number + 1 if number >= 0 else 'warm-up'}: {one.name}")
            figures = one.run()
            if metric not in figures:
                raise SamError(f"{one.name} gave no {metric!r}, the metric; it gave {', '.join(figures)}")
            if number >= 0:
                records[one.name].append(figures)
    found = Case(case, metric, higher_is_better, records, ours[0] if ours else None)
    return Report((found,), machine=machine(device))


def joined(reports: Sequence[Report], notes: dict[str, Any] | None = None) -> Report:
    """One report with the cases of several that ran on the same machine, and their notes under ``notes``."""
    merged_notes = {key: value for report in reports for key, value in report.notes.items()} | (notes or {})
    cases = tuple(case for report in reports for case in report.cases)
    return Report(cases, notes=merged_notes, machine=reports[0].machine)


def measured(work: Callable[[], Any]) -> Callable[[], Figures]:
    """A ``Contestant.run`` of this process: ``work``'s wall seconds, and its peak memory above what was held before.

    The peak needs Linux and is left out elsewhere. Freed memory that the allocator keeps is given back first, so that
    the peak does not depend on who ran before.
    """

    def run() -> Figures:
        before = _resident_mb()
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        peak = _status_mb("VmHWM")
        return {"seconds": seconds} | ({} if before is None or peak is None else {PEAK: peak - before})

    return run


def machine(device: str = "auto") -> dict[str, Any]:
    """What the figures were taken on; ``slug`` names it in file names. ``device``: cpu, cuda, or auto (cuda if any).

    One name stands for processors of several generations, so a CPU's slug has its instructions too.
    """
    import torch

    from sam.models.device import cores, multiplies_bf16

    cuda = device != "cpu" and torch.cuda.is_available()
    cpu, count = _cpu_model(), cores()
    instructions = torch.backends.cpu.get_cpu_capability() + (" bf16" if multiplies_bf16() else "")
    shown = torch.cuda.get_device_name() if cuda else f"cpu {count} {cpu} {instructions}"
    return {
        "slug": re.sub(r"[^a-z0-9]+", "-", shown.lower()).strip("-"),
        "device": "cuda" if cuda else "cpu",
        "cores": count,
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "instructions": instructions,
        "gpu": shown if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return re.sub(r"\(R\)|\(TM\)|\bCPU\b|@.*|\d+-Core Processor", "", found[1]).strip()
    return platform.processor() or platform.machine()


def _resident_mb() -> float | None:
    """Resident memory after what is free was given back; from here on a new peak is counted."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak_memory()
    return _status_mb("VmRSS")


def _status_mb(entry: str) -> float | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else None
    return None


def _table(case: Case) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the medians, the metric's range, and the ratio to the best peer."""
    figures = list(dict.fromkeys(figure for name in case.rounds for figure in case.medians(name)))
    columns = ["", *figures, f"range of {case.metric}", "× best peer"]
    return columns, [_row(case, name, figures) for name in case.rounds]


def _row(case: Case, name: str, figures: list[str]) -> list[str]:
    medians, ratio = case.medians(name), case.ratio(name)
    values = [record[case.metric] for record in case.rounds[name]]
    shown = [f"{medians[figure]:.4g}" if figure in medians else "–" for figure in figures]
    title = f"{name} (ours)" if name == case.ours else name
    return [title, *shown, f"{min(values):.4g} … {max(values):.4g}", "–" if ratio is None else f"{ratio:.2f}"]
