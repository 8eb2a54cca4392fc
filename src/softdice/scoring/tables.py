"""summaries -> rows of cells that people read, and tables of them for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from rich.table import Table as Terminal
from rich.text import Text

from softdice.scoring.classes import METRICS
from softdice.scoring.output import class_rows, comparison_rows, difference_row, overall_row
from softdice.scoring.summary import Comparison, Summary, Table, mean_ranks
from softdice.scoring.writing import shown

CLASSES = {
    "cases": "cases", "dice": "Dice", "dice_95": "95 % interval", "dice_sd": "SD", "dice_median": "median",
    "dice_quartiles": "quartiles", "pooled_dice": "pooled Dice", "iou": "IoU", "pooled_iou": "pooled IoU",
    "precision": "precision", "recall": "recall", "specificity": "specificity", "ml_pred": "predicted ml",
    "ml_ref": "reference ml", "volume_difference": "volume difference", "hd95": "HD95",
    "mean_distance": "mean distance", "surface_dice": "surface Dice", "lesion_dice": "lesion Dice", "pq": "PQ",
    "sq": "SQ", "rq": "RQ (F1)", "centreline_dice": "centre-line Dice", "in_empty": "in empty",
}  # fmt: skip
COMPARISON = {
    "cases": "pairs", "cases_alone": "one only", "difference": "difference", "difference_95": "95 % interval",
    "p_wilcoxon": "Wilcoxon p", "p_holm": "Holm p",
}  # fmt: skip
"""Keys of the rows of `softdice.scoring.output` -> headings."""

FORMS = {
    "ml_pred": ".2f",
    "ml_ref": ".2f",
    "hd95": ".2f",
    "mean_distance": ".2f",
    "volume_difference": "+.4f",
    "difference": "+.4f",
    "difference_95": "+.4f",
    "p_wilcoxon": ".3g",
    "p_holm": ".3g",
    "cases_alone": "d",
}


class Grid(NamedTuple):
    """Headings, a row of cells per class, and one over all classes."""

    columns: list[str]
    rows: list[list[str]]
    total: list[str]


def class_grid(table: Table, summary: Summary) -> Grid:
    """Mean over cases with its interval, pooled, IoU, and how many cases they rest on."""
    overall = {"cases": len(table.cases), **overall_row(summary)}
    rows = class_rows(table, summary)
    for row in rows if summary.empty[1].any() else ():
        row["in_empty"] = f"{row['predicted_in_empty']} of {row['empty_references']}"
    left_out = {"dice_sd", "dice_median", "dice_quartiles"} if len(table.cases) < 2 else set()
    left_out |= {*chain(*METRICS.values())} - {*summary.asked} | ({"in_empty"} if not summary.empty[1].any() else set())
    headings = {key: heading for key, heading in CLASSES.items() if key not in left_out}
    return _grid(headings, table, table.keys, rows, overall)


def comparison_grid(table: Table, comparison: Comparison) -> Grid:
    """Paired difference of Dice with its interval, Wilcoxon's p, and how many cases have no score to compare with."""
    overall = comparison_rows(comparison, table)
    return _grid(COMPARISON, table, comparison.keys, overall.pop("classes"), overall)


def shapes_grid(table: Table, comparison: Comparison) -> Grid:
    """The same of what was measured of shapes: the mean difference of each, and Holm's p. No columns without any."""
    overall = comparison_rows(comparison, table)
    headings: dict[str, str] = {}
    for name in comparison.shapes:
        headings |= {f"{name}_difference": CLASSES[name], f"{name}_p_holm": f"{CLASSES[name]} p"}
    return _grid(headings, table, comparison.keys, overall.pop("classes"), overall)


def _grid(
    headings: dict[str, str],
    table: Table,
    keys: Sequence[int | str],
    rows: list[dict[str, Any]],
    overall: dict[str, Any],
) -> Grid:
    overall = {key.removeprefix("macro_"): value for key, value in overall.items()}

    def cells(label: str, row: dict[str, Any]) -> list[str]:
        return [label, *(text(row[key], _form(key)) if key in row else "" for key in headings)]

    named = [cells(table.label(key), row) for key, row in zip(keys, rows, strict=True)]
    return Grid(["class", *headings.values()], named, cells("all classes", overall))


def _form(key: str) -> str:
    if key.endswith("_p_holm"):
        return FORMS["p_holm"]
    own, difference = key.removesuffix("_difference"), key.endswith("_difference") and key != "volume_difference"
    return f"+{FORMS.get(own, '.4f')}" if difference else FORMS.get(key, ".4f")


def text(value: Any, form: str = ".4f") -> str:
    """A number or the two bounds of an interval, a dash for what is undefined."""
    if isinstance(value, (int, str)):
        return str(value)
    low, high = value if isinstance(value, list) else (value, value)
    if low is None or math.isnan(low):
        return "-"
    if form == "d":  # how many of the first, how many of the second
        return f"{low} + {high}" if low or high else "-"
    return f"{low:{form}} .. {high:{form}}" if isinstance(value, list) else format(float(low), form)


def alone_line(comparison: Comparison) -> str:
    """Scores without a partner, in words; an empty text where there are none."""
    first, second = comparison.alone.sum(1).tolist()
    if not first + second:
        return ""
    why = "where one prediction and the reference lack a class, that one has no score"
    return f"Not compared: {first} scores of the first and {second} of the second, which are in their means: {why}."


def rank_line(tables: dict[str, Table]) -> str:
    """Sets of predictions by their mean rank, best first; an empty text for fewer than three."""
    if len(tables) < 3:
        return ""
    ranks, number = mean_ranks(list(tables.values()))
    ranked = sorted(zip(ranks.tolist(), tables, strict=True))
    return (
        f"Mean rank (1 is best, of {number} scores): {', '.join(f'{shown(name)} {rank:.2f}' for rank, name in ranked)}."
    )


def different_lines(table: Table, comparison: Comparison, most: int = 5) -> list[str]:
    """The cases that differ most, a line each."""
    lines = []
    for i in comparison.most_different(most):
        row = difference_row(comparison, i, table)
        in_class = f"{table.label(row['label'])} {text(row['class_difference'], '+.4f')}"
        lines.append(f"{shown(row['case'])}: {text(row['difference'], '+.4f')}, most in {in_class}")
    return lines


DROPPED: tuple[str, ...] = (
    *(f"{heading} p" for heading in CLASSES.values()),
    "in empty", "mean distance", "volume difference", "reference ml", "predicted ml", "specificity", "pooled IoU",
    "quartiles", "SD", "median", "recall", "precision", "IoU", "pooled Dice", "SQ", "PQ", "RQ (F1)", "centre-line Dice",
    "lesion Dice", "surface Dice", "HD95", "cases", "pairs",
    "one only", "95 % interval", "Wilcoxon p", "Holm p",
)  # fmt: skip

"""Columns that a narrow terminal does without, the first rather than the last. A number is never cut."""

NAMES = 12
"""Columns that the names of the classes keep at the least; longer ones are folded."""


def terminal(title: str, grid: Grid, width: int) -> Terminal:
    """Grid -> table of at most so many columns, which says what it left out for that."""
    sizes = [max(map(len, column)) for column in zip(grid.columns, *grid.rows, grid.total, strict=True)]
    kept = {i for i, heading in enumerate(grid.columns) if heading not in DROPPED}
    for heading in reversed(DROPPED):
        more = kept | {grid.columns.index(heading)} if heading in grid.columns else kept
        if min(sizes[0], NAMES) + sum(sizes[column] for column in more if column) + 3 * len(more) + 1 <= width:
            kept = more
    left_out = [heading for i, heading in enumerate(grid.columns) if i not in kept]
    caption = f"Too narrow for: {', '.join(left_out)}." if left_out else None
    drawn = Terminal(
        title=Text(shown(title)), title_justify="left", title_style="bold", caption=caption, caption_justify="left"
    )
    for column in sorted(kept):
        drawn.add_column(
            grid.columns[column], justify="right" if column else "left", no_wrap=column > 0, overflow="fold",
            min_width=sizes[column] if column else None,
        )  # fmt: skip
    for row in grid.rows:
        drawn.add_row(*(Text(row[column]) for column in sorted(kept)))
    drawn.add_section()
    drawn.add_row(*(grid.total[column] for column in sorted(kept)))
    return drawn
