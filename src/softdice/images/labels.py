"""Read labels and probabilities out of images, or refuse. Scoring and training do it nowhere else.

* JPEG, colours, channels that differ and an alpha channel that is not constant are no labels; equal channels are grey.
* Floats are labels where all are whole; close to whole ones are rounded on request.
* The index of a palette is the label, where all files give it one colour.
* Probabilities lie in [0, 1], or in [0, scale] where a scale is given.
* Axes of length 1 hold nothing: (x, y, 1) and (x, y) are one shape.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softdice.images.image import FileError, Image

ROUNDED = 0.1
"""Largest distance from a whole number that rounding may mend; values further away are no labels."""

_STORED = 1e-4
"""Tolerance for probabilities of 0 and 1 that were stored inexactly."""


def labels(
    path: Path, image: Image, *, rounded: bool = False, advice: str = "Give labels as whole numbers."
) -> np.ndarray:
    """Return the labels of an image, (*S) bool or integers.

    Args:
        path: named in errors. image: what was read from it.
        rounded: round what is at most 0.1 from a whole number.
        advice: what to do where values are further away.

    Raises:
        FileError: the file holds no labels, or no numbers.
    """
    array = _one_channel(path, image)
    if array.dtype.kind != "f":
        return array
    whole = np.rint(array)
    if not (array == whole).all():
        apart = np.abs(array - whole)
        far = float(apart.max())
        if not rounded or far > ROUNDED:
            scale = "" if image.scale is None else ", stored with slope {:g} and intercept {:g}".format(*image.scale)
            example = f"such as {array.flat[int(apart.argmax())]}{scale}"
            got = f"{int((apart > 0).sum())} voxels, at most {far:.2g} from a whole number, {example}"
            advice = f"Pass --round to round them. {advice}" if far <= ROUNDED else advice
            raise FileError(f"{path}: expected labels, got values that are not whole: {got}. {advice}")
    low, high = int(whole.min()), int(whole.max())
    for dtype in (np.uint8, np.int16, np.int32, np.int64, np.uint64):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return whole.astype(dtype)
    raise FileError(f"{path}: expected labels, got values from {low} to {high}.")


def probabilities(path: Path, image: Image, *, scale: float = 1.0, option: str = "--soft") -> np.ndarray:
    """Return the probabilities of an image, (*S) in [0, 1], float32, or float64 where the file has it.

    Args:
        path: named in errors. image: what was read from it.
        scale: what stands for 1 in the file: 100 in percent, 255 in 8 bits.
        option: of the command that takes the values for probabilities.

    Raises:
        FileError: the file holds colours, channels, no numbers, or values beyond the scale.
    """
    array = _one_channel(path, image)
    low, high = array.min(), array.max()
    if low < -_STORED * scale or high > (1 + _STORED) * scale:
        advice = "Pass --scale with what stands for 1: 100 for percent, 255 for 8 bits, 65535 for 16 bits."
        expected = f"probabilities in [0, {scale:g}]"
        raise FileError(f"{path}: {option}: expected {expected}, got {low} to {high}. {advice}")
    array = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    array = array if scale == 1 else array / array.dtype.type(scale)
    return np.clip(array, 0, 1) if low < 0 or high > scale else array


def colours(image: Image) -> dict[int, str]:
    """Return {index: colour} of the indices that occur, {} if the image has no palette.

    Alpha is part of a colour where nothing else tells two of them apart.
    """
    if image.palette is None:
        return {}
    present = np.flatnonzero(np.bincount(image.array.reshape(-1), minlength=len(image.palette)))
    used = image.palette[present[present < len(image.palette)]]
    parts = 3 if len(np.unique(used[:, :3], axis=0)) == len(used) else used.shape[1]
    return {int(i): f"#{bytes(colour[:parts]).hex()}" for i, colour in zip(present, used, strict=False)}


def one_palette(path: str | Path, colours_here: dict[int, str], seen: dict[int, tuple[str, str]]) -> None:
    """Add the colours of a file to those that other files gave the same labels.

    Raises:
        FileError: a label has another colour here; its number then means something else.
    """
    for label in sorted(colours_here.keys() & seen.keys()):
        other, where = seen[label]
        if other != colours_here[label]:
            advice = "Save both with one palette, or as grey values."
            raise FileError(
                f"{path}: expected {other} for label {label} as in {where}, got {colours_here[label]}. {advice}"
            )
    seen.update((label, (colour, str(path))) for label, colour in colours_here.items() if label not in seen)


def _one_channel(path: Path, image: Image) -> np.ndarray:
    """Return (*S) finite values; raise FileError for what cannot be labels, and for channels that differ."""
    if image.no_labels:
        raise FileError(f"{path}: expected labels, got {image.no_labels}")
    array = image.array
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise FileError(f"{path}: expected numbers, got nan or infinity ({int((~finite).sum())} voxels).")
    if array.ndim > image.spatial_ndim:
        channels = range(1, array.shape[-1])
        if image.place.axes == "xyz" or any((array[..., 0] != array[..., i]).any() for i in channels):
            advice = "Save the argmax of probabilities, or one file per class." if array.dtype.kind == "f" else ""
            raise FileError(f"{path}: expected one label per voxel, got {array.shape[-1]} channels. {advice}".rstrip())
        array = array[..., 0]  # grey that was saved as colour
    return array
