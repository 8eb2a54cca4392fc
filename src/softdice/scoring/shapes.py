"""A pair of label maps -> the scores of each class that need masks: surfaces, lesions, centre lines, objects.

p and t are the arrays of the prediction and of the reference; K is a class, M a column of `Options.measured`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from softdice.evaluation.labels import ScoreError
from softdice.images.image import Image
from softdice.metrics import counting, distances, lesions, surfaces
from softdice.metrics.distances import Compare, Formula
from softdice.metrics.instances import object_overlaps
from softdice.scoring.options import Options

PERCENTILE = 95.0

AP_THRESHOLDS = (0.5, 0.75, 0.9)
"""Overlaps from which on objects match for the average precision, as StarDist and cellpose report it."""

_FEW_LABELS = 1 << 12
"""Labels below it serve as class numbers as they are; with larger ones, labels are replaced by their rank."""

Spacing = tuple[float, ...]


class Comparison(NamedTuple):
    """A way to compare two masks, the size of a voxel for it, and the formulas of the columns that follow."""

    compare: Compare
    spacing: Spacing
    formulas: list[Formula]


def shape_scores(
    path: Path,
    p: np.ndarray,
    t: np.ndarray,
    grid: Image,
    keys: Sequence[int | str],
    names: dict[int, str],
    options: Options,
) -> np.ndarray:
    """Return the columns of `Options.measured` for each class, (M, K) float64.

    Args:
        path: the prediction, for errors.
        p, t: (*S) labels of prediction and reference; with instances, voxels to be ignored are 0 already.
        grid: the reference's image, for the size of a voxel.
        keys: the classes in the order of `Options.keys`.
        names: label -> name, for tolerances that are given by name.

    Raises:
        ScoreError: for surface, lesions or centre line, an image of other than 2 or 3 axes longer than 1, or whose file
            does not say how large a voxel is.
    """
    if not (options.measured and keys):
        return np.zeros((len(options.measured), len(keys)))
    shapes = {*options.metrics} & {"surface", "lesions", "centreline"}
    if shapes and (sum(n != 1 for n in t.shape) > 3 or t.ndim < 2):
        option = next(metric for metric in ("surface", "lesions", "centreline") if metric in options.metrics)
        raise ScoreError(f"{path}: --{option}: expected an image of 2 or 3 axes, got shape {t.shape}.")
    tolerances = [_tolerance(key, names, options) for key in keys]
    if options.instances:
        object_scores_M1 = np.array(_object_scores(p, t, options))[:, None]
        if not shapes:
            return object_scores_M1
        masks = (p != 0).astype(np.uint8), (t != 0).astype(np.uint8)
        comparisons = [*_comparisons(path, grid, t.shape, tolerances, options)]
        return np.concatenate([_class_scores(*masks, (1,), None, comparisons), object_scores_M1])
    if options.regions is not None:
        counted = ~np.isin(t, options.ignore)
        columns = []
        for region, tolerance in zip(options.regions.values(), tolerances, strict=True):
            comparisons = [*_comparisons(path, grid, t.shape, [tolerance], options)]
            masks = np.isin(p, region) & counted, np.isin(t, region) & counted
            columns.append(_class_scores(*masks, (1,), None, comparisons))
        return np.concatenate(columns, 1)
    present = [label for label in options.ignore if (t == label).any()]
    ignore = present[0] if present else None
    if len(present) > 1:
        t = np.where(np.isin(t, present), t.dtype.type(present[0]), t)
    labels = tuple(int(key) for key in keys)
    if any(array.size and not 0 <= array.min() <= array.max() < _FEW_LABELS for array in (p, t)):
        ranked = np.unique(np.concatenate([np.unique(p), np.unique(t), labels]).astype(np.int64))
        p, t = (np.searchsorted(ranked, array) for array in (p, t))
        labels = tuple(np.searchsorted(ranked, labels).tolist())
        ignore = None if ignore is None else int(np.searchsorted(ranked, ignore))
    return _class_scores(p, t, labels, ignore, [*_comparisons(path, grid, t.shape, tolerances, options)])


def _object_scores(p: np.ndarray, t: np.ndarray, options: Options) -> list[float]:
    """Return the columns of --instances: the qualities, the average precisions, and the counts."""
    overlaps = object_overlaps(p, t)
    objects = lesions.paired(*overlaps, options.rule.threshold, options.reach)
    qualities = [lesions.quality_of(objects, which) for which in ("pq", "sq", "rq")]
    precisions = [lesions.quality_of(lesions.paired(*overlaps, iou, "at_least"), "ap") for iou in AP_THRESHOLDS]
    return [*qualities, *precisions, len(objects.iou), objects.missed, objects.extra]


def mask_scores(path: Path, p: np.ndarray, t: np.ndarray, grid: Image, name: str, options: Options) -> np.ndarray:
    """Return the columns of `Options.measured` for two masks of one class, (M, 1) float64."""
    tolerance = {"": options.surface.get(name, options.surface[""])} if options.surface else None
    shared = {name: getattr(options, name) for name in ("surface_unit", "penalty", "matching", "reach", "metrics")}
    options_of_class = Options(surface=tolerance, **shared)
    return shape_scores(path, p.astype(np.uint8), t.astype(np.uint8), grid, (1,), {}, options_of_class)


def _comparisons(
    path: Path, grid: Image, shape: tuple[int, ...], tolerances: Sequence[float], options: Options
) -> Iterator[Comparison]:
    """Yield the comparisons that the options ask for, in the order of their columns."""
    axes = len(shape)
    if "surface" in options.metrics:
        spacing = _spacing_mm(path, grid, axes, "surface") if options.surface_unit == "mm" else (1.0,) * axes
        penalty = options.penalty
        worst = math.hypot(*(n * size for n, size in zip(shape, spacing, strict=True)))
        worst = worst if isinstance(penalty, str) else penalty

        def finite(distance: float) -> float:
            return worst if math.isinf(distance) else distance

        formulas: list[Formula] = [
            lambda boundaries, _: finite(surfaces.hausdorff(boundaries, PERCENTILE)),
            lambda boundaries, _: finite(surfaces.average(boundaries)),
            lambda boundaries, k: surfaces.surface_overlap(boundaries, tolerances[k]),
        ]
        yield Comparison(surfaces.between("voxels"), spacing, formulas)
    if "lesions" in options.metrics:
        rule, in_voxels = options.rule, (1.0,) * axes
        dice: list[Formula] = [lambda matches, _: lesions.mean_dice(matches)]
        qualities: list[Formula] = [
            lambda matches, _: lesions.quality_of(matches, "pq"),
            lambda matches, _: lesions.quality_of(matches, "sq"),
            lambda matches, _: lesions.quality_of(matches, "rq"),
        ]
        if isinstance(rule.matching, str):  # a challenge says how Dice is computed, and nothing of the qualities
            yield Comparison(rule.compare, _spacing_mm(path, grid, axes, "matching"), dice)
            yield Comparison(lesions.Rule().compare, in_voxels, qualities)
        else:
            yield Comparison(rule.compare, in_voxels, dice + qualities)
    if "centreline" in options.metrics:
        yield Comparison(lesions.skeletons, (1.0,) * axes, [lambda shares, _: lesions.harmonic(shares)])


def _spacing_mm(path: Path, grid: Image, axes: int, option: str) -> Spacing:
    """Return the size of a voxel along the first axes; raise ScoreError where the file does not say it."""
    sizes = grid.spacing_mm
    if sizes is None or min(sizes) <= 0:
        advice = "Pass --surface 2px to measure in pixels." if option == "surface" else "Pass an overlap, such as 0.5."
        raise ScoreError(f"{path}: --{option}: expected a file that says how large a voxel is, got none. {advice}")
    return sizes[:axes]


def _tolerance(key: int | str, names: dict[int, str], options: Options) -> float:
    """Return the tolerance of a class by its number or its name, else the one for all classes."""
    if options.surface is None:
        return 0.0
    words = (str(key), names.get(key, "") if isinstance(key, int) else "")
    return next((options.surface[word] for word in words if word and word in options.surface), options.surface[""])


def _class_scores(
    p: np.ndarray, t: np.ndarray, labels: tuple[int, ...], ignore: int | None, comparisons: Sequence[Comparison]
) -> np.ndarray:
    """Return the columns of all comparisons for each label, (M, K) float64."""
    num_classes = 1 + max(int(p.max(initial=0)), int(t.max(initial=0)), *labels, 1)
    pair = counting.as_tensor(p)[None], counting.as_tensor(t)[None]
    scores_MK = [
        distances.measure_maps(*pair, formulas, num_classes, spacing, compare, labels, ignore)[:, 0]
        for compare, spacing, formulas in comparisons
    ]
    return torch.cat(scores_MK).numpy()
