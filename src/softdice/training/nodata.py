"""Rasters with NaN where they hold no data: the value that GDAL's tag names, or that a person names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from softdice.images.files import Image
from softdice.validation import package

GDAL_NODATA = 42113
"""Tag of TIFF in which GDAL writes the value, in words."""
SHARE = 0.03
"""Of the voxels, so many must hold one value that stands for missing data."""
PERCENTILES = (0.5, 99.5)
"""Of all other values: the width between them is how far apart that value must lie, at least."""
SAMPLED_VOXELS = 1_000_000


def without_nodata(image: Image, path: Path, value: float | None) -> Image:
    """Return an image with NaN in the place of what its file, or a person, names as missing data."""
    values = [number for number in (value, _declared(path)) if number is not None]
    array = image.array
    with np.errstate(over="ignore"):  # the lowest float32, in fewer digits
        missing = [_equal(array, number) for number in values]
    if not any(mask.any() for mask in missing):
        return image
    wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    return replace(image, array=np.where(np.logical_or.reduce(missing), wide.dtype.type(np.nan), wide))


def _equal(array: np.ndarray, number: float) -> np.ndarray:
    return array == (array.dtype.type(number) if array.dtype.kind == "f" else number)


def _declared(path: Path) -> float | None:
    """Return the value that the tag of a TIFF file names, None where there is none."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    with package("softdice train", "tifffile", "images").TiffFile(path) as file:
        text = str(file.pages[0].tags.valueof(GDAL_NODATA, "")).strip("\0 ")
    try:
        return float(text)
    except ValueError:
        return None


def lonely_value(channels: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Return the lowest or highest value of a channel, and its share, if many voxels hold it and all others are far.

    Example:
        >>> lonely_value([np.array([-9999.0] * 2 + [0.1, 0.2, 0.3, 0.4])])
        (-9999.0, 0.3333333333333333)
        >>> lonely_value([np.array([0.0] * 2 + [0.1, 0.2, 0.3, 0.4])])
    """
    for channel in channels:
        finite = channel[np.isfinite(channel)] if channel.dtype.kind == "f" else channel.ravel()
        for value in (finite.min(), finite.max()) if finite.size else ():
            held = finite == value
            share = float(held.sum() / channel.size)
            if share < SHARE or held.all():
                continue
            others = finite[~held]
            low, high = np.percentile(others[:: max(1, others.size // SAMPLED_VOXELS)], PERCENTILES)
            nearest = float(others.min()) - float(value) if value < others[0] else float(value) - float(others.max())
            if nearest > high - low > 0:
                return float(value), share
    return None
