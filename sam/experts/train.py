"""Train one expert: fit, save as a PEFT folder, score it on held-out source sentences, write its card."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from sam import data as corpora
from sam.errors import SamError
from sam.experts.card import CARD_FILE, CONFIG_FILE, HELDOUT_CHARACTERS, WEIGHTS_FILE, Card
from sam.experts.data import DATA_VERSION, MEASURES, OPEN, ExpertDataModule, Recipe
from sam.experts.modelcard import write_readme
from sam.experts.module import ExpertModule
from sam.experts.packing import most_packed
from sam.generation import Generator
from sam.models.base import Base
from sam.models.device import multiplies_bf16
from sam.models.encoder import Encoder
from sam.ner import grammar, parsing, prompts
from sam.ner.scoring import Scores, score
from sam.paths import staged
from sam.results import versions
from sam.seeding import rng
from sam.types import Sentence, entity_types

log = logging.getLogger(__name__)

KEPT = ("n", "precision", "recall", "f1", "span_f1", "unparsable", "truncated", "not_in_sentence")
"""The scores that a card holds of each dataset."""

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Lightning's precisions that leave the base model's weights as they are (``bf16-true`` would cast them in place)."""


TRAINER = ("accelerator", "devices", "precision", "enable_progress_bar")
"""Lightning's options that a training takes: what is learnt is decided by the recipe, and written on the card."""


def recipe_hash(base: Base, domains: Sequence[Sequence[str]], recipe: Recipe, precision: str) -> str:
    """The hash of all that decides what is learnt; what only measures (:data:`MEASURES`) is left out."""
    unused = () if recipe.open_sentences else ("open_sentences", "open_batch_size")
    learnt = {k: v for k, v in recipe.to_dict().items() if k not in (*MEASURES, *unused)}
    parts = [base.fingerprint, prompts.PROMPT_VERSION, DATA_VERSION, [list(d) for d in domains], learnt, precision]
    parts += [] if base.dtype == "float32" else [base.dtype]
    if recipe.open_sentences:
        opened = corpora.spec(OPEN)
        parts.append([opened.files[path].mirror for path in opened.paths("train")])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def train_expert(
    base: Base,
    encoder: Encoder,
    *,
    name: str,
    role: str,
    domains: Sequence[Sequence[str]],
    recipe: Recipe,
    out: Path,
    work: Path,
    trainer: Mapping[str, Any],
    generator: Generator,
    constrained: bool = False,
    checkpoint_every: int = 25,
    replace_other: bool = False,
    logger: Any = False,
) -> tuple[Path, Card]:
    """Train expert ``name`` into ``out/name``; a finished one of the same recipe is kept, and scored anew if another
    number of held-out sentences (but 0) is asked for.

    Raises SamError for one of another recipe, unless ``replace_other``: then it is lost when the new one is there.
    A run that was killed goes on from ``work/last.ckpt`` and ends as an uninterrupted one would. ``domains`` are
    lists of dataset ids: one for an expert, all of them for the unified model. Leaves ``base`` as it was.
    """
    if further := [option for option in trainer if option not in TRAINER]:
        raise SamError(
            f"trainer.{further[0]} is no option of training, which takes {', '.join(TRAINER)}; what is learnt is set "
            "by train.*"
        )
    precision = auto_precision(str(trainer.get("precision", "auto")), base.device)
    digest = recipe_hash(base, domains, recipe, precision)
    folder = out / name
    done = _finished(folder)
    if done is not None and (done.recipe.get("hash"), done.encoder) != (digest, encoder.spec.identity):
        if not replace_other:
            raise SamError(
                f"{folder} holds an expert of another recipe ({_difference(done, recipe)}); choose another task.out, "
                "or lose that one: task.replace=true"
            )
        done = None
    if done is not None and all(getattr(recipe, m) in (0, done.recipe.get(m)) for m in MEASURES):
        log.info("%s is already trained with this recipe; nothing to do", folder)
        return folder, done
    if done is not None:  # what is not asked for anew is measured as it was
        recipe = replace(recipe, **{m: getattr(recipe, m) or done.recipe.get(m, 0) for m in MEASURES})
    data = ExpertDataModule(domains, base.tokenizer, base.stop_ids[0], recipe)
    data.setup()
    sentences, types = data.sentences, data.types
    # All that can be missing is asked for before hours are spent on training.
    seen = {s.text for s in sentences}
    heldout = {d: draw_heldout(d, recipe, seen) for domain in domains for d in domain}
    opened = draw_open_heldout(recipe)
    if done is not None:
        log.info("%s is already trained with this recipe; scoring it on other held-out sentences", folder)
        with staged(folder) as stage:
            shutil.copytree(folder, stage, dirs_exist_ok=True)
            scores = score_heldout(generator, stage, heldout, opened, constrained)
            card = replace(done, recipe={**done.recipe, **{m: getattr(recipe, m) for m in MEASURES}}, scores=scores)
            write_readme(stage, card)
            card.write(stage)
        return folder, card
    log.info("%s: %d sentences, %d steps, precision %s", name, len(sentences), len(data.plan), precision)
    module = ExpertModule(base, recipe)
    settings = {**trainer, "precision": precision}
    centroid = tuple(round(x, 6) for x in encoder.centroid([s.text for s in sentences], limit=2000))
    try:
        weights = fit(module, data, settings, work / digest, checkpoint_every, logger)
        config = module.net.peft_config["default"]
        training = {
            "seconds": round(module.seconds, 1),
            "steps": len(data.plan),
            "parameters": sum(w.numel() for w in weights.values()),
            "18HrL": 18 * base.model.config.hidden_size * recipe.r * base.model.config.num_hidden_layers,
            "device": base.device,
            "curve": module.curve(),
        }
    finally:
        module.unload()
    del module, data
    gc.collect()
    with staged(folder) as stage:
        _save_adapter(stage, weights, config, base)
        scores = score_heldout(generator, stage, heldout, opened, constrained)
        card = Card(
            name=name,
            role=role,
            domain=name,
            datasets=tuple(d for domain in domains for d in domain),
            types=tuple(types),
            base=base.name,
            base_fingerprint=base.fingerprint,
            base_fold=base.fold,
            prompt_version=prompts.PROMPT_VERSION,
            encoder=encoder.spec.identity,
            centroid=centroid,
            recipe={**recipe.to_dict(), "precision": precision, "hash": digest},
            sentences=len(sentences),
            scores=scores,
            training=training,
            licences={d: corpora.spec(d).licence for d in [*heldout, *([OPEN] if recipe.open_sentences else [])]},
            versions=versions(),
        )
        write_readme(stage, card)
        card.write(stage)
    shutil.rmtree(work / digest, ignore_errors=True)
    log.info("%s: held-out F1 %.1f, written to %s", name, 100 * scores["mean_f1"], folder)
    return folder, card


def _finished(folder: Path) -> Card | None:
    """The card in ``folder`` if a whole expert is there, else None (also for a broken card)."""
    if not all((folder / file).is_file() for file in (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE)):
        return None
    try:
        return Card.read(folder)
    except SamError as error:
        log.warning("%s; training it again", error)
        return None


def _difference(card: Card, recipe: Recipe) -> str:
    """What of ``recipe`` the expert of ``card`` was trained with otherwise, as far as a recipe says."""
    now = {k: v for k, v in recipe.to_dict().items() if k not in MEASURES}
    found = [f"train.{k}={card.recipe[k]}, now {v}" for k, v in now.items() if k in card.recipe and card.recipe[k] != v]
    return "; ".join(found) or "of other data, another base model, encoder or precision"


def auto_precision(chosen: str, device: str) -> str:
    """``auto``: bf16 autocast where the hardware multiplies bf16 itself, else fp32."""
    if chosen not in PRECISIONS:
        raise SamError(f"trainer.precision={chosen} is unknown; allowed: {', '.join(PRECISIONS)}")
    if chosen != "auto":
        return chosen
    if device.startswith("cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if multiplies_bf16() else "32-true"


def fit(
    module: ExpertModule, data: ExpertDataModule, settings: Mapping[str, Any], work: Path, every: int, logger: Any
) -> dict[str, torch.Tensor]:
    """Fit, from the last checkpoint if there is one; returns the adapter's tensors in PEFT's naming."""
    from peft import get_peft_model_state_dict

    data.most_packed = most_packed(module.base.model)
    saver = ModelCheckpoint(
        dirpath=work, filename="last", every_n_train_steps=every, save_top_k=1, enable_version_counter=False
    )
    bar = [TQDMProgressBar(refresh_rate=5)] if settings.get("enable_progress_bar", True) else []
    trainer = L.Trainer(
        **settings,
        max_epochs=1,
        gradient_clip_val=module.recipe.clip,
        callbacks=[saver, *bar],
        logger=logger,
        log_every_n_steps=10,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(work),
    )
    last = work / "last.ckpt"
    if last.is_file() and not zipfile.is_zipfile(last):
        log.warning("%s is cut short; training starts anew", last)
        last.unlink()
    with warnings.catch_warnings():
        # Lightning asks the loader for its state; ours is the data module's.
        warnings.filterwarnings("ignore", message="(You're resuming from a checkpoint|Checkpoint directory .* exists)")
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
    return {k: v.detach().cpu() for k, v in get_peft_model_state_dict(module.net).items()}


def _save_adapter(folder: Path, weights: Mapping[str, torch.Tensor], config: Any, base: Base) -> None:
    """The adapter in bf16, as PEFT itself would lay it out; PEFT alone can load it."""
    from safetensors.torch import save_file

    half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(weights.items())}
    save_file(half, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order would differ from run to run
    config.base_model_name_or_path = base.name
    config.save_pretrained(str(folder))


def held_split(dataset: str) -> str | None:
    """The split of a source dataset that finished experts are scored on: test, else dev, else none."""
    return next((s for s in ("test", "dev") if s in corpora.spec(dataset).splits), None)


def draw_heldout(dataset: str, recipe: Recipe, seen: Collection[str] = ()) -> list[Sentence]:
    """``recipe.heldout`` sentences of a source dataset's held-out split, drawn by the seed; no text that is ``seen``.

    With and without mentions, as they come. Empty for a dataset that has nothing but what the expert was trained on.
    """
    split = held_split(dataset)
    if not recipe.heldout or split is None:
        return []
    sentences = [s for s in corpora.load(dataset, split) if len(s.text) <= HELDOUT_CHARACTERS and s.text not in seen]
    return rng(recipe.seed, "held out", dataset).sample(sentences, min(recipe.heldout, len(sentences)))


def draw_open_heldout(recipe: Recipe) -> dict[str, list[Sentence]]:
    """``recipe.heldout_open`` sentences of each held-out split of the open types (all of a smaller one), by split."""
    if not recipe.heldout_open:
        return {}
    drawn = {}
    for split in (split for split in corpora.spec(OPEN).splits if split != "train"):
        sentences = corpora.load(OPEN, split)
        drawn[split] = rng(recipe.seed, "held out", split).sample(sentences, min(recipe.heldout_open, len(sentences)))
    return drawn


def score_heldout(
    generator: Generator,
    folder: Path,
    heldout: Mapping[str, Sequence[Sentence]],
    opened: Mapping[str, Sequence[Sentence]],
    constrained: bool = False,
) -> dict[str, Any]:
    """Scores of the saved adapter on held-out sentences: of each dataset, asked for all its types, and their mean F1;
    and of each split of the open types, each sentence asked for its own."""
    splits = {dataset: str(held_split(dataset)) for dataset, sentences in heldout.items() if sentences}
    asked: dict[str, tuple[Sequence[str], Sequence[Sentence]]] = {
        d: (entity_types(corpora.load(d, split)), heldout[d]) for d, split in splits.items()
    }
    asked |= {f"{OPEN}/{split}": ([], held) for split, held in opened.items()}
    scores = score_adapter(generator, folder, asked, constrained)
    by_dataset = {dataset: {"split": split, **scores[dataset]} for dataset, split in splits.items()}
    mean = sum(d["f1"] for d in by_dataset.values()) / len(by_dataset) if by_dataset else 0.0
    return {"datasets": by_dataset, "mean_f1": mean, "open": {split: scores[f"{OPEN}/{split}"] for split in opened}}


def score_adapter(
    generator: Generator,
    folder: Path,
    held: Mapping[str, tuple[Sequence[str], Sequence[Sentence]]],
    constrained: bool = False,
) -> dict[str, dict[str, Any]]:
    """The scores (:data:`KEPT`) of the adapter in ``folder`` by name of a part of ``held``: the types asked for (a
    sentence's own, if it has some) and the sentences."""
    from sam.merging import AdapterDeltas, MergeSpec, merge_modules

    known = training_types() if any(s.types for _, sentences in held.values() for s in sentences) else frozenset()
    try:
        generator.load(merge_modules([AdapterDeltas.open(folder)], [folder.name], MergeSpec("linear")))
        return {name: _score(generator, types, part, constrained, known) for name, (types, part) in held.items()}
    finally:
        generator.close()


def _score(
    generator: Generator,
    types: Sequence[str],
    sentences: Sequence[Sentence],
    constrained: bool,
    known: Collection[str],
) -> dict[str, Any]:
    asked = [s.types or types for s in sentences]
    requests = [grammar.request(of, s.text, constrained) for of, s in zip(asked, sentences, strict=True)]
    made = dict(generator.generate(requests))
    predicted = [
        parsing.predict(s.text, made[i].text, of, made[i].truncated)
        for i, (s, of) in enumerate(zip(sentences, asked, strict=True))
    ]
    scores = score(sentences, predicted)
    kept = {name: value for name, value in scores.to_dict().items() if name in KEPT}
    return kept | (_unseen(scores, known) if any(s.types for s in sentences) else {})


def _unseen(scores: Scores, known: Collection[str]) -> dict[str, Any]:
    """Recall of the gold pairs whose type is not ``known``."""
    figures = [f for name, f in scores.per_type.items() if name not in known and f["gold"]]
    gold, tp = (int(sum(f[key] for f in figures)) for key in ("gold", "tp"))
    return {"unseen_types": len(figures), "unseen_gold": gold, "unseen_recall": tp / gold if gold else 0.0}


def training_types() -> frozenset[str]:
    """The entity types of all source datasets and of all open-type sentences that experts may be trained on."""
    return corpora.type_names(d for d in corpora.datasets() if corpora.spec(d).role in ("source", "open"))
