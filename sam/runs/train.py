"""The task ``train``: the expert of one domain, or the unified model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam.console import print_table
from sam.data import spec as dataset_spec
from sam.errors import SamError
from sam.experts.card import Card
from sam.experts.training.recipe import Recipe
from sam.experts.training.train import Job, train_expert
from sam.generation import DecodeSpec, build, check_constrained
from sam.models.base import load
from sam.models.device import device_of
from sam.models.encoder import Encoder, EncoderSpec
from sam.models.spec import BaseSpec
from sam.tracking import tracked


def train(config: dict[str, Any], folder: Path, group: str | None) -> float:
    """Train ``config['domain']`` into ``config['task']['out']``; returns its mean held-out F1."""
    job, decode = job_of(config), DecodeSpec.from_config(config["decode"])
    spec, device = BaseSpec.from_config(config["base"]), device_of(config["trainer"]["accelerator"])
    generator = build(config["generator"], spec, device, decode)
    base, encoder = load(spec, device), Encoder(EncoderSpec.from_config(config["encoder"]))
    if decode.constrained:
        check_constrained(generator)
    with tracked(config, folder, group, name=f"train {job.name}") as run:
        card = train_expert(job, base, encoder, generator, _logger(run))
        f1 = float(card.scores["mean_f1"])
        if run is not None:
            run.summary["heldout/mean_f1"] = f1
    _show(job.folder, card)
    return f1


def job_of(config: dict[str, Any]) -> Job:
    """The training that ``config`` asks for; raises SamError for what cannot be trained on."""
    domain, task = config["domain"], config["task"]
    for dataset in (d for part in domain["domains"] for d in part):
        if dataset_spec(dataset).role == "open":
            raise SamError(
                f"domain={domain['name']}: {dataset} is mixed in by train.open_sentences, not by domain.domains"
            )
        if "train" not in dataset_spec(dataset).splits:
            raise SamError(f"domain={domain['name']}: dataset {dataset} has no train split")
    if domain["role"] == "start" and config["base"].get("fold"):
        raise SamError(f"domain={domain['name']} is what others start from: train it on the bare base, base.fold=null")
    if not isinstance(task["replace"], bool):
        raise SamError(f"task.replace={task['replace']} must be true or false")
    return Job(
        name=domain["name"],
        role=domain["role"],
        domains=domain["domains"],
        recipe=Recipe.from_config(config["train"]),
        trainer=config["trainer"],
        out=Path(task["out"]).expanduser(),
        work=Path(task["work"]).expanduser(),
        checkpoint_every=task["checkpoint_every"],
        replace=task["replace"],
        constrained=DecodeSpec.from_config(config["decode"]).constrained,
    )


def _logger(run: Any) -> Any:
    """Lightning's logger of a W&B run, False without one."""
    if run is None:
        return False
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(experiment=run)


def _show(folder: Path, card: Card) -> None:
    rows = [[d, f"{100 * s['f1']:.1f}", str(s["n"])] for d, s in card.scores["datasets"].items()]
    print_table(f"{folder}: held-out F1 (mean {100 * card.scores['mean_f1']:.1f})", ["dataset", "F1", "n"], rows)
