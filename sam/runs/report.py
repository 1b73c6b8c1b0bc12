"""What a run reports: sections of ``result.json``, lines of ``predictions.jsonl``, W&B's numbers, a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam.console import print_table, say
from sam.engine import Engine
from sam.generation import Request
from sam.pipeline import COMBINED, Method, TargetResult
from sam.results import PREDICTIONS, RESULT, peak_memory_mb
from sam.selection import Selector
from sam.task import Task
from sam.types import Mention, Prediction

MAIN = ("precision", "recall", "f1", "span_f1")


def section(result: TargetResult, method: Method, engine: Engine) -> dict[str, Any]:
    """One target's section of ``result.json``."""
    target, spent = result.target, result.spent
    scores = {name: s.to_dict() for name, s in result.scores.items()}
    models = {
        name: {
            "experts": list(selection.experts),
            "model_key": engine.key(selection.experts, method.merge),
            "scores": scores.get(name),
            "seconds": {"merge": spent[name].merge, "generate": spent[name].generate},
            "generated": spent[name].generated,
        }
        for name, selection in result.selections.items()
    }
    return {
        "n": len(target.sentences),
        "types": list(target.types),
        "labels_used_for_selection": "gold" in method.selector.uses,
        "selections": {name: s.to_dict() for name, s in result.selections.items()},
        "models": models,
        "combined": {"rule": method.rule.shown, "scores": scores.get(COMBINED)},
        "seconds": round(sum(one.merge + one.generate for one in spent.values()), 2),
    }


def prediction_rows(result: TargetResult, task: Task) -> list[dict[str, Any]]:
    """One target's lines of ``predictions.jsonl``, in the order of its sentences."""
    target = result.target
    return [
        {
            "target": target.name,
            "id": s.id,
            "text": s.text,
            "gold": None if s.mentions is None else [_mention(m) for m in s.mentions],
            "prompt": _prompt(task.request(target.types_of(s), s.text, False)),
            "models": {
                name: {"answer": of[s.id].completion, **_entities(of[s.id])} for name, of in result.predictions.items()
            },
            "combined": _entities(result.combined[s.id]),
        }
        for s in target.sentences
    ]


def _prompt(request: Request) -> str:
    return request.prefix + request.suffix


def _mention(mention: Mention) -> list[Any]:
    return [mention.type, mention.start, mention.end]


def _entities(prediction: Prediction) -> dict[str, Any]:
    return {"pairs": [list(p) for p in prediction.pairs], "mentions": [_mention(m) for m in prediction.mentions]}


def sections(targets: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """The result's sections over all targets; ``overall`` is the unweighted mean over those with gold."""
    import torch

    scores = [t["combined"]["scores"] for t in targets.values() if t["combined"]["scores"]]
    return {
        "targets": targets,
        "overall": {m: sum(s[m] for s in scores) / len(scores) for m in MAIN} if scores else None,
        "completions": dict(engine.counts),
        "seconds": {stage: round(s, 2) for stage, s in engine.seconds.items()},
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_memory_mb(),
    }


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that go to W&B, flat: ``target/model/metric`` and ``mean/metric``."""
    values = {f"mean/{m}": v for m, v in (result["overall"] or {}).items()}
    for name, target in result["targets"].items():
        all_scores = {n: m["scores"] for n, m in target["models"].items()} | {"combined": target["combined"]["scores"]}
        for model, scores in all_scores.items():
            values.update({f"{name}/{model}/{m}": scores[m] for m in MAIN if scores})
    return {**values, "seconds": result["seconds"]["total"], "peak_memory_mb": result["peak_memory_mb"]}


def show(result: Mapping[str, Any], folder: Path) -> None:
    """Print the run's table and where its files are."""
    oracle = any(t["labels_used_for_selection"] for t in result["targets"].values())
    rows = []
    for name, target in result["targets"].items():
        for model, entry in target["models"].items():
            label = f"{model} (gold labels used)" if target["labels_used_for_selection"] else model
            rows.append([name, label, "+".join(entry["experts"]), *_cells(entry["scores"]), ""])
        rule = target["combined"]["rule"]
        if len(target["models"]) > 1:
            rows.append([name, rule, "", *_cells(target["combined"]["scores"]), f"{target['seconds']:.1f}"])
        else:
            rows[-1][-1] = f"{target['seconds']:.1f}"
    overall = result["overall"]
    if overall and len(result["targets"]) > 1:
        cells = [f"{100 * overall[m]:.1f}" for m in ("precision", "recall", "f1")]
        rows.append(["mean", "", "", *cells, "", f"{result['seconds']['total']:.1f}"])
    note = "; selected with gold labels: an upper reference, not a method" if oracle else ""
    config = result["config"]
    name = config["selector"]["name"]
    selector = Selector.from_config(config["selector"])
    used = "k" in selector.uses or not selector.declared
    several = any(len(m["experts"]) > 1 for t in result["targets"].values() for m in t["models"].values())
    shown = [f"selector={name}"]
    shown += [f"merge={config['merge']['name']}"] * several + [f"k={config['k']}"] * used
    title = " ".join(shown) + note
    print_table(title, ["target", "model", "experts", "P", "R", "F1", "unparsable", "seconds"], rows)
    counts = result["completions"]
    say(f"{counts.get('generated', 0)} completions generated, {counts.get('reused', 0)} reused; {folder / RESULT}")
    say(f"predictions of each sentence: {folder / PREDICTIONS}")


def _cells(scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
        return ["–", "–", "–", "–"]
    return [*(f"{100 * scores[m]:.1f}" for m in ("precision", "recall", "f1")), str(scores["unparsable"])]
