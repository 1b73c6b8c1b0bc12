"""Targets: the sentences and entity types of a new domain, and its unlabelled sentences for selection."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sam.data.files import read_file
from sam.data.loading import load
from sam.errors import SamError
from sam.ner.prompts import normalised
from sam.seeding import rng
from sam.types import Sentence, entity_types

log = logging.getLogger(__name__)

MISC = "miscellaneous"
KINDS: dict[str, tuple[str, ...]] = {"mini": ("dataset",), "corpus": ("dataset", "split", "unlabelled"), "files": ()}
"""Of a target set, each with what it needs."""


@dataclass(frozen=True)
class Target:
    """What SaM is asked: ``sentences`` to extract ``types`` from, and ``unlabelled`` texts that selection may see.

    Sentences with gold mentions (of ``types`` only) are scored; their gold is never used to select, but by the oracle.
    ``own_types``: of unlabelled texts that are to be asked for types of their own.
    """

    name: str
    types: tuple[str, ...]
    sentences: tuple[Sentence, ...]
    unlabelled: tuple[str, ...]
    own_types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def types_of(self, sentence: Sentence) -> tuple[str, ...]:
        """The entity types that a sentence is asked for: its own, if it has some, else the target's."""
        return self.types if sentence.types is None else sentence.types

    def types_of_text(self, text: str) -> tuple[str, ...]:
        """As :meth:`types_of`, of a text that selection sees."""
        return self.own_types.get(text, self.types)

    @property
    def scored(self) -> tuple[Sentence, ...]:
        """The sentences that have gold."""
        return tuple(s for s in self.sentences if s.mentions is not None)


def load_targets(config: Mapping[str, Any], limit: int | None = None, limit_seed: int | None = None) -> list[Target]:
    """The targets of a ``target`` config, each of at most ``limit`` sentences: the first ones, or drawn by a seed.

    Raises SamError for a type that no target has, an empty target, or files that cannot be read.
    """
    if limit is not None and not (type(limit) is int and limit >= 1):
        raise SamError(f"limit={limit} must be at least 1 (or null for all sentences)")
    if limit_seed is not None and type(limit_seed) is not int:
        raise SamError(f"limit_seed={limit_seed} must be an integer (or null for the first sentences)")
    if limit_seed is not None and limit is None:
        raise SamError(f"limit_seed={limit_seed} draws the sentences of a limit; give limit=… too")
    if not config.get("sets"):
        raise SamError("target names no set; choose one or more: target=mini_movie, target=[crossner_ai,mit_movie]")
    if not isinstance(config["sets"], Mapping):
        raise SamError(f"target.sets={config['sets']} must be a mapping: +target.sets.NAME={{kind: …, dataset: …}}")
    for name, part in config["sets"].items():
        _check_set(name, part)
    if "files" not in {part["kind"] for part in config["sets"].values()} and (config["path"] or config["unlabelled"]):
        raise SamError("target.path and target.unlabelled are for target=files; choose it or remove them")
    raw = [_load(name, part, config) for name, part in config["sets"].items()]
    wanted = _wanted(config, sorted({t for target in raw for t in target.types}))
    return [_limited(_restrict(target, wanted, bool(config["keep_misc"])), limit, limit_seed) for target in raw]


def _limited(target: Target, limit: int | None, seed: int | None) -> Target:
    """At most ``limit`` of its sentences, in their order; their texts stay among the unlabelled, as all do."""
    sentences = target.sentences
    if limit is None or limit >= len(sentences):
        return target
    if seed is None:
        return replace(target, sentences=sentences[:limit])
    drawn = sorted(rng("limit", seed, target.name).sample(range(len(sentences)), limit))
    return replace(target, sentences=tuple(sentences[i] for i in drawn))


def _check_set(name: str, part: Any) -> None:
    """A target set is a mapping of a known kind, with what that kind needs."""
    if not isinstance(part, Mapping) or part.get("kind") not in tuple(KINDS):
        kind = part.get("kind") if isinstance(part, Mapping) else part
        raise SamError(f"target.sets.{name}.kind={kind} is unknown; allowed: {', '.join(KINDS)}")
    needed = KINDS[part["kind"]]
    if missing := [key for key in needed if not part.get(key)]:
        raise SamError(f"target.sets.{name}.{missing[0]} is missing; kind: {part['kind']} needs {', '.join(needed)}")


def _load(name: str, part: Mapping[str, Any], config: Mapping[str, Any]) -> Target:
    if part["kind"] == "mini":
        return mini(part["dataset"], name)
    if part["kind"] == "corpus":
        return _from_corpus(name, part)
    return _from_files(name, config)


def _from_corpus(name: str, part: Mapping[str, Any]) -> Target:
    sentences, others = (load(part["dataset"], part[split]) for split in ("split", "unlabelled"))
    left_out = {s.text for s in load(part["dataset"], part["without"])} if part.get("without") else set()
    kept = tuple(s for s in sentences if s.text not in left_out)
    own_types = {s.text: s.types for s in (*others, *sentences) if s.types is not None}
    return Target(name, tuple(entity_types(sentences)), kept, tuple(s.text for s in others), own_types)


def _from_files(name: str, config: Mapping[str, Any]) -> Target:
    if not config["path"]:
        raise SamError(
            "target=files needs a file: target.path=my.jsonl (JSONL, CoNLL columns, or one sentence per line)"
        )
    sentences = read_file(Path(config["path"]).expanduser())
    given = [config["types"]] if isinstance(config["types"], str) else config["types"]
    types = given or list(dict.fromkeys(t for s in sentences for t in s.types or ()))
    if not types or (not given and any(s.types is None for s in sentences)):
        raise SamError("target=files needs the entity types to ask for: target.types=[gene,disease]")
    repeated = sorted({t for t in types if types.count(t) > 1})
    if repeated:
        raise SamError(f"target.types names {repeated[0]!r} twice; name each type once")
    if odd := [t for t in types if not isinstance(t, str) or not t or normalised(t) != t]:
        raise SamError(
            f"target.types names {odd[0]!r}; a type must be text, without space at its ends or double space in it"
        )
    others = read_file(Path(config["unlabelled"]).expanduser()) if config["unlabelled"] else sentences
    annotated = entity_types(sentences)
    if annotated and not set(annotated) & set(types):
        raise SamError(f"target.types={list(types)}: the gold of {config['path']} has only {', '.join(annotated)}")
    if annotated and (absent := [t for t in types if t not in annotated]):
        unasked = [t for t in annotated if t not in types]
        log.warning(
            "%s: the gold has no mention of %s%s",
            config["path"],
            ", ".join(absent),
            f"; it has, not asked for and left out: {', '.join(unasked)}" if unasked else "",
        )
    own_types = {s.text: s.types for s in (*others, *sentences) if s.types is not None}
    return Target(name, tuple(types), tuple(sentences), tuple(s.text for s in others), own_types)


def mini(dataset: str, name: str | None = None) -> Target:
    """One of the embedded mini targets: ai, literature, music, politics, science, movie, restaurant."""
    folder = Path(__file__).parent / "mini"
    known = sorted(p.stem for p in folder.glob("*.jsonl"))
    if dataset not in known:
        raise SamError(f"mini target {dataset!r} is unknown; allowed: {', '.join(known)}")
    sentences = read_file(folder / f"{dataset}.jsonl")
    unlabelled = [s.text for s in read_file(folder / f"{dataset}.unlabelled.txt")]
    return Target(name or f"mini_{dataset}", tuple(entity_types(sentences)), tuple(sentences), tuple(unlabelled))


def _wanted(config: Mapping[str, Any], known: Sequence[str]) -> set[str] | None:
    types = config["types"]
    if not types:
        return None
    for entity_type in [types] if isinstance(types, str) else types:
        if entity_type not in known:
            near = difflib.get_close_matches(str(entity_type), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SamError(f"target.types: {entity_type!r} is unknown; the target has: {', '.join(known)}{hint}")
    return {types} if isinstance(types, str) else set(types)


def _restrict(target: Target, wanted: set[str] | None, keep_misc: bool) -> Target:
    types = [t for t in target.types if (wanted is None and (keep_misc or t != MISC)) or (wanted and t in wanted)]
    if not types:
        raise SamError(f"target {target.name} has none of the types asked for; it has: {', '.join(target.types)}")
    if not target.sentences:
        raise SamError(f"target {target.name} has no sentences; give at least one")
    asked = set(types)
    sentences = tuple(_of_types(s, asked) for s in target.sentences if s.types is None or asked & set(s.types))
    own_types = {text: tuple(t for t in own if t in asked) for text, own in target.own_types.items()}
    unlabelled = tuple(text for text in target.unlabelled if own_types.get(text) != ())
    if not sentences:
        raise SamError(f"target {target.name} has no sentence that is annotated with {', '.join(types)}")
    return replace(target, types=tuple(types), sentences=sentences, unlabelled=unlabelled, own_types=own_types)


def _of_types(sentence: Sentence, asked: set[str]) -> Sentence:
    """``sentence`` with the mentions and the own types that are ``asked``."""
    mentions, types = sentence.mentions, sentence.types
    return replace(
        sentence,
        mentions=None if mentions is None else tuple(m for m in mentions if m.type in asked),
        types=None if types is None else tuple(t for t in types if t in asked),
    )
