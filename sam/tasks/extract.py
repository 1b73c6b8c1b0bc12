"""The task ``run``: select, merge, extract and score on the targets of a config."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam import prompts
from sam.base import BaseSpec, device_of
from sam.combine import check_rule
from sam.console import console, say
from sam.encoder import Encoder, EncoderSpec
from sam.errors import SamError
from sam.experts.card import Pool
from sam.generation import CompletionCache, DecodeSpec, build
from sam.merging import MERGE_VERSION, AdapterDeltas, MergeSpec
from sam.merging.checks import check_seed
from sam.options import options
from sam.paths import cache_dir
from sam.results import (
    PREDICTIONS,
    RESULT,
    SCHEMA,
    SCORES_VERSION,
    config_hash,
    forget_peak_memory,
    git_commit,
    read_done,
    versions,
    write_json,
    write_lines,
    write_status,
)
from sam.selection.select import SELECTORS, check
from sam.targets import Target, load_targets
from sam.tasks.report import metrics, prediction_rows, section, sections, show
from sam.tracking import tracked

if TYPE_CHECKING:
    from sam.engine import Engine
    from sam.generation import Generator
    from sam.module import SamModule

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """A checked config: everything that a run needs, nothing large loaded yet."""

    base: BaseSpec
    encoder: EncoderSpec
    pool: Pool
    names: list[str]
    experts: list[str]
    merge: MergeSpec
    decode: DecodeSpec
    generator: Generator
    targets: list[Target]
    hashes: dict[str, str]
    selector: str
    k: int
    sample_size: int
    seed: int
    rule: str


def plan(config: Mapping[str, Any]) -> Plan:
    """Check all of ``config`` before any model is loaded; raises SamError with the first thing that is wrong."""
    merge = options(MergeSpec, config["merge"], "merge")
    merge.validate()
    check_seed(config["seed"], "seed")
    decode = DecodeSpec.from_config(config["decode"])
    check_rule(config["combine"]["rule"])
    if config["completions"] not in ("reuse", "fresh"):
        raise SamError(f"completions={config['completions']} is unknown; allowed: reuse, fresh")
    pool = Pool(config["experts"]["path"])
    selector, experts = config["selector"]["name"], listed(config["selector"]["experts"])
    only, exclude = listed(config["experts"]["only"]), listed(config["experts"]["exclude"])
    names = [] if selector == "none" else pool_names(pool, only, exclude)  # the base alone runs beside any pool
    check(selector, config["k"], config["sample_size"], names, pool, experts)
    if merge.weights is not None:
        if selector == "all_each":
            raise SamError("merge.weights fits no selector=all_each, whose models differ in size; choose selector=all")
        if selector == "none":
            raise SamError("merge.weights fits no selector=none, which merges nothing; remove one of the two")
        chosen = {"named": len(experts), "all": len(names), "each": 1}.get(selector, config["k"])
        if len(merge.weights) != chosen:
            raise SamError(f"merge.weights has {len(merge.weights)} values for {chosen} experts; give one an expert")
    targets = load_targets(config["target"], config["limit"], config["limit_seed"])
    if SELECTORS[selector].uses_gold and not all(t.scored for t in targets):
        raise SamError(f"selector={selector} ranks by gold labels, and the target has none; choose another selector")
    base, encoder = BaseSpec.from_config(config["base"]), EncoderSpec.from_config(config["encoder"])
    from sam.base import identity

    used = sorted({*names, *experts})
    pool.check(identity(base), prompts.PROMPT_VERSION, used)
    hashes = {name: AdapterDeltas.open(pool.folder(name)).content_hash for name in used}
    return Plan(
        base=base,
        encoder=encoder,
        pool=pool,
        names=names,
        experts=experts,
        merge=merge,
        decode=decode,
        generator=build(config["generator"], base, device_of(config["trainer"]["accelerator"]), decode.max_new_tokens),
        targets=targets,
        hashes=hashes,
        selector=selector,
        k=config["k"],
        sample_size=config["sample_size"],
        seed=config["seed"],
        rule=config["combine"]["rule"],
    )


def module_of(planned: Plan, target: Target, engine: Engine, encoder: Encoder) -> SamModule:
    """What runs ``target`` as planned."""
    from sam.module import SamModule

    return SamModule(
        engine,
        encoder,
        target,
        selector=planned.selector,
        k=planned.k,
        sample_size=planned.sample_size,
        merge=planned.merge,
        rule=planned.rule,
        seed=planned.seed,
        names=planned.names,
        experts=planned.experts,
    )


def listed(names: str | Sequence[str] | None) -> list[str]:
    """A list of names from a config, where one name may stand bare."""
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


def extract(config: Mapping[str, Any], folder: Path, overrides: Sequence[str], group: str | None) -> float:
    """Run the config into ``folder``; a folder that holds its result already is left as it is. Returns mean F1."""
    begin = time.perf_counter()
    planned = plan(config)
    science = {**config, "generator": planned.generator.key(), "decode": vars(planned.decode)}
    digest = config_hash(science, **facts(planned))
    done = read_done(folder, digest)
    if done is not None:
        say(f"already done: {folder / RESULT}")
        return float(done["overall"]["f1"] if done["overall"] else "nan")
    # An older result of another config must not pass for this one's while it runs, or if it is killed.
    write_status(folder, "running", overrides)
    with tracked(config, folder, group, name=" ".join(overrides) or "run") as run:
        (folder / RESULT).unlink(missing_ok=True)
        result, rows = run_targets(config, planned)
        result = {**head(config, digest, overrides, planned), **result}
        result["seconds"]["total"] = round(time.perf_counter() - begin, 2)
        if run is not None:
            run.log(metrics(result))
        write_lines(folder / PREDICTIONS, rows)
        write_json(folder / RESULT, result)
    show(result, folder)
    return float(result["overall"]["f1"] if result["overall"] else "nan")


def facts(planned: Plan) -> dict[str, Any]:
    """What a result stands on beside its config: the experts' and the targets' content, the encoder if the selector
    uses it, and versions."""
    from sam.base import folder, identity, settings_hash

    experts = {n: [h, planned.pool.cards[n].encoder, planned.pool.cards[n].centroid] for n, h in planned.hashes.items()}
    data = repr([(t.name, t.types, t.sentences, t.unlabelled, t.own_types) for t in planned.targets])
    return {
        "schema": SCHEMA,
        "prompt": prompts.PROMPT_VERSION,
        "scores": SCORES_VERSION,
        "encoder": planned.encoder.identity if SELECTORS[planned.selector].uses_encoder else None,
        "base": [identity(planned.base), settings_hash(folder(planned.base))],
        "merging": MERGE_VERSION,
        "experts": experts,
        "targets": hashlib.sha256(data.encode()).hexdigest(),
        "versions": versions(),
    }


_HELD: dict[str, tuple[Any, Any]] = {}


def _held(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """What an earlier job of this process made for the same ``key``, else a new one: a sweep loads its models once."""
    if kind not in _HELD or _HELD[kind][0] != key:
        _, former = _HELD.pop(kind, (None, None))
        if hasattr(former, "close"):
            former.close()  # before the next one takes its memory
        _HELD[kind] = (key, make())
    return _HELD[kind][1]


def engine_facts(planned: Plan) -> tuple[Any, ...]:
    """All that an engine holds: the base model's content and the experts'."""
    from sam.base import folder, identity, settings_hash

    return (
        planned.base,
        identity(planned.base),
        settings_hash(folder(planned.base)),
        tuple(sorted(planned.hashes.items())),
    )


def run_targets(config: Mapping[str, Any], planned: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every target in turn: the result's sections, and the lines of ``predictions.jsonl``."""
    from sam.engine import Engine

    forget_peak_memory()
    with console().status("Loading libraries"):
        import lightning as L

        from sam.tasks import ahead

    cache = CompletionCache(cache_dir() / "completions" if config["completions"] == "reuse" else None)
    engine: Engine = _held(
        "engine",
        (engine_facts(planned), planned.pool.path, planned.decode, str(planned.generator.key())),
        lambda: Engine(planned.base, planned.pool, planned.generator, cache, planned.decode.constrained),
    )
    engine.begin(planned.pool, cache)
    encoder: Encoder = _held("encoder", planned.encoder, lambda: Encoder(planned.encoder))
    trainer = L.Trainer(
        accelerator=config["trainer"]["accelerator"],
        devices=config["trainer"]["devices"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    modules = {target.name: module_of(planned, target, engine, encoder) for target in planned.targets}
    try:
        with ahead.bars() as progress:
            if SELECTORS[planned.selector].uses_sample:
                with engine.timed("select"):
                    ahead.sample(engine, planned.targets, planned.names, planned.sample_size, planned.seed, progress)
            with ahead.uncounted(engine):
                for module in modules.values():
                    module.setup("predict")
            took = ahead.answer(engine, modules, progress)
        with ahead.uncounted(engine):
            for module in modules.values():
                trainer.predict(module, return_predictions=False)
        targets = {name: section(module, took[name]) for name, module in modules.items()}
        rows = [row for module in modules.values() for row in prediction_rows(module)]
    except BaseException:
        _HELD.clear()  # what failed for want of memory must not want it for the rest of a sweep
        engine.close()
        raise
    finally:
        cache.close()
    return sections(targets, engine), rows


def head(config: Mapping[str, Any], digest: str, overrides: Sequence[str], planned: Plan) -> dict[str, Any]:
    """The result's provenance."""
    from sam.base import identity

    return {
        "schema": SCHEMA,
        "config": json.loads(json.dumps(config, default=str)),
        "config_hash": digest,
        "overrides": list(overrides),
        "git_commit": git_commit(),
        "versions": versions(),
        "base": {"name": planned.base.name, "fingerprint": identity(planned.base)},
        "generator": planned.generator.key(),
        "experts": planned.hashes,
    }
