"""The terminal: one rich console for progress, tables and errors."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def console() -> Console:
    """The console on stderr (progress, status), so that stdout holds results only."""
    return Console(stderr=True)


def say(text: str) -> None:
    """Print ``text`` on stderr as it is, unwrapped."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; columns of numbers but the first right-aligned, long cells folded rather than cut."""
    from rich.table import Table
    from rich.text import Text

    # As Text: a list in brackets, as overrides hold, is no markup.
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        numeric = all(r[i].lstrip("-")[:1].isdigit() or r[i] in ("–", "") for r in rows)
        table.add_column(column, justify="right" if numeric and i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out = Console()
    # A pipe has no width of its own: wide enough that no number is cut.
    (out if out.is_terminal else Console(width=160)).print(table)
