"""The HTML report, one page that needs no other file: numbers, box plots, the worst cases with pictures.

This module computes what the page shows; `report.html` says how it is shown. `table` holds the scores of one set of
predictions, `key` is a class, i the position of a case in a table, N a case, K a class.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softdice.evaluation.averages import mean
from softdice.evaluation.colours import EXTRA, MISSED, OTHER, RIGHT
from softdice.evaluation.labels import ScoreError
from softdice.evaluation.table import DISTANCES, Table
from softdice.images.files import FileError
from softdice.scoring.comparison import Comparison
from softdice.scoring.confidence import Ranking, charts
from softdice.scoring.error_pictures import picture
from softdice.scoring.formats import MOST_DIFFERENT, difference_row
from softdice.scoring.options import Options
from softdice.scoring.plots import box_plots
from softdice.scoring.summary import Summary, renumbered_line, unnamed_line
from softdice.scoring.templates import render
from softdice.scoring.text_tables import (
    HEADINGS,
    MEANINGS,
    Grid,
    alone_line,
    class_grid,
    comparison_grid,
    confidence_grid,
    models_grid,
    rank_line,
    shapes_grid,
    text,
)
from softdice.version import __version__

WORST, LISTED = 12, 1000
"""How many cases have a picture, and how many are in the list of all cases."""

PAPER = 14
"""Columns that fit on a sheet of paper; a wider table is printed without the columns from the standard deviation on."""

UNBOUNDED = (*DISTANCES, "matched", "missed", "extra")
"""Columns that are no shares: their plots run from 0 to the largest value."""

COLOURS = {"in both": RIGHT, "predicted in error": EXTRA, "missed": MISSED, "other classes of the label": OTHER}
"""What the colours of the pictures mean."""


def to_html(
    tables: dict[str, Table],
    summaries: dict[str, Summary],
    comparisons: Sequence[Comparison] | None,
    options: Options,
    truth: str,
    *,
    command: str = "",
    images: Mapping[str, Path] | None = None,
    view: str = "radiological",
    rankings: Sequence[Ranking] = (),
) -> str:
    """Return the report of one or more sets of predictions; the first is compared with each other one.

    The files of the worst cases are read again for their pictures; one that cannot be read has its error for a picture.

    Args:
        tables, summaries: by the path of the predictions.
        comparisons: of the first with each other set, in order; None or [] for a single set.
        truth: path of the reference. command: the command line that made the page.
        images: case -> the image to draw under its masks. rankings: of the first predictions by a confidence.
        view: "radiological" has the patient's left at the right of a picture, "neurological" at the left.
    """
    names = _short_names([*tables, truth])
    first, table = next(iter(tables.items()))
    renamed = {names[path]: each for path, each in tables.items()}
    figures = _Figures(options, images or {}, view)
    order = _worst_first(table)
    *others, last = (names[path] for path in tables)
    page = render(
        "report.html",
        title=f"{', '.join(others) + ' and ' * bool(others)}{last} against {names[truth]}",
        hints=[line for line in (unnamed_line(table), renumbered_line(tables.values())) if line],
        errors=[error for each in tables.values() for error in each.errors],
        models=models_grid(renamed, [*summaries.values()]) if len(tables) > 1 else None,
        rank=rank_line(renamed),
        comparisons=[
            _comparison_part(comparison, {names[path]: tables[path] for path in (first, other)}, figures)
            for other, comparison in zip(list(tables)[1:], comparisons or (), strict=True)
        ],
        predictions=[_predictions_part(names[path], each, summaries[path]) for path, each in tables.items()],
        first=names[first],
        rankings=rankings,
        charts=charts,
        confidence_grid=confidence_grid(rankings),
        worst=figures.worst(table, order),
        cases=_case_grid(table, order),
        classes=len(table.keys),
        scored=len(order),
        provenance=_provenance(tables, options, truth, command),
        empty="is not scored there" if math.isnan(options.empty) else f"scores {options.empty:g} there",
        meanings={HEADINGS[key]: meaning for key, meaning in MEANINGS.items()},
        colours=COLOURS,
        version=__version__,
    )
    return str(page)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path the fewest last parts that tell it from the others: "a/x" beside "b/x", "x" beside "b/y"."""
    names = {}
    for path in paths:
        parts = Path(path).parts
        others = [Path(other).parts for other in paths if other != path]
        lengths = (n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others))
        names[path] = "/".join(parts[-next(lengths, len(parts)) :]) or path
    return names


def _predictions_part(name: str, table: Table, summary: Summary) -> dict[str, Any]:
    """Return what the template shows of a set of predictions; a print on paper ends before column number `printed`."""
    grid = class_grid(table, summary)
    is_wide = len(grid.columns) > PAPER and HEADINGS["dice_sd"] in grid.columns
    labels, has_plots = [table.label(key) for key in table.keys], len(table.cases) > 1
    return {
        "name": name,
        "numbers": _key_numbers(table, grid),
        "grid": grid,
        "printed": grid.columns.index(HEADINGS["dice_sd"]) if is_wide else None,
        "plot": box_plots(labels, table.dice, "Dice") if has_plots else None,
        "shape_plots": [
            _shape_plot(f"{HEADINGS[column]} of the cases, by class", labels, table.further[column], column)
            for column in (table.shapes if has_plots else ())
        ],
    }


def _shape_plot(
    title: str, labels: list[str], values_NK: np.ndarray, name: str, *, signed: bool = False
) -> dict[str, str]:
    """Return title and HTML of box plots that a click on the title unfolds: with 40 classes they take a screen.

    `values_NK` are scores of the column `name` of `Table.shapes`, or if `signed` differences of two such scores;
    `labels` are the names of the K classes.
    """
    longest = None if name in UNBOUNDED else 1.0
    return {"title": title, "drawn": box_plots(labels, values_NK, HEADINGS[name], signed=signed, longest=longest)}


def _key_numbers(table: Table, grid: Grid) -> list[tuple[str, str, str]]:
    """Return (name, text, note) of each number that the page shows large; `grid` is the `class_grid` of the table."""
    total = dict(zip(grid.columns, grid.total, strict=True))
    interval = total.get("95 % interval", "-")
    numbers = [("mean Dice of the classes", total["Dice"], "" if interval == "-" else f"95 % {interval}")]
    if "pooled Dice" in total:
        numbers.append(("pooled Dice", total["pooled Dice"], "all voxels of all cases"))
    scored = f"{len(table.errors)} not scored" if table.errors else "all scored"
    return [*numbers, ("cases", str(len(table.cases)), scored), ("classes", str(len(grid.rows)), "")]


def _comparison_part(comparison: Comparison, tables: dict[str, Table], figures: _Figures) -> dict[str, Any]:
    """Return what the template shows of a comparison of the two `tables`, which are by short name, with pictures."""
    table = next(iter(tables.values()))
    first, second = tables
    grid = comparison_grid(table, comparison)
    total = dict(zip(grid.columns, grid.total, strict=True))
    labels = [table.label(key) for key in comparison.keys]
    rows: list[list[str]] = []
    pictures: list[dict[str, Any]] = []
    for number in comparison.most_different(MOST_DIFFERENT):
        row = difference_row(comparison, number, table)
        label = table.label(row["label"])
        rows.append([row["case"], text(row["difference"], "+.4f"), text(row["class_difference"], "+.4f"), label])
        positions = [(name, each, each.cases.index(row["case"])) for name, each in tables.items()]
        predictions = [_prediction(each, i) for _, each, i in positions]
        for name, each, i in positions if len(pictures) < WORST else ():
            pictures.append(figures.figure(each, i, row["label"], name, beside=predictions))
    return {
        "first": first,
        "second": second,
        "macro": f"{total['difference']} ({total['95 % interval']})",
        "differences": grid,
        "alone": alone_line(comparison),
        "plot": box_plots(labels, comparison.each, "difference", signed=True),
        "shapes": shapes_grid(table, comparison) if comparison.shapes else None,
        "shape_plots": [
            _shape_plot(f"{HEADINGS[name]}: differences of the cases, by class", labels, shape.each, name, signed=True)
            for name, shape in comparison.shapes.items()
        ],
        "cases": Grid(["case", "difference", "largest", "in class"], rows, []),
        "figures": pictures,
    }


def _worst_first(table: Table) -> list[int]:
    """Return the cases that have a score, in the order of their mean Dice."""
    dice_N = mean(table.dice.T)
    return [int(i) for i in np.argsort(dice_N, kind="stable") if not np.isnan(dice_N[i])]


def _case_grid(table: Table, order: list[int]) -> Grid:
    """Return the table of the first cases of `order`, which have a score: mean and lowest Dice, Dice of each class."""
    dice_NK, rows = table.dice, []
    for i in order[:LISTED]:
        k = int(np.nanargmin(dice_NK[i]))
        lowest = [text(float(mean(dice_NK[i]))), text(dice_NK[i, k]), table.label(table.keys[k])]
        rows.append([table.cases[i], *lowest, *(text(value) for value in dice_NK[i].tolist())])
    return Grid(["case", "mean Dice", "lowest Dice", "in class", *map(table.label, table.keys)], rows, [])


def _prediction(table: Table, i: int) -> Path | None:
    """Return the file of a case's prediction; None where an empty one was scored."""
    return Path(table.predictions[i]) if table.predictions[i] else None


def _provenance(tables: dict[str, Table], options: Options, truth: str, command: str) -> list[tuple[str, str]]:
    """Return (name, text) of what reproduces the page: folders, command, changed options, policies, versions, date.

    `tables`: by the path of the predictions. `truth`: path of the reference. `command`: the command line, "" for none.
    """
    defaults = vars(Options())
    # by repr: nan, the default of `empty`, does not equal itself
    changed = {name: value for name, value in vars(options).items() if repr(value) != repr(defaults[name])}
    versions = f"softdice {__version__}, torch {torch.__version__}, NumPy {np.__version__}, Python "
    return [
        *(("predictions", str(Path(path).absolute())) for path in tables),
        ("reference", str(Path(truth).absolute())),
        *([("command", command)] if command else []),
        *((name.replace("_", " "), _written(value)) for name, value in changed.items()),
        ("policies", f"class in neither map: {options.empty:g}; missing prediction: {options.missing}"),
        ("versions", versions + platform.python_version()),
        ("date", datetime.datetime.now().astimezone().isoformat(" ", "minutes")),
    ]


def _written(value: object) -> str:
    """Return the value of an option as people write it: "1, 2", or "liver: 1; all: 2" for a dict."""
    if isinstance(value, dict):
        return "; ".join(f"{f'{key}: ' if key != '' else ''}{_written(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Figures:
    """Draws pictures of cases, with the same options, images (files by case) and view for all."""

    def __init__(self, options: Options, images: Mapping[str, Path], view: str) -> None:
        self.options, self.images, self.view = options, images, view

    def worst(self, table: Table, order: list[int]) -> list[dict[str, Any]]:
        """Draw the worst class of the first cases of `order` that have an error; of a single case its worst classes."""
        dice_NK = table.dice
        if len(table.cases) == 1:
            places = [(0, int(k)) for k in np.argsort(dice_NK[0], kind="stable") if dice_NK[0, k] < 1]
        else:
            places = [(i, int(np.nanargmin(dice_NK[i]))) for i in order if np.nanmin(dice_NK[i]) < 1]
        return [self.figure(table, i, table.keys[k]) for i, k in places[:WORST]]

    def figure(
        self, table: Table, i: int, key: int | str, name: str = "", beside: Sequence[Path | None] = ()
    ) -> dict[str, Any]:
        """Draw a class of a case: return the picture with the parts of its caption, or the error if that fails.

        Where two sets of predictions are compared, `name` says which this is, and `beside` has both, to show one slice.
        """
        case, dice_K, prediction = table.cases[i], table.case(i).dice[0], _prediction(table, i)
        others = [other for other in beside if other != prediction]
        try:
            drawn = picture(
                prediction, Path(table.truths[i]), key, self.options,
                under=self.images.get(case), view=self.view, beside=others,
            )  # fmt: skip
        except (FileError, ScoreError) as error:  # a file was changed or taken away since it was scored
            return {"error": str(error)}
        dice = dice_K[table.keys.index(key)] if key in table.keys else np.nan
        note = name or f"mean Dice {text(float(mean(dice_K)))}"
        return {
            "error": "", "case": case, "drawn": drawn, "note": note,
            "place": f"{table.label(key)}: {text(dice)}{drawn.place}",
        }  # fmt: skip
