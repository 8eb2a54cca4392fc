"""a pair of label arrays -> distances between the surfaces of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softdice.images.image import Image
from softdice.metrics import distances, surfaces
from softdice.metrics.surfaces import SurfaceDistances
from softdice.scoring.classes import Options, ScoreError

PERCENTILE = 95.0


def surface_scores(
    path: Path,
    p: np.ndarray,
    t: np.ndarray,
    grid: Image,
    keys: Sequence[int | str],
    names: dict[int, str],
    options: Options,
) -> np.ndarray:
    """Labels of prediction and truth on one grid, its classes -> HD95, mean distance, surface Dice: (3, K) float64.

    Raises:
        ScoreError: an image of other than 2 or 3 axes, or whose file does not say how large a voxel is.
    """
    if sum(n != 1 for n in t.shape) > 3 or t.ndim < 2:
        raise ScoreError(f"{path}: --surface: expected an image of 2 or 3 axes, got shape {t.shape}.")
    spacing = (1.0,) * t.ndim
    if options.surface_unit == "mm":
        known = grid.spacing_mm
        if known is None or min(known) <= 0:
            advice = "Pass --surface 2px to measure in pixels."
            raise ScoreError(f"{path}: --surface: expected a file that says how large a voxel is, got none. {advice}")
        spacing = known[: t.ndim]
    tolerances = [_tolerance(path, key, names, options) for key in keys]
    if options.regions is not None:
        counted = ~np.isin(t, options.ignore)
        each = [
            _measured(np.isin(p, inside) & counted, np.isin(t, inside) & counted, (1,), None, spacing, [tolerance])
            for inside, tolerance in zip(options.regions.values(), tolerances, strict=True)
        ]
        return np.concatenate(each, 1) if each else np.zeros((3, 0))
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
    return _measured(p, t, labels, ignore, spacing, tolerances)


_DIRECT = 1 << 12
"""Labels below it are class numbers as they are."""


def mask_scores(path: Path, p: np.ndarray, t: np.ndarray, grid: Image, name: str, options: Options) -> np.ndarray:
    """Masks of one class -> the same of it, (3, 1)."""
    only = {"": options.surface.get(name, options.surface[""])} if options.surface else None
    alone = Options(surface=only, surface_unit=options.surface_unit)
    return surface_scores(path, p.astype(np.uint8), t.astype(np.uint8), grid, (1,), {}, alone)


def _tolerance(path: Path, key: int | str, names: dict[int, str], options: Options) -> float:
    assert options.surface is not None
    words = (str(key), names.get(key, "") if isinstance(key, int) else "")
    return next((options.surface[word] for word in words if word and word in options.surface), options.surface[""])


def _measured(
    p: np.ndarray,
    t: np.ndarray,
    labels: tuple[int, ...],
    ignore: int | None,
    spacing: tuple[float, ...],
    tolerances: Sequence[float],
) -> np.ndarray:
    if not labels:
        return np.zeros((3, 0))

    def dice(found: SurfaceDistances, k: int) -> float:
        return surfaces.surface_overlap(found, tolerances[k])

    formulas = [
        lambda found, _: surfaces.hausdorff(found, PERCENTILE),
        lambda found, _: surfaces.average(found),
        dice,
    ]
    count = 1 + max(int(p.max(initial=0)), int(t.max(initial=0)), *labels, 1)
    found = distances.measure_maps(_tensor(p), _tensor(t), formulas, count, spacing, "voxels", labels, ignore)
    return found[:, 0].numpy()


def _tensor(array: np.ndarray) -> Tensor:
    """(*S) -> (1, *S), without a copy where torch can take it."""
    good = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if good else array.copy())[None]
