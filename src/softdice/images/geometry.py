"""Where the voxels of two images lie: whether an array index means the same place in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
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
    apart = np.linalg.norm(((first - second) @ _corners([n for n in a.shape if n != 1]).T)[:3], axis=0).max()
    return bool(apart <= SAME_PLACE_VOXELS * np.linalg.norm(second[:3, :3], axis=0).min())


def overlap(a: Image, b: Image) -> bool:
    """Two images with affines -> whether the boxes around them share a place, seen along the axes of either."""
    assert a.affine is not None
    assert b.affine is not None
    for one, other, shape, others in ((a.affine, b.affine, a.shape, b.shape), (b.affine, a.affine, b.shape, a.shape)):
        within = (np.linalg.inv(one) @ other @ _corners(others, 0.5).T)[:3]
        size = [*shape[:3], *[1] * (3 - len(shape))]
        if any(high < -0.5 or low > n - 0.5 for low, high, n in zip(within.min(1), within.max(1), size, strict=True)):
            return False
    return True


def extended(image: Image, other: Image) -> Image:
    """A segmentation without the slices that hold nothing, an image -> with zeros, as far as the other reaches."""
    if not image.partial or image.affine is None or other.affine is None or other.spatial_ndim != 3:
        return image
    size = np.array(image.shape)
    within = (np.linalg.inv(image.affine) @ other.affine @ _corners(other.shape).T)[:3]
    beside = (within.max(1) < -0.5) | (within.min(1) > size - 0.5)
    if beside[:2].any() or (beside[2] and not other.partial):
        return image  # another place: not what was left out
    before = np.maximum(0, -np.rint(within.min(1)).astype(int))
    after = np.maximum(0, np.rint(within.max(1)).astype(int) + 1 - size)
    widths = [*zip(before, after, strict=True), *[(0, 0)] * (image.array.ndim - 3)]
    moved = np.eye(4)
    moved[:3, 3] = -before
    return replace(image, array=np.pad(image.array, widths), affine=image.affine @ moved)


def check_same_place(
    path: Path, image: Image, other_path: Path, other: Image, *, advice: str, or_else: str = ""
) -> None:
    """Two images of one shape: nothing, where their voxels are the same ones as far as the files say.

    Args:
        advice: what to do where they lie elsewhere. or_else: and where only one says where.

    Raises:
        FileError: only one of them says how its voxels lie in space, or they say that the voxels lie elsewhere.
    """
    if (image.affine is None and other.affine is None) or (
        image.affine is not None and other.affine is not None and same_place(image, other)
    ):
        return
    if image.placed != other.placed or image.affine is None or other.affine is None:
        known = path if image.placed else other_path
        advice = f"Pass --ignore-geometry if their axes agree{or_else}."
        raise FileError(f"{path}: only {known.name} says how its voxels lie in space. {advice}")
    check_inverse(path, image, other_path, other)
    if not overlap(image, other):
        raise FileError(f"{path}: expected {apart(other_path, True)}")
    got = f"{_axes(image.affine)} voxels elsewhere than the {_axes(other.affine)} voxels of {other_path.name}"
    raise FileError(f"{path}: expected the same orientation and affine, got {got}. {advice}")


def apart(path: Path, same_shape: bool) -> str:
    """The end of an error on two grids that share no place."""
    advice = "Was its affine lost? Then --ignore-geometry compares as is." if same_shape else "Check the affines."
    return f"a grid that overlaps that of {path.name} in space, got one beside it. {advice}"


def check_inverse(path: Path, image: Image, other_path: Path, other: Image) -> None:
    """Raises FileError where an affine puts different voxels into one place."""
    for name, each in ((path, image), (other_path, other)):
        if each.affine is not None and np.linalg.matrix_rank(each.affine) < 4:
            advice = "--ignore-geometry compares as is."
            raise FileError(f"{name}: expected an affine that can be inverted, got a singular one. {advice}")


def _corners(shape: Sequence[int], margin: float = 0.0) -> np.ndarray:
    """Voxel coordinates of the eight outermost centres, or so far beyond them, (8, 4)."""
    ends = [(-margin, n - 1 + margin) for n in (*shape[:3], *[1] * (3 - min(3, len(shape))))]
    return np.array([[*corner, 1] for corner in product(*ends)])


def _long_axes_first(image: Image) -> np.ndarray:
    """The affine with the columns of axes of length 1 last."""
    assert image.affine is not None
    sizes = (*image.shape, 1, 1)[:3]
    return image.affine[:, [*(i for i in range(3) if sizes[i] != 1), *(i for i in range(3) if sizes[i] == 1), 3]]


def _axes(affine: np.ndarray) -> str:
    """affine -> "RAS", "LPS" ...: where the first, second and third axis point."""
    return "".join(("LR", "PA", "IS")[world][int(sign > 0)] for world, sign in voxel_axes(affine))


def voxel_axes(affine: np.ndarray) -> list[tuple[int, int]]:
    """affine -> per voxel axis the axis of the patient (0 right, 1 front, 2 head) that it runs along most, and 1 or -1.

    Example:
        >>> voxel_axes(np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
        [(1, -1), (2, 1), (0, 1)]
    """
    columns = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    along, left = [(0, 1)] * 3, np.abs(columns)
    for _ in range(3):  # the clearest first, so that no two run along the same
        world, voxel = divmod(int(left.argmax()), 3)
        along[voxel] = world, 1 if columns[world, voxel] >= 0 else -1
        left[world], left[:, voxel] = -1, -1
    return along
