"""Box plots of the scores of cases by class, in HTML. N is a case, K a class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from softdice.evaluation.averages import mean
from softdice.scoring.templates import render

_UNSORTED = 12
"""With more classes than this, rows are sorted by their means."""


def box_plots(
    labels: Sequence[str], values_NK: np.ndarray, what: str, *, signed: bool = False, longest: float | None = 1.0
) -> Markup:
    """Return HTML, a row per class: a box from quartile to quartile, a line at the median, and a ring at the mean.

    Whiskers reach to the furthest case within 1.5 box lengths, with a dot for every case beyond. Cases beyond the axis
    are counted at its end. The number of cases that are exactly 0 stands beside the name, except for lengths, for which
    0 is best.

    Args:
        labels: of the K classes. values_NK: a score of each of N cases, nan where it is undefined.
        what: words below the axis. signed: values are differences, on an axis that is symmetric about 0.
        longest: end of the axis: 1.0 for shares, on an axis from the lowest whisker to 1; None for lengths, on an axis
            from 0 to the highest whisker, with inf beyond.

    Source: J. W. Tukey, Exploratory Data Analysis, 1977.
    """
    columns = [np.sort(column[~np.isnan(column)]) for column in values_NK.T]
    finite = [column[np.isfinite(column)] for column in columns]
    boxes = [_box(column) for column in finite]
    low, high = _range([box for box in boxes if box is not None], signed, longest)
    goodness_K = mean(values_NK) if longest is not None else -mean(values_NK)
    # many classes: the worst at the top; few keep the order of the tables
    order = np.argsort(goodness_K, kind="stable") if len(labels) > _UNSORTED else range(len(labels))
    rows = []
    for k in order:
        column, box = columns[k], boxes[k]
        zeros = 0 if signed or longest is None else int((column == 0).sum())
        row: dict[str, Any] = {"label": labels[k], "zeros": zeros, "cases": column.size, "box": box}
        if box is not None:
            outside = np.unique(column[(column < box[0]) | (column > box[-1])].round(3))
            row["outliers"] = outside[(outside >= low) & (outside <= high)]
            row["below"], row["above"] = int((column < low).sum()), int((column > high).sum())
            row["mean"] = min(max(finite[k].mean(), low), high)
        rows.append(row)
    number_format = f"{'+' if signed else ''}.{2 if longest is not None else 4}g"
    ticks = [(tick, format(tick, number_format)) for tick in np.linspace(low, high, 5)]

    def x(value: float) -> str:
        """Return the place of a value on the axis, as CSS has it."""
        return f"{100 * (value - low) / (high - low):.2f}%"

    return render("plots.html", rows=rows, ticks=ticks, x=x, low=low, high=high, what=what)


def _box(values: np.ndarray) -> tuple[float, ...] | None:
    """Return lower whisker, quartile, median, quartile and upper whisker of sorted finite values; None without any."""
    if values.size == 0:
        return None
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    return float(min(inside[0], low)), low, middle, high, float(max(inside[-1], high))


def _range(boxes: list[tuple[float, ...]], signed: bool, longest: float | None) -> tuple[float, float]:
    """Return the two ends of the axis for all boxes, so that its five ticks are round numbers.

    boxes: lower whisker, quartile, median, quartile and upper whisker each. signed: the axis is symmetric about 0.
    longest: 1.0 for scores from 0 to 1, None for lengths, which have no largest value.
    """
    furthest = max((max(abs(box[0]), abs(box[-1])) for box in boxes), default=0.0 if longest is None else 1.0)
    if longest is None:
        step = 10.0 ** math.floor(math.log10(furthest)) if furthest > 0 else 1.0
        end = next(factor * step for factor in (1, 2, 4, 10) if furthest <= factor * step)
        return (-end if signed else 0.0), end
    if signed:
        end = next((end for end in (0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8) if furthest <= end), 1.0)
        return -end, end
    lowest = min((box[0] for box in boxes), default=0.0)
    return min(0.8, math.floor(lowest / 0.2) * 0.2), 1.0  # five ticks, 0.05 to 0.25 apart
