"""Collect cases in the table of scores, average it with intervals, and put hints about the labels into sentences.

Shape suffixes: N case, K class; 2, 3 and 4 are rows of one number each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from softdice.evaluation.averages import deviation, intervals, mean, quantiles
from softdice.evaluation.table import DISTANCES, Table, mean_score, score
from softdice.images.files import FileError
from softdice.images.labels import one_palette
from softdice.metrics import formulas
from softdice.scoring.options import Options
from softdice.scoring.pair_scores import Case

_MOST_UNNAMED = 8
"""Labels that a sentence lists."""


def tabulate(
    cases: Iterable[Case],
    keys: Sequence[int | str] | None = None,
    names: dict[int, str] | None = None,
    *,
    empty: float = np.nan,
    metrics: tuple[str, ...] = (),
) -> Table:
    """Collect cases, as they come, in a table whose classes are `keys`, or every class that occurs, ascending.

    The table takes 24 bytes per case and class. A case with an error, or whose palette gives a label another colour
    than an earlier one, is in its `errors` only.

    Args:
        names: label -> name; the files' names are added. empty: score of a class in neither map of a case, nan or 1.
        metrics: scores beside Dice and IoU, names in `METRICS`, that the cases were scored by.
    """
    table = Table(names=dict(names or {}), empty=empty, metrics=metrics)
    seen = dict.fromkeys(keys or ())  # the classes so far: an ordered set
    counts: list[np.ndarray] = []
    measured: list[np.ndarray] = []
    classes: list[tuple[int | str, ...]] = []
    shared: dict[tuple[int | str, ...], tuple[int | str, ...]] = {}  # one copy of each set of classes
    palette: dict[int, tuple[str, str]] = {}  # label -> its colour, and the file that had it first
    for case in cases:
        if case.error:
            table.errors.append(case.error)
            continue
        try:
            one_palette(case.truth, case.colours, palette)
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
            voxels_before, cases_before = table.unnamed.get(label, (0, 0))
            table.unnamed[label] = voxels_before + voxels, cases_before + 1
        seen.update(dict.fromkeys(case.keys))
        classes.append(shared.setdefault(case.keys, case.keys))
        counts.append(case.counts)
        measured.append(case.measured)
    in_order = keys is not None or any(isinstance(key, str) for key in seen)
    table.keys = tuple(seen) if in_order else tuple(sorted(seen, key=int))
    dtype = np.result_type(np.int64, *{counts_3K.dtype for counts_3K in counts})  # float64 for soft scores
    table.counts = np.zeros((len(counts), 3, len(table.keys)), dtype)
    table.measured = np.full((len(counts), len(table.shapes), len(table.keys)), np.nan)
    position = {key: k for k, key in enumerate(table.keys)}
    for i, case_keys in enumerate(classes):
        columns = [position[key] for key in case_keys]
        table.counts[i][:, columns] = counts[i]
        if measured[i].size:
            table.measured[i][:, columns] = measured[i]
    return table


@dataclass(frozen=True)
class Summary:
    """Means and other aggregates over the cases: an array (K,) per class, and numbers over all classes.

    Args:
        cases: how many cases the mean of a class rests on, (K,).
        dice: mean over cases; dice_interval: (2, K); iou: mean over cases. dice_sd: standard deviation (n - 1);
            dice_median; dice_quartiles: (2, K).
        empty: cases whose reference lacks the class, and those of them where it was predicted, (2, K).
        further: scores beside Dice and IoU by name, means over the cases (K,), of distances over the finite ones.
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
    further: dict[str, np.ndarray]
    distances: dict[str, np.ndarray]


def summarise(table: Table) -> Summary:
    """Average a table over its cases and classes; a mean over nothing is nan.

    pooled: from the counts of all cases added, (K,). micro: of all classes, too. macro: mean of the class means.
    """
    dice_NK, iou_NK, pooled_3K, further = table.dice, table.iou, table.counts.sum(0), table.further
    interval, macro_interval = intervals(dice_NK)
    pooled_31 = pooled_3K.sum(1, keepdims=True)
    low, median, high = quantiles(dice_NK, (0.25, 0.5, 0.75))
    no_target_NK, has_prediction_NK = table.counts[:, 2] == 0, table.counts[:, 1] > 0
    return Summary(
        cases=(~np.isnan(dice_NK)).sum(0),
        dice=mean(dice_NK),
        dice_interval=interval,
        dice_sd=deviation(dice_NK),
        dice_median=median,
        dice_quartiles=np.stack([low, high]),
        iou=mean(iou_NK),
        pooled_dice=score(formulas.dice, pooled_3K),
        pooled_iou=score(formulas.jaccard, pooled_3K),
        macro_dice=float(mean(mean(dice_NK))),
        macro_interval=macro_interval,
        macro_iou=float(mean(mean(iou_NK))),
        micro_dice=float(score(formulas.dice, pooled_31)[0]),
        micro_iou=float(score(formulas.jaccard, pooled_31)[0]),
        # cases whose reference lacks the class, and those of them where it was predicted
        empty=np.stack([no_target_NK.sum(0), (no_target_NK & has_prediction_NK).sum(0)]),
        further={name: mean_score(name, values_NK) for name, values_NK in further.items()},
        distances={  # median, lower and upper quartile, number of infinite cases: (4, K)
            name: np.concatenate([quantiles(further[name], (0.5, 0.25, 0.75)), [np.isinf(further[name]).sum(0)]])
            for name in DISTANCES
            if name in further
        },
    )


def renumbered_line(tables: Iterable[Table]) -> str:
    """Return a hint that numbers may be objects and no classes; "" where no case of the tables looks like it."""
    cases = max(table.renumbered for table in tables)
    if not cases:
        return ""
    where = f"In {cases} case{'s' * (cases != 1)}"
    hint = "If each number is an object, such as a cell, and no class, pass --instances."
    return f"{where} most labels of the reference have another number in the prediction. {hint}"


def unused_tolerances_line(tables: Iterable[Table], options: Options) -> str:
    """Return a sentence about classes that --surface names, and that no table has; "" without any."""
    classes = {str(key) for table in tables for key in table.keys}
    classes |= {name for table in tables for label, name in table.names.items() if label in table.keys}
    unused = [repr(name) for name in options.surface or () if name and name not in classes]
    if not unused:
        return ""
    return f"--surface: no class is named {' or '.join(unused)}: that tolerance was not used. Check the names."


def unnamed_line(table: Table) -> str:
    """Return a sentence about labels of the reference that no option names, the largest first; "" without any."""
    if not table.unnamed:
        return ""
    rows = sorted(((voxels, label, cases) for label, (voxels, cases) in table.unnamed.items()), key=lambda row: -row[0])
    labels = ", ".join(
        f"{label} ({voxels} voxel{'s' * (voxels != 1)} in {cases} case{'s' * (cases != 1)})"
        for voxels, label, cases in rows[:_MOST_UNNAMED]
    )
    more = f" and {len(rows) - _MOST_UNNAMED} more" if len(rows) > _MOST_UNNAMED else ""
    return f"The reference holds labels that no option names, and which are not scored: {labels}{more}."
