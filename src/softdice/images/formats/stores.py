"""Folders of zarr that are one image each: OME-Zarr 0.4 and 0.5, and plain arrays.

The keys of OME-Zarr's attributes ("multiscales", "datasets", "coordinateTransformations" ...) are defined in its
specification. All its axes, of space, channels and time, are in one order in axes, scales and translations.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import MM, FileError, Format, Image, Place, native

_SPACE = ("x", "y", "z")
"""Names of spatial axes."""

_OLDEST = "tczyx"
"""Axes of OME-Zarr 0.1 and 0.2, whose files do not name them."""


def _read(path: Path, zarr: Any) -> Image:
    """Read the finest array of an OME-Zarr's first multiscale image; or a plain array, all of whose axes are spatial.

    The spatial axes keep the order of the file, and channels follow. Other axes of length 1 are dropped. Raise
    FileError for a group of another kind, a longer axis such as time, or a transformation such as a rotation.
    """
    store = zarr.open(path, mode="r")
    if isinstance(store, zarr.Array):
        return Image(native(np.asarray(store[...])), store.ndim, Place("any"))  # the file does not name its axes
    attributes = dict(store.attrs)
    multiscales = attributes.get("ome", attributes).get("multiscales")
    if not multiscales:
        inside = ", ".join(sorted(store)[:8]) or "nothing"
        raise FileError(f"expected an array or OME-Zarr, got a group of {inside}. Give the folder of one")
    multiscale, finest = multiscales[0], multiscales[0]["datasets"][0]
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in multiscale.get("axes", _OLDEST)]
    array = np.asarray(store[finest["path"]][...])
    spatial = [i for i, axis in enumerate(axes) if axis["name"] in _SPACE]
    others = [i for i in range(array.ndim) if i not in spatial and array.shape[i] != 1]
    if len(axes) != array.ndim or len(spatial) < 2 or any(axes[i]["name"] != "c" for i in others):
        got = " x ".join(f"{axis['name']} {n}" for axis, n in zip(axes, array.shape, strict=False))
        raise FileError(f"expected one image of 2 or 3 axes, got {got}. Save one time, and no other axes")
    scale, shift = _transformed(len(axes), finest, multiscale)
    place = _place([axes[i] for i in spatial], scale[spatial], shift[spatial])
    array = array.transpose(*spatial, *others, *(i for i in range(array.ndim) if i not in (*spatial, *others)))
    array = native(array.reshape(array.shape[: len(spatial) + len(others)]))
    beside = ", ".join(sorted(store["labels"])) if "labels" in store else ""
    reason = f"an image, whose labels lie in its folder labels/: {beside}. Give the folder of one." if beside else ""
    return Image(array, len(spatial), place, no_labels=reason)


def _place(axes: list[dict[str, Any]], scale: np.ndarray, shift: np.ndarray) -> Place:
    """Return the place of an array: its affine goes to x, y, z in mm, or in the file's unit if an axis has none.

    Args:
        axes: name and unit of the 2 or 3 spatial axes, in the order of the array.
        scale, shift: (2,) or (3,), the size of a voxel and the position of the first one along these axes.
    """
    names, mm = [axis["name"] for axis in axes], [MM.get(axis.get("unit", ""), math.nan) for axis in axes]
    has_units = not np.isnan(mm).any()
    factors = np.array(mm) if has_units else np.ones(len(mm))
    rows = [_SPACE.index(name) for name in (*names, *(name for name in _SPACE if name not in names))]
    affine = np.eye(4)[:, [*rows, 3]]  # a column for each axis of the array, a row for each of x, y and z
    spatial_rows = rows[: len(names)]
    affine[spatial_rows, range(len(names))], affine[spatial_rows, 3] = scale * factors, shift * factors
    ascending = sorted(names)
    order = "xyz" if names == ascending else "zyx" if names == ascending[::-1] else "".join(names)
    frame = "the space of an OME-Zarr" + " without units" * (not has_units)
    return Place(order, frame, affine, 1.0 if has_units else math.nan)


def _transformed(ndim: int, *parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and translation, (ndim,) each, of the transformations of a data set and then of its multiscale.

    `parts` are the attributes of the two. Raise FileError for a transformation of another kind, such as a rotation.
    """
    scale, shift = np.ones(ndim), np.zeros(ndim)
    for step in (step for part in parts for step in part.get("coordinateTransformations", ())):
        if step["type"] == "scale":
            scale, shift = scale * step["scale"], shift * step["scale"]
        elif step["type"] == "translation":
            shift = shift + step["translation"]
        elif step["type"] != "identity":
            raise FileError(f"expected scales and translations, got a transformation of type {step['type']}")
    return scale, shift


FORMATS = (Format((".ome.zarr", ".zarr"), _read, None, ("zarr", "zarr"), masks=".tif", store=True),)
