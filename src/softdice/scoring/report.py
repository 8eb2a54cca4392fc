"""The HTML report, one page that needs no other file: numbers, box plots, the worst cases with pictures."""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from itertools import count
from pathlib import Path
from string import Template

import numpy as np
import torch

from softdice.evaluation.averages import mean
from softdice.evaluation.colours import EXTRA, MISSED, OTHER, RIGHT
from softdice.evaluation.labels import ScoreError
from softdice.evaluation.table import DISTANCES, Table
from softdice.images.files import FileError
from softdice.scoring.comparison import Comparison
from softdice.scoring.error_pictures import picture
from softdice.scoring.formats import MOST_DIFFERENT, difference_row
from softdice.scoring.options import Options
from softdice.scoring.plots import box_plots, escape
from softdice.scoring.summary import Summary, renumbered_line, unnamed_line
from softdice.scoring.text_tables import (
    HEADINGS,
    MEANINGS,
    Grid,
    alone_line,
    class_grid,
    comparison_grid,
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

ALL = 10**9
"""More columns than any table has."""

UNBOUNDED = (*DISTANCES, "matched", "missed", "extra")
"""Columns that are no shares: their plots run from 0 to the largest value."""


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
) -> str:
    """Write the report of one or more sets of predictions; the first is compared with each other one.

    The worst cases are read again for their pictures.

    Args:
        tables, summaries: by the path of the predictions. truth: path of the reference.
        command: the command line that made the page. images: case -> the image to draw under its masks.
        view: see `softdice.scoring.error_pictures.picture`.
    """
    names = _short_names([*tables, truth])
    first, table = next(iter(tables.items()))
    renamed = {names[path]: side for path, side in tables.items()}
    figures = _Figures(options, images or {}, view)
    hints = (unnamed_line(table), renumbered_line(tables.values()))
    parts = [f"<p>{escape(line)}</p>" for line in hints if line]
    errors = [error for side in tables.values() for error in side.errors]
    if errors:
        items = "".join(f"<li>{escape(error)}</li>" for error in errors)
        parts.append(f"<details><summary>Not scored: {len(errors)}</summary><ul class='errors'>{items}</ul></details>")
    if len(tables) > 1:
        grid = models_grid(renamed, [*summaries.values()])
        parts.append("<h2>All predictions</h2>" + _html_table(grid.columns, grid.rows) + _meanings(grid.columns))
    if len(tables) > 2:
        parts.append(f"<p>{escape(rank_line(renamed))}</p>")
    for other, comparison in zip(list(tables)[1:], comparisons or (), strict=True):
        sides = {names[path]: tables[path] for path in (first, other)}
        parts.append(_comparison_part(comparison, sides, figures))
    for path, side in tables.items():
        parts.append(_predictions_part(names[path], side, summaries[path]))
    order = _worst_first(table)
    parts.append(f"<h2>Worst cases of {escape(names[first])}</h2>" + _legend() + figures.worst(table, order))
    parts.append(f"<h2>Cases of {escape(names[first])}</h2>" + _case_table(table, order))
    parts.append("<h2>How this was made</h2>" + _provenance(tables, options, truth, command))
    *others, last = (names[path] for path in tables)
    title = f"{', '.join(others) + ' and ' * bool(others)}{last} against {names[truth]}"
    empty = "is not scored there" if math.isnan(options.empty) else f"scores {options.empty:g} there"
    body = _with_contents("\n".join(parts))
    page = Template(files("softdice.scoring").joinpath("report.html").read_text("utf-8"))
    return page.substitute(title=escape(title), version=__version__, empty=empty, body=body)


def _with_contents(body: str) -> str:
    """Return the page's body with a table of contents that links to its headings."""
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    numbers = count(1)
    body = re.sub(r"<h2>", lambda _: f"<h2 id='part{next(numbers)}'>", body)
    links = "".join(f"<li><a href='#part{i}'>{heading}</a></li>" for i, heading in enumerate(headings, 1))
    return f"<nav aria-label='Contents'><ul>{links}</ul></nav>\n{body}"


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path its last parts, as many as tell it from the others."""
    names = {}
    for path in paths:
        parts = Path(path).parts
        others = [Path(other).parts for other in paths if other != path]
        enough = (n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others))
        names[path] = "/".join(parts[-next(enough, len(parts)) :]) or path
    return names


def _predictions_part(name: str, table: Table, summary: Summary) -> str:
    """Write the part of one set of predictions: key numbers, the table of means, box plots."""
    grid = class_grid(table, summary)
    wide = len(grid.columns) > PAPER and HEADINGS["dice_sd"] in grid.columns
    printed = grid.columns.index(HEADINGS["dice_sd"]) if wide else ALL
    grid_table = _html_table(grid.columns, grid.rows, total=grid.total, printed=printed)
    grid_table += _meanings(grid.columns)
    plot = ""
    if len(table.cases) > 1:
        labels = [table.label(key) for key in table.keys]
        plot = f"<h3>Dice of the cases, by class</h3>{box_plots(labels, table.dice, 'Dice')}"
        plot += "".join(
            _folded_plot(f"{HEADINGS[name]} of the cases, by class", labels, table.further[name], name)
            for name in table.shapes
        )
    return f"<h2>{escape(name)}</h2>" + _key_numbers(table, grid) + grid_table + plot


def _folded_plot(title: str, labels: list[str], values_NK: np.ndarray, name: str, *, signed: bool = False) -> str:
    """Write box plots that a click unfolds: with 40 classes they take a screen."""
    plot = box_plots(labels, values_NK, HEADINGS[name], signed=signed, longest=None if name in UNBOUNDED else 1.0)
    return f"<details><summary>{escape(title)}</summary>{plot}</details>"


def _key_numbers(table: Table, grid: Grid) -> str:
    """Write the few numbers that are shown large."""
    total = dict(zip(grid.columns, grid.total, strict=True))
    spread = total.get("95 % interval", "-")
    cells = [("mean Dice of the classes", total["Dice"], "" if spread == "-" else f"95 % {spread}")]
    if "pooled Dice" in total:
        cells.append(("pooled Dice", total["pooled Dice"], "all voxels of all cases"))
    cells.append(("cases", str(len(table.cases)), f"{len(table.errors)} not scored" if table.errors else "all scored"))
    cells.append(("classes", str(len(grid.rows)), ""))
    return "<div class='numbers'>" + "".join(
        f"<div><b>{value}</b><span>{what}</span><small>{note}</small></div>" for what, value, note in cells
    ) + "</div>"  # fmt: skip


def _meanings(columns: Sequence[str]) -> str:
    """Write what the columns mean whose headings do not say it."""
    meanings = {HEADINGS[key]: meaning for key, meaning in MEANINGS.items()}
    parts = [f"<b>{escape(name)}</b> {escape(meanings[name])}" for name in columns if name in meanings]
    return f"<p class='meanings'>{'; '.join(parts)}.</p>"


def _html_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] = (),
    printed: int = ALL,
) -> str:
    """Write a table that a click on a heading sorts; the first column is text, the others are numbers, zeros are red.

    Headings are spans: on paper, Chromium does not repeat a head that holds a <button> on the next sheet.

    Args:
        total: a last row, which is not sorted.
        printed: how many columns are printed on paper.
    """

    def row(tag: str, cells: Sequence[str]) -> str:
        parts = []
        for i, cell in enumerate(cells):
            styles = ["zero"] * (tag == "td" and i > 0 and cell == "0.0000") + ["screen"] * (i >= printed)
            content = escape(cell).replace(" .. ", "&nbsp;.. ").replace("_", "_<wbr>")
            content = f"<span role='button' tabindex='0'>{content}</span>" if tag == "th" else content
            scope = " scope='col'" if tag == "th" else ""
            parts.append(f"<{tag}{scope}{' class=' + repr(' '.join(styles)) if styles else ''}>{content}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    foot = f"<tfoot>{row('td', total)}</tfoot>" if total and len(rows) > 1 else ""
    return f"<div class='scroll'><table><thead>{row('th', columns)}</thead><tbody>{body}</tbody>{foot}</table></div>"


def _comparison_part(comparison: Comparison, tables: dict[str, Table], figures: _Figures) -> str:
    """Write the part that compares two sets of predictions: differences, plots, the cases that differ most."""
    table = next(iter(tables.values()))
    first, second = map(escape, tables)
    grid = comparison_grid(table, comparison)
    total = dict(zip(grid.columns, grid.total, strict=True))
    macro = f"{total['difference']} ({total['95 % interval']})"
    labels = [table.label(key) for key in comparison.keys]
    parts = [
        f"<h2>{first} and {second}</h2>",
        f"<p>Dice of {first} minus Dice of {second}, case by case. Mean of the classes: {macro}.</p>",
        _html_table(grid.columns, grid.rows, total=grid.total),
        f"<p>{alone_line(comparison)}</p>",
        "<h3>Differences of the cases, by class</h3>",
        box_plots(labels, comparison.each, "difference", signed=True),
    ]
    if comparison.shapes:
        grid = shapes_grid(table, comparison)
        parts.append("<h3>Differences of shapes, means of the cases</h3>" + _html_table(grid.columns, grid.rows))
    for name, shape in comparison.shapes.items():
        title = f"{HEADINGS[name]}: differences of the cases, by class"
        parts.append(_folded_plot(title, labels, shape.each, name, signed=True))
    rows: list[list[str]] = []
    pictures: list[str] = []
    for i in comparison.most_different(MOST_DIFFERENT):
        row = difference_row(comparison, i, table)
        label = table.label(row["label"])
        rows.append([row["case"], text(row["difference"], "+.4f"), text(row["class_difference"], "+.4f"), label])
        positions = [(name, side, side.cases.index(row["case"])) for name, side in tables.items()]
        predictions = [Path(side.predictions[k]) if side.predictions[k] else None for _, side, k in positions]
        for name, side, k in positions if len(pictures) < WORST else ():
            pictures.append(figures.figure(side, k, row["label"], name, beside=predictions))
    if rows:
        parts.append("<h3>Cases that differ most</h3>")
        parts.append(_html_table(["case", "difference", "largest", "in class"], rows))
        parts.append(f"{_legend()}<div class='pictures'>{''.join(pictures)}</div>")
    return "".join(parts)


def _worst_first(table: Table) -> list[int]:
    """Return the cases that have a score, in the order of their mean Dice."""
    dice_N = mean(table.dice.T)
    return [int(i) for i in np.argsort(dice_N, kind="stable") if not np.isnan(dice_N[i])]


def _case_table(table: Table, order: list[int]) -> str:
    """Write the list of cases with the Dice of each class, and a field that filters it."""
    dice_NK, rows = table.dice, []
    for i in order[:LISTED]:
        k = int(np.nanargmin(dice_NK[i]))
        lowest = [text(float(mean(dice_NK[i]))), text(dice_NK[i, k]), table.label(table.keys[k])]
        rows.append([table.cases[i], *lowest, *(text(value) for value in dice_NK[i].tolist())])
    note = f"<p>The {LISTED} worst of {len(order)}.</p>" if len(order) > LISTED else ""
    columns = ["case", "mean Dice", "lowest Dice", "in class", *map(table.label, table.keys)]
    filter_ = "<input type='search' placeholder='Filter by name' aria-label='Filter by name'>" if len(rows) > 1 else ""
    return note + filter_ + _html_table(columns, rows, printed=4 if len(table.keys) > 8 else ALL)


def _provenance(tables: dict[str, Table], options: Options, truth: str, command: str) -> str:
    """Write what it takes to make the page again: folders, command, options that are not the default, versions."""
    defaults = Options()
    changed = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if repr(getattr(options, field.name)) != repr(getattr(defaults, field.name))
    }
    rows = [("predictions", str(Path(path).absolute())) for path in tables]
    rows += [("reference", str(Path(truth).absolute()))]
    rows += [("command", command)] if command else []
    rows += [(name.replace("_", " "), _written(value)) for name, value in changed.items()]
    policies = f"class in neither map: {options.empty:g}; missing prediction: {options.missing}"
    versions = f"softdice {__version__}, torch {torch.__version__}, NumPy {np.__version__}, Python "
    rows += [("policies", policies), ("versions", versions + platform.python_version())]
    rows += [("date", datetime.datetime.now().astimezone().isoformat(" ", "minutes"))]
    return "<dl>" + "".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in rows) + "</dl>"


def _written(value: object) -> str:
    """Return the value of an option as people write it."""
    if isinstance(value, dict):
        return "; ".join(f"{f'{key}: ' if key != '' else ''}{_written(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _legend() -> str:
    """Write what the colours of the pictures mean."""
    colours = {"in both": RIGHT, "predicted in error": EXTRA, "missed": MISSED, "other classes of the label": OTHER}
    boxes = "".join(f"<span><i style='background:rgb{rgb}'></i>{what}</span>" for what, rgb in colours.items())
    return f"<p class='legend'>{boxes}</p>"


class _Figures:
    """Draws pictures of cases with captions, with the same options, images and view for all."""

    def __init__(self, options: Options, images: Mapping[str, Path], view: str) -> None:
        self.options, self.images, self.view = options, images, view

    def worst(self, table: Table, order: list[int]) -> str:
        """Draw the worst class of each of the worst cases that have an error; of a single case its worst classes."""
        dice_NK = table.dice
        wrong = [i for i in order if np.nanmin(dice_NK[i]) < 1]
        if not wrong:
            return "<p>No case with an error.</p>"
        if len(table.cases) == 1:
            chosen = [(0, int(k)) for k in np.argsort(dice_NK[0], kind="stable") if dice_NK[0, k] < 1][:WORST]
        else:
            chosen = [(i, int(np.nanargmin(dice_NK[i]))) for i in wrong[:WORST]]
        figures = [self.figure(table, i, table.keys[k]) for i, k in chosen]
        return f"<div class='pictures'>{''.join(figures)}</div>"

    def figure(self, table: Table, i: int, key: int | str, side: str = "", beside: Sequence[Path | None] = ()) -> str:
        """Draw a class of a case, with a caption; if that fails, the caption says why.

        Args:
            side: name of the predictions, where two are compared. beside: the predictions drawn beside this one.
        """
        case, dice_K = table.cases[i], table.case(i).dice[0]
        prediction = Path(table.predictions[i]) if table.predictions[i] else None
        under, others = self.images.get(case), [other for other in beside if other != prediction]
        try:
            drawn = picture(
                prediction, Path(table.truths[i]), key, self.options, under=under, view=self.view, beside=others
            )
        except (FileError, ScoreError) as error:  # a file was changed or taken away since it was scored
            return f"<figure><figcaption>{escape(str(error))}</figcaption></figure>"
        left, right = drawn.sides
        marks = f"<b class='left'>{left}</b><b class='right'>{right}</b>" if left else ""
        if drawn.bar is not None:
            marks += f"<i style='width:{100 * drawn.bar[0]:.1f}%'>{drawn.bar[1]} mm</i>"
        dice = dice_K[table.keys.index(key)] if key in table.keys else np.nan
        title = f"<b>{escape(case)}</b> {escape(side) if side else f'mean Dice {text(float(mean(dice_K)))}'}"
        place = f"{escape(table.label(key))}: {text(dice)}{escape(drawn.place)}"
        image = f"<img alt='{escape(case)}' src='data:image/png;base64,{drawn.png}'>"
        view = f"<div class='view'><span class='frame'>{image}{marks}</span></div>"
        return f"<figure>{view}<figcaption>{title}<br>{place}</figcaption></figure>"
