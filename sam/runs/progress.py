"""How far a run is, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sam.console import console, say
from sam.pipeline import Progress

PATIENCE = 30
"""Seconds between two lines where stderr is no terminal."""


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
    """Report how many are to be done, and every :data:`PATIENCE` seconds how many are."""
    done, last = 0, time.monotonic()
    say(f"{description}: {total} completions")

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last >= PATIENCE:
            last = time.monotonic()
            say(f"{description}: {done} of {total}")

    return advance
