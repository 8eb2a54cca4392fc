"""summaries -> rows of cells that people read, and tables of them for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table as Terminal
from rich.text import Text

from softdice.scoring.output import class_rows, comparison_rows, difference_row, number, overall_row
from softdice.scoring.summary import DISTANCES, Comparison, Summary, Table, mean_ranks
from softdice.scoring.writing import shown

CLASSES = {
    "cases": "cases", "dice": "Dice", "dice_95": "95 % interval",
    "precision": "precision", "recall": "recall", "specificity": "specificity", "ml_pred": "predicted ml",
    "ml_ref": "reference ml", "volume_difference": "volume difference",
    "hd95": "HD95", "hd95_median": "HD95 median", "hd95_infinite": "HD95 inf",
    "mean_distance": "mean distance", "mean_distance_median": "mean distance median",
    "surface_dice": "surface Dice", "lesion_dice": "lesion Dice", "pq": "PQ",
    "sq": "SQ", "rq": "RQ (F1)", "ap50": "AP 0.5", "ap75": "AP 0.75", "ap90": "AP 0.9",
    "matched": "matched", "missed": "missed", "extra": "extra", "centreline_dice": "centre-line Dice",
    "dice_sd": "SD", "dice_median": "median", "dice_quartiles": "quartiles", "hd95_quartiles": "HD95 quartiles",
    "mean_distance_quartiles": "mean distance quartiles", "pooled_dice": "pooled Dice",
    "iou": "IoU", "pooled_iou": "pooled IoU", "in_empty": "in empty",
}  # fmt: skip
"""Columns of a class in the order of the table: what was asked for stands beside Dice."""

COMPARISON = {
    "cases": "pairs", "cases_alone": "one only", "difference": "difference", "difference_95": "95 % interval",
    "p_wilcoxon": "Wilcoxon p", "p_holm": "Holm p",
}  # fmt: skip
"""Keys of the rows of `softdice.scoring.output` -> headings."""

LEGEND = {
    "dice": "mean over the cases; in the last row the mean of the classes",
    "dice_95": "interval of the mean, bootstrap over the cases; from five cases on",
    "volume_difference": "relative to the mean of both volumes",
    "hd95": "95th percentile of the distance of the surfaces, the larger of both directions; mean of the finite ones",
    "hd95_median": "of all cases, those with an infinite distance too",
    "hd95_infinite": "cases in which only one of prediction and reference has the class",
    "mean_distance": "between the surfaces, over both directions; mean of the finite ones",
    "surface_dice": "share of both surfaces that is within the tolerance",
    "lesion_dice": "mean Dice of the lesions, 0 for one without partner",
    "pq": "panoptic quality, SQ times RQ",
    "sq": "mean IoU of the lesions that match",
    "rq": "F1 of finding the lesions",
    "ap50": "matched / (matched + missed + extra), from an IoU of 0.5 on",
    "matched": "objects of a case with a partner",
    "missed": "objects of the reference without partner",
    "extra": "objects of the prediction without partner",
    "centreline_dice": "Dice of centre lines (clDice)",
    "pooled_dice": "voxels of all cases added first",
    "in_empty": "cases with a prediction, of those whose reference lacks the class",
}
"""What a column is, where its heading leaves it open."""

FORMS = {
    "ml_pred": ".2f",
    "ml_ref": ".2f",
    **{f"{name}{part}": ".2f" for name in DISTANCES for part in ("", "_median", "_quartiles")},
    "volume_difference": "+.4f",
    **dict.fromkeys(("matched", "missed", "extra"), ".1f"),
    "difference": "+.4f",
    "difference_95": "+.4f",
    "p_wilcoxon": ".3g",
    "p_holm": ".3g",
    "cases_alone": "d",
    "mean_rank": ".2f",
}


ONE_CASE = (
    "cases", "dice_95", "dice_sd", "dice_median", "dice_quartiles", "pooled_dice", "pooled_iou", "in_empty",
    *(f"{name}_{part}" for name in DISTANCES for part in ("median", "quartiles")),
)  # fmt: skip
"""Columns that say nothing of a single case."""


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
    filled = {key for row in rows for key in row} | {"cases", "dice"}
    left_out = {*ONE_CASE} if len(table.cases) < 2 else set()
    left_out |= {f"{name}_infinite" for name, rows_4K in summary.distances.items() if not rows_4K[3].any()}
    headings = {key: heading for key, heading in CLASSES.items() if key in filled - left_out}
    return _grid(headings, table, table.keys, rows, overall)


def comparison_grid(table: Table, comparison: Comparison) -> Grid:
    """Paired difference of Dice with its interval, Wilcoxon's p, and how many cases have no score to compare with."""
    overall = comparison_rows(comparison, table)
    return _grid(COMPARISON, table, comparison.keys, overall.pop("classes"), overall)


def shapes_grid(table: Table, comparison: Comparison) -> Grid:
    """The same of what was measured of shapes, a row for each score and class: difference, interval, pairs, Holm's p.

    Of distances also in how many cases that of the first and that of the second is infinite: these are no pairs.
    """
    overall = comparison_rows(comparison, table)
    classes = [(table.label(key), row) for key, row in zip(comparison.keys, overall.pop("classes"), strict=True)]
    headings = {key: COMPARISON[key] for key in ("difference", "difference_95", "cases")}
    headings |= {"infinite": "inf"} if any(other.infinite.any() for other in comparison.shapes.values()) else {}
    headings["p_holm"] = COMPARISON["p_holm"]
    rows = []
    for name in comparison.shapes:
        form = f"+{FORMS.get(name, '.4f')}"
        forms = {"difference": form, "difference_95": form, "p_holm": FORMS["p_holm"], "infinite": "d"}
        if len(classes) > 1:
            rows.append([CLASSES[name], text(overall[f"macro_{name}_difference"], form), *[""] * (len(headings) - 1)])
        for label, row in classes:
            cells = (text(row.get(f"{name}_{key}", ""), forms.get(key, "")) for key in headings)
            rows.append([f"{CLASSES[name]}: {label}", *cells])
    return Grid(["score: class", *headings.values()], rows, [])


def models_grid(tables: dict[str, Table], summaries: Sequence[Summary]) -> Grid:
    """Sets of predictions, best first: mean Dice with its interval, what was asked for, pooled, rank, what failed.

    The best is the one with the lowest mean rank of Dice over cases and classes.
    """
    ranks, _ = mean_ranks(list(tables.values()))
    rows = []
    for (name, table), summary, rank in zip(tables.items(), summaries, ranks.tolist(), strict=True):
        row = {key.removeprefix("macro_"): value for key, value in overall_row(summary).items()}
        row |= {"mean_rank": rank, "cases": len(table.cases), "failed": len(table.errors)}
        row |= {"empty_predictions": sum(prediction == "" for prediction in table.predictions)}
        rows.append((rank, shown(name), row))
    rows.sort(key=lambda row: row[0])
    kept = [key for key in CLASSES if any(key in row for *_, row in rows) and key not in ("cases", "iou", "pooled_iou")]
    kept = [key for key in kept if not key.endswith("_infinite") or any(row[key] for *_, row in rows)]
    headings = {key: CLASSES[key] for key in kept}
    headings |= {"mean_rank": "mean rank", "cases": "cases", "failed": "not scored"}
    if any(row["empty_predictions"] for *_, row in rows):
        headings["empty_predictions"] = "without prediction"
    cells = [[name, *(text(row.get(key, math.nan), _form(key)) for key in headings)] for _, name, row in rows]
    return Grid(["predictions", *headings.values()], cells, [])


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
    return FORMS.get(key, ".4f")


def text(value: Any, form: str = ".4f") -> str:
    """A number or the two bounds of an interval, a dash for what is undefined."""
    if isinstance(value, int) or (isinstance(value, str) and value != "inf"):
        return str(value)
    low, high = (math.inf if v == "inf" else v for v in (value if isinstance(value, list) else (value, value)))
    if low is None or math.isnan(low):
        return "-"
    if form == "d":  # how many of the first, how many of the second
        return f"{low} + {high}" if low or high else "-"
    return f"{low:{form}} .. {high:{form}}" if isinstance(value, list) else format(float(low), form)


def done_line(tables: dict[str, Table], summaries: dict[str, Summary], out: Path | None, report: Path | None) -> str:
    """What was scored, the mean Dice of each set of predictions, and where the files are."""
    scores = []
    for name, summary in summaries.items():
        interval = text(number(summary.macro_interval))
        spread = "" if interval == "-" else f" (95 % interval {interval})"
        scores.append(f"{f'{shown(name)} ' if len(tables) > 1 else ''}{text(summary.macro_dice)}{spread}")
    cases = len(next(iter(tables.values())).cases)
    files = [f"{what}: {shown(str(path))}" for what, path in (("Scores", out), ("Report", report)) if path is not None]
    return f"{cases} case{'s' * (cases != 1)}, mean Dice {', '.join(scores)}. {'. '.join(files)}."


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


_FIRST = (
    "pooled IoU", "quartiles", "SD", "in empty", "median", "pooled Dice", "IoU", "cases",
    "mean distance quartiles", "HD95 quartiles", "mean distance median", "HD95 median", "mean distance",
    "volume difference", "reference ml", "predicted ml", "specificity", "AP 0.9", "AP 0.75", "AP 0.5", "matched",
    "missed", "extra", "SQ", "recall", "precision", "PQ", "RQ (F1)",
    "centre-line Dice", "lesion Dice", "surface Dice", "HD95",
)  # fmt: skip
DROPPED: tuple[str, ...] = (
    *(heading + more for heading in _FIRST for more in ("", " inf")),
    "one only", "95 % interval", "Wilcoxon p", "Holm p", "pairs", "inf",
)  # fmt: skip
"""Columns that a narrow terminal does without, the first rather than the last. A number is never cut."""

NAMES = 12
"""Columns that the names of the classes keep at the least; longer ones are folded."""


def terminal(title: str, grid: Grid, width: int) -> Terminal:
    """Grid -> table of at most so many columns, which says what it left out for that."""
    totals = [grid.total] if grid.total else []
    sizes = [max(map(len, column)) for column in zip(grid.columns, *grid.rows, *totals, strict=True)]
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
    for row in totals:
        drawn.add_row(*(row[column] for column in sorted(kept)))
    return drawn
