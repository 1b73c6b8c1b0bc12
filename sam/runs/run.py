"""The task ``run``: a config run into a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam.console import console, say
from sam.models.device import threads
from sam.models.identity import Identity
from sam.paths import cache_dir
from sam.results import (
    PREDICTIONS,
    RESULT,
    SCHEMA,
    forget_peak_memory,
    git_commit,
    read_done,
    versions,
    write_json,
    write_lines,
    write_status,
)
from sam.runs.plan import Plan, content, content_hash, identified, plan
from sam.runs.report import metrics, prediction_rows, section, sections, show
from sam.tracking import tracked

if TYPE_CHECKING:
    from sam.engine import Engine
    from sam.models.encoder import Encoder, EncoderSpec

TRAINING = ("train", "domain")
"""Sections of the config that no run reads."""


class Models:
    """The engine and the encoder that jobs of one process share, for as long as they ask for the same."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._of: object = None
        self._encoder: Encoder | None = None

    def engine(self, planned: Plan, base: Identity, fresh: bool) -> Engine:
        """An engine for ``planned``: that of the last job if base, generator and decoding are the same."""
        from sam.engine import Engine
        from sam.generation import CompletionCache

        of = (base, planned.base, planned.decode, planned.settings, planned.generator.key())
        cache = CompletionCache(None if fresh else cache_dir() / "completions")
        if self._engine is None or self._of != of:
            self.close()  # before the next one takes its memory
            self._engine = Engine(
                planned.pool, planned.generator, cache, base, planned.task, planned.decode.constrained
            )
            self._of = of
        self._engine.begin(planned.pool, cache)
        return self._engine

    def encoder(self, spec: EncoderSpec) -> Encoder:
        """The sentence encoder of ``spec``."""
        from sam.models.encoder import Encoder

        if self._encoder is None or self._encoder.spec != spec:
            self._encoder = Encoder(spec)
        return self._encoder

    def close(self) -> None:
        """Free the models' memory."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._encoder = None


def run(
    config: Mapping[str, Any],
    folder: Path,
    overrides: Sequence[str] = (),
    group: str | None = None,
    models: Models | None = None,
) -> float:
    """Run the config into ``folder``; a folder that holds its result already is left as it is. Returns mean F1.

    ``models``: what further jobs of this process share.
    """
    begin = time.perf_counter()
    planned = plan(config)
    base = identified(planned)
    own = {key: value for key, value in config.items() if key not in TRAINING}
    digest = content_hash(content(planned, base))
    done = read_done(folder, digest)
    if done is not None:
        say(f"already done: {folder / RESULT}")
        return float(done["overall"]["f1"] if done["overall"] else "nan")
    # An older result of another config must not pass for this one's while it runs, or if it is killed.
    write_status(folder, "running", overrides, config=own)
    with tracked(own, folder, group, name=" ".join(overrides) or "run") as tracker:
        (folder / RESULT).unlink(missing_ok=True)
        result, rows = run_targets(planned, base, models or Models(), config["completions"] == "fresh")
        result = {**provenance(own, digest, overrides, planned, base), **result}
        result["seconds"]["total"] = round(time.perf_counter() - begin, 2)
        if tracker is not None:
            tracker.log(metrics(result))
        write_lines(folder / PREDICTIONS, rows)
        write_json(folder / RESULT, result)
    show(result, folder)
    return float(result["overall"]["f1"] if result["overall"] else "nan")


def run_targets(
    planned: Plan, base: Identity, models: Models, fresh: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All targets: the result's sections, and the lines of ``predictions.jsonl``."""
    forget_peak_memory()
    with console().status("Loading libraries"):
        import torch

        from sam import pipeline
        from sam.runs.progress import bars

        torch.set_num_threads(threads())
        engine, encoder = models.engine(planned, base, fresh), models.encoder(planned.encoder)
    try:
        with bars() as progress:
            results = pipeline.run(planned.method, planned.targets, engine, encoder, progress)
        targets = {name: section(one, planned.method, engine) for name, one in results.items()}
        rows = [row for one in results.values() for row in prediction_rows(one, planned.task)]
        return sections(targets, engine), rows
    except BaseException:
        models.close()  # what failed for want of memory must not want it for the rest of a sweep
        raise
    finally:
        engine.cache.close()


def provenance(
    config: Mapping[str, Any], digest: str, overrides: Sequence[str], planned: Plan, base: Identity
) -> dict[str, Any]:
    """What a result is of."""
    return {
        "schema": SCHEMA,
        "config": json.loads(json.dumps(config, default=str)),
        "config_hash": digest,
        "overrides": list(overrides),
        "git_commit": git_commit(),
        "versions": versions(),
        "base": {"name": planned.base.name, "fingerprint": base.fingerprint},
        "generator": planned.generator.key(),
        "experts": planned.experts,
    }
