"""The task ``train``: the expert of one domain, or the unified model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sam.console import print_table
from sam.errors import SamError
from sam.experts.data import Recipe
from sam.experts.train import train_expert
from sam.generation import DecodeSpec, build, check_constrained
from sam.models.base import Base, load
from sam.models.device import device_of
from sam.models.encoder import Encoder, EncoderSpec
from sam.models.spec import BaseSpec
from sam.tracking import tracked

log = logging.getLogger(__name__)


def train(config: dict[str, Any], folder: Path, group: str | None) -> float:
    """Train ``config['domain']`` into ``config['task']['out']``; returns its mean held-out F1."""
    from sam.data import spec as dataset_spec

    domain, recipe = config["domain"], Recipe.from_config(config["train"])
    decode = DecodeSpec.from_config(config["decode"])
    for dataset in (d for part in domain["domains"] for d in part):
        if dataset_spec(dataset).role == "open":
            raise SamError(
                f"domain={domain['name']}: {dataset} is mixed in by train.open_sentences, not by domain.domains"
            )
        if "train" not in dataset_spec(dataset).splits:
            raise SamError(f"domain={domain['name']}: dataset {dataset} has no train split")
    if domain["role"] == "start" and config["base"].get("fold"):
        raise SamError(f"domain={domain['name']} is what others start from: train it on the bare base, base.fold=null")
    if not isinstance(config["task"]["replace"], bool):
        raise SamError(f"task.replace={config['task']['replace']} must be true or false")
    spec, device = BaseSpec.from_config(config["base"]), device_of(config["trainer"]["accelerator"])
    generator = build(config["generator"], spec, device, decode)
    base: Base = load(spec, device)
    if decode.constrained:
        check_constrained(generator)
    with tracked(config, folder, group, name=f"train {domain['name']}") as run:
        logger: Any = False
        if run is not None:
            from lightning.pytorch.loggers import WandbLogger

            logger = WandbLogger(experiment=run)
        out, card = train_expert(
            base,
            Encoder(EncoderSpec.from_config(config["encoder"])),
            name=domain["name"],
            role=domain["role"],
            domains=domain["domains"],
            recipe=recipe,
            out=Path(config["task"]["out"]).expanduser(),
            work=Path(config["task"]["work"]).expanduser(),
            trainer=config["trainer"],
            generator=generator,
            constrained=decode.constrained,
            checkpoint_every=config["task"]["checkpoint_every"],
            replace_other=config["task"]["replace"],
            logger=logger,
        )
        f1 = float(card.scores["mean_f1"])
        if run is not None:
            run.summary["heldout/mean_f1"] = f1
    rows = [[d, f"{100 * s['f1']:.1f}", str(s["n"])] for d, s in card.scores["datasets"].items()]
    print_table(f"{out}: held-out F1 (mean {100 * f1:.1f})", ["dataset", "F1", "n"], rows)
    return f1
