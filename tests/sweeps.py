"""Made-up sweep folders: deterministic numbers that no model produced, for tests alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

TARGETS = {"mini_ai": 36, "mini_music": 30}
EXPERTS = ("stem", "news", "legal", "social", "biomedical", "traffic")
RANKINGS = ("domain", "sampling")
TEXT = "Ada Lovelace wrote about the Analytical Engine in London."
GOLD: list[Any] = [["person", 0, 12], ["product", 29, 46], ["location", 50, 56]]


def scores(f1: float, n: int = 36, tilt: float = 0.1) -> dict[str, Any]:
    """A full record of scores around ``f1``: precision ``tilt`` above it, recall as much below."""
    main = {"precision": f1 + tilt, "recall": f1 - tilt, "f1": f1}
    spans = {f"span_{name}": value - 0.05 for name, value in main.items()}
    counts = {"n": n, "gold": 100, "predicted": 90, "tp": 50}
    faults = {"unparsable": 2, "truncated": 1, "not_in_sentence": 3, "not_asked": 0}
    return {**counts, **main, **spans, "per_type": {"person": main}, **faults}


def made_up_f1(merge: str, k: int, seed: int, target: str) -> float:
    """The combined F1 of a made-up job: a little more for longer merge names, larger k, seed and later targets."""
    return 0.3 + 0.02 * len(merge) + 0.01 * k + 0.02 * seed + 0.1 * list(TARGETS).index(target)


def write_job(folder: Path, config: dict[str, Any], f1: dict[str, float], overrides: Sequence[str] = ()) -> Path:
    """A finished job: ``config`` over the defaults, combined scores from ``f1`` by target. Returns its folder."""
    config = {"merge": {"name": "ties", "seed": 0}, "k": 3, "seed": 0, **config}
    config = {"selector": {"name": "sam"}, "combine": {"rule": "union"}, "base": {"name": "tiny"}, **config}
    targets = {name: _target(config, value, TARGETS.get(name, 10)) for name, value in f1.items()}
    mean = {m: sum(t["combined"]["scores"][m] for t in targets.values()) / len(targets) for m in ("precision", "f1")}
    result = {
        "schema": 1,
        "config": config,
        "overrides": list(overrides),
        "git_commit": "0123456789abcdef",
        "base": {"name": config["base"]["name"], "fingerprint": "f" * 8},
        "targets": targets,
        "overall": mean,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = [json.dumps(_line(name)) for name in targets]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The config of made-up jobs with ``overrides`` such as ``k=1``, ``merge=ties`` and ``merge.density=0.4``."""
    config: dict[str, Any] = {"merge": {"name": "ties", "seed": 0}, "k": 3, "seed": 0, "selector": {"name": "sam"}}
    config |= {"combine": {"rule": "union"}, "base": {"name": "tiny"}}
    for override in sorted(overrides):
        key, _, text = override.partition("=")
        value = yaml.safe_load(text)
        group, _, leaf = key.partition(".")
        if leaf or group in ("merge", "selector"):
            config[group] = {**config[group], leaf or "name": value}
        else:
            config[group] = value
    return config


def write_status(folder: Path, state: str, overrides: Sequence[str], error: str = "") -> Path:
    """An unfinished job. Returns its folder."""
    folder.mkdir(parents=True)
    status = {"state": state, "error": error, "overrides": list(overrides), "config": composed(overrides)}
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return folder


def make_sweep(
    root: Path,
    merges: Iterable[str] = ("linear", "ties"),
    ks: Iterable[int] = (1, 3),
    seeds: Sequence[int] = (0,),
    failed: Iterable[tuple[str, int]] = (),
) -> Path:
    """A sweep of merge x k x seed over ``TARGETS``; each (merge, k) of ``failed`` has failed."""
    failed = set(failed)
    for merge in merges:
        for k in ks:
            for seed in seeds:
                overrides = [f"k={k}", f"merge={merge}", *([f"seed={seed}"] if len(seeds) > 1 else [])]
                folder = root / ",".join(overrides)
                if (merge, k) in failed:
                    write_status(folder, "failed", overrides, "CUDA out of memory")
                    continue
                f1 = {target: made_up_f1(merge, k, seed, target) for target in TARGETS}
                write_job(folder, {"merge": {"name": merge, "seed": 0}, "k": k, "seed": seed}, f1, overrides)
    return root


def _target(config: dict[str, Any], f1: float, n: int) -> dict[str, Any]:
    # The rankings turn the list of experts by different amounts, so that they select differently.
    chosen = {name: [EXPERTS[(i + 2 * r) % 6] for i in range(min(config["k"], 6))] for r, name in enumerate(RANKINGS)}
    return {
        "n": n,
        "types": ["person", "product", "location"],
        "labels_used_for_selection": config["selector"]["name"] == "oracle",
        "selections": {
            name: {"selector": name, "experts": experts, "scores": {e: 0.5 for e in experts}, "details": {}}
            for name, experts in chosen.items()
        },
        "models": {
            name: {"experts": experts, "model_key": name, "scores": scores(f1 - 0.05 * (i + 1), n)}
            for i, (name, experts) in enumerate(chosen.items())
        },
        "combined": {"rule": "union", "scores": scores(f1, n, tilt=-0.05)},
        "seconds": 1.0,
    }


def _line(target: str) -> dict[str, Any]:
    found: dict[str, Any] = {"domain": GOLD[:1], "sampling": [*GOLD[1:2], ["person", 4, 12]]}
    models = {
        name: {"answer": json.dumps(m), "pairs": [[t, TEXT[a:b]] for t, a, b in m], "mentions": m}
        for name, m in found.items()
    }
    union = [mention for mentions in found.values() for mention in mentions]
    combined = {"pairs": [[t, TEXT[a:b]] for t, a, b in union], "mentions": union}
    prompt = f"Entities <person>, <product>, <location> in: {TEXT}"
    return {
        "target": target,
        "id": "0",
        "text": TEXT,
        "gold": GOLD,
        "prompt": prompt,
        "models": models,
        "combined": combined,
    }
