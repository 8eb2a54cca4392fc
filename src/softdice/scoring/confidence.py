"""Whether a confidence of masks, as `softdice predict --confidence` writes it, ranks them by their true Dice.

The risk of the n surest masks is 1 - their mean Dice; the risk-coverage curve shows it over the coverage n / N. Shape
suffixes: N mask, the surest first.
"""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from softdice.evaluation.averages import mean
from softdice.evaluation.labels import ScoreError
from softdice.evaluation.table import Table
from softdice.evaluation.text import number
from softdice.scoring.templates import render

LEAST = 3
"""Masks that have an order worth a number."""


@dataclass(frozen=True)
class Ranking:
    """Names of masks with their confidence and Dice, (N,) without nan, the surest first, N > 0.

    Both numbers are of the class `name`, or with "" the means over the classes.
    """

    name: str
    masks: list[str]
    confidence: np.ndarray
    dice: np.ndarray

    @cached_property
    def correlation(self) -> float:
        """Return Spearman's rank correlation of confidence and Dice: 1 is a perfect order, 0 none, -1 the reverse.

        It is nan for fewer than `LEAST` masks, and where all confidences or all Dice coefficients are equal.
        """
        from scipy.stats import spearmanr

        if len(self.masks) < LEAST:
            return float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about equal numbers: the nan says it
            return float(spearmanr(self.confidence, self.dice).statistic)

    @property
    def risk(self) -> np.ndarray:
        """Return what the n surest masks lack on average: 1 - their mean Dice, for n = 1 to N."""
        return 1 - running_mean(self.dice)

    @property
    def best_risk(self) -> np.ndarray:
        """Return the risk of masks in the order of their true Dice: no confidence can do better."""
        return 1 - running_mean(np.sort(self.dice)[::-1])

    def row(self) -> dict[str, Any]:
        """Return the row of JSON: rank correlation, and mean risk by this order, a random one and the best one.

        The mean risk is the area below the risk-coverage curve; the best order is by the true Dice.
        """
        return {
            "name": self.name or "mean",
            "masks": len(self.masks),
            "rank_correlation": number(self.correlation),
            "risk_coverage_area": number(self.risk.mean()),
            "risk_coverage_area_random": number(1 - self.dice.mean()),
            "risk_coverage_area_best": number(self.best_risk.mean()),
        }

    def line(self) -> str:
        """Return a sentence for people: the correlation, and the mean Dice of the surer half."""
        half = (len(self.masks) + 1) // 2
        masks = f"the Dice of {len(self.masks)} masks"
        order = f"rank correlation {self.correlation:.2f} with {masks} (1: a perfect order, 0: none)"
        if np.isnan(self.correlation):
            equal = "confidence" if np.ptp(self.confidence) == 0 else "Dice"
            reason = f"it takes {LEAST}" if len(self.masks) < LEAST else f"their {equal} is equal"
            order = f"no rank correlation with {masks}, for {reason}"
        return (
            f"Confidence: {order}. Mean Dice of the surest {half}: {self.dice[:half].mean():.4f}, of all: "
            f"{self.dice.mean():.4f}."
        )


def running_mean(values_N: np.ndarray) -> np.ndarray:
    """Return the mean of the first n values, for n = 1 to N."""
    return values_N.cumsum() / np.arange(1, len(values_N) + 1)


def read_confidence(path: Path, masks: Sequence[Path | None]) -> dict[str, dict[str, float]]:
    """Read a CSV of confidences: return for each mask's name its numbers by name of the column, nan for an empty cell.

    `masks` are the predictions that it should be about, None for a case without one.

    Raises:
        ScoreError: the file cannot be read, lacks the columns mask and confidence, has a row for none of the masks, two
            for one name, or a cell that is no number; or two masks have one name, in two folders.
    """
    advice = "Pass what softdice predict --confidence wrote for these masks."
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.DictReader(file) if any(row.values())]  # spreadsheets leave empty ones behind
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScoreError(f"--confidence: expected a CSV file at {path}, got: {error}. {advice}") from error
    if not rows or not {"mask", "confidence"} <= {*rows[0]}:
        columns = ", ".join(filter(None, rows[0])) if rows else "no rows"
        raise ScoreError(f"--confidence: expected {path} with the columns mask and confidence, got {columns}. {advice}")
    names_in_rows, names_of_masks = [row["mask"] for row in rows], [mask.name for mask in masks if mask]
    one_row, one_name = "Keep one row for each mask.", "Give each its own name."
    for where, names, remedy in ((path, names_in_rows, one_row), ("PREDICTIONS", names_of_masks, one_name)):
        name, times = Counter(names).most_common(1)[0] if names else ("", 0)
        if times > 1:
            raise ScoreError(
                f"--confidence: expected names that differ in {where}, got {times} times {name!r}. {remedy}"
            )
    try:
        by_mask = {row.pop("mask"): {name: float(cell or "nan") for name, cell in row.items()} for row in rows}
    except (TypeError, ValueError) as error:
        raise ScoreError(f"--confidence: expected numbers in {path}, got: {error}. {advice}") from error
    if np.isinf([list(row.values()) for row in by_mask.values()]).any():
        raise ScoreError(f"--confidence: expected numbers in {path}, got inf. {advice}")
    if not any(mask is not None and mask.name in by_mask for mask in masks):
        raise ScoreError(
            f"--confidence: expected rows of the masks in {path}, got {next(iter(by_mask))!r} first. {advice}"
        )
    return by_mask


def rankings(table: Table, rows: dict[str, dict[str, float]]) -> list[Ranking]:
    """Return the ranking by the means over the classes, then one for each class; [] if no mask has both means.

    `rows` is name of a mask -> column of the CSV -> confidence: column "confidence" is the mean, "label 1" is of a
    class. A ranking holds the masks that have a confidence and a Dice; a class without such masks has no ranking.
    """
    columns = {"": ("confidence", mean(table.dice.T))}
    for k, key in enumerate(table.keys):
        columns[table.label(key)] = (f"label {key}", table.dice[:, k])
    ranked = []
    for name, (column, dice_N) in columns.items():
        dice_of_masks = zip((Path(mask).name for mask in table.predictions), dice_N.tolist(), strict=True)
        triples = [(mask, rows.get(mask, {}).get(column, np.nan), dice) for mask, dice in dice_of_masks]
        triples = [triple for triple in triples if not np.isnan(triple[1:]).any()]
        if triples:
            masks, confidence, dice = zip(*sorted(triples, key=lambda triple: (-triple[1], triple[0])), strict=True)
            ranked.append(Ranking(name, list(masks), np.array(confidence), np.array(dice)))
    return ranked if ranked and not ranked[0].name else []  # the means have the name "" and come first


def charts(ranking: Ranking) -> Markup:
    """Return HTML of two charts: confidence and Dice of each mask, and the risk-coverage curve for three orders."""
    N = len(ranking.masks)
    coverage_N = np.arange(1, N + 1) / N
    risks = {
        "by confidence": ranking.risk,
        "best order": ranking.best_risk,
        "random order": np.full(N, ranking.risk[-1]),
    }
    return render(
        "confidence.html",
        points=[*zip(ranking.masks, ranking.confidence.tolist(), ranking.dice.tolist(), strict=True)],
        left=_round_down(float(ranking.confidence.min())),
        lowest=_round_down(float(ranking.dice.min())),
        curves={name: [*zip(coverage_N.tolist(), risk_N.tolist(), strict=True)] for name, risk_N in risks.items()},
        highest=max(0.1, float(np.ceil(10 * ranking.risk.max()) / 10)),  # an axis from 0 to the next tenth above
    )


def _round_down(value: float) -> float:
    """Return the next tenth below, at most 0.9: where an axis that ends at 1 begins."""
    return min(0.9, float(np.floor(10 * value) / 10))
