"""Training data of an expert: sentences of a domain's datasets, cut into batches and rendered.

A batch is of one dataset and asks for the same types in all its sentences, so that the prompt's shared part is computed
once; in a batch of open-type sentences each is asked for its own types. Everything random is drawn by seed, epoch and
the names of datasets and sentences, so that the batches of a run are a function of its recipe alone and a resumed run
meets the same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Sampler

from sam import data as corpora
from sam.errors import SamError
from sam.experts.detokenise import detokenised
from sam.experts.packing import MOST, Batch, Example, collate
from sam.ner import prompts
from sam.options import options
from sam.seeding import rng
from sam.types import Sentence, entity_types

log = logging.getLogger(__name__)

DATA_VERSION = 4
"""Raise it with every change to which sentences are drawn for a recipe, or to how they are shown."""

OPEN = "open_types"
"""The dataset whose sentences each have entity types of their own."""

MEASURES = ("heldout", "heldout_open")
"""The parts of a recipe that do not change what is learnt."""

SCIENTIFIC = ("biomedical", "stem")
"""Domains of scientific text; all others are everyday text."""


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; ``sentences`` is the budget a domain, ``epochs`` the passes over them.

    ``label_drop`` is the chance that a type is left out of a prompt (its mentions too), ``negatives`` the most
    :func:`foreign_types` that a prompt asks for beside its own, ``max_types`` the most types in a prompt,
    ``max_empty`` the largest share of sentences without a mention, ``detokenise`` the chance that a sentence is shown
    with ordinary spacing (``C++ (a language).``) instead of its corpus's tokens, ``max_length`` the most tokens of a
    sentence and its answer (beside those of the prompt's types). ``open_sentences`` of the dataset :data:`OPEN` are
    mixed in (0: none), in batches of ``open_batch_size``; label drop, negatives, ``max_types`` and detokenising do not
    apply to them. ``heldout`` (per dataset) and ``heldout_open`` (per split) sentences are for scoring the finished
    expert.
    """

    sentences: int = 5000
    open_sentences: int = 0
    epochs: int = 1
    batch_size: int = 4
    open_batch_size: int = 1
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    r: int = 8
    alpha: int = 16
    label_drop: float = 0.15
    negatives: int = 4
    max_types: int = 16
    max_empty: float = 0.1
    detokenise: float = 0.3
    max_length: int = 320
    heldout: int = 100
    heldout_open: int = 400
    seed: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """From the plain mapping of ``conf/train``; refuses unknown keys, values of another type or out of range."""
        recipe = options(cls, config, "train")
        for name in ("sentences", "epochs", "batch_size", "open_batch_size", "r", "alpha", "max_types", "max_length"):
            if getattr(recipe, name) < 1:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be at least 1")
        for name in ("lr", "alpha"):
            if not getattr(recipe, name) > 0:
                raise SamError(f"train.{name}={getattr(recipe, name)} must be above 0")
        for name in ("weight_decay", "clip", "heldout", "heldout_open", "negatives", "open_sentences"):
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


class Renderer:
    """Sentences to batches with a tokenizer; prompt parts are tokenised apart, as the decoder does."""

    def __init__(self, tokenizer: Any, stop_id: int, recipe: Recipe) -> None:
        self.tokenizer, self.stop_id, self.recipe = tokenizer, stop_id, recipe

    def __call__(
        self, sentences: Sequence[Sentence], types: Sequence[str], epoch: int, foreign: Sequence[str] = ()
    ) -> Batch:
        """The batch of ``sentences`` with the types shuffled, some dropped, some of ``foreign`` added, all drawn by
        (seed, id of the first, epoch)."""
        draw = rng(self.recipe.seed, sentences[0].id, epoch)
        shuffled = draw.sample(list(types), len(types))
        kept = [t for t in shuffled if draw.random() >= self.recipe.label_drop][: self.recipe.max_types]
        asked = kept or shuffled[:1]
        added = draw.sample(list(foreign), min(draw.randint(0, self.recipe.negatives), len(foreign)))
        if added:
            asked = (asked + added)[: self.recipe.max_types]
            draw.shuffle(asked)
        shown = [detokenised(s) if draw.random() < self.recipe.detokenise else s for s in sentences]
        prefix = self._ids(prompts.prefix(asked), special=True)
        return Batch(tuple(prefix), tuple(self.example(s, asked) for s in shown))

    def open_batch(self, sentences: Sequence[Sentence], epoch: int) -> Batch:
        """Sentences that are each asked for their own types, shuffled by (seed, id, epoch): no part is shared."""
        examples = []
        for sentence in sentences:
            types = sentence.types or ()
            asked = rng(self.recipe.seed, sentence.id, epoch).sample(types, len(types))
            example = self.example(sentence, asked)
            prefix = self._ids(prompts.prefix(asked), special=True)
            examples.append(Example((*prefix, *example.ids), example.answer))
        return Batch((), tuple(examples))

    def example(self, sentence: Sentence, asked: Sequence[str]) -> Example:
        """The sentence and its answer to the types ``asked``."""
        answer = self._ids(prompts.answer(sentence, asked)) + [self.stop_id]
        return Example(tuple(self._ids(prompts.suffix(sentence.text)) + answer), len(answer))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)


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
    if len(picked) == share:
        return picked
    # The dataset has less than its share, of which so many might have been empty.
    most = int(recipe.max_empty * (len(picked) - empty) / (1 - recipe.max_empty))
    surplus = {s.id for s in [s for s in picked if not s.mentions][most:]}
    return [s for s in picked if s.id not in surplus]


def draw_open(recipe: Recipe, fits: Callable[[Sentence], bool]) -> list[Sentence]:
    """``recipe.open_sentences`` of the open-type sentences; with one seed, fewer are among more.

    Raises SamError if there are not so many that ``fits``.
    """
    if not recipe.open_sentences:
        return []
    sentences = corpora.load(OPEN, "train")
    order = rng(recipe.seed, "open").sample(sentences, len(sentences))
    drawn = list(islice(filter(fits, order), recipe.open_sentences))
    if len(drawn) < recipe.open_sentences:
        raise SamError(f"train.open_sentences={recipe.open_sentences}: {OPEN} has {len(drawn)} that fit; ask for fewer")
    return drawn


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
        self.sentences: list[Sentence] = []
        """Of the domains: those of the open types are in ``opened``."""
        self.opened: list[Sentence] = []
        self.types: list[str] = []
        self.plan: list[Batch] = []
        self.most_packed = MOST
        """Tokens that a row of several sentences may have (see :func:`sam.experts.packing.most_packed`)."""
        self.start = 0

    def setup(self, stage: str | None = None) -> None:
        """Draw and render; the same for the same recipe."""
        if self.plan:
            return
        drawn = [
            (name, *found)
            for datasets in self.domains
            for name, found in draw_sentences(datasets, "train", self.recipe, self._fits).items()
        ]
        self.sentences = [s for _, sentences, _ in drawn for s in sentences]
        if not self.sentences:
            names = ", ".join(d for datasets in self.domains for d in datasets)
            raise SamError(f"train.max_length={self.recipe.max_length} leaves no sentence of {names}; raise it")
        self.types = sorted({t for _, sentences, types in drawn if sentences for t in types})
        self.opened = draw_open(self.recipe, lambda s: self._fits(s, s.types or (), OPEN))
        for epoch in range(self.recipe.epochs):
            batches = [b for part in drawn for b in self._batches(*part, epoch)]
            batches += self._open_batches(epoch)
            rng(self.recipe.seed, "batches", epoch).shuffle(batches)
            self.plan += batches

    def _batches(self, dataset: str, sentences: Sequence[Sentence], types: Sequence[str], epoch: int) -> list[Batch]:
        size, foreign = self.recipe.batch_size, self._foreign(dataset)
        order = rng(self.recipe.seed, "order", dataset, epoch).sample(sentences, len(sentences))
        return [self.renderer(order[i : i + size], types, epoch, foreign) for i in range(0, len(order), size)]

    def _open_batches(self, epoch: int) -> list[Batch]:
        size = self.recipe.open_batch_size
        order = rng(self.recipe.seed, "order", OPEN, epoch).sample(self.opened, len(self.opened))
        return [self.renderer.open_batch(order[i : i + size], epoch) for i in range(0, len(order), size)]

    def _foreign(self, dataset: str) -> list[str]:
        return foreign_types(dataset) if self.recipe.negatives else []

    def _fits(self, sentence: Sentence, types: Sequence[str], dataset: str) -> bool:
        # Character counts bound token counts well enough to skip most of the tokenising.
        if len(sentence.text) > 6 * self.recipe.max_length:
            return False
        return len(self.renderer.example(sentence, types).ids) <= self.recipe.max_length

    def train_dataloader(self) -> DataLoader:
        """One item = one batch of the plan."""
        sampler = ResumableSampler(len(self.plan), self.start)
        return DataLoader(
            self.plan,  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,
            collate_fn=lambda batch: collate(batch, self.most_packed),  # type: ignore[arg-type]
        )

    def state_dict(self) -> dict[str, int]:
        """How many batches have been trained on."""
        return {"start": self.trainer.global_step if self.trainer else self.start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches already trained on."""
        self.start = state_dict["start"]
