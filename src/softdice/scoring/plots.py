"""values of cases by classes -> box plots as HTML that fits a phone and a sheet of paper: positions are percentages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as _escaped

import numpy as np

from softdice.scoring.summary import mean
from softdice.scoring.writing import shown

_SORTED = 12
"""Classes from which on they stand in the order of their means."""


def escape(text: str) -> str:
    """A name as HTML shows it."""
    return _escaped(shown(text))


def box_plots(
    labels: Sequence[str], values_NK: np.ndarray, what: str, *, signed: bool = False, longest: float | None = 1.0
) -> str:
    """One row per class: box from quartile to quartile, line at the median, whiskers to the furthest case within 1.5
    box lengths, a dot for every case beyond, a ring at the mean. What lies beyond the axis is counted at its end.

    The axis runs from the lowest whisker to 1, for `signed` values symmetrically about 0, and for lengths (`longest`
    None) from 0 to the highest whisker; inf lies beyond. How many cases are exactly 0 stands beside the name, but for
    lengths, whose best that is. Source: J. W. Tukey, Exploratory Data Analysis, 1977.
    """
    columns = [np.sort(column[~np.isnan(column)]) for column in values_NK.T]
    finite = [column[np.isfinite(column)] for column in columns]
    boxes = [_box(column) for column in finite]
    low, high = _range([box for box in boxes if box is not None], signed, longest)
    worst = mean(values_NK) if longest is not None else -mean(values_NK)
    order = np.argsort(worst, kind="stable") if len(labels) > _SORTED else range(len(labels))

    def x(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    digits = 2 if longest is not None else 4
    ticks = [(tick, f"{tick:{'+' if signed else ''}.{digits}g}") for tick in np.linspace(low, high, 5)]
    grid = "".join(f"<line class='grid' x1='{x(tick)}' x2='{x(tick)}' y1='0' y2='100%'/>" for tick, _ in ticks)
    rows = []
    for k in order:
        column, box, label = columns[k], boxes[k], escape(labels[k]).replace("_", "_<wbr>")
        zeros = int((column == 0).sum())
        if zeros and not signed and longest is not None:
            label += f" <em>{zeros} × 0</em>"
        if box is None:
            why = f"inf in {column.size}" if column.size else "in no case"
            rows.append(
                f"<div><span>{label}</span><svg>{grid}<text class='faint' x='4' y='15'>{why}</text></svg></div>"
            )
            continue
        first, quarter, middle, three, last = box
        told = f"{labels[k]}: median {middle:.4f}, quartiles {quarter:.4f} and {three:.4f}, {column.size} cases"
        beyond = np.unique(column[(column < first) | (column > last)].round(3))
        shown_beyond = beyond[(beyond >= low) & (beyond <= high)]
        dots = "".join(f"<circle cx='{x(value)}' cy='11' r='2.5'/>" for value in shown_beyond)
        outside = int((column < low).sum()), int((column > high).sum())
        edges = f"<text class='faint' x='2' y='15'>◂ {outside[0]}</text>" if outside[0] else ""
        edges += f"<text class='faint' x='100%' y='15' text-anchor='end'>{outside[1]} ▸</text>" if outside[1] else ""
        centre = f"<circle class='mean' cx='{x(min(max(finite[k].mean(), low), high))}' cy='11' r='3.5'/>"
        rows.append(
            f"<div><span>{label}</span><svg role='img'><title>{escape(told)}</title>{grid}"
            f"<line x1='{x(first)}' x2='{x(last)}' y1='11' y2='11'/>"
            f"<rect x='{x(quarter)}' width='{100 * (three - quarter) / (high - low):.2f}%' y='4' height='14' rx='2'/>"
            f"<line class='median' x1='{x(middle)}' x2='{x(middle)}' y1='4' y2='18'/>{dots}{centre}{edges}</svg></div>"
        )
    anchors = ["start", *["middle"] * 3, "end"]
    axis = "".join(
        f"<text x='{x(tick)}' y='14' text-anchor='{anchor}'>{text}</text>"
        for (tick, text), anchor in zip(ticks, anchors, strict=True)
    )
    rows.append(f"<div class='axis'><span>{what}</span><svg aria-hidden='true'>{axis}</svg></div>")
    return f"<div class='plot'>{''.join(rows)}</div>"


def _box(values: np.ndarray) -> tuple[float, ...] | None:
    """Sorted values -> whisker, quartile, median, quartile, whisker."""
    if values.size == 0:
        return None
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    return float(min(inside[0], low)), low, middle, high, float(max(inside[-1], high))


def _range(boxes: list[tuple[float, ...]], signed: bool, longest: float | None) -> tuple[float, float]:
    """The ends of the axis, in steps that give round ticks."""
    if longest is None:
        most = max((box[-1] if not signed else max(abs(box[0]), abs(box[-1])) for box in boxes), default=0.0)
        step = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
        end = next(factor * step for factor in (1, 2, 4, 10) if most <= factor * step)
        return (-end if signed else 0.0), end
    if signed:
        most = max((max(abs(box[0]), abs(box[-1])) for box in boxes), default=1.0)
        end = next((end for end in (0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8) if most <= end), 1.0)
        return -end, end
    lowest = min((box[0] for box in boxes), default=0.0)
    return min(0.8, math.floor(lowest / 0.2) * 0.2), 1.0
