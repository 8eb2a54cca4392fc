"""Box plots of the scores of cases by class, in HTML that fits a phone and a sheet of paper: positions are per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as _escaped

import numpy as np

from softdice.evaluation.averages import mean
from softdice.evaluation.text import shown

_UNSORTED = 12
"""With more classes than this, rows are sorted by their means."""


def escape(text: str) -> str:
    """Return a name that is safe to show in HTML."""
    return _escaped(shown(text))


def box_plots(
    labels: Sequence[str], values_NK: np.ndarray, what: str, *, signed: bool = False, longest: float | None = 1.0
) -> str:
    """Write one row per class: a box from quartile to quartile, a line at the median, and a ring at the mean.

    Whiskers reach to the furthest case within 1.5 box lengths, with a dot for every case beyond. Cases beyond the axis
    are counted at its end. The axis runs from the lowest whisker to 1; for `signed` values it is symmetric about 0; for
    lengths (`longest` None) it runs from 0 to the highest whisker, and inf lies beyond. The number of cases that are
    exactly 0 stands beside the name, except for lengths, for which 0 is best.
    Source: J. W. Tukey, Exploratory Data Analysis, 1977.
    """
    columns = [np.sort(column[~np.isnan(column)]) for column in values_NK.T]
    finite = [column[np.isfinite(column)] for column in columns]
    boxes = [_box(column) for column in finite]
    low, high = _range([box for box in boxes if box is not None], signed, longest)
    goodness_K = mean(values_NK) if longest is not None else -mean(values_NK)
    order = np.argsort(goodness_K, kind="stable") if len(labels) > _UNSORTED else range(len(labels))

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
        first, quarter, middle, three_quarters, last = box
        title = f"{labels[k]}: median {middle:.4f}, quartiles {quarter:.4f} and {three_quarters:.4f}"
        title += f", {column.size} cases"
        outliers = np.unique(column[(column < first) | (column > last)].round(3))
        outliers = outliers[(outliers >= low) & (outliers <= high)]
        dots = "".join(f"<circle cx='{x(value)}' cy='11' r='2.5'/>" for value in outliers)
        below, above = int((column < low).sum()), int((column > high).sum())
        edges = f"<text class='faint' x='2' y='15'>◂ {below}</text>" if below else ""
        edges += f"<text class='faint' x='100%' y='15' text-anchor='end'>{above} ▸</text>" if above else ""
        centre = f"<circle class='mean' cx='{x(min(max(finite[k].mean(), low), high))}' cy='11' r='3.5'/>"
        rows.append(
            f"<div><span>{label}</span><svg role='img'><title>{escape(title)}</title>{grid}"
            f"<line x1='{x(first)}' x2='{x(last)}' y1='11' y2='11'/>"
            f"<rect x='{x(quarter)}' width='{100 * (three_quarters - quarter) / (high - low):.2f}%' "
            "y='4' height='14' rx='2'/>"
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
    """Return the whisker, quartile, median, quartile and whisker of sorted values; None without values."""
    if values.size == 0:
        return None
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    return float(min(inside[0], low)), low, middle, high, float(max(inside[-1], high))


def _range(boxes: list[tuple[float, ...]], signed: bool, longest: float | None) -> tuple[float, float]:
    """Return the ends of the axis, chosen so that ticks are round."""
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
