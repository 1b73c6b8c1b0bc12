"""One expert from its recipe to its card: plan, fit, save, score."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sam import data as corpora
from sam.errors import SamError
from sam.experts.card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, Card
from sam.experts.modelcard import write_readme
from sam.experts.training.data import ExpertDataModule
from sam.experts.training.fit import expert_module, fit, trainer_settings
from sam.experts.training.heldout import draw_heldout, score_heldout
from sam.experts.training.recipe import MEASURES, OPEN, Recipe, recipe_hash
from sam.generation import Generator
from sam.models.base import Base
from sam.models.encoder import Encoder
from sam.ner import prompts
from sam.paths import staged
from sam.results import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What to train, and where to.

    ``name``, ``role`` and ``domains`` are those of ``conf/domain``: lists of dataset ids, one for an expert, all of
    them for the unified model. The expert goes to ``out/name``, a checkpoint to ``work`` every ``checkpoint_every``
    steps. With ``replace`` a finished expert of another recipe is lost when the new one is there. ``trainer``:
    Lightning's options (:data:`~sam.experts.training.fit.TRAINER`). ``constrained``: held-out completions follow the
    grammar.
    """

    name: str
    role: str
    domains: Sequence[Sequence[str]]
    recipe: Recipe
    trainer: Mapping[str, Any]
    out: Path
    work: Path
    checkpoint_every: int
    replace: bool
    constrained: bool

    @property
    def folder(self) -> Path:
        """The expert's."""
        return self.out / self.name

    @property
    def datasets(self) -> tuple[str, ...]:
        """Those of all domains."""
        return tuple(dataset for domain in self.domains for dataset in domain)


@dataclass(frozen=True)
class Plan:
    """A job that was checked: its Lightning options, its recipe's ``hash``, and the card of the ``finished`` expert of
    this recipe, if it is there already."""

    job: Job
    recipe: Recipe
    trainer: Mapping[str, Any]
    hash: str
    finished: Card | None

    @property
    def checkpoints(self) -> Path:
        """A folder of this recipe alone: no other training goes on from what lies in it."""
        return self.job.work / self.hash

    @property
    def measured(self) -> bool:
        """Whether the finished expert has all the scores that are asked for."""
        card = self.finished
        return card is not None and all(getattr(self.recipe, m) == card.recipe.get(m, 0) for m in MEASURES)


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: its tensors in PEFT's naming, PEFT's config, and what the card says of the training."""

    weights: Mapping[str, torch.Tensor]
    config: Any
    training: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """In bf16, as PEFT itself would lay it out; PEFT alone can load it."""
        from safetensors.torch import save_file

        half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(self.weights.items())}
        save_file(half, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.config.inference_mode = True
        self.config.target_modules = sorted(self.config.target_modules)  # a set: its order differs from run to run
        self.config.save_pretrained(str(folder))


def train_expert(job: Job, base: Base, encoder: Encoder, generator: Generator, logger: Any = False) -> Card:
    """Train an expert; a finished one of the same recipe is kept, and scored anew if another number of held-out
    sentences (but 0) is asked for.

    Raises SamError for a finished one of another recipe, unless ``job.replace``. A run that was killed goes on from its
    last checkpoint and ends as an uninterrupted one would. Leaves ``base`` as it was. ``logger`` is Lightning's.
    """
    plan = make_plan(job, base, encoder)
    if plan.finished is not None and plan.measured:
        log.info("%s is already trained with this recipe; nothing to do", job.folder)
        return plan.finished
    # All that can be missing is asked for before hours are spent on training.
    data = ExpertDataModule(job.domains, base.tokenizer, base.stop_ids[0], plan.recipe)
    data.setup()
    heldout = draw_heldout(job.datasets, plan.recipe, {s.text for s in data.sentences})
    if plan.finished is None:
        card, save = _trained(plan, base, encoder, data, logger)
    else:
        card, save = _kept(plan, plan.finished)
    del data  # it leads to the module
    gc.collect()
    card = _written(job.folder, card, save, partial(score_heldout, heldout, generator, job.constrained))
    shutil.rmtree(plan.checkpoints, ignore_errors=True)
    log.info("%s: held-out F1 %.1f, written to %s", job.name, 100 * card.scores["mean_f1"], job.folder)
    return card


def _trained(
    plan: Plan, base: Base, encoder: Encoder, data: ExpertDataModule, logger: Any
) -> tuple[Card, Callable[[Path], object]]:
    """The card of a new expert without its scores, and what writes its adapter into a folder."""
    card = new_card(plan, base, encoder, data)
    adapter = fit_adapter(plan, base, data, logger)
    return replace(card, training=dict(adapter.training)), adapter.save


def _kept(plan: Plan, card: Card) -> tuple[Card, Callable[[Path], object]]:
    """The same of a finished expert that is to be scored on other held-out sentences."""
    log.info("%s is already trained with this recipe; scoring it on other held-out sentences", plan.job.folder)
    measures = {m: getattr(plan.recipe, m) for m in MEASURES}
    copy = partial(shutil.copytree, plan.job.folder, dirs_exist_ok=True)
    return replace(card, recipe={**card.recipe, **measures}), copy


def _written(folder: Path, card: Card, save: Callable[[Path], object], score: Callable[[Path], dict[str, Any]]) -> Card:
    """The card with its scores; the whole expert is in ``folder`` then, or what was there before."""
    with staged(folder) as stage:
        save(stage)
        card = replace(card, scores=score(stage))
        write_readme(stage, card)
        card.write(stage)
    return card


def make_plan(job: Job, base: Base, encoder: Encoder) -> Plan:
    """Check the job and see what is there already; raises SamError for an expert of another recipe that is to stay."""
    trainer = trainer_settings(job.trainer, base.device)
    digest = recipe_hash(base, job.domains, job.recipe, trainer["precision"])
    card = finished_card(job.folder)
    if card is not None and (card.recipe.get("hash"), card.encoder) != (digest, encoder.spec.identity):
        if not job.replace:
            raise SamError(
                f"{job.folder} holds an expert of another recipe ({_difference(card, job.recipe)}); choose another "
                "task.out, or lose that one: task.replace=true"
            )
        card = None
    if card is None:
        return Plan(job, job.recipe, trainer, digest, None)
    # What is not asked for anew is measured as it was.
    measures = {m: getattr(job.recipe, m) or card.recipe.get(m, 0) for m in MEASURES}
    return Plan(job, replace(job.recipe, **measures), trainer, digest, card)


def finished_card(folder: Path) -> Card | None:
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
    before, now = ({"fused": True, **values} for values in (card.recipe, recipe.to_dict()))
    changed = [name for name in now if name in before and name not in MEASURES and before[name] != now[name]]
    shown = [f"train.{name}={before[name]}, now {now[name]}" for name in changed]
    return "; ".join(shown) or "of other data, another base model, encoder or precision"


def new_card(plan: Plan, base: Base, encoder: Encoder, data: ExpertDataModule) -> Card:
    """The card of an expert that is still to be trained and scored."""
    job, recipe = plan.job, plan.recipe
    centroid = encoder.centroid([s.text for s in data.sentences], limit=2000)
    licensed = [*job.datasets, *([OPEN] if recipe.open_sentences else [])]
    return Card(
        name=job.name,
        role=job.role,
        domain=job.name,
        datasets=job.datasets,
        types=tuple(data.types),
        base=base.name,
        base_fingerprint=base.fingerprint,
        base_fold=base.fold,
        prompt_version=prompts.PROMPT_VERSION,
        encoder=encoder.spec.identity,
        centroid=tuple(round(x, 6) for x in centroid),
        recipe={**recipe.to_dict(), "precision": plan.trainer["precision"], "hash": plan.hash},
        sentences=len(data.sentences),
        licences={dataset: corpora.spec(dataset).licence for dataset in licensed},
        versions=versions(),
    )


def fit_adapter(plan: Plan, base: Base, data: ExpertDataModule, logger: Any) -> Adapter:
    """Train the adapter on the batches of ``data``."""
    job, steps = plan.job, len(data.plan)
    log.info(
        "%s: %d sentences, %d steps, precision %s", job.name, len(data.sentences), steps, plan.trainer["precision"]
    )
    module = expert_module(base, plan.recipe)
    try:
        weights = fit(module, data, plan.trainer, plan.checkpoints, job.checkpoint_every, logger)
        config = module.net.peft_config["default"]
    finally:
        module.unload()
    config.base_model_name_or_path = base.name
    training = {
        "seconds": round(module.seconds, 1),
        "steps": steps,
        "parameters": sum(w.numel() for w in weights.values()),
        "18HrL": 18 * base.model.config.hidden_size * plan.recipe.r * base.model.config.num_hidden_layers,
        "device": base.device,
        "curve": module.curve(),
    }
    return Adapter(weights, config, training)
