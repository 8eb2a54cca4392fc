"""a pair of label arrays -> what is measured of the shape of each class: surfaces, lesions, centre lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice.images.image import Image
from softdice.metrics import distances, lesions, surfaces
from softdice.metrics.distances import Compare, Formula
from softdice.metrics.instances import object_overlaps
from softdice.scoring.classes import Options, ScoreError

PERCENTILE = 95.0

Spacing = tuple[float, ...]


class Measure(NamedTuple):
    """How two masks are compared, in what unit, and the columns that come of it."""

    compare: Compare
    spacing: Spacing
    formulas: list[Formula]


def measured_scores(
    path: Path,
    p: np.ndarray,
    t: np.ndarray,
    grid: Image,
    keys: Sequence[int | str],
    names: dict[int, str],
    options: Options,
) -> np.ndarray:
    """Labels of prediction and truth on one grid, its classes -> the columns of `Options.measured`, (M, K) float64.

    Raises:
        ScoreError: an image of other than 2 or 3 axes, or whose file does not say how large a voxel is.
    """
    if not (options.measured and keys):
        return np.zeros((len(options.measured), len(keys)))
    shapes = {*options.metrics} & {"surface", "lesions", "centreline"}
    if shapes and (sum(n != 1 for n in t.shape) > 3 or t.ndim < 2):
        option = next(metric for metric in ("surface", "lesions", "centreline") if metric in options.metrics)
        raise ScoreError(f"{path}: --{option}: expected an image of 2 or 3 axes, got shape {t.shape}.")
    tolerances = [_tolerance(key, names, options) for key in keys]
    if options.instances:
        masks = (p != 0).astype(np.uint8), (t != 0).astype(np.uint8)
        measures = [*_measures(path, grid, t.shape, tolerances, options)] if shapes else []
        of_masks = [_measured(*masks, (1,), None, measures)] if measures else []
        return np.concatenate([*of_masks, [[score] for score in _object_scores(p, t, options)]])
    if options.regions is not None:
        counted = ~np.isin(t, options.ignore)
        each = [
            _measured(np.isin(p, inside) & counted, np.isin(t, inside) & counted, (1,), None, measures)
            for inside, tolerance in zip(options.regions.values(), tolerances, strict=True)
            for measures in [[*_measures(path, grid, t.shape, [tolerance], options)]]
        ]
        return np.concatenate(each, 1)
    present = [label for label in options.ignore if (t == label).any()]
    ignore = present[0] if present else None
    if len(present) > 1:
        t = np.where(np.isin(t, present), t.dtype.type(present[0]), t)
    labels = tuple(int(key) for key in keys)
    if any(array.size and not 0 <= array.min() <= array.max() < _DIRECT for array in (p, t)):
        every = np.unique(np.concatenate([np.unique(p), np.unique(t), labels]).astype(np.int64))
        p, t = (np.searchsorted(every, array) for array in (p, t))
        labels = tuple(np.searchsorted(every, labels).tolist())
        ignore = None if ignore is None else int(np.searchsorted(every, ignore))
    return _measured(p, t, labels, ignore, [*_measures(path, grid, t.shape, tolerances, options)])


AP = (0.5, 0.75, 0.9)
"""Overlaps from which on objects match for the average precision, as StarDist and cellpose report it."""


def _object_scores(p: np.ndarray, t: np.ndarray, options: Options) -> list[float]:
    """Return the columns of `--instances`: the qualities, the average precisions, and the counts."""
    overlaps = object_overlaps(p, t)
    objects = lesions.paired(*overlaps, options.rule.threshold, options.reach)
    qualities = [lesions.quality_of(objects, which) for which in ("pq", "sq", "rq")]
    precisions = [lesions.quality_of(lesions.paired(*overlaps, iou, "at_least"), "ap") for iou in AP]
    return [*qualities, *precisions, len(objects.iou), objects.missed, objects.extra]


_DIRECT = 1 << 12
"""Labels below it are class numbers as they are."""


def mask_scores(path: Path, p: np.ndarray, t: np.ndarray, grid: Image, name: str, options: Options) -> np.ndarray:
    """Masks of one class -> the same of it, (M, 1)."""
    only = {"": options.surface.get(name, options.surface[""])} if options.surface else None
    shared = {name: getattr(options, name) for name in ("surface_unit", "penalty", "matching", "reach", "metrics")}
    alone = Options(surface=only, **shared)
    return measured_scores(path, p.astype(np.uint8), t.astype(np.uint8), grid, (1,), {}, alone)


def _measures(
    path: Path, grid: Image, shape: tuple[int, ...], tolerances: Sequence[float], options: Options
) -> Iterator[Measure]:
    """What the options ask for, in the order of their columns."""
    axes = len(shape)
    if "surface" in options.metrics:
        spacing = _spacing_mm(path, grid, axes, "surface") if options.surface_unit == "mm" else (1.0,) * axes
        penalty = options.penalty
        worst = math.hypot(*(n * size for n, size in zip(shape, spacing, strict=True)))
        worst = worst if isinstance(penalty, str) else penalty

        def finite(distance: float) -> float:
            return worst if math.isinf(distance) else distance

        formulas: list[Formula] = [
            lambda found, _: finite(surfaces.hausdorff(found, PERCENTILE)),
            lambda found, _: finite(surfaces.average(found)),
            lambda found, k: surfaces.surface_overlap(found, tolerances[k]),
        ]
        yield Measure(surfaces.between("voxels"), spacing, formulas)
    if "lesions" in options.metrics:
        whole, rule = (1.0,) * axes, options.rule
        by_name = isinstance(rule.matching, str)
        spacing = _spacing_mm(path, grid, axes, "matching") if by_name else whole
        dice: list[Formula] = [lambda found, _: lesions.mean_dice(found)]
        qualities: list[Formula] = [
            lambda found, _: lesions.quality_of(found, "pq"),
            lambda found, _: lesions.quality_of(found, "sq"),
            lambda found, _: lesions.quality_of(found, "rq"),
        ]
        yield Measure(rule.compare, spacing, dice if by_name else dice + qualities)
        if by_name:
            yield Measure(lesions.Rule().compare, whole, qualities)
    if "centreline" in options.metrics:
        yield Measure(lesions.skeletons, (1.0,) * axes, [lambda found, _: lesions.harmonic(found)])


def _spacing_mm(path: Path, grid: Image, axes: int, option: str) -> Spacing:
    known = grid.spacing_mm
    if known is None or min(known) <= 0:
        advice = "Pass --surface 2px to measure in pixels." if option == "surface" else "Pass an overlap, such as 0.5."
        raise ScoreError(f"{path}: --{option}: expected a file that says how large a voxel is, got none. {advice}")
    return known[:axes]


def _tolerance(key: int | str, names: dict[int, str], options: Options) -> float:
    if options.surface is None:
        return 0.0
    words = (str(key), names.get(key, "") if isinstance(key, int) else "")
    return next((options.surface[word] for word in words if word and word in options.surface), options.surface[""])


def _measured(
    p: np.ndarray, t: np.ndarray, labels: tuple[int, ...], ignore: int | None, measures: Sequence[Measure]
) -> np.ndarray:
    count = 1 + max(int(p.max(initial=0)), int(t.max(initial=0)), *labels, 1)
    pair = _tensor(p), _tensor(t)
    found = [
        distances.measure_maps(*pair, formulas, count, spacing, compare, labels, ignore)[:, 0]
        for compare, spacing, formulas in measures
    ]
    return torch.cat(found).numpy()


def _tensor(array: np.ndarray) -> Tensor:
    """(*S) -> (1, *S), without a copy where torch can take it."""
    good = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if good else array.copy())[None]
