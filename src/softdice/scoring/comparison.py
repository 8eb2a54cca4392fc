"""Compare tables of scores of the same cases: differences with intervals and p values, and mean ranks.

N is a case that all tables have, K a class, T a table, X a case and a class. A table holds the scores of one set of
predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from softdice.evaluation.averages import intervals, mean
from softdice.evaluation.table import Table


@dataclass(frozen=True)
class Comparison:
    """The differences, case by case, of a score of two sets of predictions: first minus second; Dice outside `shapes`.

    Args:
        keys: the classes. cases: how many pairs of scores each class rests on, (K,).
        alone: how many cases only the first, and only the second, has a score for, (2, K): the other predictions and
            the reference lack the class.
        infinite: cases where the distance of the first, and of the second, is infinite, (2, K); `cases` leaves them
            out.
        difference: mean over the cases, (K,). interval: bootstrap over the cases, (2, K). p_value: two-sided, of
            Wilcoxon's signed-rank test. p_holm: the same, corrected for the number of classes.
        macro_difference, macro_interval: mean of the class means.
        names: the cases. each: their differences, (N, K), nan where a score is undefined.
        shapes: a comparison for each column of `Table.shapes` that both have.
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
        """Return the positions of up to `most` cases with a mean difference other than 0, the largest first."""
        size_N = np.abs(mean(self.each.T))
        return [int(i) for i in np.argsort(-size_N, kind="stable") if size_N[i] > 0][:most]


def compare(first: Table, second: Table) -> Comparison:
    """Compare the Dice, and the scores that need masks (`shapes`), of two tables over the cases that both have.

    p is 1 where no case differs, nan where no case has a score in both. Sources: F. Wilcoxon, Biometrics 1, 1945;
    S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    shapes = {name: _compare(first, second, name) for name in first.shapes if name in second.shapes}
    return replace(_compare(first, second, "dice"), shapes=shapes)


def _compare(first: Table, second: Table, column: str) -> Comparison:
    """Compare one column, "dice" or a name in `Table.further`, over the cases of both tables; `shapes` stays empty.

    The p value of a class is two-sided, of Wilcoxon's signed-rank test of its differences, first - second.
    """
    from scipy.stats import wilcoxon

    keys, cases, scores_TNK = _aligned([first, second], column)
    with np.errstate(invalid="ignore"):  # inf - inf is nan
        difference_NK = scores_TNK[0] - scores_TNK[1]
    difference_NK[np.isinf(difference_NK)] = np.nan  # one of two distances is infinite: the pair is left out
    p_K = np.full(len(keys), np.nan)
    for k, differences in enumerate(difference_NK.T):
        differences = differences[~np.isnan(differences)]
        if differences.size:
            p_K[k] = wilcoxon(differences).pvalue if np.any(differences != 0) else 1.0
    interval, macro_interval = intervals(difference_NK)
    missing_TNK = np.isnan(scores_TNK)  # T is 2: [::-1] below exchanges the tables
    return Comparison(
        keys=keys,
        cases=(~np.isnan(difference_NK)).sum(0),
        infinite=np.isinf(scores_TNK).sum(1),
        alone=(~missing_TNK & missing_TNK[::-1]).sum(1),  # a score here, and none in the other table
        difference=mean(difference_NK),
        interval=interval,
        p_value=p_K,
        p_holm=holm(p_K),
        macro_difference=float(mean(mean(difference_NK))),
        macro_interval=macro_interval,
        names=cases,
        each=difference_NK,
    )


def _aligned(tables: Sequence[Table], column: str = "dice") -> tuple[tuple[int | str, ...], list[str], np.ndarray]:
    """Return the classes of any table, the names of the cases that are in all, and their scores, (T, N, K) float64.

    `column`: "dice" or a name in `Table.further`. A class that a table lacks has the score of a class in neither map.
    """
    keys = tuple(dict.fromkeys(key for table in tables for key in table.keys))
    if all(isinstance(key, int) for key in keys):
        keys = tuple(sorted(keys, key=int))
    everywhere = set.intersection(*(set(table.cases) for table in tables))
    cases = [case for case in tables[0].cases if case in everywhere]
    scores = []
    for table in tables:
        row, column_of = {case: i for i, case in enumerate(table.cases)}, {key: k for k, key in enumerate(table.keys)}
        scores_NK, empty = table.dice if column == "dice" else table.further[column], table.empty_score(column)
        # one column more, which index -1 takes for a class that this table lacks
        scores_NK = np.column_stack([scores_NK, np.full(len(table.cases), empty)])
        scores.append(scores_NK[[row[case] for case in cases]][:, [column_of.get(key, -1) for key in keys]])
    return keys, cases, np.array(scores)


def mean_ranks(tables: Sequence[Table]) -> tuple[np.ndarray, int]:
    """Rank tables by Dice, 1 is best: return the mean rank of each, (T,), and the number of scores it is a mean of.

    Equal scores share the mean of their ranks. A score that only some tables have is of a class that the reference
    lacks: tables without the score rightly predict nothing, and rank first. Source: M. Friedman, JASA 32, 1937.
    """
    from scipy.stats import rankdata

    dice_TX = _aligned(tables)[2].reshape(len(tables), -1)
    dice_TX = dice_TX[:, ~np.isnan(dice_TX).all(0)]
    ranks_TX = rankdata(-np.where(np.isnan(dice_TX), np.inf, dice_TX), axis=0)
    return mean(ranks_TX.T), dice_TX.shape[1]


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p values (K,) for their number by Holm's method (step down, never above 1); nan stays nan.

    Example:
        >>> holm(np.array([0.01, 0.04, float("nan"), 0.03]))
        array([0.03, 0.06,  nan, 0.06])

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6, 1979.
    """
    corrected = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: (~np.isnan(p)).sum()]  # argsort puts nan last
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)), 1)
    return corrected
