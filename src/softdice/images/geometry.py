"""Compare where the voxels of two images lie: whether an array index means the same place in both.

`path` and `other_path` are the files of `image` and `other`, for messages alone; `advice` and `transpose` are sentences
that end a message and say what to do. Affines are (4, 4), from voxel indices to coordinates in the frame of the image,
which is the space of a patient or of a map; "" for an image whose file does not say where its voxels lie.
"""

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
    """Return whether two images of one shape can be compared index by index, though no common frame says so.

    The first rule that holds decides:

    * Both have a frame, or one lies in a patient: False. Affines decide; an order of axes gives no directions.
    * The axes of both are "zyx" or "any" (not known): True, whatever the spacing. Pictures, stacks and maps have rows
      before columns, and so has an array that was saved beside them.
    * Otherwise the order of the axes must be the same, and the spacing, too, where both files know it.
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
    """Return whether the voxels of two images of one frame lie at the same places; axes of length 1 do not count.

    Their outermost voxel centres may differ by `SAME_PLACE_VOXELS` of the shortest side of a voxel.
    """
    if not one_shape(a.shape, b.shape):
        return False
    affine_a, affine_b = _long_axes_first(a), _long_axes_first(b)  # so that (x, y, 1) and (1, x, y) compare
    farthest = np.linalg.norm(((affine_a - affine_b) @ _corners(_long(a.shape)).T)[:3], axis=0).max()
    voxel_sizes = np.linalg.norm(affine_b[:3, : len(_long(b.shape)) or 3], axis=0)  # or 3: of a single voxel
    return bool(farthest <= SAME_PLACE_VOXELS * voxel_sizes.min())


def overlap(a: Image, b: Image) -> bool:
    """Return whether the boxes around two images of one frame overlap, to the outer faces of their voxels.

    Only the voxel axes of each image are tried as separating axes: False is certain, True may be wrong for boxes that
    are turned against each other. Boxes that touch overlap. The caller has checked the affines by `check_inverse`.
    """
    for one, other in ((a, b), (b, a)):
        other_corners = _corners_within(one, other, 0.5)  # outer ones, in voxel indices of `one`
        low, high, size = other_corners.min(1), other_corners.max(1), np.array((*one.shape, 1, 1)[:3])
        if ((high < -0.5) | (low > size - 0.5)).any():
            return False
    return True


def extended(image: Image, other: Image) -> Image:
    """Zero-pad a segmentation whose file omits empty slices (`Place.partial`) to the extent of the other image.

    Any other image is returned as it is. So is a segmentation that lies beside the other image along some axis, unless
    both omit empty slices there: then two segmentations without a common slice are padded. The caller has checked that
    affines of volumes of one frame can be inverted.
    """
    place = image.place
    if not place.partial or not one_frame(image, other) or other.spatial_ndim != 3 or image.spatial_ndim != 3:
        return image
    assert image.affine is not None
    size, other_corners = np.array(image.shape), _corners_within(image, other)
    low, high = other_corners.min(1), other_corners.max(1)  # voxel indices of `image`
    axes_beside = {*np.flatnonzero((high < -0.5) | (low > size - 0.5)).tolist()}
    if axes_beside - ({*place.partial} & {*other.place.partial}):
        return image  # it lies elsewhere: padding would not bring the two together
    before = np.maximum(0, -np.rint(low).astype(int))  # voxels to add at the start of each axis
    after = np.maximum(0, np.rint(high).astype(int) + 1 - size)
    widths = [*zip(before, after, strict=True), *[(0, 0)] * (image.array.ndim - 3)]
    shift = np.eye(4)
    shift[:3, 3] = -before
    return replace(image, array=np.pad(image.array, widths), place=replace(place, affine=image.affine @ shift))


def check_same_place(
    path: Path, image: Image, other_path: Path, other: Image, *, advice: str, transpose: str = ""
) -> None:
    """Raise FileError unless the voxels of two images of one shape lie at the same places, as far as the files say.

    `advice` is for voxels that lie elsewhere, `transpose` for an image that has the axes of the other one reversed.
    """
    if by_position(image, other):
        return
    if not one_frame(image, other):
        raise FileError(f"{path}: {_without_frame(path, image, other_path, other, transpose)}")
    if same_place(image, other):
        return
    check_inverse(path, image, other_path, other)
    if not overlap(image, other):
        raise FileError(f"{path}: expected {apart(other_path, same_shape=True)}")
    got = "{} elsewhere than the {} of {}".format(*_lying(image, other), other_path.name)
    sizes = [np.linalg.norm(each.affine[:3, 0]) for each in (image, other) if each.affine is not None]
    if abs(abs(math.log(sizes[0] / sizes[1], 1000)) - 1) < 1e-3:  # by a factor of 1000: mm and um, or m and mm
        advice = f"Is the unit of length of one wrong? Then correct its header. {advice}"
    raise FileError(f"{path}: expected the same orientation and affine, got {got}. {advice}")


def _without_frame(path: Path, image: Image, other_path: Path, other: Image, transpose: str) -> str:
    """Return why two images cannot be compared, and what to do: a message about `image`, which it calls "it".

    They have no common frame, and `by_position` is False: so if their axes have one order, the sizes of voxels differ.
    "any" is an order that the file does not say. `transpose` ends the message if one shape is the reverse of the other.
    """
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
        array, order = (path if axes[0] == "any" else other_path).name, ", ".join("xyz"[: len(_long(image.shape))])
        how = f"If {array} was saved in the order ({order}), as nibabel has it, pass --ignore-geometry."
        return f"{got}. {how} If in the reversed order, as SimpleITK has it: {transpose}"
    first, first_there = _first_axis(image), _first_axis(other)
    return f"{got}, and its first axis is that of the {first}, not of the {first_there} as there. {transpose}"


def _first_axis(image: Image) -> str:
    """Return what the first axis longer than 1 counts, "columns", "rows" or "slices"; `place.axes` is not "any"."""
    ndim, axes = image.spatial_ndim, image.place.axes
    letters = ("z" * ndim + "yx")[-ndim:] if axes == "zyx" else axes[:ndim]
    letter = next(letter for letter, n in zip(letters, image.shape, strict=True) if n != 1)
    return {"x": "columns", "y": "rows", "z": "slices"}[letter]


def reversed_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether two shapes without their axes of length 1 are each other's reverse."""
    return len(_long(a)) > 1 and _long(a) == _long(b)[::-1]


def apart(path: Path, same_shape: bool) -> str:
    """Return the end of an error, after "expected ", about a grid that does not overlap the grid of the file `path`."""
    advice = "Was its affine lost? Then --ignore-geometry compares as is." if same_shape else "Check the affines."
    return f"a grid that overlaps that of {path.name} in space, got one beside it. {advice}"


def check_inverse(path: Path, image: Image, other_path: Path, other: Image) -> None:
    """Raise FileError if either image has a singular affine, which maps different voxels to one place."""
    for name, each in ((path, image), (other_path, other)):
        if each.affine is not None and np.linalg.matrix_rank(each.affine) < 4:
            advice = "--ignore-geometry compares as is."
            raise FileError(f"{name}: expected an affine that can be inverted, got a singular one. {advice}")


def _long(shape: Sequence[int]) -> list[int]:
    """Return the shape without axes of length 1."""
    return [n for n in shape if n != 1]


def _lying(a: Image, b: Image) -> list[str]:
    """Describe two images of one frame for a message, such as "RAS voxels of 1 x 1 x 2 mm"; sizes where they differ."""
    assert a.affine is not None
    assert b.affine is not None
    sizes = [np.linalg.norm(affine[:3, : a.spatial_ndim], axis=0) for affine in (a.affine, b.affine)]
    alike = np.allclose(sizes[0], sizes[1], rtol=1e-3)
    lengths = ["" if alike else " of " + " x ".join(f"{n:.4g}" for n in size) + " mm" * a.placed for size in sizes]
    kinds = [f"{_axes(affine)} voxels" if a.placed else "pixels" for affine in (a.affine, b.affine)]
    return [kind + length for kind, length in zip(kinds, lengths, strict=True)]


def _corners(shape: Sequence[int], margin: float = 0.0) -> np.ndarray:
    """Return homogeneous voxel coordinates (8, 4) of the outermost centres, moved outwards by `margin` voxels."""
    ends = [(-margin, n - 1 + margin) for n in (*shape, 1, 1, 1)[:3]]
    return np.array([[*corner, 1] for corner in product(*ends)])


def _corners_within(image: Image, other: Image, margin: float = 0.0) -> np.ndarray:
    """Return `_corners` of `other` in voxel indices of `image`, (3, 8) float64; both have affines of one frame."""
    assert image.affine is not None
    assert other.affine is not None
    return np.asarray((np.linalg.inv(image.affine) @ other.affine @ _corners(other.shape, margin).T)[:3])


def _long_axes_first(image: Image) -> np.ndarray:
    """Return the affine (4, 4) of an image that has one, with the columns of axes of length 1 behind the others."""
    assert image.affine is not None
    sizes = (*image.shape, 1, 1)[:3]
    return image.affine[:, [*(i for i in range(3) if sizes[i] != 1), *(i for i in range(3) if sizes[i] == 1), 3]]


def _axes(affine: np.ndarray) -> str:
    """Return where the first, second and third axis point, such as "RAS" or "LPS"."""
    return "".join(("LR", "PA", "IS")[world][int(sign > 0)] for world, sign in voxel_axes(affine))


def voxel_axes(affine: np.ndarray) -> list[tuple[int, int]]:
    """Return, for each voxel axis, the axis of the patient that it runs along most, and its sign.

    Args:
        affine: (4, 4), to right, front and head (RAS).

    Returns:
        Three pairs: 0 right, 1 front or 2 head, each once; and 1, or -1 where the axis runs the other way.

    Example:
        >>> voxel_axes(np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
        [(1, -1), (2, 1), (0, 1)]
    """
    columns = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    axes, remaining = [(0, 1)] * 3, np.abs(columns)
    for _ in range(3):  # the largest cosine first, so that no two axes get the same direction
        world, voxel = divmod(int(remaining.argmax()), 3)
        axes[voxel] = world, 1 if columns[world, voxel] >= 0 else -1
        remaining[world], remaining[:, voxel] = -1, -1
    return axes
