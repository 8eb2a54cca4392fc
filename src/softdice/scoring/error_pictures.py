"""Draw the slice of a pair with the largest error of a class, in the orientation that radiologists use.

Where the file says how its voxels lie in space, the picture is axial, coronal or sagittal, the front or the head of the
patient is up, sides are marked, and lengths are true. Otherwise it is drawn as it is stored, with the true lengths of
pixels where the file has them.

Functions that pass the arrays of one volume (*S), or of one plane (H, W), keep them in this order, bool but the last:
errors (a prediction differs from the reference), either (a prediction or the reference has the class), the prediction
to draw, the reference, any class of the reference, and if wanted the grey image (float32, 0 to 255). errors and either
count all predictions that show this slice. `grid` is the image of the reference, for the place of its voxels.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softdice.evaluation.colours import EXTRA, MISSED, OTHER, RIGHT
from softdice.evaluation.labels import ScoreError
from softdice.images import geometry
from softdice.images.files import image_name, read_image
from softdice.images.image import Image
from softdice.scoring.options import Options
from softdice.scoring.pair_loading import load_class, load_pair, region_mask, resampled

PIXELS = 360
"""Pixels of a picture along its longer side."""

ENLARGED = 8
"""A class is drawn larger if it spans less than the plane divided by this, in both directions."""

_PLANES = ("sagittal", "coronal", "axial")
"""Names of the planes across the patient's axes right, front and head."""


@dataclass(frozen=True)
class Picture:
    """A drawn slice.

    Args:
        png: base64. place: where it was taken, for the caption. sides: letters at its left and right edge, or "".
        bar: length of a scale bar as a share of the width, and in mm.
    """

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
    """Draw the slice of a pair with the largest error of a class.

    Args:
        prediction, truth: the files of the pair, or two folders with a file per class; None is an empty prediction.
        key: the class, a label, or the name of a region or of a file in such folders.
        under: image to draw below the masks.
        view: "radiological" has the patient's left at the right of an axial or coronal picture, "neurological" at the
            left.
        beside: other predictions whose errors count too, so that pictures of all of them show one slice.

    Raises:
        FileError: a file cannot be read. ScoreError: the two cannot be compared, or the image has another shape.
    """
    in_p, in_t, any_t, grid = _masks(prediction, truth, key, options)
    errors, either = in_p != in_t, in_p | in_t
    for other in beside:
        in_other = _masks(other, truth, key, options)[0]
        if in_other.shape == in_t.shape:  # a reference that omits empty slices is padded to each prediction
            errors, either = errors | (in_other != in_t), either | in_other
    arrays = [errors, either, in_p, in_t, any_t, *([] if under is None else [_grey(under, grid, options)])]
    spacing: tuple[float, float] | None
    if grid.placed and grid.spatial_ndim == 3:
        planes, place, sides, spacing = _anatomical_planes(arrays, grid, view)
    else:
        planes, place = _stored_planes(arrays)
        sides, spacing = ("", ""), _stored_spacing(grid)
    planes, remark = _enlarged(planes)
    bar = None if spacing is None else _bar(planes[0].shape[1] * spacing[1])
    return Picture(_png(planes, spacing or (1.0, 1.0)), place + remark, sides, bar)


def _masks(
    prediction: Path | None, truth: Path, key: int | str, options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Image]:
    """Return in_p, in_t, any_t and grid: the class in prediction and reference, any class of the reference, its image.

    The masks are (*S) bool. A probability above 1/2 is in the class. `key`: a label, or the name of a region or of a
    file in folders of masks, where any_t is in_t: files of other classes are not read. Raise FileError if a file cannot
    be read, ScoreError if the two cannot be compared.
    """
    if truth.is_dir() and image_name(truth) is None:  # a folder of masks, not one that is an image, as of DICOM
        p, in_t, _, grid = load_class(prediction, truth, str(key), options)
        return p > 0.5 if p.dtype.kind == "f" else p, in_t, in_t, grid
    p, t, _, grid = load_pair(prediction, truth, options)
    in_p = p > 0.5 if p.dtype.kind == "f" else region_mask(p, key, options)
    return in_p, region_mask(t, key, options), t != 0, grid


def _enlarged(planes: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Cut planes to a third of each side if the class is small; return them without errors and either, and a remark.

    `planes` are in the module's order. The class is small if the bounding box of `either` spans at most 1 / `ENLARGED`
    of the plane along both axes. The remark for the caption is ", enlarged" if the planes are cut, else "".
    """
    _, either, *shown = planes
    positions, shape = np.argwhere(either), np.array(either.shape)
    if len(positions) == 0 or ((np.ptp(positions, axis=0) + 1) * ENLARGED > shape).any():
        return shown, ""
    size = np.ceil(shape / 3).astype(int)
    start = np.clip((positions.min(0) + positions.max(0) - size) // 2, 0, shape - size)
    window = tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))
    return [plane[window] for plane in shown], ", enlarged"


def _grey(path: Path, grid: Image, options: Options) -> np.ndarray:
    """Read an image onto the grid of the masks, scaled to 0 to 255 from its 1st to its 99th percentile.

    An image on another grid of the same space is resampled if it overlaps the masks. Without a common space, or with
    --ignore-geometry, it must have their shape. Raise FileError if it cannot be read or lies elsewhere, ScoreError if
    its shape is another.
    """
    image = read_image(path)
    array = np.nan_to_num(image.shown.astype(np.float32))
    if array.ndim == image.spatial_ndim + 1:
        array = array.mean(-1)  # over the colours
    mask = Path("the mask")  # in errors
    elsewhere = geometry.one_frame(image, grid) and not options.ignore_geometry and not geometry.same_place(image, grid)
    if elsewhere:  # `resampled` needs inverses, and takes up to three axes
        geometry.check_inverse(path, image, mask, grid)
    if elsewhere and max(array.ndim, len(grid.shape)) <= 3 and geometry.overlap(image, grid):
        assert image.affine is not None
        assert grid.affine is not None
        array = resampled(array, image.affine, grid.affine, grid.shape)
    elif not geometry.one_shape(array.shape, grid.shape):
        raise ScoreError(f"{path}: expected an image of shape {grid.shape} as the masks, got {array.shape}.")
    elif not options.ignore_geometry:
        advice = "Give the images on which the masks were drawn."
        geometry.check_same_place(path, image, mask, grid, advice=advice, transpose="Save both in one format.")
    array = array.reshape(grid.shape)
    low, high = np.percentile(array, (1, 99))
    return np.clip((array - low) * (255 / max(high - low, 1e-9)), 0, 255)


def _anatomical_planes(
    volumes: list[np.ndarray], grid: Image, view: str
) -> tuple[list[np.ndarray], str, tuple[str, str], tuple[float, float]]:
    """Return the planes across a patient's axis with the largest area of errors, rows from the head or the front down.

    Then words for their place, the letters at the left and right edge, and the mm of a pixel along rows and columns.
    `volumes` are in the module's order and have three axes; `grid` is placed in a patient. `view` is "radiological",
    with the patient's left at the right, or "neurological".
    """
    assert grid.affine is not None
    axes = geometry.voxel_axes(grid.affine)  # for each array axis: 0 right, 1 front or 2 head; 1, or -1 if reversed
    # 1. array axes in the order right, front, head, each ascending in that direction
    order = [next(i for i, (world, _) in enumerate(axes) if world == direction) for direction in range(3)]
    sizes_mm = np.linalg.norm(grid.affine[:3, :3], axis=0)[order]
    steps = [int(axes[i][1]) for i in order]
    volumes = [volume.transpose(order)[tuple(slice(None, None, step) for step in steps)] for volume in volumes]
    # 2. the plane with the largest area of errors: its rows go towards the head, in an axial plane towards the front
    axis, index = _worst_plane(volumes[0], sizes_mm)
    rows, columns = (other for other in (2, 1, 0) if other != axis)
    planes = [np.take(volume, index, axis) for volume in volumes]
    planes = [plane.T if rows > columns else plane for plane in planes]  # np.take leaves the axes ascending
    # 3. head or front up; mirrored: a radiologist faces the patient, and a sagittal plane has the front at the left
    mirrored = columns == 1 or view == "radiological"
    planes = [plane[::-1, ::-1] if mirrored else plane[::-1] for plane in planes]
    sides = {1: ("A", "P")}.get(columns, ("R", "L") if mirrored else ("L", "R"))
    stored_index = index if steps[axis] > 0 else volumes[0].shape[axis] - 1 - index
    return planes, f", {_PLANES[axis]} slice {stored_index}", sides, (float(sizes_mm[rows]), float(sizes_mm[columns]))


def _worst_plane(errors: np.ndarray, sizes_mm: np.ndarray) -> tuple[int, int]:
    """Return axis and index of the plane with the largest area of errors; the middle one without any.

    A plane that is a line comes last, an axial one first among equals. The axes of `errors` lead to the right, front
    and head; `sizes_mm` is a voxel's size along them.
    """
    candidates = []
    for axis in range(3):
        pixel_mm2 = float(np.prod(np.delete(sizes_mm, axis)))
        errors_by_slice = errors.sum(tuple(other for other in range(3) if other != axis))
        is_line = min(np.delete(errors.shape, axis)) == 1
        largest = float(errors_by_slice.max()) * pixel_mm2
        # the first three decide, in this order
        candidates.append((not is_line, largest, axis == 2, axis, int(errors_by_slice.argmax())))
    *_, axis, index = max(candidates)
    return axis, index if errors.any() else errors.shape[axis] // 2


def _stored_planes(arrays: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Return arrays at the slice with the most errors along each axis but the last two, and words for the place.

    `arrays` are in the module's order, errors first.
    """
    place = ""
    while arrays[0].ndim > 2:
        errors_by_slice = arrays[0].sum(tuple(range(1, arrays[0].ndim)))
        index = int(np.argmax(errors_by_slice)) if errors_by_slice.any() else len(errors_by_slice) // 2
        arrays = [array[index] for array in arrays]
        place += f", slice {index}"
    return [np.atleast_2d(array) for array in arrays], place


def _stored_spacing(grid: Image) -> tuple[float, float] | None:
    """Return the mm of a pixel along the last two axes, which `_stored_planes` draws; None if the file does not say."""
    sizes_mm = grid.spacing_mm
    if sizes_mm is None or grid.spatial_ndim not in (2, 3) or min(sizes_mm) == 0:  # a fourth axis is no length
        return None
    return sizes_mm[-2], sizes_mm[-1]


def _png(planes: list[np.ndarray], spacing: tuple[float, float]) -> str:
    """Draw a PNG in base64 of the planes (H, W): prediction, reference, any class, and if wanted the grey image.

    `spacing`: distance of two rows, and of two columns, in one unit.
    """
    from PIL import Image as Pillow

    in_p, in_t, any_t, *image = planes
    rgb = np.full((*in_t.shape, 3), 16.0)
    if image:
        rgb[:] = image[0][..., None]
    for mask, colour, opacity in (
        (any_t, OTHER, 0.3), (in_p & in_t, RIGHT, 0.35), (in_p & ~in_t, EXTRA, 0.65), (in_t & ~in_p, MISSED, 0.65),
    ):  # fmt: skip
        opacity = opacity if image else 1.0
        rgb[mask] = (1 - opacity) * rgb[mask] + opacity * np.array(colour)
    drawn = Pillow.fromarray(rgb.astype(np.uint8))
    lengths = drawn.width * spacing[1], drawn.height * spacing[0]
    size = [max(1, round(PIXELS * length / max(lengths))) for length in lengths]
    enlarged = size[0] >= drawn.width and size[1] >= drawn.height
    # NEAREST keeps voxels sharp; BOX averages the voxels of a pixel, so that a single wrong one does not vanish
    drawn = drawn.resize((size[0], size[1]), Pillow.Resampling.NEAREST if enlarged else Pillow.Resampling.BOX)
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _bar(width_mm: float) -> tuple[float, int] | None:
    """Return the length of a scale bar, as a share of the width and in mm: 1, 2 or 5 times a power of ten.

    It is at most a third of the width; None if that is below 1 mm.
    """
    longest = width_mm / 3
    if longest < 1:
        return None
    power = 10 ** int(math.log10(longest))
    length = next(step * power for step in (5, 2, 1) if step * power <= longest)
    return length / width_mm, length
