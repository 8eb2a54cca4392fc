"""Compare where the voxels of two images lie: whether an array index means the same place in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from softdice.images.image import PATIENT, FileError, Image

SAME_PLACE_VOXELS = 0.05
"""Two grids are the same when no corner of the volume lies further apart than this share of a voxel."""


def one_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether two shapes are equal without their axes of length 1."""
    return _long(a) == _long(b)


def one_frame(a: Image, b: Image) -> bool:
    """Return whether both images say where their voxels lie, in the same space or on the same map."""
    return a.place.frame == b.place.frame != ""


def by_position(a: Image, b: Image) -> bool:
    """Return whether equal indices mean equal voxels in two images of one shape, though no common frame says so.

    Pictures, stacks and maps have rows before columns, and so has an array that was saved beside them, whatever their
    spacing. Axes of another order agree in spacing, too, where both files know it. False where both images name a
    frame: their affines decide; and where one lies in a patient: there an order of axes says nothing of directions.
    """
    if PATIENT in (a.place.frame, b.place.frame) or (a.place.frame and b.place.frame):
        return False
    if {a.place.axes, b.place.axes} <= {"zyx", "any"}:
        return True
    if a.place.axes != b.place.axes or a.spacing_mm is None or b.spacing_mm is None:
        return a.place.axes == b.place.axes
    axes = min(a.spatial_ndim, b.spatial_ndim)
    return bool(np.allclose(a.spacing_mm[:axes], b.spacing_mm[:axes], rtol=1e-3))


def same_place(a: Image, b: Image) -> bool:
    """Return whether the voxels of two images of one frame lie at the same places."""
    if not one_shape(a.shape, b.shape):
        return False
    first, second = _long_axes_first(a), _long_axes_first(b)
    apart = np.linalg.norm(((first - second) @ _corners(_long(a.shape)).T)[:3], axis=0).max()
    return bool(apart <= SAME_PLACE_VOXELS * np.linalg.norm(second[:3, : len(_long(b.shape)) or 3], axis=0).min())


def overlap(a: Image, b: Image) -> bool:
    """Return whether the boxes around two images of one frame overlap, to the outer faces of their voxels.

    They are seen along the axes of each in turn: False is certain, True may be wrong of boxes turned against each
    other. Boxes that touch overlap. Both affines can be inverted (`check_inverse` comes first).
    """
    assert a.affine is not None
    assert b.affine is not None
    for one, other, shape, others in ((a.affine, b.affine, a.shape, b.shape), (b.affine, a.affine, b.shape, a.shape)):
        within = (np.linalg.inv(one) @ other @ _corners(others, 0.5).T)[:3]
        size = [*shape[:3], *[1] * (3 - len(shape))]
        if any(high < -0.5 or low > n - 0.5 for low, high, n in zip(within.min(1), within.max(1), size, strict=True)):
            return False
    return True


def extended(image: Image, other: Image) -> Image:
    """Zero-pad a segmentation whose file omits empty slices to the extent of the other image."""
    place = image.place
    if not place.partial or not one_frame(image, other) or other.spatial_ndim != 3 or image.spatial_ndim != 3:
        return image
    assert image.affine is not None
    assert other.affine is not None
    size = np.array(image.shape)
    within = (np.linalg.inv(image.affine) @ other.affine @ _corners(other.shape).T)[:3]
    beside = (within.max(1) < -0.5) | (within.min(1) > size - 0.5)
    both = {*place.partial} & {*other.place.partial}
    if {*np.flatnonzero(beside).tolist()} - both:
        return image  # another place: not what was left out
    before = np.maximum(0, -np.rint(within.min(1)).astype(int))
    after = np.maximum(0, np.rint(within.max(1)).astype(int) + 1 - size)
    widths = [*zip(before, after, strict=True), *[(0, 0)] * (image.array.ndim - 3)]
    moved = np.eye(4)
    moved[:3, 3] = -before
    return replace(image, array=np.pad(image.array, widths), place=replace(place, affine=image.affine @ moved))


def check_same_place(
    path: Path, image: Image, other_path: Path, other: Image, *, advice: str, transpose: str = ""
) -> None:
    """Raise FileError unless the voxels of two images of one shape lie at the same places, as far as the files say.

    Args:
        advice: what to do where they lie elsewhere.
        transpose: what to do where the axes of one are those of the other in reversed order.
    """
    if by_position(image, other):
        return
    if one_frame(image, other):
        if same_place(image, other):
            return
        check_inverse(path, image, other_path, other)
        if not overlap(image, other):
            raise FileError(f"{path}: expected {apart(other_path, True)}")
        got = "{} elsewhere than the {} of {}".format(*_lying(image, other), other_path.name)
        sizes = [np.linalg.norm(each.affine[:3, 0]) for each in (image, other) if each.affine is not None]
        if abs(abs(math.log(sizes[0] / sizes[1], 1000)) - 1) < 1e-3:
            advice = f"Is the unit of length of one wrong? Then correct its header. {advice}"
        raise FileError(f"{path}: expected the same orientation and affine, got {got}. {advice}")
    raise FileError(f"{path}: {_without_frame(path, image, other_path, other, transpose)}")


def _without_frame(path: Path, image: Image, other_path: Path, other: Image, transpose: str) -> str:
    """Return why two images of one shape cannot be compared voxel by voxel, and what to do."""
    frames, axes = (image.place.frame, other.place.frame), (image.place.axes, other.place.axes)
    if all(frames):
        got = f"it lies in {frames[0]}, and {other_path.name} in {frames[1]}"
    elif any(frames):
        got = f"only {(path if frames[0] else other_path).name} says how its voxels lie in space"
    elif axes[0] == axes[1]:
        got = f"its voxels have another size than those of {other_path.name}"
    else:
        got = f"neither it nor {other_path.name} says how its voxels lie in space"
    if axes[0] == axes[1] or not reversed_shape(image.shape, other.shape):
        return f"{got}. Pass --ignore-geometry if their axes agree."
    if "any" in axes:
        array, order = (path if axes[0] == "any" else other_path).name, "(x, y, z)"[: 3 * len(_long(image.shape)) - 1]
        how = f"If {array} was saved in the order {order}), as nibabel has it, pass --ignore-geometry."
        return f"{got}. {how} If in the reversed order, as SimpleITK has it: {transpose}"
    first, last = ("columns", "rows") if axes[0] == "xyz" else ("rows", "columns")
    return f"{got}, and its first axis is that of the {first}, not of the {last} as there. {transpose}"


def reversed_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether two shapes without their axes of length 1 are each other's reverse."""
    return len(_long(a)) > 1 and _long(a) == _long(b)[::-1]


def apart(path: Path, same_shape: bool) -> str:
    """Return the end of an error about two grids that do not overlap."""
    advice = "Was its affine lost? Then --ignore-geometry compares as is." if same_shape else "Check the affines."
    return f"a grid that overlaps that of {path.name} in space, got one beside it. {advice}"


def check_inverse(path: Path, image: Image, other_path: Path, other: Image) -> None:
    """Raise FileError if the affine of either image is singular: it puts different voxels into one place."""
    for name, each in ((path, image), (other_path, other)):
        if each.affine is not None and np.linalg.matrix_rank(each.affine) < 4:
            advice = "--ignore-geometry compares as is."
            raise FileError(f"{name}: expected an affine that can be inverted, got a singular one. {advice}")


def _long(shape: Sequence[int]) -> list[int]:
    """Return the shape without axes of length 1."""
    return [n for n in shape if n != 1]


def _lying(a: Image, b: Image) -> list[str]:
    """Return the direction of the voxels of two images, such as "RAS voxels", and their sizes where those differ."""
    assert a.affine is not None
    assert b.affine is not None
    sizes = [np.linalg.norm(affine[:3, : a.spatial_ndim], axis=0) for affine in (a.affine, b.affine)]
    alike = np.allclose(sizes[0], sizes[1][: len(sizes[0])], rtol=1e-3)
    lengths = ["" if alike else " of " + " x ".join(f"{n:.4g}" for n in size) + " mm" * a.placed for size in sizes]
    kinds = [f"{_axes(each.affine)} voxels" if each.affine is not None and each.placed else "pixels" for each in (a, b)]
    return [kind + length for kind, length in zip(kinds, lengths, strict=True)]


def _corners(shape: Sequence[int], margin: float = 0.0) -> np.ndarray:
    """Return homogeneous voxel coordinates (8, 4) of the outermost centres, moved outwards by `margin` voxels."""
    ends = [(-margin, n - 1 + margin) for n in (*shape[:3], *[1] * (3 - min(3, len(shape))))]
    return np.array([[*corner, 1] for corner in product(*ends)])


def _long_axes_first(image: Image) -> np.ndarray:
    """Return the affine with the columns of axes of length 1 last."""
    assert image.affine is not None
    sizes = (*image.shape, 1, 1)[:3]
    return image.affine[:, [*(i for i in range(3) if sizes[i] != 1), *(i for i in range(3) if sizes[i] == 1), 3]]


def _axes(affine: np.ndarray) -> str:
    """Return where the first, second and third axis point, such as "RAS" or "LPS"."""
    return "".join(("LR", "PA", "IS")[world][int(sign > 0)] for world, sign in voxel_axes(affine))


def voxel_axes(affine: np.ndarray) -> list[tuple[int, int]]:
    """Return, for each voxel axis, the axis of the patient (0 right, 1 front, 2 head) it runs along most, and its sign.

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
