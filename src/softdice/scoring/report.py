"""Table, Summary -> one HTML page that needs no other file: numbers, box plots, the worst cases with pictures."""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path

import numpy as np
import torch

from softdice.images.files import FileError
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.output import MOST_DIFFERENT, difference_row
from softdice.scoring.page import PAGE
from softdice.scoring.pictures import EXTRA, MISSED, OTHER, RIGHT, picture
from softdice.scoring.plots import box_plots, escape
from softdice.scoring.summary import UNBOUNDED, Comparison, Summary, Table, mean, renumbered_line, unnamed_line
from softdice.scoring.tables import (
    CLASSES,
    LEGEND,
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
"""Figures with a picture, and cases in the list of all."""


PAPER = 14
"""Columns that a sheet of paper has room for; more than these are left out from the standard deviation on."""


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
    """{name of the predictions: Table}, their summaries, the first compared with each other one -> HTML.

    Reads the worst cases again for their pictures.

    Args:
        truth: path of the reference. command: the line that made the page. images: case -> the image to draw under its
            masks. view: `softdice.scoring.pictures.VIEWS`.
    """
    names = _short([*tables, truth])
    first, table = next(iter(tables.items()))
    drawn = _Pictures(options, images or {}, view)
    doubts = (unnamed_line(table), renumbered_line(tables.values()))
    parts = [f"<p>{escape(line)}</p>" for line in doubts if line]
    errors = [error for each in tables.values() for error in each.errors]
    if errors:
        listed = "".join(f"<li>{escape(error)}</li>" for error in errors)
        parts.append(f"<details><summary>Not scored: {len(errors)}</summary><ul class='errors'>{listed}</ul></details>")
    if len(tables) > 1:
        grid = models_grid({names[name]: each for name, each in tables.items()}, [*summaries.values()])
        parts.append("<h2>All predictions</h2>" + _html_table(grid.columns, grid.rows) + _meanings(grid.columns))
    if len(tables) > 2:
        parts.append(f"<p>{escape(rank_line({names[name]: each for name, each in tables.items()}))}</p>")
    for other, comparison in zip(list(tables)[1:], comparisons or (), strict=True):
        pair = {names[side]: tables[side] for side in (first, other)}
        parts.append(_comparison(comparison, pair, list(pair), drawn))
    for name, each in tables.items():
        parts.append(_side(names[name], each, summaries[name]))
    order = _worst_first(table)
    parts.append(f"<h2>Worst cases of {escape(names[first])}</h2>" + _legend() + drawn.worst(table, order))
    parts.append(f"<h2>Cases of {escape(names[first])}</h2>" + _case_table(table, order))
    parts.append("<h2>How this was made</h2>" + _about(tables, options, truth, command))
    *some, last = (names[name] for name in tables)
    title = f"{', '.join(some) + ' and ' * bool(some)}{last} against {names[truth]}"
    empty = "is not scored there" if math.isnan(options.empty) else f"scores {options.empty:g} there"
    body = _with_contents("\n".join(parts))
    return PAGE.format(title=escape(title), version=__version__, empty=empty, body=body)


def _with_contents(body: str) -> str:
    """Return the page's body with its headings numbered as targets, and a table of contents before it."""
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    numbers = count(1)
    body = re.sub(r"<h2>", lambda _: f"<h2 id='part{next(numbers)}'>", body)
    links = "".join(f"<li><a href='#part{i}'>{heading}</a></li>" for i, heading in enumerate(headings, 1))
    return f"<nav aria-label='Contents'><ul>{links}</ul></nav>\n{body}"


def _short(paths: Sequence[str]) -> dict[str, str]:
    """Paths -> their last parts, as many as it takes to tell them apart."""
    short = {}
    for path in paths:
        parts = Path(path).parts
        others = [Path(other).parts for other in paths if other != path]
        clear = (n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others))
        short[path] = "/".join(parts[-next(clear, len(parts)) :]) or path
    return short


def _side(name: str, table: Table, summary: Summary) -> str:
    grid = class_grid(table, summary)
    wide = len(grid.columns) > PAPER
    on_screen_from = next((i for i, name in enumerate(grid.columns) if wide and name == CLASSES["dice_sd"]), 10**9)
    grid_table = _html_table(grid.columns, grid.rows, total=grid.total, on_screen_from=on_screen_from)
    grid_table += _meanings(grid.columns)
    plot = ""
    if len(table.cases) > 1:
        labels = [table.label(key) for key in table.keys]
        plot = f"<h3>Dice of the cases, by class</h3>{box_plots(labels, table.dice, 'Dice')}"
        plot += "".join(
            _folded(f"{CLASSES[name]} of the cases, by class", labels, table.asked[name], name) for name in table.shapes
        )
    return f"<h2>{escape(name)}</h2>" + _key_numbers(table, grid) + grid_table + plot


def _folded(title: str, labels: list[str], values: np.ndarray, name: str, *, signed: bool = False) -> str:
    """Box plots that are drawn when they are asked for: with 40 classes each takes a screen."""
    plot = box_plots(labels, values, CLASSES[name], signed=signed, longest=None if name in UNBOUNDED else 1.0)
    return f"<details><summary>{escape(title)}</summary>{plot}</details>"


def _key_numbers(table: Table, grid: Grid) -> str:
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
    """Return a legend: what the columns mean that do not say it themselves."""
    said = {CLASSES[key]: meaning for key, meaning in LEGEND.items()}
    parts = [f"<b>{escape(name)}</b> {escape(said[name])}" for name in columns if name in said]
    return f"<p class='meanings'>{'; '.join(parts)}.</p>"


def _html_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] = (),
    on_screen_from: int = 10**9,
) -> str:
    """Click on a column to sort by it; the first column is text, the others are numbers. A zero is marked.

    Headings are no <button>: Chromium repeats no head with one on the next sheet of paper.

    Args:
        total: a last row, which stays where it is.
        on_screen_from: columns from this one on are left out on paper, which is not so wide.
    """

    def row(tag: str, cells: Sequence[str]) -> str:
        parts = []
        for i, cell in enumerate(cells):
            words = ["zero"] * (tag == "td" and i > 0 and cell == "0.0000") + ["screen"] * (i >= on_screen_from)
            inner = escape(cell).replace(" .. ", "&nbsp;.. ").replace("_", "_<wbr>")
            inner = f"<span role='button' tabindex='0'>{inner}</span>" if tag == "th" else inner
            about = " scope='col'" if tag == "th" else ""
            parts.append(f"<{tag}{about}{' class=' + repr(' '.join(words)) if words else ''}>{inner}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    foot = f"<tfoot>{row('td', total)}</tfoot>" if total and len(rows) > 1 else ""
    return f"<div class='scroll'><table><thead>{row('th', columns)}</thead><tbody>{body}</tbody>{foot}</table></div>"


def _comparison(comparison: Comparison, tables: dict[str, Table], names: list[str], drawn: _Pictures) -> str:
    table = next(iter(tables.values()))
    grid = comparison_grid(table, comparison)
    total = dict(zip(grid.columns, grid.total, strict=True))
    macro = f"{total['difference']} ({total['95 % interval']})"
    said = f"Dice of {escape(names[0])} minus Dice of {escape(names[1])}, case by case. Mean of the classes: {macro}."
    labels = [table.label(key) for key in comparison.keys]
    plot = f"<h3>Differences of the cases, by class</h3>{box_plots(labels, comparison.each, 'difference', signed=True)}"
    if comparison.shapes:
        shapes = shapes_grid(table, comparison)
        others = (f"{CLASSES[name]}: differences of the cases, by class" for name in comparison.shapes)
        plot += "<h3>Differences of shapes, means of the cases</h3>" + _html_table(
            shapes.columns, shapes.rows, total=shapes.total
        )
        plot += "".join(
            _folded(title, labels, other.each, name, signed=True)
            for title, (name, other) in zip(others, comparison.shapes.items(), strict=True)
        )
    different = comparison.most_different(MOST_DIFFERENT)
    rows: list[list[str]] = []
    figures: list[str] = []
    for i in different:
        row = difference_row(comparison, i, table)
        label = table.label(row["label"])
        rows.append([row["case"], text(row["difference"], "+.4f"), text(row["class_difference"], "+.4f"), label])
        sides = [(side, side.cases.index(row["case"])) for side in tables.values()]
        files = [Path(side.predictions[k]) if side.predictions[k] else None for side, k in sides]
        for name, (side, k) in zip(names, sides, strict=True) if len(figures) < WORST else ():
            figures.append(drawn.figure(side, k, row["label"], name, beside=files))
    listed = _html_table(["case", "difference", "largest", "in class"], rows)
    most = f"<h3>Cases that differ most</h3>{listed}{_legend()}<div class='pictures'>{''.join(figures)}</div>"
    alone = f"<p>{alone_line(comparison)}</p>"
    table_html = _html_table(grid.columns, grid.rows, total=grid.total)
    head = f"<h2>{escape(names[0])} and {escape(names[1])}</h2><p>{said}</p>"
    return head + table_html + alone + plot + (most if different else "")


def _worst_first(table: Table) -> list[int]:
    """Cases by their mean Dice, those without any score left out."""
    each = mean(table.dice.T)
    return [int(i) for i in np.argsort(each, kind="stable") if not np.isnan(each[i])]


def _case_table(table: Table, order: list[int]) -> str:
    dice, rows = table.dice, []
    for i in order[:LISTED]:
        k = int(np.nanargmin(dice[i]))
        lowest = [text(float(mean(dice[i]))), text(dice[i, k]), table.label(table.keys[k])]
        rows.append([table.cases[i], *lowest, *(text(value) for value in dice[i].tolist())])
    note = f"<p>The {LISTED} worst of {len(order)}.</p>" if len(order) > LISTED else ""
    columns = ["case", "mean Dice", "lowest Dice", "in class", *map(table.label, table.keys)]
    filter_ = "<input type='search' placeholder='Filter by name' aria-label='Filter by name'>" if len(rows) > 1 else ""
    return note + filter_ + _html_table(columns, rows, on_screen_from=4 if len(table.keys) > 8 else 10**9)


def _about(tables: dict[str, Table], options: Options, truth: str, command: str) -> str:
    """What it takes to make the page again: folders, the command, options that are not as they are by default."""
    defaults = Options()
    said = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if repr(getattr(options, field.name)) != repr(getattr(defaults, field.name))
    }
    rows = [("predictions", str(Path(name).absolute())) for name in tables]
    rows += [("reference", str(Path(truth).absolute()))]
    rows += [("command", command)] if command else []
    rows += [(name.replace("_", " "), _plain(value)) for name, value in said.items()]
    policies = f"class in neither map: {options.empty:g}; missing prediction: {options.missing}"
    versions = f"softdice {__version__}, torch {torch.__version__}, NumPy {np.__version__}, Python "
    rows += [("policies", policies), ("versions", versions + platform.python_version())]
    rows += [("date", datetime.datetime.now().astimezone().isoformat(" ", "minutes"))]
    return "<dl>" + "".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in rows) + "</dl>"


def _plain(value: object) -> str:
    """The value of an option as people write it."""
    if isinstance(value, dict):
        return "; ".join(f"{f'{key}: ' if key != '' else ''}{_plain(each)}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _legend() -> str:
    said = {"in both": RIGHT, "predicted in error": EXTRA, "missed": MISSED, "other classes of the label": OTHER}
    boxes = "".join(f"<span><i style='background:rgb{colour}'></i>{what}</span>" for what, colour in said.items())
    return f"<p class='legend'>{boxes}</p>"


class _Pictures:
    """Figures of cases; holds what all of them share."""

    def __init__(self, options: Options, images: Mapping[str, Path], view: str) -> None:
        self.options, self.images, self.view = options, images, view

    def worst(self, table: Table, order: list[int]) -> str:
        """The worst class of each of the worst cases that have an error; of a single case its worst classes."""
        dice = table.dice
        wrong = [i for i in order if np.nanmin(dice[i]) < 1]
        if not wrong:
            return "<p>No case with an error.</p>"
        if len(table.cases) == 1:
            chosen = [(0, int(k)) for k in np.argsort(dice[0], kind="stable") if dice[0, k] < 1][:WORST]
        else:
            chosen = [(i, int(np.nanargmin(dice[i]))) for i in wrong[:WORST]]
        figures = [self.figure(table, i, table.keys[k]) for i, k in chosen]
        return f"<div class='pictures'>{''.join(figures)}</div>"

    def figure(self, table: Table, i: int, key: int | str, side: str = "", beside: Sequence[Path | None] = ()) -> str:
        """A case and a class -> picture and caption; without a picture, why there is none."""
        case, one = table.cases[i], table.case(i).dice[0]
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
        value = one[table.keys.index(key)] if key in table.keys else np.nan
        said = (
            f"<b>{escape(case)}</b> {escape(side)}"
            if side
            else f"<b>{escape(case)}</b> mean Dice {text(float(mean(one)))}"
        )
        place = f"{escape(table.label(key))}: {text(value)}{escape(drawn.place)}"
        image = f"<img alt='{escape(case)}' src='data:image/png;base64,{drawn.png}'>"
        view = f"<div class='view'><span class='frame'>{image}{marks}</span></div>"
        return f"<figure>{view}<figcaption>{said}<br>{place}</figcaption></figure>"
