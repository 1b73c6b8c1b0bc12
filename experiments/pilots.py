"""Pilots of the experts' recipe: ``python -m experiments.pilots NAME [train.epochs=2 …]``.

One adapter is trained on a few sentences of four source domains and scored on other sentences of these domains and,
zero-shot, of datasets of domains left out. What is scored is the same for all pilots; no target is touched. A pilot is
a line of ``results/pilots/pilots.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.errors import HydraException

from sam import corpora
from sam.base import Base, BaseSpec, device_of, load
from sam.decoding import DecodeSpec
from sam.errors import SamError
from sam.experts.card import HELDOUT_CHARACTERS
from sam.experts.data import ExpertDataModule, Recipe
from sam.experts.module import ExpertModule
from sam.experts.train import auto_precision, fit, score_adapter
from sam.launch import compose, one_line, quiet
from sam.ner import Sentence
from sam.results import git_commit
from sam.seeding import rng

RESULTS = Path(__file__).parent / "results" / "pilots" / "pilots.jsonl"

DOMAINS = ("news", "biomedical", "legal", "traffic")
"""Source domains that are trained on; their datasets are those of ``conf/domain``."""

LEFT_OUT = ("wnut17", "btc", "scierc", "matscholar")
"""Datasets of the domains left out, social and stem."""

SIZES = {"in_domain": 40, "left_out": 100}
"""Sentences that are scored a dataset."""

DEFAULTS = ("base.fold=null", "train.sentences=200", "trainer=cpu", "trainer.enable_progress_bar=false")
"""The shipped start has seen all domains, also those left out here: a pilot begins from the bare base."""

READ = ("train", "base", "trainer", "decode")
"""The parts of the config that a pilot reads."""


class PilotData(ExpertDataModule):
    """Training data without the texts that are ``scored``, and without the left-out datasets' types as negatives."""

    def __init__(
        self,
        domains: Sequence[Sequence[str]],
        tokenizer: Any,
        stop_id: int,
        recipe: Recipe,
        scored: Collection[str],
    ) -> None:
        super().__init__(domains, tokenizer, stop_id, recipe)
        self.scored = frozenset(scored)
        self.unasked = {t for dataset in LEFT_OUT for t in corpora.spec(dataset).types}

    def _foreign(self, dataset: str) -> list[str]:
        return [t for t in super()._foreign(dataset) if t not in self.unasked]

    def _fits(self, sentence: Sentence, types: Sequence[str], dataset: str) -> bool:
        return sentence.text not in self.scored and super()._fits(sentence, types, dataset)


def configure(overrides: Sequence[str]) -> dict[str, Any]:
    """The config of a pilot. Raises SamError for an override of what a pilot does not read."""
    for override in overrides:
        if override.lstrip("+~").partition("=")[0].partition(".")[0] not in READ:
            raise SamError(f"{override} changes nothing in a pilot, which reads {', '.join(f'{r}.*' for r in READ)}")
    given = {override.partition("=")[0] for override in overrides}
    return compose(*(d for d in DEFAULTS if d.partition("=")[0] not in given), *overrides)


def domains() -> list[list[str]]:
    """The dataset ids of each of :data:`DOMAINS`."""
    return [d for name in DOMAINS for d in compose(f"domain={name}")["domain"]["domains"]]


def draw_scored(dataset: str, n: int) -> list[Sentence]:
    """``n`` dev sentences of the dataset (all if it has fewer), whatever the recipe's seed."""
    sentences = [s for s in corpora.load(dataset, "dev") if len(s.text) <= HELDOUT_CHARACTERS]
    return rng("pilots", dataset).sample(sentences, min(n, len(sentences)))


def train(base: Base, data: PilotData, trainer: Mapping[str, Any], folder: Path) -> None:
    """Train an adapter on ``data`` into ``folder``; leaves ``base`` as it was."""
    module = ExpertModule(base, data.recipe)
    try:
        fit(module, data, trainer, folder / "work", len(data.plan) + 1, False)
        module.net.save_pretrained(str(folder))
    finally:
        module.unload()


def mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean F1, precision and recall of datasets, each of the same weight."""
    return {name: sum(s[name] for s in scores) / len(scores) for name in ("f1", "precision", "recall")}


def pilot(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and score the pilot; returns its line."""
    commit, config, trained = git_commit(), configure(overrides), domains()
    recipe, decode = Recipe.from_config(config["train"]), DecodeSpec.from_config(config["decode"])
    groups = {"in_domain": [d for part in trained for d in part], "left_out": list(LEFT_OUT)}
    scored = {d: draw_scored(d, SIZES[group]) for group, names in groups.items() for d in names}
    base = load(BaseSpec.from_config(config["base"]), device_of(config["trainer"]["accelerator"]))
    precision = auto_precision(config["trainer"]["precision"], base.device)
    texts = {s.text for sentences in scored.values() for s in sentences}
    data = PilotData(trained, base.tokenizer, base.stop_ids[0], recipe, texts)
    data.setup()
    with TemporaryDirectory() as folder:
        train(base, data, {**config["trainer"], "precision": precision}, Path(folder))
        scores = score_adapter(base, Path(folder), {d: ("dev", held) for d, held in scored.items()}, decode)
    return {
        "name": name,
        "overrides": list(overrides),
        **{group: mean([scores[d] for d in names]) for group, names in groups.items()},
        "unparsable": sum(s["unparsable"] for s in scores.values()),
        "truncated": sum(s["truncated"] for s in scores.values()),
        "datasets": scores,
        "sentences": len(data.sentences),
        "steps": len(data.plan),
        "recipe": recipe.to_dict(),
        "base_fingerprint": base.fingerprint,
        "precision": precision,
        "git_commit": commit,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one pilot, append its line and print it; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pilots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="what the pilot is called in the results")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="train.KEY=VALUE", help="what differs from conf/train"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"the file of results (default {RESULTS})")
    args = parser.parse_args(argv)
    quiet()
    try:
        line = pilot(args.name, args.overrides)
    except (SamError, HydraException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
