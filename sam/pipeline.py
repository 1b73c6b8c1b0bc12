"""One run on plain values: select experts, merge, generate, parse, combine and score, for any number of targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sam.data.targets import Target
from sam.engine import SINGLE, Asked, Engine
from sam.experts.card import Pool
from sam.extend import Configured
from sam.merging import Merge
from sam.merging.checks import check_seed
from sam.models.encoder import Encoder
from sam.selection import Query, Selection, Selector, by_sampling
from sam.task import Scores, Task
from sam.types import Prediction, Sentence

COMBINED = "combined"
"""The name under which scores hold those of the combined predictions."""

Predictions = Mapping[str, Mapping[str, Prediction]]
"""Task model -> sentence id -> its prediction."""
Progress = Callable[[str, int], Callable[[int], None]]
"""``progress(description, total)`` returns what is called with numbers of completions done."""


def silent(description: str, total: int) -> Callable[[int], None]:
    """A :data:`Progress` that shows nothing."""
    return lambda done: None


@dataclass(frozen=True)
class Method:
    """How targets are run: ``selector`` chooses experts of ``names``, mostly ``k`` per task model, ``merge`` merges
    them, ``rule`` combines the models' predictions."""

    merge: Merge
    names: tuple[str, ...]
    selector: Selector
    k: int
    sample_size: int
    rule: Configured
    seed: int

    @property
    def largest(self) -> int | None:
        """The most experts that one task model merges; None where only the selector knows."""
        if not self.selector.ours:
            return None
        sizes = {"named": len(self.selector.experts), "each": 1, "none": 0}
        sizes |= dict.fromkeys(("all", "all_each"), len(self.names))
        return sizes.get(self.selector.name, self.k)

    def check(self, pool: Pool) -> None:
        """Raises SamError for what cannot be run, before anything is loaded."""
        self.merge.check()
        check_seed(self.seed)
        self.selector.check(self.k, self.sample_size, self.names, pool)


class Spent(NamedTuple):
    """Of a task model on a target: its share of the seconds of merging and of generating, and the share of its
    completions that were ``generated`` now (the others were cached, and took no time)."""

    merge: float
    generate: float
    generated: float


@dataclass(frozen=True)
class TargetResult:
    """One target: the selection and the predictions of each task model, the combined predictions by sentence id, and
    the scores by model and of :data:`COMBINED` (none without gold)."""

    target: Target
    selections: Mapping[str, Selection]
    predictions: Predictions
    combined: Mapping[str, Prediction]
    scores: Mapping[str, Scores]
    spent: Mapping[str, Spent] = field(default_factory=dict)


def run(
    method: Method, targets: Sequence[Target], engine: Engine, encoder: Encoder, progress: Progress = silent
) -> dict[str, TargetResult]:
    """All ``targets`` by name. Each model is merged and loaded once: what all targets ask of it is asked together."""
    with engine.timed("select"):
        sampled = _sample(method, targets, engine, progress)
        selections = {t.name: select_for(method, t, engine, encoder, sampled) for t in targets}
    predictions, spent = _predict(method, targets, selections, engine, progress)
    return {
        t.name: result(method, engine.task, t, selections[t.name], predictions[t.name], spent[t.name]) for t in targets
    }


def select_for(
    method: Method,
    target: Target,
    engine: Engine,
    encoder: Encoder,
    sampled: Mapping[str, Mapping[Asked, Prediction]] | None = None,
) -> dict[str, Selection]:
    """Task model -> the experts that are merged for it. ``sampled``: predictions of single experts that are there."""

    def ask(expert: str, texts: Sequence[str]) -> list[Prediction]:
        asked = [(target.types_of_text(text), text) for text in texts]
        known = (sampled or {}).get(expert, {})
        if all(one in known for one in asked):
            return [known[one] for one in asked]
        return engine.predict([expert], SINGLE, asked)

    options = (method.k, method.sample_size, method.seed)
    return method.selector.choose(Query(target, engine.pool, method.names, encoder, engine.task, ask, *options))


def result(
    method: Method,
    task: Task,
    target: Target,
    selections: Mapping[str, Selection],
    predictions: Predictions,
    spent: Mapping[str, Spent] | None = None,
) -> TargetResult:
    """Combine and score the sentences that all task models have predictions for."""
    sizes = [len(selections[name].experts) for name in predictions]
    combined = {
        s.id: task.combine([of[s.id] for of in predictions.values()], s.text, method.rule, target.types_of(s), sizes)
        for s in target.sentences
        if predictions and all(s.id in of for of in predictions.values())
    }
    gold = [s for s in target.scored if s.id in combined]
    scores = {n: task.score(gold, [of[s.id] for s in gold]) for n, of in {**predictions, COMBINED: combined}.items()}
    return TargetResult(target, selections, predictions, combined, scores if target.scored else {}, spent or {})


def _sample(
    method: Method, targets: Sequence[Target], engine: Engine, progress: Progress
) -> dict[str, dict[Asked, Prediction]]:
    """What each expert alone predicts on the sentences that sampling evaluation draws from all targets."""
    if "sample_size" not in method.selector.uses:
        return {}
    drawn = [
        (target.types_of_text(target.unlabelled[i]), target.unlabelled[i])
        for target in targets
        for i in by_sampling.draw(target.unlabelled, method.sample_size, method.seed, target.name)
    ]
    step = progress("sampling evaluation", len(method.names) * len(drawn))
    return {name: dict(zip(drawn, engine.predict([name], SINGLE, drawn, step), strict=True)) for name in method.names}


def _predict(
    method: Method,
    targets: Sequence[Target],
    selections: Mapping[str, Mapping[str, Selection]],
    engine: Engine,
    progress: Progress,
) -> tuple[dict[str, dict[str, dict[str, Prediction]]], dict[str, dict[str, Spent]]]:
    """Target -> task model -> sentence id -> prediction, and target -> task model -> what that took."""
    groups: dict[str, list[tuple[Target, str]]] = defaultdict(list)
    for target in targets:
        for model, selection in selections[target.name].items():
            groups[engine.key(selection.experts, method.merge)].append((target, model))
    step = progress("extraction", sum(len(t.sentences) for group in groups.values() for t, _ in group))
    predictions: dict[str, dict[str, dict[str, Prediction]]] = {t.name: {} for t in targets}
    spent: dict[str, dict[str, Spent]] = {t.name: {} for t in targets}
    for group in groups.values():
        asked: list[tuple[Target, str, Sentence]] = [(t, model, s) for t, model in group for s in t.sentences]
        first, model = group[0]
        before = {**engine.seconds}, engine.counts["generated"]
        texts = [(t.types_of(s), s.text) for t, _, s in asked]
        made = engine.predict(selections[first.name][model].experts, method.merge, texts, step)
        merging, generating = (engine.seconds[stage] - before[0].get(stage, 0.0) for stage in ("merge", "generate"))
        generated = (engine.counts["generated"] - before[1]) / len(set(texts))
        for (target, name, sentence), prediction in zip(asked, made, strict=True):
            predictions[target.name].setdefault(name, {})[sentence.id] = prediction
        for target, name in group:
            share = len(target.sentences) / len(asked)
            took = Spent(round(merging * share, 2), round(generating * share, 2), round(generated, 4))
            spent[target.name][name] = took
    # In the order of the selections, which the union goes by.
    ordered = {t.name: {m: predictions[t.name][m] for m in selections[t.name]} for t in targets}
    return ordered, spent
