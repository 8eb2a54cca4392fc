"""tables and their summaries -> pieces of text: CSV, JSON, and the summary.json of nnU-Net, case by case."""

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

from softdice.scoring.classes import METRICS, Options
from softdice.scoring.summary import DISTANCES, Comparison, Summary, Table, mean, mean_ranks, mean_score
from softdice.scoring.writing import shown
from softdice.version import __version__

MOST_DIFFERENT = 12
"""Cases of a comparison that are listed."""


def case_rows(table: Table, i: int) -> Iterator[dict[str, Any]]:
    """Table, number of a case -> one row per class; scores are None where the class is in neither.

    tp, fp, fn are voxels (sums of probabilities for soft scores) of this class: right, too many, missed.
    """
    one = table.case(i)
    asked = {name: values[0].tolist() for name, values in one.asked.items()}
    both, predicted, true = table.counts[i].tolist()
    for k, (key, dice, iou) in enumerate(zip(table.keys, one.dice[0].tolist(), one.iou[0].tolist(), strict=True)):
        yield {
            "case": table.cases[i],
            **_class(table, key),
            "dice": number(dice),
            "iou": number(iou),
            "tp": both[k],
            "fp": predicted[k] - both[k],
            "fn": true[k] - both[k],
            "n_pred": predicted[k],
            "n_ref": true[k],
            **{name: number(values[k]) for name, values in asked.items()},
        }


Rows = Mapping[str, Iterable[Iterable[dict[str, Any]]]]
"""Rows in groups, by name of the predictions."""


def to_csv(tables: dict[str, Table], summaries: dict[str, Summary], rows: str = "pairs") -> Iterator[str]:
    """{name of the predictions: Table}, their summaries -> CSV; with two of them the first column says which.

    Rows are pairs of case and class; "classes", with their means; or "cases", with the Dice of each class in a column.
    """
    return _csv(*_table(tables, summaries, rows))


def to_json_rows(tables: dict[str, Table], summaries: dict[str, Summary], rows: str) -> Iterator[str]:
    """The same as a list of objects in JSON, a line for each, which `pandas.read_json` takes."""
    _, sides = _table(tables, summaries, rows)
    before = "[\n"
    for name, groups in sides.items():
        for row in chain.from_iterable(groups):
            yield before + json.dumps({"predictions": name} | row if len(sides) > 1 else row, allow_nan=False)
            before = ",\n"
    yield "\n]\n" if before == ",\n" else "[]\n"


def _table(tables: dict[str, Table], summaries: dict[str, Summary], rows: str) -> tuple[list[str], Rows]:
    """Return the columns, and the rows of each set of predictions."""
    first = next(iter(tables.values()))
    if rows == "pairs":
        asked = [name for metric in first.metrics for name in METRICS[metric]]
        columns = ["case", "label", "name", "dice", "iou", "tp", "fp", "fn", "n_pred", "n_ref", *asked]
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
    dice = dict(zip(table.keys, map(number, table.case(i).dice[0]), strict=True))
    return [{"case": table.cases[i], **{label: dice.get(key) for key, label in labels.items()}}]


def flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The two bounds of an interval as columns of their own."""
    for key, value in row.items():
        if isinstance(value, list):
            yield from zip((f"{key}_low", f"{key}_high"), value, strict=True)
        else:
            yield key, value


def _csv(columns: list[str], sides: Rows) -> Iterator[str]:
    several = ["predictions"] if len(sides) > 1 else []
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    writer.writerow([*several, *map(_cell, columns)])
    for name, groups in sides.items():
        for rows in groups:
            writer.writerows([*(_cell(name) for _ in several), *(_cell(row[key]) for key in columns)] for row in rows)
            yield line.getvalue()
            line.seek(0)
            line.truncate()
    yield line.getvalue()


def _cell(value: object) -> object:
    """Names as they are, but for what a spreadsheet would run: behind an apostrophe it is text."""
    if not isinstance(value, str):
        return value
    return f"'{shown(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else shown(value)


def to_json(
    tables: dict[str, Table], summaries: dict[str, Summary], comparisons: Sequence[Comparison], options: Options
) -> Iterator[str]:
    """Everything: per case, per class, over all, comparisons and errors; null where a score is undefined.

    With more than two sets of predictions each is compared with the first, and their mean ranks are given.
    """
    yield '{\n"softdice": ' + json.dumps(__version__) + ',\n"options": ' + json.dumps(options_row(options))
    rows = [
        {"predictions": name, **comparison_rows(comparison, next(iter(tables.values())))}
        for name, comparison in zip(list(tables)[1:], comparisons, strict=True)
    ]
    if rows:
        yield ',\n"comparison": ' + json.dumps(rows[0], indent=1, allow_nan=False)
    if len(rows) > 1:
        yield ',\n"comparisons": ' + json.dumps(rows, indent=1, allow_nan=False)
        ranks = zip(tables, mean_ranks(list(tables.values()))[0].tolist(), strict=True)
        yield ',\n"mean_ranks": ' + json.dumps(dict(sorted(ranks, key=lambda item: item[1])), indent=1)
    unnamed = next(iter(tables.values())).unnamed
    rows_u = [{"label": label, "voxels": voxels, "cases": cases} for label, (voxels, cases) in unnamed.items()]
    yield ',\n"unnamed_labels": ' + json.dumps(rows_u)
    yield ',\n"renumbered_cases": ' + json.dumps(max(table.renumbered for table in tables.values()))
    yield ',\n"errors": ' + json.dumps([error for table in tables.values() for error in table.errors], indent=1)
    yield ',\n"results": ['
    for number, (name, table) in enumerate(tables.items()):
        summary = summaries[name]
        head = {"predictions": name, "overall": overall_row(summary), "classes": class_rows(table, summary)}
        yield (",\n" if number else "\n") + json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "cases": ['
        for i, case in enumerate(table.cases):
            files = {"case": case, "prediction": table.predictions[i], "reference": table.truths[i]}
            rows_i = [{key: row[key] for key in row if key != "case"} for row in case_rows(table, i)]
            yield (",\n" if i else "\n") + "  " + json.dumps({**files, "classes": rows_i}, allow_nan=False)
        yield "]}"
    yield "\n]}\n"


def options_row(options: Options) -> dict[str, Any]:
    """The options as JSON has them, which knows neither nan nor inf."""
    penalty = options.penalty if isinstance(options.penalty, str) else number(options.penalty)
    return {**asdict(options), "empty": number(options.empty), "penalty": penalty}


def class_rows(table: Table, summary: Summary) -> list[dict[str, Any]]:
    """One row of aggregates per class."""
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
    for name, means in summary.asked.items():
        columns[name] = means
        if name in summary.distances:
            median, low, high, _ = summary.distances[name]
            columns |= {f"{name}_median": median, f"{name}_quartiles": np.stack([low, high], 1)}
    rows = _rows(table, table.keys, summary.cases, columns)
    for name, (*_, infinite) in summary.distances.items():
        for row, number_of_cases in zip(rows, infinite.tolist(), strict=True):
            row[f"{name}_infinite"] = int(number_of_cases)
    for row, (empty, predicted) in zip(rows, summary.empty.T.tolist(), strict=True):
        row |= {"empty_references": empty, "predicted_in_empty": predicted}
    return rows


def overall_row(summary: Summary) -> dict[str, Any]:
    """Aggregates over all classes."""
    return {
        "macro_dice": number(summary.macro_dice),
        "macro_dice_95": number(summary.macro_interval),
        "macro_iou": number(summary.macro_iou),
        "pooled_dice": number(summary.micro_dice),
        "pooled_iou": number(summary.micro_iou),
        **{f"macro_{name}": number(mean(means)) for name, means in summary.asked.items()},
        **{f"{name}_infinite": int(rows[3].sum()) for name, rows in summary.distances.items()},
    }


def comparison_rows(comparison: Comparison, table: Table) -> dict[str, Any]:
    """Differences of Dice, first predictions minus second, per class and over all."""
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
    for name, other in comparison.shapes.items():
        shapes |= {f"macro_{name}_difference": number(other.macro_difference)}
        for k, row in enumerate(classes):
            if name in DISTANCES:
                row |= {f"{name}_infinite": other.infinite[:, k].tolist()}
            row |= {f"{name}_cases": int(other.cases[k]), f"{name}_difference": number(other.difference[k])}
            row |= {f"{name}_difference_95": number(other.interval[:, k]), f"{name}_p_holm": number(other.p_holm[k])}
    return {
        "macro_difference": number(comparison.macro_difference),
        "macro_difference_95": number(comparison.macro_interval),
        **shapes,
        "classes": classes,
        "most_different": [difference_row(comparison, i, table) for i in comparison.most_different(MOST_DIFFERENT)],
    }


def difference_row(comparison: Comparison, i: int, table: Table) -> dict[str, Any]:
    """Comparison, number of a case -> its mean difference, and the class that differs most."""
    each = comparison.each[i]
    k = int(np.nanargmax(np.abs(each)))
    mean_difference = {"case": comparison.names[i], "difference": number(mean(each))}
    return {**mean_difference, **_class(table, comparison.keys[k]), "class_difference": number(each[k])}


def _rows(
    table: Table, keys: Sequence[int | str], cases: np.ndarray, columns: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {**_class(table, key), "cases": int(cases[k]), **{name: number(column[k]) for name, column in columns.items()}}
        for k, key in enumerate(keys)
    ]


def _class(table: Table, key: int | str) -> dict[str, Any]:
    return {"label": key, "name": table.names.get(key, "") if isinstance(key, int) else key}


def to_nnunet(table: Table, options: Options) -> Iterator[str]:
    """Table -> the summary.json of nnU-Net: metric_per_case, mean, foreground_mean; NaN as nnU-Net writes it.

    Behind its own metrics stand those that were asked for.
    """
    keys = [_nnunet_key(key, options) for key in table.keys]
    both, predicted, true = np.moveaxis(table.counts, 1, 0)
    union = predicted + true - both
    metrics_NK = {
        "Dice": table.dice,
        "FN": true - both,
        "FP": predicted - both,
        "IoU": table.iou,
        "TN": np.array(table.voxels, dtype=np.int64)[:, None] - union,
        "TP": both,
        "n_pred": predicted,
        "n_ref": true,
        **table.asked,
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
    """nnU-Net names a region by the tuple of its labels."""
    if isinstance(key, int) or options.regions is None:
        return str(key)
    labels = options.regions[str(key)]
    return str(labels if len(labels) > 1 else labels[0])


def number(value: Any) -> Any:
    """A number, or an array as a list of them; JSON has neither nan, which is None, nor inf, which is a word."""
    if np.ndim(value):
        return [number(each) for each in value]
    if math.isinf(value):
        return "inf"
    return None if math.isnan(value) else float(value)
