"""The axes of an image in one order, and a mask back on the grid of its image.

Volumes that say how they lie in a patient run to the right, the front and the head: RAS. Other volumes keep their axes,
and pictures have rows before columns, whatever the format.

A turn is what nibabel calls an orientation: (ndim, 2) numbers, for each spatial axis as it is stored the axis that it
becomes, and 1, or -1 where it is mirrored. `axes` is "RAS", or the letters of the axes in order, such as "zyx".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from nibabel import orientations

from softdice.images.geometry import check_same_place, one_frame, one_shape, same_place
from softdice.images.image import FileError, Image

RAS = "RAS"
LETTERS = {RAS: "xyz"}
"""Axes of a patient by the letters of `train --mirror`: x from left to right, y to the front, z to the head."""


def axes_of(image: Image) -> str:
    """Return the order of an image's axes after `turned`: "RAS" in a patient, else their letters, as "zyx" or "yx"."""
    if image.spatial_ndim != 3:
        return "yx"
    return RAS if image.placed else "zyx" if image.place.axes == "any" else image.place.axes


def lies(axes: str) -> str:
    """Return the words that describe the axes of an image in a message, after "an image"."""
    return (
        "that says how its voxels lie in a patient" if axes == RAS else f"with its axes in the order {', '.join(axes)}"
    )


def turn_of(image: Image) -> np.ndarray:
    """Return the turn that brings a volume in a patient to RAS, a picture to rows before columns, and changes no other.

    Raise FileError if the affine of a volume in a patient is singular.
    """
    if image.spatial_ndim == 3 and image.placed:
        assert image.affine is not None
        turn = orientations.io_orientation(image.affine)
        if np.isnan(turn).any():
            raise FileError("expected an affine that can be inverted, got a singular one. Correct its header.")
        return turn
    turn = unturned(image)
    return turn[::-1] if image.spatial_ndim == 2 and image.place.axes == "xyz" else turn


def unturned(image: Image) -> np.ndarray:
    """Return the turn that leaves the axes of an image as they are."""
    return np.column_stack([np.arange(image.spatial_ndim), np.ones(image.spatial_ndim)]).astype(int)


def turned(image: Image, turn: np.ndarray) -> Image:
    """Turn the voxels of an image, which become contiguous, and its affine.

    `place.axes` keeps the order in the file; `axes_of` returns the order after the turn.
    """
    array = np.ascontiguousarray(orientations.apply_orientation(image.array, turn))  # float sums depend on memory order
    if image.affine is None or image.spatial_ndim > 3:  # an affine is for three axes at most
        return replace(image, array=array)
    ndim = image.spatial_ndim
    turn_3d = np.vstack([turn, [[axis, 1] for axis in range(ndim, 3)]]) if ndim < 3 else turn
    affine = image.affine @ orientations.inv_ornt_aff(turn_3d, (*image.shape, 1, 1)[:3])
    return replace(image, array=array, place=replace(image.place, affine=affine))


def turned_like(image: Image, other: Image, *, by_position: bool = False) -> Image:
    """Turn an image that belongs to `other`, such as its mask, into the order of `turned(other, turn_of(other))`.

    Two volumes in one frame: the image is turned by its own affine, if this can be inverted. Any other image is
    reshaped to the spatial shape of `other`, if the two differ by axes of length 1 alone, and turned as `other` is. If
    the shapes differ by more, it is returned as it is: the caller compares them.

    Args:
        other: as stored, not turned yet.
        by_position: ignore the affine of `image`: equal indices mean equal voxels.
    """
    by_affine = not by_position and image.spatial_ndim == other.spatial_ndim == 3 and one_frame(image, other)
    if by_affine and image.affine is not None and np.linalg.matrix_rank(image.affine) == 4:
        return turned(image, turn_of(image))
    if not one_shape(image.shape, other.shape):
        return image
    channels = image.array.shape[image.spatial_ndim :]
    image = replace(image, array=image.array.reshape(*other.shape, *channels), spatial_ndim=other.spatial_ndim)
    return turned(image, turn_of(other))


def check_turned(path: Path, image: Image, other_path: Path, other: Image, *, advice: str, transpose: str) -> None:
    """Raise FileError unless the voxels of two images, as they are stored, lie at the same places once both are turned.

    They are turned first, since a mask may be stored in another order of axes than its image. `advice` ends the message
    for voxels that lie elsewhere, `transpose` for an image with reversed axes; the paths are for messages.
    """
    if one_frame(image, other) and same_place(turned_like(image, other), turned(other, turn_of(other))):
        return
    check_same_place(path, image, other_path, other, advice=advice, transpose=transpose)


def turned_back(array: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Undo a turn: return voxels, spatial axes first, in the order of the file that they were read from.

    Example:
        >>> turn = np.array([[1, -1], [0, 1]])
        >>> turned_back(orientations.apply_orientation(np.array([[1, 2, 3], [4, 5, 6]]), turn), turn).tolist()
        [[1, 2, 3], [4, 5, 6]]
    """
    stored = np.column_stack([np.arange(len(turn)), np.ones(len(turn))])
    return np.ascontiguousarray(orientations.apply_orientation(array, orientations.ornt_transform(stored, turn)))


def axis_number(axes: str, letter: str) -> int:
    """Return the number of the axis that `letter`, x, y or z, names among `axes`, "RAS" or letters such as "zyx".

    Example:
        >>> axis_number("RAS", "x"), axis_number("zyx", "x"), axis_number("yx", "x")
        (0, 2, 1)
    """
    return LETTERS.get(axes, axes).index(letter)
