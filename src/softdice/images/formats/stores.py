"""Folders of zarr that are one image each: OME-Zarr 0.4 and 0.5, and plain arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import MM, FileError, Format, Image, Place, native


def _read(path: Path, zarr: Any) -> Image:
    store = zarr.open(path, mode="r")
    if isinstance(store, zarr.Array):
        return Image(native(np.asarray(store[...])), store.ndim, Place("any"))
    attributes = dict(store.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        inside = ", ".join(sorted(store)[:8]) or "nothing"
        raise FileError(f"expected an array or OME-Zarr, got a group of {inside}. Give the folder of one")
    first, finest = scales[0], scales[0]["datasets"][0]
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in first["axes"]]
    array = np.asarray(store[finest["path"]][...])
    spatial = [i for i, axis in enumerate(axes) if axis["name"] in _SPACE]
    others = [i for i in range(array.ndim) if i not in spatial and array.shape[i] != 1]
    if len(axes) != array.ndim or len(spatial) < 2 or any(axes[i]["name"] != "c" for i in others):
        got = " x ".join(f"{axis['name']} {n}" for axis, n in zip(axes, array.shape, strict=False))
        raise FileError(f"expected one image of 2 or 3 axes, got {got}. Save one time, and no other axes")
    scale, shift = _transformed(len(axes), finest, first)
    names, mm = [axes[i]["name"] for i in spatial], [MM.get(axes[i].get("unit", ""), math.nan) for i in spatial]
    has_units = not np.isnan(mm).any()
    rows = [_SPACE.index(name) for name in (*names, *(each for each in _SPACE if each not in names))]
    affine = np.eye(4)[:, [*rows, 3]]
    for column, i in enumerate(spatial):
        affine[rows[column], [column, 3]] = np.array([scale[i], shift[i]]) * (mm[column] if has_units else 1.0)
    order = "xyz" if names == sorted(names) else "zyx" if names == sorted(names)[::-1] else "".join(names)
    frame = "the space of an OME-Zarr" + " without units" * (not has_units)
    place = Place(order, frame, affine, 1.0 if has_units else math.nan)
    array = array.transpose(*spatial, *others, *(i for i in range(array.ndim) if i not in (*spatial, *others)))
    array = native(array.reshape(array.shape[: len(spatial) + len(others)]))
    beside = ", ".join(sorted(store["labels"])) if "labels" in store else ""
    reason = f"an image, whose labels lie in its folder labels/: {beside}. Give the folder of one." if beside else ""
    return Image(array, len(spatial), place, no_labels=reason)


_SPACE = ("x", "y", "z")
"""Names of spatial axes."""


def _transformed(ndim: int, *parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and translation of the transformations of a data set, and then of its multiscale."""
    scale, shift = np.ones(ndim), np.zeros(ndim)
    for each in (step for part in parts for step in part.get("coordinateTransformations", ())):
        if each["type"] == "scale":
            scale, shift = scale * each["scale"], shift * each["scale"]
        elif each["type"] == "translation":
            shift = shift + each["translation"]
        elif each["type"] != "identity":
            raise FileError(f"expected scales and translations, got a transformation of type {each['type']}")
    return scale, shift


FORMATS = (Format((".ome.zarr", ".zarr"), _read, None, ("zarr", "zarr"), masks=".tif", store=True),)
