"""a pair of files and a class -> the slice with the largest error, as a picture that a reader of scans recognises.

Where the file says how its voxels lie in space, the picture is axial, coronal or sagittal, the front or the head of the
patient is up, sides are marked, and lengths are true. Otherwise it is drawn as it is stored.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softdice.images.files import image_name, read_image
from softdice.images.geometry import check_same_place, one_frame, one_shape, overlap, same_place, voxel_axes
from softdice.images.image import Image
from softdice.scoring.cases import load_class, load_pair, region_mask, resampled
from softdice.scoring.classes import Options, ScoreError

PIXELS = 360
RIGHT, EXTRA, MISSED, OTHER = (201, 208, 216), (230, 159, 0), (64, 156, 255), (58, 64, 72)
"""Colours that people with any colour vision tell apart: right voxels, predicted in error, missed, other classes."""

VIEWS = ("radiological", "neurological")
"""Which side of an axial or coronal picture is the patient's left: the right one, or the left one."""

NEARER = 8
"""A class that is less than this part of the plane in both directions is drawn larger."""

_PLANES = ("sagittal", "coronal", "axial")
"""By the axis of the patient that is left out: right, front, head."""


@dataclass(frozen=True)
class Picture:
    """PNG in base64, where it was taken, letters at its left and right edge, a scale bar: share of the width, mm."""

    png: str
    place: str
    sides: tuple[str, str]
    bar: tuple[float, int] | None


def picture(
    prediction: Path | None,
    truth: Path,
    key: int | str,
    options: Options,
    *,
    under: Path | None = None,
    view: str = "radiological",
    beside: Sequence[Path | None] = (),
) -> Picture:
    """A pair and a class -> the slice with the largest error, on the image `under` it where one is given.

    The errors of predictions `beside` this one count too, so that pictures of both show one place.

    Raises:
        FileError: a file cannot be read. ScoreError: the two cannot be compared, or the image has another shape.
    """
    in_p, in_t, any_t, grid = _masks(prediction, truth, key, options)
    wrong, either = in_p != in_t, in_p | in_t
    for other in beside:
        also = _masks(other, truth, key, options)[0]
        if also.shape == in_t.shape:
            wrong, either = wrong | (also != in_t), either | also
    stack = [wrong, either, in_p, in_t, any_t, *([] if under is None else [_grey(under, grid, options)])]
    if grid.placed and grid.spatial_ndim == 3:
        planes, place, sides, spacing = _anatomical(stack, grid, view)
    else:
        planes, place = _as_stored(stack)
        sides, spacing = ("", ""), (1.0, 1.0)
    planes, nearer = _nearer(planes)
    place += nearer
    return Picture(_png(planes, spacing), place, sides, _bar(planes[0].shape[1] * spacing[1]) if grid.placed else None)


def _masks(
    prediction: Path | None, truth: Path, key: int | str, options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Image]:
    """A pair and a class -> the class in both, any class of the reference, the grid."""
    if truth.is_dir() and image_name(truth) is None:
        p, in_t, _, grid = load_class(prediction, truth, str(key), options)
        return p > 0.5 if p.dtype.kind == "f" else p, in_t, in_t, grid
    p, t, _, grid = load_pair(prediction, truth, options)
    in_p = p > 0.5 if p.dtype.kind == "f" else region_mask(p, key, options)
    return in_p, region_mask(t, key, options), t != 0, grid


def _nearer(planes: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """wrong, either, others -> the others; a third of each side where what is to be seen would be specks otherwise."""
    either, shape = np.argwhere(planes[1]), np.array(planes[1].shape)
    if len(either) == 0 or ((np.ptp(either, axis=0) + 1) * NEARER > shape).any():
        return planes[2:], ""
    size = np.ceil(shape / 3).astype(int)
    start = np.clip((either.min(0) + either.max(0) - size) // 2, 0, shape - size)
    window = tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))
    return [plane[window] for plane in planes[2:]], ", enlarged"


def _grey(path: Path, grid: Image, options: Options) -> np.ndarray:
    """An image, brought to the grid of the masks -> 0 to 255, from its 1st to its 99th percentile."""
    image = read_image(path)
    array = np.nan_to_num(image.array.astype(np.float32))
    if array.ndim == image.spatial_ndim + 1:
        array = array.mean(-1)  # colours
    elsewhere = one_frame(image, grid) and not options.ignore_geometry and not same_place(image, grid)
    if elsewhere and max(array.ndim, len(grid.shape)) <= 3 and overlap(image, grid):
        assert image.affine is not None
        assert grid.affine is not None
        array = resampled(array, image.affine, grid.affine, grid.shape)
    elif not one_shape(array.shape, grid.shape):
        raise ScoreError(f"{path}: expected an image of shape {grid.shape} as the masks, got {array.shape}.")
    elif not options.ignore_geometry:
        advice = "Give the images on which the masks were drawn."
        check_same_place(path, image, Path("the mask"), grid, advice=advice, transpose="Save both in one format.")
    array = array.reshape(grid.shape)
    low, high = np.percentile(array, (1, 99))
    return np.clip((array - low) * (255 / max(high - low, 1e-9)), 0, 255)


def _anatomical(
    stack: list[np.ndarray], grid: Image, view: str
) -> tuple[list[np.ndarray], str, tuple[str, str], tuple[float, float]]:
    """Volumes -> the plane with the largest error, rows from head or front; its name, its sides, mm of a pixel."""
    assert grid.affine is not None
    axes = voxel_axes(grid.affine)
    order = [next(i for i, (world, _) in enumerate(axes) if world == wanted) for wanted in range(3)]
    lengths = np.linalg.norm(grid.affine[:3, :3], axis=0)[order]
    stored = [int(axes[i][1]) for i in order]
    turned = [array.transpose(order)[tuple(slice(None, None, step) for step in stored)] for array in stack]
    wrong, shape = turned[0], turned[0].shape
    best = []
    for axis in range(3):
        area = float(np.prod(np.delete(lengths, axis)))
        sums = wrong.sum(tuple(a for a in range(3) if a != axis))
        flat = min(np.delete(shape, axis)) == 1  # a line, where another plane is a picture
        best.append((not flat, float(sums.max()) * area, axis == 2, axis, int(sums.argmax())))
    *_, axis, index = max(best)
    if not wrong.any():
        index = shape[axis] // 2
    rows, columns = (a for a in (2, 1, 0) if a != axis)
    planes = [np.take(array, index, axis) for array in turned]
    planes = [plane.T if rows > columns else plane for plane in planes]  # axes stood in ascending order
    mirrored = columns == 1 or view == "radiological"
    planes = [plane[::-1, ::-1] if mirrored else plane[::-1] for plane in planes]
    sides = {1: ("A", "P")}.get(columns, ("R", "L") if mirrored else ("L", "R"))
    slice_ = index if stored[axis] > 0 else shape[axis] - 1 - index
    return planes, f", {_PLANES[axis]} slice {slice_}", sides, (float(lengths[rows]), float(lengths[columns]))


def _as_stored(stack: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Arrays -> the plane of the leading axes with the most errors."""
    place = ""
    while stack[0].ndim > 2:
        wrong = stack[0].sum(tuple(range(1, stack[0].ndim)))
        index = int(np.argmax(wrong)) if wrong.any() else len(wrong) // 2
        stack = [array[index] for array in stack]
        place += f", slice {index}"
    return [np.atleast_2d(array) for array in stack], place


def _png(planes: list[np.ndarray], spacing: tuple[float, float]) -> str:
    from PIL import Image as Pillow

    in_p, in_t, any_t, *image = planes
    colours = np.full((*in_t.shape, 3), 16.0)
    if image:
        colours[:] = image[0][..., None]
    for mask, colour, share in (
        (any_t, OTHER, 0.3), (in_p & in_t, RIGHT, 0.35), (in_p & ~in_t, EXTRA, 0.65), (in_t & ~in_p, MISSED, 0.65),
    ):  # fmt: skip
        share = share if image else 1.0
        colours[mask] = (1 - share) * colours[mask] + share * np.array(colour)
    drawn = Pillow.fromarray(colours.astype(np.uint8))
    lengths = drawn.width * spacing[1], drawn.height * spacing[0]
    size = [max(1, round(PIXELS * length / max(lengths))) for length in lengths]
    enlarged = size[0] >= drawn.width and size[1] >= drawn.height
    drawn = drawn.resize((size[0], size[1]), Pillow.Resampling.NEAREST if enlarged else Pillow.Resampling.BOX)
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _bar(width_mm: float) -> tuple[float, int] | None:
    """Width of a picture -> a round length of at most a third of it, as a share of the width and in mm."""
    most = width_mm / 3
    if most < 1:
        return None
    power = 10 ** int(math.log10(most))
    length = next(step * power for step in (5, 2, 1) if step * power <= most)
    return length / width_mm, length
