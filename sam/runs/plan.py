"""A config checked and made plain: nothing is loaded, converted or downloaded but the target's sentences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sam.data.targets import Target, load_targets
from sam.errors import SamError
from sam.experts.card import Pool
from sam.extend import Configured
from sam.generation import DecodeSpec, Generator, build, check_constrained
from sam.merging import MERGE_VERSION, AdapterDeltas, Merge
from sam.models import sources
from sam.models.device import device_of
from sam.models.encoder import EncoderSpec
from sam.models.identity import Identity, fold_hash, identify
from sam.models.spec import BaseSpec
from sam.ner.task import NER
from sam.pipeline import Method
from sam.results import SCHEMA, SCORES_VERSION, versions
from sam.selection import Selector
from sam.task import Task


@dataclass(frozen=True)
class Plan:
    """A checked config: everything that a run needs. ``experts``: the hash of each one's weights that it may use;
    ``settings``: the generator's section of the config."""

    base: BaseSpec
    encoder: EncoderSpec
    pool: Pool
    method: Method
    decode: DecodeSpec
    generator: Generator
    targets: list[Target]
    experts: dict[str, str]
    settings: str
    task: Task

    @property
    def uses_encoder(self) -> bool:
        """Whether sentences are embedded."""
        return "encoder" in self.method.selector.uses or not self.method.selector.declared


def plan(config: Mapping[str, Any]) -> Plan:
    """Check all of ``config``; raises SamError with the first thing that is wrong."""
    merge = Merge.from_config(config["merge"])
    decode = DecodeSpec.from_config(config["decode"])
    if config["completions"] not in ("reuse", "fresh"):
        raise SamError(f"completions={config['completions']} is unknown; allowed: reuse, fresh")
    pool = Pool(config["experts"]["path"])
    selector = Selector.from_config(config["selector"])
    only, exclude = listed(config["experts"]["only"]), listed(config["experts"]["exclude"])
    names = pool_names(pool, only, exclude) if "names" in selector.uses else []
    method = Method(
        merge=merge,
        names=tuple(names),
        selector=selector,
        k=config["k"],
        sample_size=config["sample_size"],
        rule=Configured.read(config["combine"], "combine", 2, ["rule"]),
        seed=config["seed"],
    )
    method.check(pool)
    _check_weights(method)
    targets = load_targets(config["target"], config["limit"], config["limit_seed"])
    if "gold" in selector.uses and not all(t.scored for t in targets):
        raise SamError(
            f"selector={selector.name} ranks by gold labels, and the target has none; choose another selector"
        )
    base, encoder = BaseSpec.from_config(config["base"]), EncoderSpec.from_config(config["encoder"])
    sources.check(base)
    fold_hash(base)  # opens the warm start
    device = device_of(config["trainer"]["accelerator"])
    used = sorted({*names, *selector.experts})
    return Plan(
        base=base,
        encoder=encoder,
        pool=pool,
        method=method,
        decode=decode,
        generator=build(config["generator"], base, device, decode),
        targets=targets,
        experts={name: AdapterDeltas.open(pool.folder(name)).content_hash for name in used},
        settings=json.dumps(config["generator"], sort_keys=True),
        task=NER,
    )


def identified(planned: Plan) -> Identity:
    """What the base model is, once it is here (converted or downloaded first, which is announced).

    Raises SamError where experts were trained on another one, or on another prompt, or where the generator that
    ``auto`` chooses for it cannot run.
    """
    base = identify(planned.base)
    planned.pool.check(base.fingerprint, planned.task.version, sorted(planned.experts))
    if planned.decode.constrained:
        check_constrained(planned.generator)
    return base


def content(planned: Plan, base: Identity) -> dict[str, Any]:
    """All that a result depends on, by content: no path, and no setting that cannot change what is extracted."""
    data = repr([(t.name, t.types, t.sentences, t.unlabelled, t.own_types) for t in planned.targets])
    return {
        "schema": SCHEMA,
        "prompt": planned.task.version,
        "scores": SCORES_VERSION,
        "merging": MERGE_VERSION,
        "method": _method_content(planned.method),
        "decode": asdict(planned.decode),
        "generator": planned.generator.key(),
        "base": [base.fingerprint, base.settings, planned.base.dtype],
        "encoder": planned.encoder.identity if planned.uses_encoder else None,
        "experts": {name: [weights, *_centroid(planned, name)] for name, weights in planned.experts.items()},
        "targets": hashlib.sha256(data.encode()).hexdigest(),
        "versions": versions(),
    }


def _method_content(method: Method) -> dict[str, Any]:
    """What of the method can change a result: the options that its selector uses, and the merge where one is made."""
    options = ("names", "k", "sample_size", "seed")
    used = [option for option in options if option in method.selector.uses or not method.selector.declared]
    merges = method.largest is None or method.largest > 1
    return {
        "selector": method.selector.content(),
        "rule": method.rule.content(),
        "merge": [method.merge.content(), method.merge.weights] if merges else None,
        **{option: getattr(method, option) for option in used},
    }


def _centroid(planned: Plan, name: str) -> list[Any]:
    card = planned.pool.cards[name]
    return [card.encoder, card.centroid] if planned.uses_encoder else []


def content_hash(content: Mapping[str, Any]) -> str:
    """The hash of plain values."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def listed(names: str | Sequence[str] | None) -> list[str]:
    """A list of names from a config, where a single name needs no brackets."""
    return [names] if isinstance(names, str) else list(names or [])


def pool_names(pool: Pool, only: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The names to rank: the pool's experts, narrowed by ``only`` and ``exclude``."""
    for name in [*only, *exclude]:
        pool.folder(name)
        if (role := pool.cards[name].role) != "expert":
            raise SamError(
                f"{name!r} is not ranked (its role is {role}), which experts.only and experts.exclude are for; "
                f"selector=named 'selector.experts=[{name}]' asks it alone"
            )
    names = [n for n in pool.names if (not only or n in only) and n not in exclude]
    if not names:
        raise SamError(f"experts.only and experts.exclude leave no expert; the pool holds: {', '.join(pool.names)}")
    return names


def _check_weights(method: Method) -> None:
    """Of ``merge.weights`` there must be one for each expert of every task model, where their number is known."""
    size = method.largest
    if method.merge.weights is None or size is None:
        return
    if method.selector.name == "all_each":
        raise SamError("merge.weights fits no selector=all_each, whose models differ in size; choose selector=all")
    if method.selector.name == "none":
        raise SamError("merge.weights fits no selector=none, which merges nothing; remove one of the two")
    if len(method.merge.weights) != size:
        raise SamError(f"merge.weights has {len(method.merge.weights)} values for {size} experts; give one per expert")
