"""Training data of an expert: sentences of a domain's datasets, rendered and cut into batches.

Everything random is drawn by (seed, sentence id, epoch), so that the batches of a run are a function of its recipe
alone and a resumed run meets the same ones.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from sam import corpora, prompts
from sam.errors import SamError
from sam.experts.detokenise import detokenised
from sam.ner import Sentence, entity_types
from sam.seeding import rng

log = logging.getLogger(__name__)

IGNORED = -100

DATA_VERSION = 2
"""Raise it with every change to which sentences are drawn for a recipe, or to how they are shown."""

SCIENTIFIC = ("biomedical", "stem")
"""Domains of scientific text; all others are everyday text."""


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; ``sentences`` is the budget a domain, ``epochs`` the passes over them.

    ``label_drop`` is the chance that a type is left out of a prompt (its mentions too), ``negatives`` the most
    :func:`foreign_types` that a prompt asks for beside its own, ``max_types`` the most types in a prompt,
    ``max_empty`` the largest share of sentences without a mention, ``detokenise`` the chance that a sentence is shown
    with ordinary spacing (``C++ (a language).``) instead of its corpus's tokens, ``max_length`` tokens.
    """

    sentences: int = 5000
    epochs: int = 1
    batch_size: int = 4
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    r: int = 8
    alpha: int = 16
    rslora: bool = False
    label_drop: float = 0.15
    negatives: int = 4
    max_types: int = 16
    max_empty: float = 0.1
    detokenise: float = 0.3
    max_length: int = 320
    heldout: int = 100
    seed: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """From the plain mapping of ``conf/train``; refuses unknown keys and values out of range."""
        known = {f.name for f in fields(cls)}
        if unknown := set(config) - known:
            raise SamError(f"train.{sorted(unknown)[0]} is unknown; allowed: {', '.join(sorted(known))}")
        recipe = cls(**config)
        for name in ("sentences", "epochs", "batch_size", "r", "alpha", "max_types", "max_length"):
            if getattr(recipe, name) < 1:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be at least 1")
        for name in ("lr", "alpha"):
            if not getattr(recipe, name) > 0:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be above 0")
        for name in ("weight_decay", "clip", "heldout", "negatives"):
            if not getattr(recipe, name) >= 0:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be at least 0")
        for name in ("warmup", "label_drop", "max_empty"):
            if not 0 <= getattr(recipe, name) < 1:
                raise SamError(f"train.{name}={getattr(recipe, name)} must lie in [0, 1)")
        if not 0 <= recipe.detokenise <= 1:
            raise SamError(f"train.detokenise={recipe.detokenise} must lie in [0, 1]")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping."""
        return asdict(self)


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; the loss is on the last ``answer`` of them."""

    ids: tuple[int, ...]
    answer: int


class Renderer:
    """Sentences to examples with a tokenizer; prompt parts are tokenised apart, as the decoder does."""

    def __init__(self, tokenizer: Any, stop_id: int, recipe: Recipe) -> None:
        self.tokenizer, self.stop_id, self.recipe = tokenizer, stop_id, recipe

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def __call__(self, sentence: Sentence, types: Sequence[str], epoch: int, foreign: Sequence[str] = ()) -> Example:
        """The example of ``sentence`` with its types shuffled, some dropped, some of ``foreign`` added, all by
        (seed, id, epoch)."""
        draw = rng(self.recipe.seed, sentence.id, epoch)
        shuffled = draw.sample(list(types), len(types))
        kept = [t for t in shuffled if draw.random() >= self.recipe.label_drop][: self.recipe.max_types]
        asked = kept or shuffled[:1]
        added = draw.sample(list(foreign), min(draw.randint(0, self.recipe.negatives), len(foreign)))
        if added:
            asked = (asked + added)[: self.recipe.max_types]
            draw.shuffle(asked)
        if draw.random() < self.recipe.detokenise:
            sentence = detokenised(sentence)
        answer = self._ids(prompts.answer(sentence, asked)) + [self.stop_id]
        prompt = self._ids(prompts.prefix(asked), special=True) + self._ids(prompts.suffix(sentence.text))
        return Example(tuple(prompt + answer), len(answer))


def draw_sentences(
    datasets: Sequence[str], split: str, recipe: Recipe, fits: Any = None
) -> dict[str, tuple[list[Sentence], list[str]]]:
    """``recipe.sentences`` sentences over ``datasets`` in equal shares (what one lacks, the next ones fill).

    Returns dataset -> (sentences, all its entity types). ``fits(sentence, types, dataset) -> bool`` may refuse some.
    """
    chosen: dict[str, tuple[list[Sentence], list[str]]] = {}
    loaded = {name: corpora.load(name, split) for name in datasets}
    left = recipe.sentences
    for done, name in enumerate(sorted(datasets, key=lambda d: (len(loaded[d]), d))):
        share = left // (len(datasets) - done)
        types = entity_types(loaded[name])
        picked = _pick(
            loaded[name], share, recipe, lambda s, types=types, name=name: fits is None or fits(s, types, name)
        )
        chosen[name] = (picked, types)
        left -= len(picked)
    if left > 0:
        log.warning("%s: only %d of %d sentences could be drawn", datasets, recipe.sentences - left, recipe.sentences)
    return {name: chosen[name] for name in datasets}


def _pick(sentences: Sequence[Sentence], share: int, recipe: Recipe, fits: Any) -> list[Sentence]:
    order = rng(recipe.seed, "sentences").sample(range(len(sentences)), len(sentences))
    picked: list[Sentence] = []
    seen: set[str] = set()
    empty = 0
    for index in order:
        if len(picked) >= share:
            break
        sentence = sentences[index]
        if sentence.text in seen or (not sentence.mentions and empty >= recipe.max_empty * share):
            continue
        if fits(sentence):
            picked.append(sentence)
            seen.add(sentence.text)
            empty += not sentence.mentions
    return picked


@cache
def foreign_types(dataset: str) -> list[str]:
    """Types that the sentences of ``dataset`` do not hold: those of scientific sources for a dataset of everyday text,
    and the other way round; none that a source on its own side has too. Sorted.

    Nearer domains do not serve: nobody has marked the persons of TopRes19th or the sports teams of CoNLL-2003.
    """
    sources = [s for s in map(corpora.spec, corpora.datasets()) if s.role == "source"]
    side = corpora.spec(dataset).domain in SCIENTIFIC
    own = {t for s in sources if (s.domain in SCIENTIFIC) == side for t in s.types}
    return sorted({t for s in sources for t in s.types} - own)


def batches(examples: Sequence[Example], size: int, draw: random.Random) -> list[list[Example]]:
    """``examples`` cut into batches of similar length, in random order."""
    order = draw.sample(list(examples), len(examples))
    window = size * 16
    cut = []
    for start in range(0, len(order), window):
        bucket = sorted(order[start : start + window], key=lambda e: len(e.ids))
        cut += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    draw.shuffle(cut)
    return cut


def collate(batch: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels`` ([batch, length]; -100 outside the answer)."""
    # Few distinct shapes: CPU and GPU libraries prepare a kernel for each.
    length = -(-max(len(e.ids) for e in batch) // 8) * 8
    ids = torch.full((len(batch), length), pad_id)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    for row, example in enumerate(batch):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        mask[row, :n] = 1
        labels[row, n - example.answer : n] = torch.tensor(example.ids[n - example.answer :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class ResumableSampler(Sampler[int]):
    """Indices ``start`` .. ``total - 1`` in order; its length is ``total``, as Lightning counts resumed batches."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class ExpertDataModule(L.LightningDataModule):
    """The training batches of one expert, all epochs in one pass, and where in them a resumed run goes on."""

    def __init__(self, domains: Sequence[Sequence[str]], tokenizer: Any, stop_id: int, recipe: Recipe) -> None:
        """``domains``: lists of dataset ids, one for an expert, all for the unified model; the budget is a domain's."""
        super().__init__()
        self.domains = [list(d) for d in domains]
        self.recipe, self.renderer = recipe, Renderer(tokenizer, stop_id, recipe)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_id
        self.sentences: list[Sentence] = []
        self.types: list[str] = []
        self.plan: list[list[Example]] = []
        self.start = 0

    def setup(self, stage: str | None = None) -> None:
        """Draw and render; the same for the same recipe."""
        if self.plan:
            return
        drawn: list[tuple[Sentence, list[str], list[str]]] = []
        for datasets in self.domains:
            for name, (sentences, types) in draw_sentences(datasets, "train", self.recipe, self._fits).items():
                foreign = self._foreign(name)
                drawn += [(s, types, foreign) for s in sentences]
        if not drawn:
            names = ", ".join(d for datasets in self.domains for d in datasets)
            raise SamError(f"train.max_length={self.recipe.max_length} leaves no sentence of {names}; raise it")
        self.sentences = [s for s, _, _ in drawn]
        self.types = sorted({t for _, types, _ in drawn for t in types})
        for epoch in range(self.recipe.epochs):
            examples = [self.renderer(s, types, epoch, foreign) for s, types, foreign in drawn]
            self.plan += batches(examples, self.recipe.batch_size, rng(self.recipe.seed, "batches", epoch))

    def _foreign(self, dataset: str) -> list[str]:
        return foreign_types(dataset) if self.recipe.negatives else []

    def _fits(self, sentence: Sentence, types: Sequence[str], dataset: str) -> bool:
        # Character counts bound token counts well enough to skip most of the tokenising.
        if len(sentence.text) > 6 * self.recipe.max_length:
            return False
        return len(self.renderer(sentence, types, 0, self._foreign(dataset)).ids) <= self.recipe.max_length

    def train_dataloader(self) -> DataLoader:
        """One item = one batch of the plan."""
        sampler = ResumableSampler(len(self.plan), self.start)
        return DataLoader(
            self.plan,  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,
            collate_fn=lambda batch: collate(batch, self.pad_id),
        )

    def state_dict(self) -> dict[str, int]:
        """How many batches have been trained on."""
        return {"start": self.trainer.global_step if self.trainer else self.start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches already trained on."""
        self.start = state_dict["start"]
