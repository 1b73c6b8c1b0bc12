"""The systems of the paper's main comparison, read from a sweep of ``experiment=main_table``, and their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments import bootstrap
from experiments.bootstrap import Counts, Interval
from experiments.collect import MEAN, RIM, Job, load_finished, read_predictions, target_names
from sam import data as corpora
from sam.errors import SamError
from sam.launch import compose
from sam.ner.prompts import normalised
from sam.results import PREDICTIONS

BASELINE, METHOD = "unified", "SaM"
MEAN_EXPERT, BEST_EXPERT = "experts, mean", "experts, best"
RATIOS = ("precision", "recall", "span_f1")
FAULTS = ("unparsable", "hallucinated", "silent")
"""Shares of answers that are no JSON, of pairs that are not in the sentence, of sentences with mentions left empty."""
NAMES = ("known", "new")
"""Of types: whether the sources have one of that name."""
LABELS = {
    "none": "warm start alone",
    "unified_small": "unified, one expert's budget",
    "each": "experts, union of all",
    "each, vote": "experts, two votes",
    "all_each, vote": "all merged or two experts",
    "all": "all merged",
    "random": "random",
    "random_pair": "union of two random",
    "domain": "SaM, domain only",
    "sampling": "SaM, sampling only",
    "sam": METHOD,
    "sameco": "SaMeco",
    "oracle": "top k by gold F1",
}
ORDER = (
    "none",
    "unified",
    "unified_small",
    "expert",
    "mean",
    "best",
    "each",
    "each, vote",
    "random",
    "all",
    "all_each, vote",
    "random_pair",
    "domain",
    "sampling",
    "sam",
    "sameco",
    "oracle",
)
FREE = ("merge.seed", "experts.path", "base.fold", "base.fingerprint")
"""Settings in which the jobs of a comparison may differ, beside whole groups."""
ENOUGH = 0.25
"""The least share of a model's completions that must be generated in a job for its seconds to count."""


Run = tuple[str, int]
"""The training (the pool, and the fingerprint of the base model with its warm start) and the seed."""


@dataclass
class Outcome:
    """One system on one target: ``counts`` of each run, by training and seed, and its figures, means over runs."""

    counts: dict[Run, list[Counts]] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, run: Run, counts: Counts, figures: Mapping[str, float]) -> None:
        """One run of one model."""
        self.counts.setdefault(run, []).append(counts)
        _, predicted, gold = counts
        silent = float(np.mean(predicted[gold > 0] == 0)) if (gold > 0).any() else 0.0
        for name, value in {**figures, "silent": silent}.items():
            self.figures.setdefault(name, []).append(value)

    def mean(self, figure: str) -> float:
        """Mean over runs; NaN where it was not measured in all."""
        return statistics.fmean(self.figures.get(figure, [float("nan")]))


@dataclass
class Row:
    """One system: its outcomes by target, the runs of it; ``gold`` if it looked at gold labels."""

    label: str
    kind: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    gold: bool = False
    runs: list[Run] = field(default_factory=list)

    def at(self, target: str) -> Outcome:
        """Its outcome on ``target``, empty at first."""
        return self.outcomes.setdefault(target, Outcome())


@dataclass
class Comparison:
    """All rows, with the targets and sentences that they share, and the jobs that they were read from."""

    rows: dict[str, Row]
    targets: list[str]
    sentences: dict[str, list[str]]
    jobs: list[Job]

    @property
    def commits(self) -> list[str]:
        """The commits that the jobs were run at, sorted."""
        return sorted({job.git_commit for job in self.jobs})

    def f1(self, row: Row, target: str) -> Interval:
        """F1 (0 to 1) of a row on a target, or its mean over targets, with its interval."""
        return bootstrap.interval(self.f1_value(row, target), self._replicates(row, target))

    def against(self, row: Row, other: Row, target: str) -> tuple[Interval, Interval]:
        """F1 of ``row`` minus that of ``other``, and as a share of ``other``'s, each with its paired interval.

        The share is NaN where a resample of ``other`` finds nothing.
        """
        ours, theirs = self.f1_value(row, target), self.f1_value(other, target)
        a, b = self._replicates(row, target), self._replicates(other, target)
        share = np.divide(a - b, b, out=np.full_like(a, np.nan), where=b > 0)
        relative = bootstrap.interval((ours - theirs) / theirs if theirs else float("nan"), share)
        return bootstrap.interval(ours - theirs, a - b), relative

    def figure(self, row: Row, target: str, name: str) -> float:
        """Any other figure of a row, for ``mean`` the unweighted mean over targets."""
        names = self.targets if target == MEAN else [target]
        return statistics.fmean(row.at(t).mean(name) for t in names)

    def recall(self, row: Row, names: str) -> float:
        """Recall of all pairs, of all targets, whose types' names are ``known`` or ``new``."""
        tp, gold = (sum(row.at(t).mean(f"{what} {names}") for t in self.targets) for what in ("tp", "gold"))
        return tp / gold if gold else float("nan")

    def f1_value(self, row: Row, target: str) -> float:
        """F1 (0 to 1) of a row, mean over trainings of means over seeds (and over targets for ``mean``)."""
        if target == MEAN:
            return statistics.fmean(self.f1_value(row, t) for t in self.targets)
        by_training = _nested(row.at(target), lambda models: statistics.fmean(map(bootstrap.f1, models)))
        return statistics.fmean(map(statistics.fmean, by_training))

    def _replicates(self, row: Row, target: str) -> Any:
        if target == MEAN:
            return bootstrap.mean([self._replicates(row, t) for t in self.targets])
        weights = _resamples(len(self.sentences[target]), target)
        runs = _nested(row.at(target), lambda models: bootstrap.mean([bootstrap.f1_of(c, weights) for c in models]))
        return bootstrap.redrawn(runs, target)


def _nested(outcome: Outcome, value: Callable[[list[Counts]], Any]) -> list[list[Any]]:
    """``value`` of each run's models: a list per training, in order, of one per seed."""
    by_training: dict[str, list[Any]] = {}
    for (training, _), models in sorted(outcome.counts.items()):
        by_training.setdefault(training, []).append(value(models))
    return list(by_training.values())


_resamples = cache(bootstrap.resamples)


def compare(folder: Path) -> Comparison:
    """Read a sweep of ``experiment=main_table``.

    Raises SamError for unfinished jobs, for jobs that differ in more than selector, combination, seed and pool (with
    its start), or in their sentences, and for rows of other pools than the baseline's.
    """
    jobs = load_finished(folder)
    for job in jobs[1:]:
        _check_alike(jobs[0], job)
    comparison = Comparison({}, target_names(jobs), {}, jobs)
    seconds = _seconds(jobs)
    for job in jobs:
        _read(job, comparison, seconds)
    for needed in (BASELINE, METHOD):
        if needed not in comparison.rows:
            raise SamError(f"{folder} has no job of {needed}; it is made by `python run.py experiment=main_table`")
    trainings = {training for training, _ in comparison.rows[BASELINE].runs}
    for row in comparison.rows.values():
        if {training for training, _ in row.runs} != trainings:
            raise SamError(
                f"{folder}: {row.label} was not run with the same pools as {BASELINE}; run it with all of them"
            )
        if len(set(row.runs)) < len(row.runs):
            raise SamError(f"{folder} has two jobs of {row.label} with one pool and seed; move one of them away")
    _add_expert_rows(comparison)
    comparison.rows = dict(sorted(comparison.rows.items(), key=lambda item: ORDER.index(item[1].kind)))
    return comparison


def _check_alike(first: Job, job: Job) -> None:
    """Refuse jobs of other settings: they would be taken for other runs of the same system. Pools of several trainings
    of the same experts may differ."""
    free = (*RIM, "selector", "combine", "seed")
    known = {p for p in (*first.config, *job.config) if p.split(".")[0] not in free and p not in FREE}
    if other := sorted(p for p in known if first.config.get(p) != job.config.get(p)):
        raise SamError(f"{first.folder} and {job.folder} differ in {other[0]}; compare jobs of the same settings")
    if list(first.targets) != list(job.targets):
        raise SamError(f"{first.folder} and {job.folder} have other targets; compare jobs of the same targets")


def _seconds(jobs: Sequence[Job]) -> dict[tuple[str, str], float]:
    """Of each model on each target, the seconds of merging it and of generating all its completions.

    From the job that generated most of them; absent where no job generated enough (:data:`ENOUGH`). A model that
    several rankings of a job chose has a part of its seconds under each.
    """
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for job in jobs:
        for target, result in job.targets.items():
            alike: dict[str, list[Any]] = {}
            for model in result["models"].values():
                alike.setdefault(model["model_key"], []).append(model)
            for name, models in alike.items():
                share = max(model.get("generated", 0.0) for model in models)
                if share >= ENOUGH and share > best.get((target, name), (0.0, 0.0))[0]:
                    merge, generate = (sum(m["seconds"][stage] for m in models) for stage in ("merge", "generate"))
                    best[target, name] = (share, merge + generate / share)
    return {key: seconds for key, (_, seconds) in best.items()}


def _read(job: Job, comparison: Comparison, seconds: Mapping[tuple[str, str], float]) -> None:
    """Add a job's systems to the rows: its combination, and for the union of ``each`` every expert too."""
    selector, rows = str(job.config["selector.name"]), read_predictions(job)
    run = (training_of(job), int(job.config["seed"]))
    if not rows:
        raise SamError(f"{job.folder / PREDICTIONS} is missing; delete {job.folder} and run the sweep again")
    touched = set()
    for target, result in job.targets.items():
        lines = [line for line in rows if line["target"] == target]
        ids = [line["id"] for line in lines]
        if comparison.sentences.setdefault(target, ids) != ids:
            raise SamError(f"{job.folder} scored other sentences of {target}; all rows need the same")
        keys = {name: m["model_key"] for name, m in result["models"].items()}
        costs = {key: seconds.get((target, key), float("nan")) for key in keys.values()}
        if selector == "each" and job.config["combine.rule"] == "union":
            for name, model in result["models"].items():
                row = _row(comparison, f"expert {name}", "expert")
                row.runs = row.runs if run in row.runs else [*row.runs, run]
                row.at(target).add(run, _counts(lines, name), _figures(model["scores"], costs[keys[name]]))
        row = _row(comparison, *_label(job))
        row.gold = result["labels_used_for_selection"]
        row.at(target).add(run, _counts(lines, None), _figures(result["combined"]["scores"], sum(costs.values())))
        touched.add(row.label)
    for label in touched:
        comparison.rows[label].runs.append(run)


def training_of(job: Job) -> str:
    """What tells the pools of a comparison apart."""
    return f"{job.config.get('experts.path')} {job.config.get('base.fingerprint')}"


def kind_of(job: Job) -> str:
    """The kind of row that a job is: its selector, or the expert it names, and its combination if that is no union.

    Raises SamError for a job that is no row of the comparison.
    """
    kind = str(job.config["selector.name"])
    if kind == "named":
        kind = "+".join(next(iter(next(iter(job.targets.values()))["models"].values()))["experts"])
    if job.config["combine.rule"] != "union":
        kind += f", {job.config['combine.rule']}"
    if kind not in ORDER:
        raise SamError(f"{job.folder}: {kind} is no row of the main comparison; move the job away")
    return kind


def _label(job: Job) -> tuple[str, str]:
    """The row's label and kind."""
    kind = kind_of(job)
    drawn = kind in ("random", "random_pair")
    return LABELS.get(kind, kind) + (f" {job.config['k']}" if drawn else ""), kind


def _row(comparison: Comparison, label: str, kind: str) -> Row:
    return comparison.rows.setdefault(label, Row(label, kind))


def _figures(scores: Mapping[str, Any], seconds: float) -> dict[str, float]:
    return {
        **{name: scores[name] for name in RATIOS},
        "unparsable": scores["unparsable"] / scores["n"],
        "hallucinated": scores["not_in_sentence"] / scores["predicted"] if scores["predicted"] else 0.0,
        "seconds": seconds,
        **_by_name(scores["per_type"]),
    }


@cache
def known_types() -> frozenset[str]:
    """The names of the types of all sources that the unified model, and the experts together, are trained on.

    The open types, where they are trained on too, add no name of a target's type.
    """
    return corpora.type_names(d for part in compose("domain=unified")["domain"]["domains"] for d in part)


def _by_name(per_type: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Gold pairs and true positives of types with a name that training had, and of others."""
    found = dict.fromkeys((f"{what} {name}" for name in NAMES for what in ("gold", "tp")), 0.0)
    for entity_type, figures in per_type.items():
        for what in ("gold", "tp"):
            found[f"{what} {NAMES[entity_type not in known_types()]}"] += figures[what]
    return found


def _counts(lines: Sequence[Mapping[str, Any]], model: str | None) -> Counts:
    """Counts of one model, or of the combination (``model`` None)."""
    return counts_of(
        (
            {(name, normalised(line["text"][start:end])) for name, start, end in line["gold"]},
            {tuple(pair) for pair in (line["combined"] if model is None else line["models"][model])["pairs"]},
        )
        for line in lines
    )


def counts_of(sentences: Iterable[tuple[set[Any], set[Any]]]) -> Counts:
    """Counts of (gold, predicted) distinct pairs, as :mod:`sam.ner.scoring` counts them."""
    found = [(len(gold & predicted), len(predicted), len(gold)) for gold, predicted in sentences]
    return np.array(found, dtype=np.float64).T


def _add_expert_rows(comparison: Comparison) -> None:
    """The experts' mean, and on each target the one with the best gold F1."""
    experts = [row for row in comparison.rows.values() if row.kind == "expert"]
    if not experts:
        return
    mean, best = Row(MEAN_EXPERT, "mean"), Row(BEST_EXPERT, "best", gold=True)
    for target in comparison.targets:
        for row in experts:
            for run, models in row.at(target).counts.items():
                mean.at(target).counts.setdefault(run, []).extend(models)
            for name, values in row.at(target).figures.items():
                mean.at(target).figures.setdefault(name, []).extend(values)
        best.outcomes[target] = max(experts, key=lambda r: comparison.f1_value(r, target)).at(target)
    comparison.rows |= {mean.label: mean, best.label: best}
