"""cases -> scores per case and class, means with intervals, and the comparison of two sets of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from softdice.images.files import FileError
from softdice.images.labels import one_palette
from softdice.metrics import formulas as scores
from softdice.scoring.cases import Case

RESAMPLES = 2000
"""Resamples of a bootstrap."""

_SEED = 0
_AT_ONCE = 1 << 18
"""Cases that are drawn at a time: memory does not grow with their number."""


@dataclass
class Table:
    """Cases (N) by classes (K): counts (N, 3, K), and what is known of each case.

    A class that a case has neither in the prediction nor in the truth has counts 0 there, hence the score nan.
    """

    keys: tuple[int | str, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 0), np.int64))
    cases: list[str] = field(default_factory=list)
    predictions: list[str] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)
    voxels: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def dice(self) -> np.ndarray:
        """(N, K) float64, nan where the class is in neither."""
        return score(scores.dice, self.counts)

    @property
    def iou(self) -> np.ndarray:
        """(N, K) float64, nan where the class is in neither."""
        return score(scores.jaccard, self.counts)

    def label(self, key: int | str) -> str:
        """A class as people read it."""
        return f"{key} {self.names[key]}" if isinstance(key, int) and key in self.names else str(key)


def tabulate(
    cases: Iterable[Case], keys: Sequence[int | str] | None = None, names: dict[int, str] | None = None
) -> Table:
    """cases -> Table; classes are `keys`, or every class that occurs, ascending. 24 bytes per case and class."""
    table, rows, seen = Table(names=dict(names or {})), [], dict.fromkeys(keys or ())
    shared: dict[tuple[int | str, ...], tuple[int | str, ...]] = {}  # ten thousand cases, a few sets of classes
    colours: dict[int, tuple[str, str]] = {}  # of palettes: a label must mean one thing in all cases
    for case in cases:
        if case.error:
            table.errors.append(case.error)
            continue
        try:
            one_palette(case.truth, case.colours, colours)
        except FileError as error:
            table.errors.append(str(error))
            continue
        table.cases.append(case.case)
        table.predictions.append(case.prediction)
        table.truths.append(case.truth)
        table.voxels.append(case.voxels)
        for label, name in case.names.items():
            table.names.setdefault(label, name)
        seen.update(dict.fromkeys(case.keys))
        rows.append((shared.setdefault(case.keys, case.keys), case.counts))
    if keys is not None or any(isinstance(key, str) for key in seen):
        table.keys = tuple(seen)
    else:
        table.keys = tuple(sorted(seen, key=int))
    dtype = np.result_type(np.int64, *{counts.dtype for _, counts in rows})
    table.counts = np.zeros((len(rows), 3, len(table.keys)), dtype)
    column = {key: i for i, key in enumerate(table.keys)}
    for row, (found, counts) in zip(table.counts, rows, strict=True):
        row[:, [column[key] for key in found]] = counts
    return table


def score(formula: object, counts: np.ndarray) -> np.ndarray:
    """A formula of `softdice.metrics.formulas`, counts (..., 3, K) -> (..., K) float64."""
    assert callable(formula)
    return np.asarray(formula(torch.from_numpy(np.moveaxis(counts, -2, 0).copy())).numpy())


def mean(values: np.ndarray) -> np.ndarray:
    """(N, ...) -> (...): the mean over what is not nan, nan where nothing is left."""
    valid = ~np.isnan(values)
    total, number = np.where(valid, values, 0.0).sum(0), valid.sum(0)
    return np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)


def intervals(values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values of N cases and K classes -> 95 % intervals of the class means (2, K), and of the mean of those, (2,).

    Percentile bootstrap over the cases (2000 resamples, fixed seed); nan is skipped as in the mean itself; nan for
    fewer than two cases. Source: B. Efron, Annals of Statistics 7, 1979.
    """
    N, K = values_NK.shape
    if N < 2 or K == 0:
        return np.full((2, K), np.nan), np.full(2, np.nan)
    generator = np.random.default_rng(_SEED)
    valid_NK = ~np.isnan(values_NK)
    filled_NK, valid_NK = np.where(valid_NK, values_NK, 0.0), valid_NK.astype(np.float64)
    means_RK = np.full((RESAMPLES, K), np.nan)
    step = min(64, max(1, _AT_ONCE // N))
    for start in range(0, RESAMPLES, step):
        R = min(step, RESAMPLES - start)
        drawn_RN = generator.integers(0, N, (R, N)) + N * np.arange(R)[:, None]
        times_RN = np.bincount(drawn_RN.reshape(-1), minlength=R * N).reshape(R, N).astype(np.float64)
        total, number = times_RN @ filled_NK, times_RN @ valid_NK
        np.divide(total, number, out=means_RK[start : start + R], where=number > 0)
    return _quantiles(means_RK), _quantiles(mean(means_RK.T)[:, None])[:, 0]


def _quantiles(means_RK: np.ndarray) -> np.ndarray:
    found = np.full((2, means_RK.shape[1]), np.nan)
    for k, column in enumerate(means_RK.T):
        column = column[~np.isnan(column)]
        if column.size:
            found[:, k] = np.quantile(column, (0.025, 0.975))
    return found


@dataclass(frozen=True)
class Summary:
    """Aggregates over the cases: (K,) arrays per class, and numbers over all classes.

    Args:
        cases: cases that the mean of a class rests on, (K,).
        dice: mean over cases; dice_interval: (2, K); iou: mean over cases.
        pooled_dice, pooled_iou: from the counts of all cases added, (K,).
        macro_dice, macro_interval: mean of the class means; macro_iou.
        micro_dice, micro_iou: from the counts of all cases and classes added.
    """

    cases: np.ndarray
    dice: np.ndarray
    dice_interval: np.ndarray
    iou: np.ndarray
    pooled_dice: np.ndarray
    pooled_iou: np.ndarray
    macro_dice: float
    macro_interval: np.ndarray
    macro_iou: float
    micro_dice: float
    micro_iou: float


def summarise(table: Table) -> Summary:
    """Table -> Summary."""
    dice_NK, iou_NK, pooled_3K = table.dice, table.iou, table.counts.sum(0)
    interval, macro_interval = intervals(dice_NK)
    everything = pooled_3K.sum(1, keepdims=True)
    return Summary(
        cases=(~np.isnan(dice_NK)).sum(0),
        dice=mean(dice_NK),
        dice_interval=interval,
        iou=mean(iou_NK),
        pooled_dice=score(scores.dice, pooled_3K),
        pooled_iou=score(scores.jaccard, pooled_3K),
        macro_dice=float(mean(mean(dice_NK))),
        macro_interval=macro_interval,
        macro_iou=float(mean(mean(iou_NK))),
        micro_dice=float(score(scores.dice, everything)[0]),
        micro_iou=float(score(scores.jaccard, everything)[0]),
    )


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions on the same cases: Dice of the first minus Dice of the second, per class.

    Args:
        keys: the classes, (K,). cases: pairs that each rests on (both scores defined), (K,).
        difference: mean; interval: (2, K) bootstrap over the cases; p_value: Wilcoxon's signed-rank test, two-sided.
        macro_difference, macro_interval: mean over the classes of the differences.
    """

    keys: tuple[int | str, ...]
    cases: np.ndarray
    difference: np.ndarray
    interval: np.ndarray
    p_value: np.ndarray
    macro_difference: float
    macro_interval: np.ndarray


def compare(first: Table, second: Table) -> Comparison:
    """Table, Table -> Comparison over the cases that both have.

    p is 1 where no case differs, nan where no case has the class in both. Source: F. Wilcoxon, Biometrics 1, 1945.
    """
    from scipy.stats import wilcoxon

    keys = tuple(dict.fromkeys((*first.keys, *second.keys)))
    if all(isinstance(key, int) for key in keys):
        keys = tuple(sorted(keys, key=int))
    scored = set(second.cases)
    common = [case for case in first.cases if case in scored]
    sides = []
    for table in (first, second):
        rows, columns = {case: i for i, case in enumerate(table.cases)}, {key: i for i, key in enumerate(table.keys)}
        dice = np.column_stack([table.dice, np.full(len(table.cases), np.nan)])
        sides.append(dice[[rows[case] for case in common]][:, [columns.get(key, -1) for key in keys]])
    difference = sides[0] - sides[1]
    p_value = np.full(len(keys), np.nan)
    for k, column in enumerate(difference.T):
        column = column[~np.isnan(column)]
        if column.size:
            p_value[k] = wilcoxon(column).pvalue if np.any(column != 0) else 1.0
    interval, macro_interval = intervals(difference)
    cases = (~np.isnan(difference)).sum(0)
    macro = float(mean(mean(difference)))
    return Comparison(keys, cases, mean(difference), interval, p_value, macro, macro_interval)
