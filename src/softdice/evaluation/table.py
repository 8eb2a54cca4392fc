"""The table of scores: counts of voxels by case and class, and every score that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from softdice.evaluation.averages import mean
from softdice.evaluation.text import shown
from softdice.metrics import formulas

METRICS = {
    "precision": ("precision",),
    "recall": ("recall",),
    "specificity": ("specificity",),
    "volume": ("ml_pred", "ml_ref", "volume_difference"),
    "surface": ("hd95", "mean_distance", "surface_dice"),
    "lesions": ("lesion_dice", "pq", "sq", "rq"),
    "centreline": ("centreline_dice",),
    "instances": ("pq", "sq", "rq", "ap50", "ap75", "ap90", "matched", "missed", "extra"),
}
"""Scores beside Dice and IoU, each with its columns."""

MEASURED = ("surface", "lesions", "centreline", "instances")
"""The scores of `METRICS` that need the masks: counts of voxels do not give them."""

DISTANCES = ("hd95", "mean_distance")
"""Columns whose best value is 0, and that have no upper bound."""


@dataclass
class Table:
    """Cases (N) by classes (K): counts of voxels, from which scores are computed, and what is known of each case.

    Args:
        keys: the classes, labels or names of regions. counts: (N, 3, K) voxels of both maps, of the prediction, and of
            the reference, int64, or float64 for soft scores. A class that neither map of a case has counts 0 there.
        cases, predictions, truths: names and paths, in the order of the counts; "" for an empty prediction.
        voxels: how many of each case were counted. voxel_ml: volume of a voxel, nan where it is unknown.
        names: label -> name, where known. errors: of the cases that could not be scored; they are no rows.
        unnamed: label of the reference that no option names -> its voxels, and how many cases hold it.
        empty: score of a class in neither map, nan or 1. metrics: scores beside Dice and IoU, of `METRICS`.
        measured: (N, M, K) float64, the columns of `shapes`.
        renumbered: how many cases look like numbered objects.
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
        """Return the Dice coefficients, (N, K) float64."""
        return self._filled(score(formulas.dice, self.counts))

    @property
    def iou(self) -> np.ndarray:
        """Return the intersections over unions, (N, K) float64."""
        return self._filled(score(formulas.jaccard, self.counts))

    @property
    def further(self) -> dict[str, np.ndarray]:
        """Return the scores beside Dice and IoU that `metrics` names, (N, K) float64 each, by column.

        Each metric has the columns that `METRICS` lists. `empty` stands where a class is in neither map.
        """
        voxels_N1, ml_N1 = np.array(self.voxels)[:, None], np.array(self.voxel_ml)[:, None]
        columns = {  # functions: only the columns asked for are computed
            "precision": lambda: self._filled(score(formulas.precision, self.counts)),
            "recall": lambda: self._filled(score(formulas.recall, self.counts)),
            "specificity": lambda: score(formulas.specificity, self.counts, voxels_N1),
            "ml_pred": lambda: self.counts[:, 1] * ml_N1,
            "ml_ref": lambda: self.counts[:, 2] * ml_N1,
            "volume_difference": lambda: score(formulas.volume_difference, self.counts),
        }
        for i, name in enumerate(self.shapes):
            columns[name] = partial(self._filled, self.measured[:, i], self.empty_score(name))
        return {name: columns[name]() for metric in self.metrics for name in METRICS[metric]}

    @property
    def shapes(self) -> tuple[str, ...]:
        """Return the names of the columns of `measured`."""
        return measured_columns(self.metrics)

    def empty_score(self, name: str) -> float:
        """Return the value of a column for a class in neither map: `empty`, and for distances 1 - `empty`, 0 or nan."""
        return 1 - self.empty if name in DISTANCES else self.empty

    def case(self, i: int) -> Table:
        """Return a table for the scores of case number `i` alone; the names of all cases stay in it."""
        row = slice(i, i + 1)
        arrays = {name: getattr(self, name)[row] for name in ("counts", "voxels", "voxel_ml", "measured")}
        return replace(self, **arrays)

    def _filled(self, values: np.ndarray, empty: float | None = None) -> np.ndarray:
        """Return scores with `empty` in the place of nan."""
        return np.where(np.isnan(values), self.empty if empty is None else empty, values)

    def label(self, key: int | str) -> str:
        """Return a class as people read it: its number and name."""
        return shown(f"{key} {self.names[key]}" if isinstance(key, int) and key in self.names else str(key))


def measured_columns(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns, in order, of those of the `metrics` (names in `METRICS`) that need the masks."""
    return tuple(name for metric in metrics if metric in MEASURED for name in METRICS[metric])


def score(formula: Callable[..., torch.Tensor], counts: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Return scores (..., K): a formula of `softdice.metrics.formulas` of counts (..., 3, K) and its `others`."""
    counts_first = torch.from_numpy(np.moveaxis(counts, -2, 0).copy())
    return np.asarray(formula(counts_first, *map(torch.from_numpy, others)))


def mean_score(name: str, values: np.ndarray) -> np.ndarray:
    """Return the mean of the column `name` over the cases, (N, ...) to (...); of distances the finite ones alone."""
    return mean(np.where(np.isinf(values), np.nan, values) if name in DISTANCES else values)
