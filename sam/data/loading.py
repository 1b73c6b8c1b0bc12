"""From a dataset's files to sentences with named entity types, counting all that is repaired or left out."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from sam.data.catalogue import DatasetSpec, spec
from sam.data.download import fetch_all
from sam.data.readers import Draft, Source
from sam.errors import SamError
from sam.types import Mention, Sentence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A split with what happened to it.

    counts: repairs and drops that occurred, by name. read_*: what was read before drops; ``read_labels`` counts
    mentions by the corpus's own label.
    """

    sentences: list[Sentence]
    counts: Mapping[str, int]
    read_sentences: int
    read_mentions: int
    read_labels: Mapping[str, int]


def load(dataset_id: str, split: str) -> list[Sentence]:
    """The sentences of a split, with their gold mentions; logs repairs and drops in one line.

    Ids are ``{dataset_id}/{split}/{index}``, index = position in the split before drops.
    Raises SamError for an unknown dataset or split, for files that cannot be had and for labels without a name.
    """
    return load_report(dataset_id, split).sentences


def load_report(dataset_id: str, split: str) -> Loaded:
    """As ``load``, with the counts."""
    dataset = spec(dataset_id)
    counts: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    sentences = []
    read = 0
    drop = _Dropper(dataset)
    for index, draft in enumerate(_drafts(dataset, split, counts)):
        read += 1
        labels.update(m.type for m in draft.mentions)
        if dataset.mark:
            draft = joined(draft, dataset.mark, counts)
        reason = drop.reason(draft)
        if reason:
            counts[reason] += 1
        else:
            mentions = draft.mentions if dataset.role == "open" else _named(dataset, draft.mentions)
            sentences.append(Sentence(f"{dataset_id}/{split}/{index}", draft.text, mentions, draft.types))
    # A mention or pair that could not be placed was read none the less.
    lost = counts["blank_mention_dropped"] + counts["pairs_without_occurrence"]
    counts = +counts
    if counts:
        log.info("%s/%s: %s", dataset_id, split, ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    return Loaded(sentences, dict(counts), read, labels.total() + lost, dict(labels))


def type_names(dataset_ids: Iterable[str]) -> frozenset[str]:
    """The names of all entity types of these datasets; of open types, those of the sentences to train on."""
    names: set[str] = set()
    for dataset in map(spec, dataset_ids):
        opened = load(dataset.id, "train") if dataset.role == "open" else []
        names.update(dataset.types, *(s.types or () for s in opened))
    return frozenset(names)


def joined(draft: Draft, mark: str, counts: Counter[str]) -> Draft:
    """``draft`` with each mention ``mark`` and the mention of its label after it as one, without the space between.

    ``counts["marks_joined"]`` grows by each.
    """
    mentions: list[Mention] = []
    cuts: list[int] = []
    for mention in draft.mentions:
        last = mentions[-1] if mentions and mentions[-1].type == mention.type else None
        if last and draft.text[last.start : last.end] == mark and last.end + 1 == mention.start:
            cuts.append(last.end)
            mentions[-1] = Mention(last.start, mention.end, mention.type)
        else:
            mentions.append(mention)
    if not cuts:
        return draft
    counts["marks_joined"] += len(cuts)
    text = "".join(char for place, char in enumerate(draft.text) if place not in cuts)

    def moved(place: int) -> int:
        return place - sum(cut < place for cut in cuts)

    return replace(draft, text=text, mentions=tuple(Mention(moved(m.start), moved(m.end), m.type) for m in mentions))


def _drafts(dataset: DatasetSpec, split: str, counts: Counter[str]) -> Iterator[Draft]:
    """The drafts of a split; repairs in documents of other parts are not counted."""
    chosen = dataset.split(split)
    source = Source(fetch_all(dataset, dataset.paths(split)), chosen.subset)
    if chosen.fold is None:
        yield from dataset.reader.read(source, counts)
        return
    own: Counter[str] = Counter()
    for draft in dataset.reader.read(source, own):
        if draft.document % 10 in chosen.fold:
            counts.update(own)
            yield draft
        own.clear()


class _Dropper:
    """Which drafts a dataset's config leaves out, and why."""

    def __init__(self, dataset: DatasetSpec) -> None:
        self._drop = dataset.drop
        self._texts = {name: re.compile(pattern) for name, pattern in dataset.drop.text.items()}
        pattern = dataset.drop.without_mentions
        self._bare = {p for p in dataset.files if pattern and PurePosixPath(p).match(pattern)}

    def reason(self, draft: Draft) -> str | None:
        """The name of the counter for ``draft``'s drop; None to keep it."""
        if not draft.text or draft.text.isspace():
            return "empty_sentences_dropped"
        if self._drop.unannotated and not draft.annotated:
            return "dropped_unannotated"
        if not draft.mentions and draft.path in self._bare:
            return "dropped_damaged"
        return next((name for name, pattern in self._texts.items() if pattern.fullmatch(draft.text)), None)


def _named(dataset: DatasetSpec, mentions: tuple[Mention, ...]) -> tuple[Mention, ...]:
    try:
        return tuple(Mention(m.start, m.end, dataset.labels[m.type]) for m in mentions)
    except KeyError as error:
        label = error.args[0]
        raise SamError(
            f"{dataset.id}: label '{label}' has no name; add '{label}: <name>' under labels: in "
            f"conf/dataset/{dataset.id}.yaml"
        ) from None
