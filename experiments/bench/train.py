"""Training a LoRA expert: tokens a second, loss and peak memory, against ``train.fused=false``: PEFT in Lightning.

Every contestant trains in a process of its own on the same batches in the same order, from the same factors, with the
same learning rates. Tokens are those of whole prompts and target completions, without padding (a prompt's shared part
counts for each sentence, also where it is computed once), seconds those of the fit, without loading; the peak is the
process's. The text is conll2003's where ``SAM_MIRROR`` names a mirror of the corpora, else the embedded mini
benchmark's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from experiments.bench.harness import PEAK, Contestant, Figures, Options, Report, compete, joined
from sam.data.targets import mini
from sam.errors import SamError
from sam.experts.training.batch import Batch, Example
from sam.experts.training.data import ExpertDataModule
from sam.experts.training.fit import expert_module, fit, resolved_precision
from sam.experts.training.recipe import Recipe
from sam.experts.training.render import Renderer
from sam.launch import compose
from sam.models.base import load
from sam.models.device import device_of
from sam.models.sources import folder
from sam.models.spec import BaseSpec
from sam.results import peak_memory_mb

ROOT = Path(__file__).parents[2]
STEPS, QUICK_STEPS = 60, 3
BATCH_SIZES = (2, 4)
"""A small one, and that of the shipped recipe."""
DATASET = "conll2003"
MINI = ("ai", "literature", "movie", "music", "politics", "restaurant", "science")


def run(options: Options) -> Report:
    """A case for each batch size, with every contestant once a round."""
    steps = QUICK_STEPS if options.quick else STEPS
    config = compose("base=smollm2_135m", "train.open_sentences=0")
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in BATCH_SIZES:
            recipe = Recipe.from_config({**config["train"], "sentences": steps * size, "batch_size": size})
            job = Path(scratch) / f"{size}.json"
            job.write_text(json.dumps(describe(config, recipe, make_plan(config["base"], recipe))))
            reports.append(_case(job, f"batch of {size}", options.rounds))
    notes = {"text": DATASET if _mirrored() else "mini benchmark", "steps": steps, "loss": "mean over the steps"}
    gaps = {f"loss against the peers, {r.cases[0].name}": _loss_gap(r) for r in reports}
    return joined(reports, notes | gaps)


def _case(job: Path, name: str, rounds: int) -> Report:
    auto = resolved_precision("auto", device_of("auto"))
    ours = Contestant(f"fused, {auto}", partial(_in_process, job, "fused", auto), ours=True)
    # The peer in bf16 only where we would take it: elsewhere it is many times slower.
    peers = [
        Contestant(f"PEFT in Lightning, {precision}", partial(_in_process, job, "plain", precision))
        for precision in dict.fromkeys((auto, "32-true"))
    ]
    return compete([ours, *peers], rounds, "tokens_per_s", True, case=name)


def _loss_gap(report: Report) -> str:
    """How far our mean loss lies from each peer's."""
    (case,) = report.cases
    own = case.medians(case.ours or "")["loss"]
    return ", ".join(f"{own - case.medians(peer)['loss']:+.4f} to {peer}" for peer in case.peers)


def _mirrored() -> bool:
    return bool(os.environ.get("SAM_MIRROR"))


def make_plan(base: Mapping[str, Any], recipe: Recipe) -> Sequence[Batch]:
    """The batches that every contestant trains on."""
    tokenizer = AutoTokenizer.from_pretrained(folder(BaseSpec.from_config(base)))
    if _mirrored():
        data = ExpertDataModule([[DATASET]], tokenizer, tokenizer.eos_token_id, recipe)
        data.setup()
        return data.plan
    render = Renderer(tokenizer, tokenizer.eos_token_id, recipe)
    size = recipe.batch_size
    return [
        render(target.sentences[i : i + size], target.types, 0)
        for target in map(mini, MINI)
        for i in range(0, len(target.sentences) - size + 1, size)
    ][: recipe.sentences // size]


def describe(config: Mapping[str, Any], recipe: Recipe, plan: Sequence[Batch]) -> dict[str, Any]:
    """All that the contestants' processes have to know."""
    return {
        "base": config["base"],
        "trainer": config["trainer"],
        "recipe": asdict(recipe),
        "plan": [[list(b.prefix), [[list(e.ids), e.completion] for e in b.examples]] for b in plan],
    }


def _in_process(job: Path, way: str, precision: str) -> Figures:
    """One round: the figures from what a process of its own prints on its last line."""
    command = [sys.executable, "-m", "experiments.bench.train", str(job), way, precision]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SamError(f"{way} training failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    record = json.loads(done.stdout.splitlines()[-1])
    losses = record["losses"]
    last = losses[-max(1, len(losses) // 4) :]
    plan = json.loads(job.read_text())["plan"]
    tokens = sum(len(prefix) + len(ids) for prefix, examples in plan for ids, _ in examples)
    return {
        "tokens_per_s": tokens / record["seconds"],
        "loss": sum(losses) / len(losses),
        "loss_last_quarter": sum(last) / len(last),
        PEAK: record["peak_mb"],
    }


def train(job: Mapping[str, Any], fused: bool, precision: str, folder: Path) -> dict[str, Any]:
    """Train as ``run.py task=train`` does: seconds of the fit, the loss of each step, the process's peak in MiB."""
    recipe = Recipe.from_config({**job["recipe"], "fused": fused})
    base = load(BaseSpec.from_config(job["base"]), device_of(job["trainer"]["accelerator"]))
    module = expert_module(base, recipe)
    module.configure_model()  # before the clock starts
    data = ExpertDataModule([], base.tokenizer, base.stop_ids[0], recipe)
    data.plan = [
        Batch(tuple(prefix), tuple(Example(tuple(ids), completion) for ids, completion in examples))
        for prefix, examples in job["plan"]
    ]
    start = time.perf_counter()
    fit(module, data, {**job["trainer"], "precision": precision}, folder, every=25, logger=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": [loss.item() for loss in module.losses], PEAK: peak_memory_mb()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        path, way, precision = sys.argv[1:]
        print(json.dumps(train(json.loads(Path(path).read_text()), way == "fused", precision, Path(scratch))))
