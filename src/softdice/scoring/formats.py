"""Tables and their summaries as CSV, JSON and nnU-Net's summary.json, piece by piece: a data set may be large."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from softdice.evaluation.averages import mean
from softdice.evaluation.table import DISTANCES, METRICS, Table, mean_score
from softdice.evaluation.text import number, shown
from softdice.scoring.comparison import Comparison, mean_ranks
from softdice.scoring.confidence import Ranking
from softdice.scoring.options import Options
from softdice.scoring.summary import Summary
from softdice.version import __version__

MOST_DIFFERENT = 12
"""Cases of a comparison that are listed."""


def case_rows(table: Table, i: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each class of a case; scores are nan where neither map has the class.

    tp, fp and fn are voxels of the class (sums of probabilities for soft scores): right, too many, missed.
    """
    case = table.case(i)
    further = {name: values_1K[0].tolist() for name, values_1K in case.further.items()}
    both, in_prediction, in_reference = table.counts[i].tolist()
    for k, (key, dice, iou) in enumerate(zip(table.keys, case.dice[0].tolist(), case.iou[0].tolist(), strict=True)):
        yield {
            "case": table.cases[i],
            **_class(table, key),
            "dice": dice,
            "iou": iou,
            "tp": both[k],
            "fp": in_prediction[k] - both[k],
            "fn": in_reference[k] - both[k],
            "n_pred": in_prediction[k],
            "n_ref": in_reference[k],
            **{name: values[k] for name, values in further.items()},
        }


Rows = Mapping[str, Iterable[Iterable[dict[str, Any]]]]
"""Rows in groups, by name of the predictions."""


def to_csv(tables: dict[str, Table], summaries: dict[str, Summary], rows: str = "pairs") -> Iterator[str]:
    """Write tables by name of the predictions as CSV; with two or more the first column has the name.

    A row is a pair of case and class; with "classes" a class with its means; with "cases" a case with the Dice of each
    class in a column.
    """
    return _csv(*_rows_of(tables, summaries, rows))


def to_json_rows(tables: dict[str, Table], summaries: dict[str, Summary], rows: str) -> Iterator[str]:
    """Write the rows of `to_csv` as a list of objects in JSON, a line for each, which `pandas.read_json` takes."""
    _, sides = _rows_of(tables, summaries, rows)
    before = "[\n"
    for name, groups in sides.items():
        for row in chain.from_iterable(groups):
            yield before + _json({"predictions": name} | row if len(sides) > 1 else row)
            before = ",\n"
    yield "\n]\n" if before == ",\n" else "[]\n"


def _rows_of(tables: dict[str, Table], summaries: dict[str, Summary], rows: str) -> tuple[list[str], Rows]:
    """Return the columns, and the rows of each set of predictions."""
    first = next(iter(tables.values()))
    if rows == "pairs":
        further = [name for metric in first.metrics for name in METRICS[metric]]
        columns = ["case", "label", "name", "dice", "iou", "tp", "fp", "fn", "n_pred", "n_ref", *further]
        return columns, {name: map(partial(case_rows, t), range(len(t.cases))) for name, t in tables.items()}
    if rows == "cases":
        labels = {key: table.label(key) for table in tables.values() for key in table.keys}
        sides = {name: map(partial(_case_row, t, labels), range(len(t.cases))) for name, t in tables.items()}
        return ["case", *labels.values()], sides
    classes = {
        name: [[dict(flat(row)) for row in class_rows(table, summaries[name])]] for name, table in tables.items()
    }
    return list(dict.fromkeys(key for (side,) in classes.values() for row in side for key in row)), classes


def _case_row(table: Table, labels: dict[int | str, str], i: int) -> list[dict[str, Any]]:
    """Return the one row of a case, with the Dice of each class under its label."""
    dice = dict(zip(table.keys, table.case(i).dice[0].tolist(), strict=True))
    return [{"case": table.cases[i], **{label: dice.get(key, math.nan) for key, label in labels.items()}}]


def flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the cells of a row, the two bounds of an interval as two cells."""
    for key, value in row.items():
        if isinstance(value, list):
            yield from zip((f"{key}_low", f"{key}_high"), value, strict=True)
        else:
            yield key, value


def _csv(columns: list[str], sides: Rows) -> Iterator[str]:
    """Write rows as CSV, a group at a time."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    with_name = len(sides) > 1
    writer.writerow(["predictions"] * with_name + [*map(_cell, columns)])
    for name, groups in sides.items():
        for rows in groups:
            writer.writerows([_cell(name)] * with_name + [_cell(row[key]) for key in columns] for row in rows)
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def _cell(value: object) -> object:
    """Return a cell: nothing for nan, an apostrophe before a name that a spreadsheet would run as a formula."""
    if not isinstance(value, str):
        return number(value)
    return f"'{shown(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else shown(value)


def _json(value: object, indent: int | None = None) -> str:
    """Write a value as JSON, which has neither nan nor inf: null, and "inf"."""
    return json.dumps(number(value), indent=indent, allow_nan=False)


def to_json(
    tables: dict[str, Table],
    summaries: dict[str, Summary],
    comparisons: Sequence[Comparison],
    options: Options,
    rankings: Sequence[Ranking] = (),
) -> Iterator[str]:
    """Write everything as JSON: cases, classes, overall, comparisons and errors; null where a score is undefined.

    The first predictions are compared with each of the others; with three or more, mean ranks follow. Rankings by a
    confidence are those of the first predictions.
    """
    yield '{\n"softdice": ' + _json(__version__) + ',\n"options": ' + _json(asdict(options))
    rows = [
        {"predictions": name, **comparison_rows(comparison, next(iter(tables.values())))}
        for name, comparison in zip(list(tables)[1:], comparisons, strict=True)
    ]
    if rows:
        yield ',\n"comparison": ' + _json(rows[0], indent=1)
    if len(rows) > 1:
        yield ',\n"comparisons": ' + _json(rows, indent=1)
        ranks = zip(tables, mean_ranks(list(tables.values()))[0].tolist(), strict=True)
        yield ',\n"mean_ranks": ' + _json(dict(sorted(ranks, key=lambda item: item[1])), indent=1)
    if rankings:
        yield ',\n"confidence": ' + _json([ranking.row() for ranking in rankings], indent=1)
    unnamed = next(iter(tables.values())).unnamed
    labels = [{"label": label, "voxels": voxels, "cases": cases} for label, (voxels, cases) in unnamed.items()]
    yield ',\n"unnamed_labels": ' + _json(labels)
    yield ',\n"renumbered_cases": ' + _json(max(table.renumbered for table in tables.values()))
    yield ',\n"errors": ' + _json([error for table in tables.values() for error in table.errors], indent=1)
    yield ',\n"results": ['
    for position, (name, table) in enumerate(tables.items()):
        summary = summaries[name]
        head = {"predictions": name, "overall": overall_row(summary), "classes": class_rows(table, summary)}
        yield (",\n" if position else "\n") + _json(head, indent=1)[:-2] + ',\n "cases": ['
        for i, case in enumerate(table.cases):
            files = {"case": case, "prediction": table.predictions[i], "reference": table.truths[i]}
            classes = [{key: row[key] for key in row if key != "case"} for row in case_rows(table, i)]
            yield (",\n" if i else "\n") + "  " + _json({**files, "classes": classes})
        yield "]}"
    yield "\n]}\n"


def class_rows(table: Table, summary: Summary) -> list[dict[str, Any]]:
    """Return a row for each class with its means and other aggregates, by the names that CSV and JSON have for them."""
    columns = {
        "dice": summary.dice,
        "dice_95": summary.dice_interval.T,
        "dice_sd": summary.dice_sd,
        "dice_median": summary.dice_median,
        "dice_quartiles": summary.dice_quartiles.T,
        "iou": summary.iou,
        "pooled_dice": summary.pooled_dice,
        "pooled_iou": summary.pooled_iou,
    }
    for name, means_K in summary.further.items():
        columns[name] = means_K
        if name in summary.distances:
            median, low, high, _ = summary.distances[name]
            columns |= {f"{name}_median": median, f"{name}_quartiles": np.stack([low, high], 1)}
    rows = _rows(table, table.keys, summary.cases, columns)
    for name, (*_, infinite) in summary.distances.items():
        for row, number_of_cases in zip(rows, infinite.tolist(), strict=True):
            row[f"{name}_infinite"] = int(number_of_cases)
    for row, counts in zip(rows, summary.empty.T.tolist(), strict=True):
        row["empty_references"], row["predicted_in_empty"] = counts
    return rows


def overall_row(summary: Summary) -> dict[str, Any]:
    """Return the aggregates over all classes."""
    return {
        "macro_dice": summary.macro_dice,
        "macro_dice_95": summary.macro_interval.tolist(),
        "macro_iou": summary.macro_iou,
        "pooled_dice": summary.micro_dice,
        "pooled_iou": summary.micro_iou,
        **{f"macro_{name}": float(mean(means)) for name, means in summary.further.items()},
        **{f"{name}_infinite": int(rows_4K[3].sum()) for name, rows_4K in summary.distances.items()},
    }


def comparison_rows(comparison: Comparison, table: Table) -> dict[str, Any]:
    """Return the differences of scores, first predictions minus second: overall, per class, and the largest cases."""
    columns = {
        "difference": comparison.difference,
        "difference_95": comparison.interval.T,
        "p_wilcoxon": comparison.p_value,
        "p_holm": comparison.p_holm,
    }
    classes = _rows(table, comparison.keys, comparison.cases, columns)
    for row, alone in zip(classes, comparison.alone.T.tolist(), strict=True):
        row["cases_alone"] = alone
    shapes: dict[str, Any] = {}
    for name, shape in comparison.shapes.items():
        shapes[f"macro_{name}_difference"] = shape.macro_difference
        for k, row in enumerate(classes):
            if name in DISTANCES:
                row[f"{name}_infinite"] = shape.infinite[:, k].tolist()
            row[f"{name}_cases"], row[f"{name}_difference"] = int(shape.cases[k]), float(shape.difference[k])
            row[f"{name}_difference_95"], row[f"{name}_p_holm"] = shape.interval[:, k].tolist(), float(shape.p_holm[k])
    return {
        "macro_difference": comparison.macro_difference,
        "macro_difference_95": comparison.macro_interval.tolist(),
        **shapes,
        "classes": classes,
        "most_different": [difference_row(comparison, i, table) for i in comparison.most_different(MOST_DIFFERENT)],
    }


def difference_row(comparison: Comparison, i: int, table: Table) -> dict[str, Any]:
    """Return the mean difference of a case, and the class that differs most."""
    difference_K = comparison.each[i]
    k = int(np.nanargmax(np.abs(difference_K)))
    return {
        "case": comparison.names[i],
        "difference": float(mean(difference_K)),
        **_class(table, comparison.keys[k]),
        "class_difference": float(difference_K[k]),
    }


def _rows(
    table: Table, keys: Sequence[int | str], cases: np.ndarray, columns: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return a row for each class: its label and name, its number of cases, and a cell of each column."""
    return [
        {**_class(table, key), "cases": int(cases[k]), **{name: column[k].tolist() for name, column in columns.items()}}
        for k, key in enumerate(keys)
    ]


def _class(table: Table, key: int | str) -> dict[str, Any]:
    """Return the label and the name of a class; a region has its name for both."""
    return {"label": key, "name": table.names.get(key, "") if isinstance(key, int) else key}


def to_nnunet(table: Table, options: Options) -> Iterator[str]:
    """Write nnU-Net's summary.json: metric_per_case, mean, foreground_mean, and NaN as nnU-Net writes it.

    nnU-Net's metrics come first, then the columns of `Table.further`.
    """
    keys = [_nnunet_key(key, options) for key in table.keys]
    both, in_prediction, in_reference = np.moveaxis(table.counts, 1, 0)
    union = in_prediction + in_reference - both
    metrics_NK = {
        "Dice": table.dice,
        "FN": in_reference - both,
        "FP": in_prediction - both,
        "IoU": table.iou,
        "TN": np.array(table.voxels, dtype=np.int64)[:, None] - union,
        "TP": both,
        "n_pred": in_prediction,
        "n_ref": in_reference,
        **table.further,
    }
    means = {name: mean_score(name, values.astype(np.float64)) for name, values in metrics_NK.items()}
    means |= {f"{name}_infinite": np.isinf(metrics_NK[name]).sum(0) for name in DISTANCES if name in metrics_NK}
    foreground = [k for k, key in enumerate(keys) if key != "0"]
    head = {
        "foreground_mean": {name: float(mean(values[foreground])) for name, values in means.items()},
        "mean": {key: {name: float(values[k]) for name, values in means.items()} for k, key in enumerate(keys)},
    }
    yield json.dumps(head, indent=4)[:-2] + ',\n    "metric_per_case": ['
    for i in range(len(table.cases)):
        rows = {key: {name: values[i, k].item() for name, values in metrics_NK.items()} for k, key in enumerate(keys)}
        case = {"metrics": rows, "prediction_file": table.predictions[i], "reference_file": table.truths[i]}
        yield (",\n" if i else "\n") + json.dumps(case, indent=4)
    yield "\n    ]\n}\n"


def _nnunet_key(key: int | str, options: Options) -> str:
    """Return nnU-Net's name of a class, which for a region is the tuple of its labels."""
    if isinstance(key, int) or options.regions is None:
        return str(key)
    labels = options.regions[str(key)]
    return str(labels if len(labels) > 1 else labels[0])
