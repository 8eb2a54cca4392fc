"""summaries -> rows of cells that people read, and tables of them for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table as Terminal

from softdice.scoring.output import class_rows, comparison_rows, overall_row
from softdice.scoring.summary import Comparison, Summary, Table

CLASSES = {
    "cases": "cases", "dice": "Dice", "dice_95": "95 % interval", "pooled_dice": "pooled Dice", "iou": "IoU",
    "pooled_iou": "pooled IoU",
}  # fmt: skip
COMPARISON = {
    "cases": "pairs", "difference": "difference", "difference_95": "95 % interval", "p_wilcoxon": "Wilcoxon p",
}  # fmt: skip
"""Keys of the rows of `softdice.scoring.output` -> headings."""

FORMS = {"difference": "+.4f", "difference_95": "+.4f", "p_wilcoxon": ".3g"}


class Grid(NamedTuple):
    """Headings, a row of cells per class, and one over all classes."""

    columns: list[str]
    rows: list[list[str]]
    total: list[str]


def class_grid(table: Table, summary: Summary) -> Grid:
    """Mean over cases with its interval, pooled, IoU, and how many cases they rest on."""
    overall = {"cases": len(table.cases), **overall_row(summary)}
    return _grid(CLASSES, table, table.keys, class_rows(table, summary), overall)


def comparison_grid(table: Table, comparison: Comparison) -> Grid:
    """Paired difference of Dice with its interval and Wilcoxon's p."""
    overall = comparison_rows(comparison, table)
    return _grid(COMPARISON, table, comparison.keys, overall.pop("classes"), overall)


def _grid(
    headings: dict[str, str],
    table: Table,
    keys: Sequence[int | str],
    rows: list[dict[str, Any]],
    overall: dict[str, Any],
) -> Grid:
    overall = {key.removeprefix("macro_"): value for key, value in overall.items()}

    def cells(label: str, row: dict[str, Any]) -> list[str]:
        return [label, *(text(row[key], FORMS.get(key, ".4f")) if key in row else "" for key in headings)]

    named = [cells(table.label(key), row) for key, row in zip(keys, rows, strict=True)]
    return Grid(["class", *headings.values()], named, cells("all classes", overall))


def text(value: Any, form: str = ".4f") -> str:
    """A number or the two bounds of an interval, a dash for what is undefined."""
    if isinstance(value, int):
        return str(value)
    low, high = value if isinstance(value, list) else (value, value)
    if low is None or math.isnan(low):
        return "-"
    return f"{low:{form}} .. {high:{form}}" if isinstance(value, list) else format(float(low), form)


def terminal(title: str, grid: Grid) -> Terminal:
    """Grid -> table."""
    shown = Terminal(title=title, title_justify="left", title_style="bold")
    for column, heading in enumerate(grid.columns):
        shown.add_column(heading, justify="right" if column else "left")
    for row in grid.rows:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*grid.total)
    return shown
