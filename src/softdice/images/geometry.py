"""Where the voxels of two images lie: whether an array index means the same place in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softdice.images.image import FileError, Image

SAME_PLACE_VOXELS = 0.05
"""Two grids are the same when no corner of the volume lies further apart than this share of a voxel."""


def one_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are equal but for axes of length 1, which hold nothing."""
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def same_place(a: Image, b: Image) -> bool:
    """Two images with affines -> whether their voxels are the same ones."""
    if not one_shape(a.shape, b.shape):
        return False
    first, second = _long_axes_first(a), _long_axes_first(b)
    extent = [n - 1 for n in a.shape if n != 1]
    extent += [0] * (3 - len(extent))
    corners = np.array([[i, j, k, 1] for i in (0, extent[0]) for j in (0, extent[1]) for k in (0, extent[2])])
    apart = np.linalg.norm(((first - second) @ corners.T)[:3], axis=0).max()
    return bool(apart <= SAME_PLACE_VOXELS * np.linalg.norm(second[:3, :3], axis=0).min())


def check_same_place(path: Path, image: Image, other_path: Path, other: Image, *, advice: str) -> None:
    """Two images of one shape: nothing, where their voxels are the same ones as far as the files say.

    Raises:
        FileError: only one of them says how its voxels lie in space, or they say that the voxels lie elsewhere.
    """
    if (image.affine is None) != (other.affine is None):
        known = path if image.affine is not None else other_path
        advice = "Pass --ignore-geometry if their axes agree."
        raise FileError(f"{path}: only {known.name} says how its voxels lie in space. {advice}")
    if image.affine is not None and other.affine is not None and not same_place(image, other):
        got = f"{_axes(image.affine)} voxels elsewhere than the {_axes(other.affine)} voxels of {other_path.name}"
        raise FileError(f"{path}: expected the same orientation and affine, got {got}. {advice}")


def _long_axes_first(image: Image) -> np.ndarray:
    """The affine with the columns of axes of length 1 last."""
    assert image.affine is not None
    sizes = (*image.shape, 1, 1)[:3]
    return image.affine[:, [*(i for i in range(3) if sizes[i] != 1), *(i for i in range(3) if sizes[i] == 1), 3]]


def _axes(affine: np.ndarray) -> str:
    """affine -> "RAS", "LPS" ...: where the first, second and third axis point."""
    letters = ("LR", "PA", "IS")
    axes = [int(np.argmax(np.abs(column))) for column in affine[:3, :3].T]
    return "".join(letters[axis][int(affine[axis, i] > 0)] for i, axis in enumerate(axes))
