"""Table, Summary -> one HTML page that needs no other file: numbers, box plots, the worst cases with pictures."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np

from softdice.images.files import FileError
from softdice.scoring.cases import load_pair, region_mask
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.page import PAGE
from softdice.scoring.summary import Comparison, Summary, Table, mean
from softdice.scoring.tables import Grid, class_grid, comparison_grid, text
from softdice.version import __version__

WORST, LISTED = 12, 1000
"""Cases with a picture, and cases in the list of all."""

PICTURE_PIXELS = 360
RIGHT, EXTRA, MISSED, OTHER = (201, 208, 216), (230, 159, 0), (64, 156, 255), (58, 64, 72)
"""Colours that people with any colour vision tell apart: right voxels, predicted in error, missed, other classes."""


def to_html(
    tables: dict[str, Table],
    summaries: dict[str, Summary],
    comparison: Comparison | None,
    options: Options,
    truth: str,
) -> str:
    """{name of the predictions: Table}, their summaries -> HTML. Reads the worst cases again for their pictures."""
    name, table = next(iter(tables.items()))
    parts = []
    for title, each in tables.items():
        summary = summaries[title]
        grid = class_grid(each, summary)
        parts.append(f"<h2>{escape(title)}</h2>" + _key_numbers(each, grid) + _html_table(grid.columns, grid.rows))
        parts.append(f"<h3>Dice of the cases, by class</h3>{box_plots(each, summary)}")
    if comparison is not None:
        parts.insert(0, _comparison_table(comparison, list(tables), table))
    order = _worst_first(table)
    parts.append(f"<h2>Worst cases of {escape(name)}</h2>" + _legend() + _pictures(table, order[:WORST], options))
    parts.append(f"<h2>Cases of {escape(name)}</h2>" + _case_table(table, order))
    errors = [error for each in tables.values() for error in each.errors]
    if errors:
        listed = "".join(f"<li>{escape(error)}</li>" for error in errors)
        parts.append(f"<h2>Not scored: {len(errors)}</h2><ul class='errors'>{listed}</ul>")
    title = f"{name} against {truth}"
    return PAGE.format(title=escape(title), version=__version__, body="\n".join(parts))


def _key_numbers(table: Table, grid: Grid) -> str:
    _, cases, dice, spread, pooled, *_ = grid.total
    cells = [
        ("mean Dice of the classes", dice, "" if spread == "-" else f"95 % {spread}"),
        ("pooled Dice", pooled, "all voxels of all cases"),
        ("cases", cases, f"{len(table.errors)} not scored" if table.errors else "all scored"),
        ("classes", str(len(grid.rows)), ""),
    ]
    return "<div class='numbers'>" + "".join(
        f"<div><b>{value}</b><span>{what}</span><small>{note}</small></div>" for what, value, note in cells
    ) + "</div>"  # fmt: skip


def _html_table(columns: list[str], rows: list[list[str]]) -> str:
    """Click on a column to sort by it; the first column is text, the others are numbers."""
    head = "".join(f"<th scope='col'><button>{escape(column)}</button></th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _comparison_table(comparison: Comparison, names: list[str], table: Table) -> str:
    grid = comparison_grid(table, comparison)
    macro = "{1} ({2})".format(*grid.total[1:])
    said = f"Dice of {escape(names[0])} minus Dice of {escape(names[1])}, case by case. Mean of the classes: {macro}."
    return f"<h2>Comparison</h2><p>{said}</p>{_html_table(grid.columns, grid.rows)}"


def _worst_first(table: Table) -> list[int]:
    """Cases by their mean Dice, those without any score left out."""
    each = mean(table.dice.T)
    return [int(i) for i in np.argsort(each, kind="stable") if not np.isnan(each[i])]


def _case_table(table: Table, order: list[int]) -> str:
    dice, rows = table.dice, []
    for i in order[:LISTED]:
        k = int(np.nanargmin(dice[i]))
        rows.append([table.cases[i], text(float(mean(dice[i]))), text(dice[i, k]), table.label(table.keys[k])])
    note = f"<p>The {LISTED} worst of {len(order)}.</p>" if len(order) > LISTED else ""
    return note + _html_table(["case", "mean Dice", "lowest Dice", "in class"], rows)


def box_plots(table: Table, summary: Summary) -> str:
    """One row per class: box from quartile to quartile, line at the median, whiskers to the furthest case within 1.5
    box lengths, a dot for every case beyond, a diamond at the mean.

    Source: J. W. Tukey, Exploratory Data Analysis, 1977.
    """
    dice, height, left, width = table.dice, 22, 220, 560
    bottom = height * len(table.keys) + 6

    def x(value: float) -> str:
        return f"{left + width * value:.1f}"

    parts = [
        f"<line class='grid' x1='{x(tick / 5)}' x2='{x(tick / 5)}' y1='0' y2='{bottom}'/>"
        f"<text x='{x(tick / 5)}' y='{bottom + 16}' text-anchor='middle'>{tick / 5:.1f}</text>"
        for tick in range(6)
    ]
    for k, key in enumerate(table.keys):
        y, values = height * k + height // 2 + 3, np.sort(dice[:, k][~np.isnan(dice[:, k])])
        label = table.label(key)
        short = label if len(label) < 32 else label[:30] + "…"
        parts.append(f"<text x='{left - 10}' y='{y + 4}' text-anchor='end'>{escape(short)}</text>")
        if values.size == 0:
            parts.append(f"<text x='{left + 6}' y='{y + 4}' class='faint'>in no case</text>")
            continue
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        reach = 1.5 * (high - low)
        inside = values[(values >= low - reach) & (values <= high + reach)]
        told = f"{label}: median {middle:.4f}, quartiles {low:.4f} and {high:.4f}, {values.size} cases"
        box = max(width * (high - low), 1.0)
        parts.append(
            f"<g><title>{escape(told)}</title>"
            f"<line x1='{x(inside[0])}' x2='{x(inside[-1])}' y1='{y}' y2='{y}'/>"
            f"<rect x='{x(low)}' y='{y - 7}' width='{box:.1f}' height='14' rx='2'/>"
            f"<line class='median' x1='{x(middle)}' x2='{x(middle)}' y1='{y - 7}' y2='{y + 7}'/>"
        )
        beyond = np.unique(values[(values < low - reach) | (values > high + reach)].round(3))
        parts.extend(f"<circle cx='{x(value)}' cy='{y}' r='2.5'/>" for value in beyond)
        parts.append(f"<path class='mean' d='M{x(summary.dice[k])} {y - 4}l4 4l-4 4l-4 -4z'/></g>")
    about = f"role='img' aria-label='Box plots of Dice by class' viewBox='0 0 {left + width + 20} {bottom + 24}'"
    return f"<div class='scroll'><svg {about}>{''.join(parts)}</svg></div>"


def _legend() -> str:
    said = {"in both": RIGHT, "predicted in error": EXTRA, "missed": MISSED, "other classes of the label": OTHER}
    boxes = "".join(f"<span><i style='background:rgb{colour}'></i>{what}</span>" for what, colour in said.items())
    return f"<p class='legend'>{boxes}</p>"


def _pictures(table: Table, cases: list[int], options: Options) -> str:
    figures = []
    for i in cases:
        dice = table.dice[i]
        k = int(np.nanargmin(dice))
        try:
            source, place = picture(Path(table.predictions[i]), Path(table.truths[i]), table.keys[k], options)
        except (FileError, ScoreError) as error:  # the file was changed or taken away since it was scored
            figures.append(f"<figure><figcaption>{escape(str(error))}</figcaption></figure>")
            continue
        said = f"<b>{escape(table.cases[i])}</b> mean Dice {text(float(mean(dice)))}"
        lowest = f"{escape(table.label(table.keys[k]))}: {text(dice[k])}{escape(place)}"
        image = f"<img alt='{escape(table.cases[i])}' src='data:image/png;base64,{source}'>"
        figures.append(f"<figure>{image}<figcaption>{said}<br>{lowest}</figcaption></figure>")
    return f"<div class='pictures'>{''.join(figures)}</div>"


def picture(prediction: Path, truth: Path, key: int | str, options: Options) -> tuple[str, str]:
    """A pair and a class -> PNG in base64 of the slice with the most errors, and which slice that is."""
    from PIL import Image as Picture

    p, t, _, truth_image = load_pair(prediction, truth, options)
    in_p = p > 0.5 if p.dtype.kind == "f" else region_mask(p, key, options)
    in_t, any_t, place = region_mask(t, key, options), t != 0, ""
    while in_t.ndim > 2:
        axis = 2 if in_t.ndim == 3 and truth_image.affine is not None else 0
        wrong = (in_p != in_t).sum(tuple(a for a in range(in_t.ndim) if a != axis))
        index = int(np.argmax(wrong)) if wrong.any() else in_t.shape[axis] // 2
        in_p, in_t, any_t = (np.take(mask, index, axis) for mask in (in_p, in_t, any_t))
        place += f", slice {index}"
        if axis == 2:
            in_p, in_t, any_t = (np.rot90(mask) for mask in (in_p, in_t, any_t))  # the front of a patient is up
    in_p, in_t, any_t = (np.atleast_2d(mask) for mask in (in_p, in_t, any_t))
    colours = np.full((*in_t.shape, 3), 16, np.uint8)
    for mask, colour in ((any_t, OTHER), (in_p & in_t, RIGHT), (in_p & ~in_t, EXTRA), (in_t & ~in_p, MISSED)):
        colours[mask] = colour
    shown = Picture.fromarray(colours)
    scale = PICTURE_PIXELS / max(shown.size)
    size = tuple(max(1, round(side * scale)) for side in shown.size)
    buffer = io.BytesIO()
    shown.resize((size[0], size[1]), Picture.Resampling.NEAREST if scale > 1 else Picture.Resampling.BOX).save(
        buffer, format="PNG", optimize=True
    )
    return base64.b64encode(buffer.getvalue()).decode(), place
