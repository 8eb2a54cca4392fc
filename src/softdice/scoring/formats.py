"""Tables and their summaries as CSV, JSON and nnU-Net's summary.json, piece by piece: a data set may be large.

`tables` and `summaries` are by name of the predictions, in the order of the command, and of one set of options. A row
is a dict, name of a column -> number or text. N is a case, K a class.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
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
    """Yield a row for each class of case number `i`; scores are nan where neither map has the class.

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


def all_case_rows(table: Table) -> Iterator[dict[str, Any]]:
    """Yield the `case_rows` of all cases."""
    return chain.from_iterable(case_rows(table, i) for i in range(len(table.cases)))


Rows = Mapping[str, Iterable[dict[str, Any]]]
"""Name of the predictions -> rows, which are computed as they are written."""


class _Echo:
    """A file for `csv.writer` whose `writerow` then returns the line."""

    def write(self, line: str) -> str:
        return line


def to_csv(tables: dict[str, Table], summaries: dict[str, Summary], rows: str = "pairs") -> Iterator[str]:
    """Yield a CSV file line by line; with two or more sets of predictions the first column has their name.

    `rows` says what a row is: "pairs" of a case and a class; "classes" with their means; or "cases", with the Dice of
    each class in a column.
    """
    writer = csv.writer(_Echo(), lineterminator="\n")
    columns, rows_by_name = _rows_by_name(tables, summaries, rows)
    with_name = len(tables) > 1
    yield writer.writerow(["predictions"] * with_name + [*map(_cell, columns)])
    for name, rows_of_name in rows_by_name.items():
        for row in rows_of_name:
            yield writer.writerow([_cell(name)] * with_name + [_cell(row[column]) for column in columns])


def to_json_rows(tables: dict[str, Table], summaries: dict[str, Summary], rows: str) -> Iterator[str]:
    """Yield the rows of `to_csv` as a list of objects in JSON, a line for each, which `pandas.read_json` takes."""
    separator = "[\n"
    for name, rows_of_name in _rows_by_name(tables, summaries, rows)[1].items():
        for row in rows_of_name:
            yield separator + _json({"predictions": name} | row if len(tables) > 1 else row)
            separator = ",\n"
    yield "\n]\n" if separator == ",\n" else "[]\n"


def _rows_by_name(tables: dict[str, Table], summaries: dict[str, Summary], rows: str) -> tuple[list[str], Rows]:
    """Return the names of the columns, and the rows ("pairs", "classes" or "cases") of each set of predictions."""
    first = next(iter(tables.values()))
    if rows == "pairs":
        further = [name for metric in first.metrics for name in METRICS[metric]]
        columns = ["case", "label", "name", "dice", "iou", "tp", "fp", "fn", "n_pred", "n_ref", *further]
        return columns, {name: all_case_rows(table) for name, table in tables.items()}
    if rows == "cases":
        headings = {key: table.label(key) for table in tables.values() for key in table.keys}
        return ["case", *headings.values()], {name: _dice_rows(table, headings) for name, table in tables.items()}
    classes = {name: [dict(flat(row)) for row in class_rows(table, summaries[name])] for name, table in tables.items()}
    return list(dict.fromkeys(column for row in chain(*classes.values()) for column in row)), classes


def _dice_rows(table: Table, headings: dict[int | str, str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each case: the Dice of each class in its column of `headings`, nan for other tables' classes."""
    for i, case in enumerate(table.cases):
        dice = dict(zip(table.keys, table.case(i).dice[0].tolist(), strict=True))
        yield {"case": case, **{heading: dice.get(key, math.nan) for key, heading in headings.items()}}


def flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield column and value of a row's cells; a list of two bounds becomes the columns `..._low` and `..._high`."""
    for column, value in row.items():
        if isinstance(value, list):
            yield from zip((f"{column}_low", f"{column}_high"), value, strict=True)
        else:
            yield column, value


def _cell(value: object) -> object:
    """Return a cell of CSV: None for nan, an apostrophe before a text that a spreadsheet would run as a formula."""
    if not isinstance(value, str):
        return number(value)
    return f"'{shown(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else shown(value)


def _json(value: object, indent: int | None = None) -> str:
    """Return a value as JSON, which has neither nan nor inf: null, and "inf"."""
    return json.dumps(number(value), indent=indent, allow_nan=False)


def to_json(
    tables: dict[str, Table],
    summaries: dict[str, Summary],
    comparisons: Sequence[Comparison],
    options: Options,
    rankings: Sequence[Ranking] = (),
) -> Iterator[str]:
    """Yield one JSON object in pieces: cases, classes, overall, comparisons, errors; null where a score is undefined.

    `comparisons` are of the first predictions with each of the others; with three or more sets, mean ranks follow.
    `rankings` are of the first predictions, by their confidence. "unnamed_labels" are those of the reference that no
    option names; "renumbered_cases" is how many look like numbered objects, in the set that has the most.
    """
    yield '{\n"softdice": ' + _json(__version__) + ',\n"options": ' + _json(asdict(options))
    rows = [
        {"predictions": name, **comparison_rows(comparison, next(iter(tables.values())))}
        for name, comparison in zip(list(tables)[1:], comparisons, strict=True)
    ]
    if rows:  # the first comparison has the same key, however many there are
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
        # without the "\n}" at its end: the object goes on with its cases
        yield (",\n" if position else "\n") + _json(head, indent=1)[:-2] + ',\n "cases": ['
        for i, case in enumerate(table.cases):
            files = {"case": case, "prediction": table.predictions[i], "reference": table.truths[i]}
            classes = [{key: row[key] for key in row if key != "case"} for row in case_rows(table, i)]
            yield (",\n" if i else "\n") + "  " + _json({**files, "classes": classes})
        yield "]}"
    yield "\n]}\n"


def class_rows(table: Table, summary: Summary) -> list[dict[str, Any]]:
    """Return a row for each class with its means and other aggregates, by their names in CSV; intervals are lists.

    `summary.distances` is name of a distance -> median, quartiles and number of infinite cases, (4, K). `summary.empty`
    (2, K) counts the cases whose reference lacks the class, and those of them where it was predicted.
    """
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
    for name, (*_, infinite_K) in summary.distances.items():
        for row, cases in zip(rows, infinite_K.tolist(), strict=True):
            row[f"{name}_infinite"] = int(cases)
    for row, counts in zip(rows, summary.empty.T.tolist(), strict=True):
        row["empty_references"], row["predicted_in_empty"] = counts
    return rows


def overall_row(summary: Summary) -> dict[str, Any]:
    """Return the row of all classes: means of the class means (`macro_...`), pooled scores, how many are infinite."""
    return {
        "macro_dice": summary.macro_dice,
        "macro_dice_95": summary.macro_interval.tolist(),
        "macro_iou": summary.macro_iou,
        "pooled_dice": summary.micro_dice,
        "pooled_iou": summary.micro_iou,
        **{f"macro_{name}": float(mean(means)) for name, means in summary.further.items()},
        **{f"{name}_infinite": int(infinite_K.sum()) for name, (*_, infinite_K) in summary.distances.items()},
    }


def comparison_rows(comparison: Comparison, table: Table) -> dict[str, Any]:
    """Return the object of the JSON that compares two sets of predictions, the first minus the second.

    Beside the means it has the lists `classes` and `most_different` (cases). `comparison.shapes` is name of a score ->
    the comparison of that score. Two counts of cases are of the first set and of the second: `cases_alone`, where only
    this set has a score, and `..._infinite`, where its distance is infinite. `table` gives the names of classes.
    """
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
    """Return a row with the mean difference of case number `i`, and the class that differs most.

    `i` is a position in `comparison.names`; some class of the case has a difference.
    """
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
    """Return a row for each of the classes: label, name, its number of cases, and its cell of each column (K, ...)."""
    return [
        {**_class(table, key), "cases": int(cases[k]), **{name: column[k].tolist() for name, column in columns.items()}}
        for k, key in enumerate(keys)
    ]


def _class(table: Table, key: int | str) -> dict[str, Any]:
    """Return the label and the name of a class; a region has its name for both."""
    return {"label": key, "name": table.names.get(key, "") if isinstance(key, int) else key}


def to_nnunet(table: Table, options: Options) -> Iterator[str]:
    """Yield nnU-Net's summary.json in pieces: foreground_mean, mean, metric_per_case, and NaN as nnU-Net writes it.

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
    yield json.dumps(head, indent=4)[:-2] + ',\n    "metric_per_case": ['  # without "\n}": the object goes on
    for i in range(len(table.cases)):
        rows = {key: {name: values[i, k].item() for name, values in metrics_NK.items()} for k, key in enumerate(keys)}
        case = {"metrics": rows, "prediction_file": table.predictions[i], "reference_file": table.truths[i]}
        yield (",\n" if i else "\n") + json.dumps(case, indent=4)
    yield "\n    ]\n}\n"


def _nnunet_key(key: int | str, options: Options) -> str:
    """Return nnU-Net's name of a class: "1" for a label, "(1, 2)" for a region of several."""
    if isinstance(key, int) or options.regions is None:
        return str(key)
    labels = options.regions[str(key)]
    return str(labels if len(labels) > 1 else labels[0])
