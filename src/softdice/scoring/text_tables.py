"""Summaries and comparisons as tables of text, for the report and for a terminal, and as sentences.

`tables` is by name of the predictions, in the order of the command. In the comparison of two sets of predictions
`table` is the first's, which knows the names of the classes. A key is the name of a column in the rows of `formats`. K
is a class.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table as Terminal
from rich.text import Text

from softdice.evaluation.table import DISTANCES, Table
from softdice.evaluation.text import shown
from softdice.scoring.comparison import Comparison, mean_ranks
from softdice.scoring.confidence import Ranking
from softdice.scoring.formats import class_rows, comparison_rows, difference_row, overall_row
from softdice.scoring.summary import Summary

HEADINGS = {
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
"""Keys of the rows of a class -> headings, in the order of the table; further scores stand beside Dice."""

COMPARISON_HEADINGS = {
    "cases": "pairs", "cases_alone": "one only", "difference": "difference", "difference_95": "95 % interval",
    "p_wilcoxon": "Wilcoxon p", "p_holm": "Holm p",
}  # fmt: skip
"""Keys of the rows of a comparison -> headings."""

MEANINGS = {
    "dice": "mean over the cases; in the last row the mean of the classes",
    "dice_95": "interval of the mean, bootstrap over the cases; from five cases on",
    "volume_difference": "relative to the mean of both volumes",
    "hd95": "95th percentile of the distance of the surfaces, the larger of both directions; mean of the finite ones",
    "hd95_median": "over all cases, including infinite distances",
    "hd95_infinite": "cases in which only one of prediction and reference has the class",
    "mean_distance": "between the surfaces, over both directions; mean of the finite ones",
    "surface_dice": "share of both surfaces that is within the tolerance",
    "lesion_dice": "mean Dice of the lesions, 0 for a lesion without partner",
    "pq": "panoptic quality, SQ times RQ",
    "sq": "mean IoU of the lesions that match",
    "rq": "F1 of finding the lesions",
    "ap50": "matched / (matched + missed + extra), from an IoU of 0.5 on",
    "matched": "objects with a partner, in a case",
    "missed": "objects of the reference without partner",
    "extra": "objects of the prediction without partner",
    "centreline_dice": "Dice of centre lines (clDice)",
    "pooled_dice": "voxels of all cases added first",
    "in_empty": "cases with a prediction, of those whose reference lacks the class",
}
"""What a column means, if its heading does not say it."""

NUMBER_FORMATS = defaultdict(
    lambda: ".4f",
    {
        **dict.fromkeys(("ml_pred", "ml_ref", "mean_rank"), ".2f"),
        **{f"{name}{part}": ".2f" for name in DISTANCES for part in ("", "_median", "_quartiles")},
        **dict.fromkeys(("volume_difference", "difference", "difference_95"), "+.4f"),
        **dict.fromkeys(("matched", "missed", "extra"), ".1f"),
        **dict.fromkeys(("p_wilcoxon", "p_holm"), ".3g"),
        "cases_alone": "d",
    },
)
"""Key -> how the numbers of the column are written, as `format` takes it."""

NEEDS_CASES = (
    "cases", "dice_95", "dice_sd", "dice_median", "dice_quartiles", "pooled_dice", "pooled_iou", "in_empty",
    *(f"{name}_{part}" for name in DISTANCES for part in ("median", "quartiles")),
)  # fmt: skip
"""Columns that mean nothing with a single case."""


class Grid(NamedTuple):
    """A table of text: headings, rows of cells, and a last row over all of them, which may be empty."""

    columns: list[str]
    rows: list[list[str]]
    total: list[str]


def class_grid(table: Table, summary: Summary) -> Grid:
    """Return the table of means: Dice with its interval, further scores, pooled scores, and how many cases.

    Columns that say nothing are left out: spreads with a single case, counts of infinite distances that are all 0.
    """
    overall = {"cases": len(table.cases), **overall_row(summary)}
    rows = class_rows(table, summary)
    for row in rows if summary.empty[1].any() else ():
        row["in_empty"] = f"{row['predicted_in_empty']} of {row['empty_references']}"
    filled = {key for row in rows for key in row} | {"cases", "dice"}
    omitted = {*NEEDS_CASES} if len(table.cases) < 2 else set()
    omitted |= {f"{name}_infinite" for name, (*_, infinite_K) in summary.distances.items() if not infinite_K.any()}
    headings = {key: heading for key, heading in HEADINGS.items() if key in filled - omitted}
    return _grid(headings, table, table.keys, rows, overall)


def comparison_grid(table: Table, comparison: Comparison) -> Grid:
    """Return the table of differences of Dice: interval, p values, pairs, and cases that only one side has."""
    overall = comparison_rows(comparison, table)
    return _grid(COMPARISON_HEADINGS, table, comparison.keys, overall.pop("classes"), overall)


def shapes_grid(table: Table, comparison: Comparison) -> Grid:
    """Return the table of differences of the scores that need masks, a row for each score and class.

    With several classes a row for their mean comes before them. `comparison.shapes` is name of a score -> comparison of
    that score. Distances also say in how many cases the first, and the second, is infinite: these are no pairs.
    """
    with_infinite = any(shape.infinite.any() for shape in comparison.shapes.values())
    *headings, p_heading = (COMPARISON_HEADINGS[key] for key in ("difference", "difference_95", "cases", "p_holm"))
    columns = [*headings, *["inf"] * with_infinite, p_heading]
    rows = []
    for name, shape in comparison.shapes.items():
        signed = f"+{NUMBER_FORMATS[name]}"
        if len(comparison.keys) > 1:
            rows.append([HEADINGS[name], text(shape.macro_difference, signed), *[""] * (len(columns) - 1)])
        for k, key in enumerate(comparison.keys):
            cells = [text(shape.difference[k], signed), text(shape.interval[:, k], signed), str(shape.cases[k])]
            if with_infinite:
                cells.append(text(shape.infinite[:, k], "d") if name in DISTANCES else "")
            rows.append([f"{HEADINGS[name]}: {table.label(key)}", *cells, text(shape.p_holm[k], ".3g")])
    return Grid(["score: class", *columns], rows, [])


def models_grid(tables: dict[str, Table], summaries: Sequence[Summary]) -> Grid:
    """Return the table of all sets of predictions, a row each, by mean rank of Dice; `summaries` are in their order."""
    ranks, _ = mean_ranks(list(tables.values()))
    rows = []
    for (name, table), summary, rank in zip(tables.items(), summaries, ranks.tolist(), strict=True):
        row = {key.removeprefix("macro_"): value for key, value in overall_row(summary).items()}
        row |= {"mean_rank": rank, "cases": len(table.cases), "failed": len(table.errors)}
        row |= {"empty_predictions": sum(prediction == "" for prediction in table.predictions)}
        rows.append((rank, shown(name), row))
    rows.sort(key=lambda row: row[0])
    # "cases" stands further right; the IoU of a case follows from its Dice, and is left out
    filled = {key for *_, row in rows for key in row} - {"cases", "iou", "pooled_iou"}
    filled -= {key for key in filled if key.endswith("_infinite") and not any(row[key] for *_, row in rows)}
    headings = {key: heading for key, heading in HEADINGS.items() if key in filled}
    headings |= {"mean_rank": "mean rank", "cases": "cases", "failed": "not scored"}
    if any(row["empty_predictions"] for *_, row in rows):
        headings["empty_predictions"] = "without prediction"
    cells = [[name, *(text(row.get(key, math.nan), NUMBER_FORMATS[key]) for key in headings)] for _, name, row in rows]
    return Grid(["predictions", *headings.values()], cells, [])


def _grid(
    headings: dict[str, str],
    table: Table,
    keys: Sequence[int | str],
    rows: list[dict[str, Any]],
    overall: dict[str, Any],
) -> Grid:
    """Return a table with a row for each of the classes `keys`, whose cells are in `rows`, and a last one over all.

    `headings` is key of a cell -> heading, in the order of the columns; a row without the key has an empty cell. The
    keys of the last row, `overall`, may have the prefix "macro_", which is removed.
    """
    overall = {key.removeprefix("macro_"): value for key, value in overall.items()}

    def cells(label: str, row: dict[str, Any]) -> list[str]:
        """Return the texts of a row, its label first."""
        return [label, *(text(row[key], NUMBER_FORMATS[key]) if key in row else "" for key in headings)]

    class_cells = [cells(table.label(key), row) for key, row in zip(keys, rows, strict=True)]
    return Grid(["class", *headings.values()], class_cells, cells("all classes", overall))


def text(value: Any, number_format: str = ".4f") -> str:
    """Return a cell as text: "0.9120", "0.8000 .. 0.9500" for a list or array of two bounds, "-" for nan and None.

    Texts and integers stay as they are. The format "d" joins two counts, of the first and second predictions: "2 + 1".
    """
    if isinstance(value, (int, str)):
        return str(value)
    is_pair = isinstance(value, (list, np.ndarray))
    low, high = value if is_pair else (value, value)
    if low is None or math.isnan(low):
        return "-"
    if number_format == "d":
        return f"{low} + {high}" if low or high else "-"
    if is_pair:
        return f"{low:{number_format}} .. {high:{number_format}}"
    return format(float(low), number_format)


def confidence_grid(rankings: Sequence[Ranking]) -> Grid:
    """Return the table with a row for each ranking by a confidence, as `rankings` returned them: the means first."""
    columns = ["", "masks", "rank correlation", "risk-coverage area", "in random order", "in the best order"]
    return Grid(columns, [[text(value) for value in ranking.row().values()] for ranking in rankings], [])


def done_line(tables: dict[str, Table], summaries: dict[str, Summary], out: Path | None, report: Path | None) -> str:
    """Return the last line of a run: how many cases, mean Dice of each set of predictions, and the written files."""
    scores = []
    for name, summary in summaries.items():
        interval = text(summary.macro_interval)
        spread = "" if interval == "-" else f" (95 % interval {interval})"
        scores.append(f"{f'{shown(name)} ' if len(tables) > 1 else ''}{text(summary.macro_dice)}{spread}")
    cases = len(next(iter(tables.values())).cases)
    files = [f"{what}: {shown(str(path))}" for what, path in (("Scores", out), ("Report", report)) if path is not None]
    return f"{cases} case{'s' * (cases != 1)}, mean Dice {', '.join(scores)}. {'. '.join(files)}."


def alone_line(comparison: Comparison) -> str:
    """Return a sentence about scores that only one of the two sets of predictions has; "" if there is no such score."""
    first, second = comparison.alone.sum(1).tolist()  # how many scores only the first has, and only the second
    if not first + second:
        return ""
    counts = f"{first} scores of the first and {second} of the second, which are in their means"
    return f"Not compared: {counts}. The other side has no score where it and the reference lack the class."


def rank_line(tables: dict[str, Table]) -> str:
    """Return a sentence with the mean ranks, best first; "" for fewer than three sets of predictions."""
    if len(tables) < 3:
        return ""
    ranks, number = mean_ranks(list(tables.values()))
    ranked = sorted(zip(ranks.tolist(), tables, strict=True))
    return (
        f"Mean rank (1 is best, of {number} scores): {', '.join(f'{shown(name)} {rank:.2f}' for rank, name in ranked)}."
    )


def different_lines(table: Table, comparison: Comparison, most: int = 5) -> list[str]:
    """Return a heading and a line for each of the `most` cases that differ most; [] if no case differs."""
    lines = []
    for i in comparison.most_different(most):
        row = difference_row(comparison, i, table)
        in_class = f"{table.label(row['label'])} {text(row['class_difference'], '+.4f')}"
        lines.append(f"  {shown(row['case'])}: {text(row['difference'], '+.4f')}, most in {in_class}")
    return ["Cases that differ most:", *lines] if lines else []


_DROPPED_FIRST = (
    "pooled IoU", "quartiles", "SD", "in empty", "median", "pooled Dice", "IoU", "cases",
    "mean distance quartiles", "HD95 quartiles", "mean distance median", "HD95 median", "mean distance",
    "volume difference", "reference ml", "predicted ml", "specificity", "AP 0.9", "AP 0.75", "AP 0.5", "matched",
    "missed", "extra", "SQ", "recall", "precision", "PQ", "RQ (F1)",
    "centre-line Dice", "lesion Dice", "surface Dice", "HD95",
)  # fmt: skip
DROPPED: tuple[str, ...] = (
    *(heading + suffix for heading in _DROPPED_FIRST for suffix in ("", " inf")),
    "one only", "95 % interval", "Wilcoxon p", "Holm p", "pairs", "inf",
)  # fmt: skip
"""Columns that a narrow terminal leaves out, in this order. Numbers are never cut."""

NAME_WIDTH = 12
"""Characters that names of classes keep at least; longer ones are folded."""


def terminal(title: str, grid: Grid, width: int) -> Terminal:
    """Return a table of rich that fits a terminal of that many characters; its caption names the columns left out.

    The columns of `DROPPED` are tried from its end on, and kept where they fit; all others stay.
    """
    totals = [grid.total] if grid.total else []
    widths = [max(map(len, column)) for column in zip(grid.columns, *grid.rows, *totals, strict=True)]
    kept = {i for i, heading in enumerate(grid.columns) if heading not in DROPPED}
    for heading in reversed(DROPPED):
        wider = kept | {grid.columns.index(heading)} if heading in grid.columns else kept
        borders = 3 * len(wider) + 1  # rich puts a blank on both sides of a cell, and a line between two cells
        if min(widths[0], NAME_WIDTH) + sum(widths[i] for i in wider if i) + borders <= width:
            kept = wider
    omitted = [heading for i, heading in enumerate(grid.columns) if i not in kept]
    caption = f"Too narrow for: {', '.join(omitted)}." if omitted else None
    drawn = Terminal(
        title=Text(shown(title)), title_justify="left", title_style="bold", caption=caption, caption_justify="left"
    )
    for i in sorted(kept):
        drawn.add_column(
            grid.columns[i], justify="right" if i else "left", no_wrap=i > 0, overflow="fold",
            min_width=widths[i] if i else None,
        )  # fmt: skip
    for cells in grid.rows:
        drawn.add_row(*(Text(cells[i]) for i in sorted(kept)))
    drawn.add_section()
    for cells in totals:
        drawn.add_row(*(cells[i] for i in sorted(kept)))
    return drawn
