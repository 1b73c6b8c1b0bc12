"""Decoding ahead: the answers of all targets, model by model, so that each model is merged and applied once.

A target's own module then finds its answers kept; the order of work changes, no answer does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from sam.console import console, say
from sam.engine import SINGLE, Engine
from sam.selection import sampling
from sam.targets import Target

if TYPE_CHECKING:
    from sam.module import SamModule

Progress = Callable[[str, int], Callable[[int], None]]
"""``progress(description, total)`` starts a bar and returns what advances it."""


PATIENCE = 30
"""Seconds."""


class Spent(NamedTuple):
    """What a model took on a target: its share of the seconds of merging and of generating, and which
    share of its completions were ``generated`` now (the others were kept from before, and took no time)."""

    merge: float
    generate: float
    generated: float


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars on the terminal; where stderr is not one, a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console().is_terminal:
        yield lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console()) as bar:

        def start(description: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(description, total=total)
            return lambda n: bar.advance(task, n)

        yield start


def lines(description: str, total: int) -> Callable[[int], None]:
    """Say how many are to be done, and every :data:`PATIENCE` seconds how many are."""
    done, said = 0, time.monotonic()
    say(f"{description}: {total} completions")

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= PATIENCE:
            said = time.monotonic()
            say(f"{description}: {done} of {total}")

    return advance


@contextmanager
def uncounted(engine: Engine) -> Iterator[None]:
    """Do not count as reused what a block takes from the store: it was decoded ahead for this very run."""
    before = engine.counts["reused"]
    yield
    engine.counts["reused"] = before


def sample(
    engine: Engine, targets: Sequence[Target], names: Sequence[str], size: int, seed: int, progress: Progress
) -> None:
    """What each expert answers on the sampled sentences of all targets."""
    asked = [
        (target.types_of_text(target.unlabelled[i]), target.unlabelled[i])
        for target in targets
        for i in sampling.draw(target.unlabelled, size, seed, target.name)
    ]
    step = progress("sampling evaluation", len(names) * len(asked))
    for name in names:
        engine.predict([name], SINGLE, asked, step)


def answer(engine: Engine, modules: Mapping[str, SamModule], progress: Progress) -> dict[str, dict[str, Spent]]:
    """What each task model answers on all sentences of all targets that selected it.

    ``modules``: target name -> its module, set up. Returns target -> model -> what its answers took.
    """
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, module in modules.items():
        for model, selection in module.selections.items():
            groups[engine.key(selection.experts, module.merge)].append((name, model))
    step = progress("extraction", sum(len(modules[name].target.sentences) for g in groups.values() for name, _ in g))
    took: dict[str, dict[str, Spent]] = {name: {} for name in modules}
    for group in groups.values():
        targets = [modules[n].target for n, _ in group]
        asked = [(target.types_of(s), s.text) for target in targets for s in target.sentences]
        first = modules[group[0][0]]
        before = {**engine.seconds}, engine.counts["generated"]
        engine.predict(first.selections[group[0][1]].experts, first.merge, asked, step)
        merge, generate = (engine.seconds[stage] - before[0].get(stage, 0.0) for stage in ("merge", "generate"))
        generated = (engine.counts["generated"] - before[1]) / len(set(asked))
        for name, model in group:
            share = len(modules[name].target.sentences) / len(asked)
            took[name][model] = Spent(round(merge * share, 2), round(generate * share, 2), round(generated, 4))
    return took
