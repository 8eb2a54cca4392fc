"""A pair of label maps -> the scores of each class that need masks: surfaces, lesions, centre lines, objects.

p and t are the labels (*S) of prediction and reference, bool or integers on one grid; `grid` is the image of the
reference, for the size of a voxel; `path` is the prediction, for messages. K is a class, M a column of
`Options.measured`. A measurement compares the masks of a class once, for example by the distances of their surfaces,
and turns the result into columns, each by a formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
"""Size of a voxel along each axis, in mm, or 1 where scores are in voxels."""


class _Measurement(NamedTuple):
    """compare(mask_p, mask_t, spacing) measures a class; each formula(measured, position of the class) is a column."""

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
        p, t: with instances, the caller has set ignored voxels to 0.
        keys: the classes, labels or all regions; with instances `OBJECTS` alone.
        names: label -> name: --surface may give a class its tolerance by name.

    Raise ScoreError if surface, lesions or centre line are asked for, and the image has not 2 or 3 axes longer than 1,
    or its file does not say how large a voxel is.
    """
    if not (options.measured and keys):
        return np.zeros((len(options.measured), len(keys)))
    shapes = {*options.metrics} & {"surface", "lesions", "centreline"}
    if shapes and (sum(n != 1 for n in t.shape) > 3 or t.ndim < 2):
        option = next(metric for metric in ("surface", "lesions", "centreline") if metric in options.metrics)
        raise ScoreError(f"{path}: --{option}: expected an image of 2 or 3 axes, got shape {t.shape}.")
    tolerances = [_tolerance(key, names, options) for key in keys]
    # 1. with --instances, one class of all objects
    if options.instances:
        object_scores_M1 = np.array(_object_scores(p, t, options))[:, None]
        if not shapes:
            return object_scores_M1
        masks = (p != 0).astype(np.uint8), (t != 0).astype(np.uint8)
        measurements = [*_measurements(path, grid, t.shape, tolerances, options)]
        return np.concatenate([_class_scores(*masks, (1,), None, measurements), object_scores_M1])
    # 2. regions: they may overlap, so each is a pair of masks
    if options.regions is not None:
        counted = ~np.isin(t, options.ignore)
        columns = []
        for region, tolerance in zip(options.regions.values(), tolerances, strict=True):
            measurements = [*_measurements(path, grid, t.shape, [tolerance], options)]
            masks = np.isin(p, region) & counted, np.isin(t, region) & counted
            columns.append(_class_scores(*masks, (1,), None, measurements))
        return np.concatenate(columns, 1)
    # 3. labels: all in one walk over both maps
    present = [label for label in options.ignore if (t == label).any()]
    ignore = present[0] if present else None
    if len(present) > 1:  # several ignored labels become one, which is all that `measure_maps` takes
        t = np.where(np.isin(t, present), t.dtype.type(present[0]), t)
    labels = tuple(int(key) for key in keys)
    # tables by label have as many entries as the largest label: negative or large labels are replaced by their rank
    if any(array.size and not 0 <= array.min() <= array.max() < _FEW_LABELS for array in (p, t)):
        distinct = [np.unique(array) for array in (p, t)]
        # ranks as Python's integers: one array of int64 and uint64 would be float64, in which large labels are equal
        all_labels = {*labels, *distinct[0].tolist(), *distinct[1].tolist()}
        rank = {label: i for i, label in enumerate(sorted(all_labels))}
        p, t = (
            np.array([rank[label] for label in values.tolist()])[np.searchsorted(values, array)]
            for values, array in zip(distinct, (p, t), strict=True)
        )
        labels = tuple(rank[label] for label in labels)
        ignore = None if ignore is None else rank[ignore]
    return _class_scores(p, t, labels, ignore, [*_measurements(path, grid, t.shape, tolerances, options)])


def _object_scores(p: np.ndarray, t: np.ndarray, options: Options) -> list[float]:
    """Return the columns of --instances for maps whose numbers above 0 are objects, in the order of `METRICS`.

    They are panoptic, segmentation and recognition quality, the average precision (AP) from an IoU of 0.5, 0.75 and 0.9
    on, and how many objects are matched, missed and extra. For all but AP, `options.rule` says which objects match.
    """
    overlaps = object_overlaps(p, t)  # sizes of the objects in p, and in t, and the pairs that share voxels
    objects = lesions.paired(*overlaps, options.rule.threshold, options.reach)
    qualities = [lesions.quality_of(objects, which) for which in ("pq", "sq", "rq")]
    precisions = [lesions.quality_of(lesions.paired(*overlaps, iou, "at_least"), "ap") for iou in AP_THRESHOLDS]
    return [*qualities, *precisions, len(objects.iou), objects.missed, objects.extra]


def mask_scores(path: Path, p: np.ndarray, t: np.ndarray, grid: Image, name: str, options: Options) -> np.ndarray:
    """Return the `shape_scores` of two bool masks (*S) of one class, `name`, (M, 1) float64."""
    tolerance = {"": options.surface.get(name, options.surface[""])} if options.surface else None
    options_of_class = replace(options, regions=None, ignore=(), surface=tolerance)
    return shape_scores(path, p.astype(np.uint8), t.astype(np.uint8), grid, (1,), {}, options_of_class)


def _measurements(
    path: Path, grid: Image, shape: tuple[int, ...], tolerances: Sequence[float], options: Options
) -> Iterator[_Measurement]:
    """Yield the measurements of surfaces, lesions and centre lines that the options ask for, in the order of columns.

    `shape`: of the label maps. `tolerances`: the surface tolerance of each class. Raise ScoreError if lengths in mm are
    asked for and the file does not say how large a voxel is. A formula takes what `compare` measured of a class, and
    the position of the class.
    """
    axes = len(shape)
    in_voxels = (1.0,) * axes
    if "surface" in options.metrics:
        spacing = _spacing_mm(path, grid, axes, "surface") if options.surface_unit == "mm" else in_voxels
        diagonal = math.hypot(*(n * size for n, size in zip(shape, spacing, strict=True)))
        penalty = diagonal if isinstance(options.penalty, str) else options.penalty

        def penalised(distance: float) -> float:
            """Return the distance, or the penalty for inf: only one map has the class."""
            return penalty if math.isinf(distance) else distance

        formulas: list[Formula] = [
            lambda boundaries, _: penalised(surfaces.hausdorff(boundaries, PERCENTILE)),
            lambda boundaries, _: penalised(surfaces.average(boundaries)),
            lambda boundaries, k: surfaces.surface_overlap(boundaries, tolerances[k]),
        ]
        yield _Measurement(surfaces.between("voxels"), spacing, formulas)
    if "lesions" in options.metrics:
        rule = options.rule
        dice: list[Formula] = [lambda matches, _: lesions.mean_dice(matches)]
        qualities: list[Formula] = [
            lambda matches, _: lesions.quality_of(matches, "pq"),
            lambda matches, _: lesions.quality_of(matches, "sq"),
            lambda matches, _: lesions.quality_of(matches, "rq"),
        ]
        # a challenge says how Dice is computed, in mm, and nothing of the qualities; overlaps need no size of a voxel
        if isinstance(rule.matching, str):
            yield _Measurement(rule.compare, _spacing_mm(path, grid, axes, "matching"), dice)
            yield _Measurement(lesions.Rule().compare, in_voxels, qualities)
        else:
            yield _Measurement(rule.compare, in_voxels, dice + qualities)
    if "centreline" in options.metrics:
        yield _Measurement(lesions.skeletons, in_voxels, [lambda shares, _: lesions.harmonic(shares)])


def _spacing_mm(path: Path, grid: Image, axes: int, option: str) -> Spacing:
    """Return the size of a voxel in mm along the first `axes` axes; raise ScoreError if the file does not say it.

    `option`: the one that needs the size, without dashes, for the message.
    """
    sizes = grid.spacing_mm
    if sizes is None:
        advice = "Pass --surface 2px to measure in pixels." if option == "surface" else "Pass an overlap, such as 0.5."
        raise ScoreError(f"{path}: --{option}: expected a file that says how large a voxel is, got none. {advice}")
    return sizes[:axes]


def _tolerance(key: int | str, names: dict[int, str], options: Options) -> float:
    """Return the surface tolerance of a class: by its number, its name in `names`, or for all; 0 without --surface."""
    if options.surface is None:
        return 0.0
    words = (str(key), names.get(key, "") if isinstance(key, int) else "")
    return next((options.surface[word] for word in words if word and word in options.surface), options.surface[""])


def _class_scores(
    p: np.ndarray, t: np.ndarray, labels: tuple[int, ...], ignore: int | None, measurements: Sequence[_Measurement]
) -> np.ndarray:
    """Return the columns of the measurements for each label, (M, K) float64, without voxels where t is `ignore`.

    There is at least one measurement. p, t and `labels` hold class numbers from 0 on, below `_FEW_LABELS` or ranks.
    """
    num_classes = 1 + max(int(p.max(initial=0)), int(t.max(initial=0)), *labels, 1)
    maps_1S = counting.as_tensor(p)[None], counting.as_tensor(t)[None]
    scores_MK = [  # of each measurement; [:, 0]: a batch of one
        distances.measure_maps(*maps_1S, formulas, num_classes, spacing, compare, labels, ignore)[:, 0]
        for compare, spacing, formulas in measurements
    ]
    return torch.cat(scores_MK).numpy()
