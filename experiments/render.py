"""A table of scores as Markdown, CSV and LaTeX text."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experiments.collect import GROUP_LEAVES

Key = tuple[str, ...]
"""The printed values of a row's or column's axes."""

DAGGER_NOTE = "selected with gold labels"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "…": r"\dots{}",
    "†": r"$^\dagger$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Cell:
    """The numbers of one cell, one a seed; without any, ``state`` says why: failed, running or absent."""

    values: tuple[float, ...] = ()
    state: str = "absent"
    uses_labels: bool = False

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (ddof = 1) over seeds, None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Table:
    """Cells by (row, column), with what is printed around them; ``better`` is ``max``, ``min`` or None."""

    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    rows: list[Key]
    columns: list[Key]
    cells: dict[tuple[Key, Key], Cell]
    caption: str
    failures: tuple[str, ...] = ()
    better: str | None = "max"
    target: str | None = None

    def cell(self, row: Key, column: Key) -> Cell:
        """The cell at ``row`` and ``column``, an absent one where no job falls."""
        return self.cells.get((row, column), Cell())

    @property
    def most_seeds(self) -> int:
        """The number of values in the fullest cell."""
        return max((len(cell.values) for cell in self.cells.values()), default=0)

    @property
    def uses_labels(self) -> bool:
        """Whether any cell used gold labels to select experts."""
        return any(cell.uses_labels for cell in self.cells.values())

    def best_columns(self, row: Key) -> set[Key]:
        """The columns of the best cells of ``row`` as printed, ties all; none where there is nothing to compare.

        Cells that used gold labels are bounds, not rivals: they compete only in a row of their own kind.
        """
        filled = {column: self.cell(row, column) for column in self.columns if self.cell(row, column).values}
        rivals = {column: cell for column, cell in filled.items() if not cell.uses_labels} or filled
        if self.better is None or len(rivals) < 2:
            return set()
        best = (max if self.better == "max" else min)(round(cell.mean, 1) for cell in rivals.values())
        return {column for column, cell in rivals.items() if round(cell.mean, 1) == best}


def markdown(table: Table, best: bool = True) -> str:
    """Caption, table and notes; the best cells of a row in bold."""
    body = _body(table, best, lambda text: f"**{text}**")
    head, *rows = [[text.replace("|", "\\|") for text in row] for row in body]
    rule = ["---"] * len(table.row_names) + ["---:"] * len(table.columns)
    notes = [f"† {DAGGER_NOTE}"] if table.uses_labels else []
    notes += [f"- failed: {failure}" for failure in table.failures]
    lines = [table.caption, "", *(f"| {' | '.join(row)} |" for row in [head, rule, *rows])]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def latex(table: Table, best: bool = True) -> str:
    """A ``table`` float with booktabs rules; failed jobs are comments."""
    # Bold is put on after escaping, by marks that no label holds.
    body = _body(table, best, lambda text: f"\x00{text}\x01")
    head, *rows = [" & ".join(map(escape, row)) + r" \\" for row in body]
    note = [r"\par\smallskip{\footnotesize $^\dagger$ " + DAGGER_NOTE + "}"] if table.uses_labels else []
    lines = [
        "% needs \\usepackage{booktabs}",
        *(f"% failed: {failure}" for failure in table.failures),
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.row_names)}{'r' * len(table.columns)}}}",
        *(r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
        *(r"\end{tabular}", *note, r"\end{table}"),
    ]
    return "\n".join(lines).replace("\x00", r"\textbf{").replace("\x01", "}") + "\n"


def csv_text(tables: Sequence[Table]) -> str:
    """Numbers to four decimals, or the words of unfinished cells; a leading ``for_target`` column for tables by target.

    Where any cell has several seeds, each column has ``std`` and ``n`` columns beside it; where gold labels were used,
    a last column names the columns of the row that used them.
    """
    several = any(table.most_seeds > 1 for table in tables)
    daggers = any(table.uses_labels for table in tables)
    # One header for all: a column that only some targets have is absent in the others.
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    first = tables[0]
    titles = [_column_title(first.column_names, column) for column in columns]
    head = [*(["for_target"] if first.target else []), *first.row_names]
    head += [f"{title}{part}" for title in titles for part in (("", " std", " n") if several else ("",))]
    lines = [[*head, *([DAGGER_NOTE] if daggers else [])]]
    for table in tables:
        for row in table.rows:
            line = [*([table.target] if table.target else []), *row]
            for column in columns:
                cell = table.cell(row, column)
                spread = ["" if cell.std is None else f"{cell.std:.4f}", str(len(cell.values))]
                line += [f"{cell.mean:.4f}" if cell.values else _word(cell), *(spread if several else [])]
            used = [title for title, c in zip(titles, columns, strict=True) if table.cell(row, c).uses_labels]
            lines.append([*line, *(["; ".join(used)] if daggers else [])])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def files(tables: Sequence[Table], best: bool = True) -> dict[str, tuple[str, str]]:
    """Format -> (file name, text), the format of each file that tables are written to."""
    return {
        "markdown": ("table.md", "\n".join(markdown(table, best) for table in tables)),
        "csv": ("table.csv", csv_text(tables)),
        "latex": ("table.tex", "\n".join(latex(table, best) for table in tables)),
    }


def records_csv(records: Sequence[Mapping[str, object]]) -> str:
    """Records of the same keys as CSV, a line each."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def escape(text: str) -> str:
    """``text`` with LaTeX's special characters made literal."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def short_name(path: str) -> str:
    """A config path as headings show it: ``merge.name`` is ``merge``."""
    head, _, leaf = path.rpartition(".")
    return head if head and leaf in GROUP_LEAVES else path


def _body(table: Table, best: bool, bold: Callable[[str], str]) -> list[list[str]]:
    """Heading and rows as text."""
    head = [*map(short_name, table.row_names), *(_column_title(table.column_names, c) for c in table.columns)]
    lines = [head]
    for row in table.rows:
        winners = table.best_columns(row) if best else set()
        texts = {column: _cell_text(table.cell(row, column), table.most_seeds) for column in table.columns}
        lines.append([*row, *(bold(text) if column in winners else text for column, text in texts.items())])
    return lines


def _cell_text(cell: Cell, most_seeds: int) -> str:
    if not cell.values:
        return _word(cell)
    spread = "" if cell.std is None else f" ± {cell.std:.1f}"
    fewer = f" (n={len(cell.values)})" if len(cell.values) < most_seeds else ""
    return f"{cell.mean:.1f}{spread}{fewer}{'†' if cell.uses_labels else ''}"


def _word(cell: Cell) -> str:
    return {"failed": "failed", "running": "…"}.get(cell.state, "–")


def _column_title(names: Sequence[str], key: Key) -> str:
    """``k=3`` for numbers, the bare word otherwise."""
    pairs = zip(names, key, strict=True)
    return ", ".join(f"{short_name(name)}={value}" if _is_bare(value) else value for name, value in pairs)


def _is_bare(value: str) -> bool:
    """Whether ``value`` means nothing without its name: a number, or none, true, false."""
    try:
        float(value)
    except ValueError:
        return value in ("none", "true", "false")
    return True


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table without a last newline: the first ``left`` columns left-aligned, the others right-aligned."""
    lines = [head, [*["---"] * left, *["---:"] * (len(head) - left)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
