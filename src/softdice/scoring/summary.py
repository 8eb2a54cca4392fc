"""cases -> scores per case and class, means with intervals, and the comparison of two sets of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from softdice.images.files import FileError
from softdice.images.labels import one_palette
from softdice.metrics import formulas as scores
from softdice.scoring.cases import Case
from softdice.scoring.classes import MEASURED, METRICS
from softdice.scoring.writing import shown

DISTANCES = ("hd95", "mean_distance")
"""Columns whose best value is 0, and that have no upper bound."""

UNBOUNDED = (*DISTANCES, "matched", "missed", "extra")
"""Columns that are no shares."""

RESAMPLES = 2000
"""Resamples of a bootstrap."""

LEAST = 5
"""Cases from which on there is an interval: of fewer a bootstrap draws little but the same cases again."""

_MOST_UNNAMED = 8
_SEED = 0
_AT_ONCE = 1 << 18
"""Cases that are drawn at a time: memory does not grow with their number."""


@dataclass
class Table:
    """Cases (N) by classes (K): counts (N, 3, K), and what is known of each case.

    A class that a case has neither in the prediction nor in the truth has counts 0 there, hence the score nan.
    `unnamed`: label of the truth that no option names -> its voxels, and the cases that hold it. `renumbered`: cases
    that look like numbered objects.
    """

    keys: tuple[int | str, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 0), np.int64))
    cases: list[str] = field(default_factory=list)
    predictions: list[str] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)
    voxels: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    unnamed: dict[int, tuple[int, int]] = field(default_factory=dict)
    voxel_ml: list[float] = field(default_factory=list)
    empty: float = np.nan
    metrics: tuple[str, ...] = ()
    measured: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    renumbered: int = 0

    @property
    def dice(self) -> np.ndarray:
        """(N, K) float64, `empty` where the class is in neither."""
        return self._filled(score(scores.dice, self.counts))

    @property
    def iou(self) -> np.ndarray:
        """(N, K) float64, `empty` where the class is in neither."""
        return self._filled(score(scores.jaccard, self.counts))

    @property
    def asked(self) -> dict[str, np.ndarray]:
        """The columns of `metrics`, (N, K) float64 each."""
        voxels_N1, ml_N1 = np.array(self.voxels)[:, None], np.array(self.voxel_ml)[:, None]
        columns = {
            "precision": lambda: self._filled(score(scores.precision, self.counts)),
            "recall": lambda: self._filled(score(scores.recall, self.counts)),
            "specificity": lambda: score(scores.specificity, self.counts, voxels_N1),
            "ml_pred": lambda: self.counts[:, 1] * ml_N1,
            "ml_ref": lambda: self.counts[:, 2] * ml_N1,
            "volume_difference": lambda: score(scores.volume_difference, self.counts),
        }
        for i, name in enumerate(self.shapes):
            columns[name] = partial(self._filled, self.measured[:, i], self.empty_score(name))
        return {name: columns[name]() for metric in self.metrics for name in METRICS[metric]}

    @property
    def shapes(self) -> tuple[str, ...]:
        """The columns of `measured`."""
        return tuple(name for metric in self.metrics if metric in MEASURED for name in METRICS[metric])

    def empty_score(self, name: str) -> float:
        """What a column of `shapes` has for a class that is in neither map."""
        return 1 - self.empty if name in DISTANCES else self.empty

    def case(self, i: int) -> Table:
        """The same of one case only."""
        here = slice(i, i + 1)
        one = replace(self, counts=self.counts[here], voxels=self.voxels[here], voxel_ml=self.voxel_ml[here])
        one.measured = self.measured[here]
        return one

    def _filled(self, values: np.ndarray, empty: float | None = None) -> np.ndarray:
        return np.where(np.isnan(values), self.empty if empty is None else empty, values)

    def label(self, key: int | str) -> str:
        """A class as people read it."""
        return shown(f"{key} {self.names[key]}" if isinstance(key, int) and key in self.names else str(key))


def renumbered_line(tables: Iterable[Table]) -> str:
    """The doubt whether numbers are classes; an empty text where there is none."""
    cases = max(table.renumbered for table in tables)
    if not cases:
        return ""
    doubt = (
        f"In {cases} case{'s' * (cases != 1)} most labels of the reference lie under other numbers in the prediction"
    )
    return f"{doubt}. If each number is an object, as of a cell, and no class, pass --instances."


def unnamed_line(table: Table) -> str:
    """What the reference holds and no option names, with counts; an empty text where there is nothing."""
    if not table.unnamed:
        return ""
    most = sorted(table.unnamed.items(), key=lambda item: -item[1][0])
    said = ", ".join(
        f"{label} ({voxels} voxel{'s' * (voxels != 1)} in {cases} case{'s' * (cases != 1)})"
        for label, (voxels, cases) in most[:_MOST_UNNAMED]
    )
    more = f" and {len(most) - _MOST_UNNAMED} more" if len(most) > _MOST_UNNAMED else ""
    return f"The reference holds labels that no option names, and which are not scored: {said}{more}."


def tabulate(
    cases: Iterable[Case],
    keys: Sequence[int | str] | None = None,
    names: dict[int, str] | None = None,
    *,
    empty: float = np.nan,
    metrics: tuple[str, ...] = (),
) -> Table:
    """cases -> Table; classes are `keys`, or every class that occurs, ascending. 24 bytes per case and class."""
    table, rows, seen = Table(names=dict(names or {}), empty=empty, metrics=metrics), [], dict.fromkeys(keys or ())
    far: list[np.ndarray] = []
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
        table.renumbered += case.renumbered
        table.predictions.append(case.prediction)
        table.truths.append(case.truth)
        table.voxels.append(case.voxels)
        table.voxel_ml.append(case.voxel_ml)
        for label, name in case.names.items():
            table.names.setdefault(label, name)
        for label, voxels in case.unnamed.items():
            before = table.unnamed.get(label, (0, 0))
            table.unnamed[label] = before[0] + voxels, before[1] + 1
        seen.update(dict.fromkeys(case.keys))
        rows.append((shared.setdefault(case.keys, case.keys), case.counts))
        far.append(case.measured)
    if keys is not None or any(isinstance(key, str) for key in seen):
        table.keys = tuple(seen)
    else:
        table.keys = tuple(sorted(seen, key=int))
    dtype = np.result_type(np.int64, *{counts.dtype for _, counts in rows})
    table.counts = np.zeros((len(rows), 3, len(table.keys)), dtype)
    column = {key: i for i, key in enumerate(table.keys)}
    for row, (found, counts) in zip(table.counts, rows, strict=True):
        row[:, [column[key] for key in found]] = counts
    table.measured = np.full((len(rows), len(table.shapes), len(table.keys)), np.nan)
    for row, (found, _), scored in zip(table.measured, rows, far, strict=True):
        if scored.size:
            row[:, [column[key] for key in found]] = scored
    return table


def score(formula: object, counts: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """A formula of `softdice.metrics.formulas`, counts (..., 3, K) -> (..., K) float64."""
    assert callable(formula)
    return np.asarray(formula(torch.from_numpy(np.moveaxis(counts, -2, 0).copy()), *map(torch.from_numpy, others)))


def mean(values: np.ndarray) -> np.ndarray:
    """(N, ...) -> (...): the mean over what is not nan, nan where nothing is left."""
    valid = ~np.isnan(values)
    total, number = np.where(valid, values, 0.0).sum(0), valid.sum(0)
    return np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)


def intervals(values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values of N cases and K classes -> 95 % intervals of the class means (2, K), and of the mean of those, (2,).

    Percentile bootstrap over the cases (2000 resamples, fixed seed); nan is skipped as in the mean itself; nan for
    fewer than five cases that have a score. Source: B. Efron, Annals of Statistics 7, 1979.
    """
    N, K = values_NK.shape
    scored_NK = ~np.isnan(values_NK)
    enough_K = scored_NK.sum(0) >= LEAST
    if scored_NK.any(1).sum() < LEAST:
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
    bounds = (0.025, 0.975)
    of_classes = np.where(enough_K, quantiles(means_RK, bounds), np.nan)
    return of_classes, quantiles(mean(means_RK.T)[:, None], bounds)[:, 0]


def quantiles(values_NK: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """(N, K) -> (shares, K): of what is not nan, nan where nothing is left. Between a number and inf lies inf."""
    found = np.full((len(shares), values_NK.shape[1]), np.nan)
    for k, column in enumerate(values_NK.T):
        column = column[~np.isnan(column)]
        if np.isinf(column).any():
            low, high = (np.quantile(column, shares, method=side) for side in ("lower", "higher"))
            column = np.where(np.isinf(column), column[np.isfinite(column)].max(initial=0), column)
            found[:, k] = np.where(np.isinf(high), np.where(low == high, low, high), np.quantile(column, shares))
        elif column.size:
            found[:, k] = np.quantile(column, shares)
    return found


def mean_score(name: str, values: np.ndarray) -> np.ndarray:
    """A column, (N, ...) -> (...): the mean over the cases, of distances over the finite ones."""
    return mean(np.where(np.isinf(values), np.nan, values) if name in DISTANCES else values)


def deviation(values_NK: np.ndarray) -> np.ndarray:
    """(N, K) -> (K,): standard deviation (n - 1) of what is not nan, nan for fewer than two."""
    number = (~np.isnan(values_NK)).sum(0)
    squares = np.nansum((values_NK - mean(values_NK)) ** 2, 0)
    return np.sqrt(np.divide(squares, number - 1, out=np.full(number.shape, np.nan), where=number > 1))


@dataclass(frozen=True)
class Summary:
    """Aggregates over the cases: (K,) arrays per class, and numbers over all classes.

    Args:
        cases: cases that the mean of a class rests on, (K,).
        dice: mean over cases; dice_interval: (2, K); iou: mean over cases. dice_sd: standard deviation (n - 1);
            dice_median; dice_quartiles: (2, K).
        empty: cases whose truth lacks the class, and those of them where it was predicted, (2, K).
        asked: further metrics by name, means over the cases (K,), of distances over the finite ones.
        distances: distances by name -> median, quartiles and how many are infinite, (4, K).
        pooled_dice, pooled_iou: from the counts of all cases added, (K,).
        macro_dice, macro_interval: mean of the class means; macro_iou.
        micro_dice, micro_iou: from the counts of all cases and classes added.
    """

    cases: np.ndarray
    dice: np.ndarray
    dice_interval: np.ndarray
    dice_sd: np.ndarray
    dice_median: np.ndarray
    dice_quartiles: np.ndarray
    iou: np.ndarray
    pooled_dice: np.ndarray
    pooled_iou: np.ndarray
    macro_dice: float
    macro_interval: np.ndarray
    macro_iou: float
    micro_dice: float
    micro_iou: float
    empty: np.ndarray
    asked: dict[str, np.ndarray]
    distances: dict[str, np.ndarray]


def summarise(table: Table) -> Summary:
    """Table -> Summary."""
    dice_NK, iou_NK, pooled_3K, asked = table.dice, table.iou, table.counts.sum(0), table.asked
    interval, macro_interval = intervals(dice_NK)
    everything = pooled_3K.sum(1, keepdims=True)
    low, median, high = quantiles(dice_NK, (0.25, 0.5, 0.75))
    empty_NK, predicted_NK = table.counts[:, 2] == 0, table.counts[:, 1] > 0
    return Summary(
        cases=(~np.isnan(dice_NK)).sum(0),
        dice=mean(dice_NK),
        dice_interval=interval,
        dice_sd=deviation(dice_NK),
        dice_median=median,
        dice_quartiles=np.stack([low, high]),
        iou=mean(iou_NK),
        pooled_dice=score(scores.dice, pooled_3K),
        pooled_iou=score(scores.jaccard, pooled_3K),
        macro_dice=float(mean(mean(dice_NK))),
        macro_interval=macro_interval,
        macro_iou=float(mean(mean(iou_NK))),
        micro_dice=float(score(scores.dice, everything)[0]),
        micro_iou=float(score(scores.jaccard, everything)[0]),
        empty=np.stack([empty_NK.sum(0), (empty_NK & predicted_NK).sum(0)]),
        asked={name: mean_score(name, values) for name, values in asked.items()},
        distances={
            name: np.concatenate([quantiles(asked[name], (0.5, 0.25, 0.75)), [np.isinf(asked[name]).sum(0)]])
            for name in DISTANCES
            if name in asked
        },
    )


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions on the same cases: Dice of the first minus Dice of the second, per class.

    Args:
        keys: the classes, (K,). cases: pairs that each rests on (both scores defined), (K,).
        alone: cases that only the first, and only the second has a score of, (2, K): the other and the truth are empty.
        infinite: cases where the distance of the first, and of the second, is infinite, (2, K): they are in no pair.
        difference: mean; interval: (2, K) bootstrap over the cases; p_value: Wilcoxon's signed-rank test, two-sided;
            p_holm: the same, corrected for the number of classes.
        macro_difference, macro_interval: mean over the classes of the differences.
        names: cases that both have, (N,). each: their differences (N, K), nan where a score is undefined.
        shapes: the same of each column of `Table.shapes` that both have. Cases where a distance is inf are left out.
    """

    keys: tuple[int | str, ...]
    cases: np.ndarray
    alone: np.ndarray
    infinite: np.ndarray
    difference: np.ndarray
    interval: np.ndarray
    p_value: np.ndarray
    p_holm: np.ndarray
    macro_difference: float
    macro_interval: np.ndarray
    names: list[str]
    each: np.ndarray
    shapes: dict[str, Comparison] = field(default_factory=dict)

    def most_different(self, most: int) -> list[int]:
        """Numbers of the cases by the size of their mean difference, largest first, without those that agree."""
        size = np.abs(mean(self.each.T))
        return [int(i) for i in np.argsort(-size, kind="stable") if size[i] > 0][:most]


def compare(first: Table, second: Table) -> Comparison:
    """Table, Table -> Comparison over the cases that both have.

    p is 1 where no case differs, nan where no case has the class in both. Sources: F. Wilcoxon, Biometrics 1, 1945;
    S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    shapes = {name: _compare(first, second, name) for name in first.shapes if name in second.shapes}
    return replace(_compare(first, second, "dice"), shapes=shapes)


def _compare(first: Table, second: Table, what: str) -> Comparison:
    from scipy.stats import wilcoxon

    keys, common, sides = _aligned([first, second], what)
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = sides[0] - sides[1]
    difference[np.isinf(difference)] = np.nan
    p_value = np.full(len(keys), np.nan)
    for k, column in enumerate(difference.T):
        column = column[~np.isnan(column)]
        if column.size:
            p_value[k] = wilcoxon(column).pvalue if np.any(column != 0) else 1.0
    interval, macro_interval = intervals(difference)
    missing = np.isnan(sides)
    return Comparison(
        keys=keys,
        cases=(~np.isnan(difference)).sum(0),
        infinite=np.isinf(sides).sum(1),
        alone=np.stack([(~missing[0] & missing[1]).sum(0), (missing[0] & ~missing[1]).sum(0)]),
        difference=mean(difference),
        interval=interval,
        p_value=p_value,
        p_holm=holm(p_value),
        macro_difference=float(mean(mean(difference))),
        macro_interval=macro_interval,
        names=common,
        each=difference,
    )


def _aligned(tables: Sequence[Table], what: str = "dice") -> tuple[tuple[int | str, ...], list[str], np.ndarray]:
    """M tables -> all their classes (K), the cases that each of them has (N), one of their columns (M, N, K)."""
    keys = tuple(dict.fromkeys(key for table in tables for key in table.keys))
    if all(isinstance(key, int) for key in keys):
        keys = tuple(sorted(keys, key=int))
    everywhere = set.intersection(*(set(table.cases) for table in tables))
    common = [case for case in tables[0].cases if case in everywhere]
    sides = []
    for table in tables:
        rows, columns = {case: i for i, case in enumerate(table.cases)}, {key: i for i, key in enumerate(table.keys)}
        values, empty = (table.dice, table.empty) if what == "dice" else (table.asked[what], table.empty_score(what))
        values = np.column_stack([values, np.full(len(table.cases), empty)])  # last: a class that it lacks
        sides.append(values[[rows[case] for case in common]][:, [columns.get(key, -1) for key in keys]])
    return keys, common, np.array(sides)


def mean_ranks(tables: Sequence[Table]) -> tuple[np.ndarray, int]:
    """M tables -> the mean over cases and classes of the rank of each by Dice, (M,), 1 is best; how many were ranked.

    Equal scores share the mean of their ranks. Where only some have a score the reference lacks the class: those
    without one are right to predict nothing, and come first. Source: M. Friedman, JASA 32, 1937.
    """
    from scipy.stats import rankdata

    dice_MX = _aligned(tables)[2].reshape(len(tables), -1)
    dice_MX = dice_MX[:, ~np.isnan(dice_MX).all(0)]
    ranks_MX = rankdata(-np.where(np.isnan(dice_MX), np.inf, dice_MX), axis=0)
    return mean(ranks_MX.T), dice_MX.shape[1]


def holm(p: np.ndarray) -> np.ndarray:
    """p values -> the same, corrected for their number by Holm's method: step down, never above 1. nan stays.

    Example:
        >>> holm(np.array([0.01, 0.04, float("nan"), 0.03]))
        array([0.03, 0.06,  nan, 0.06])

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6, 1979.
    """
    corrected = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: (~np.isnan(p)).sum()]  # nan stands last
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)), 1)
    return corrected
