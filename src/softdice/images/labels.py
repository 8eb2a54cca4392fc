"""Read labels and probabilities out of images, or refuse. Scoring and training do it nowhere else.

* JPEG, colours, channels that differ and an alpha channel that is not constant are no labels; equal channels are one,
  and so are they beside an opaque one (all at the largest number of the dtype).
* Floats are labels where all are whole; close to whole ones are rounded on request.
* The index of a palette is the label, where all files give it one colour.
* Probabilities lie in [0, 1], or in [0, scale] where a scale is given.
* Axes of length 1 hold nothing: (x, y, 1) and (x, y) are one shape.

S are the spatial axes of an image. `path` is the file that an image was read from, for messages alone.
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
        rounded: round what is at most 0.1 from a whole number.
        advice: the end of the message about values that are further away: what to do.

    Raises:
        FileError: the file holds no labels (see the top of this file), or has nan or infinity.
    """
    array = _one_channel(path, image)
    if array.dtype == np.uint64 and array.max() < 2**63:
        return array.view(np.int64)  # beside int64, NumPy would compute with float64, in which large labels are equal
    if array.dtype.kind != "f":
        return array
    whole_numbers = np.rint(array)
    if not (array == whole_numbers).all():
        distance = np.abs(array - whole_numbers)
        farthest = float(distance.max())
        if not rounded or farthest > ROUNDED:
            scale = "" if image.scale is None else ", stored with slope {:g} and intercept {:g}".format(*image.scale)
            example = f"such as {array.flat[int(distance.argmax())]}{scale}"
            got = f"{int((distance > 0).sum())} voxels, at most {farthest:.2g} from a whole number, {example}"
            advice = f"Pass --round to round them. {advice}" if farthest <= ROUNDED else advice
            raise FileError(f"{path}: expected labels, got values that are not whole: {got}. {advice}")
    low, high = int(whole_numbers.min()), int(whole_numbers.max())
    for dtype in (np.uint8, np.int16, np.int32, np.int64, np.uint64):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return whole_numbers.astype(dtype)
    raise FileError(f"{path}: expected labels, got values from {low} to {high}.")


def probabilities(path: Path, image: Image, *, scale: float = 1.0, option: str = "--soft") -> np.ndarray:
    """Return the probabilities of an image, (*S) in [0, 1], float32, or float64 where the file has it.

    Args:
        scale: the value in the file that means 1: 100 in percent, 255 in 8 bits.
        option: the command's option that asked for probabilities, for the message.

    Raises:
        FileError: the file holds colours or channels that differ, nan or infinity, or values outside [0, scale].
    """
    array = _one_channel(path, image)
    low, high = array.min(), array.max()
    if low < -_STORED * scale or high > (1 + _STORED) * scale:  # 0 and 1 may be stored inexactly
        advice = "Pass --scale with what stands for 1: 100 for percent, 255 for 8 bits, 65535 for 16 bits."
        expected = f"probabilities in [0, {scale:g}]"
        raise FileError(f"{path}: {option}: expected {expected}, got {low} to {high}. {advice}")
    array = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    array = array if scale == 1 else array / array.dtype.type(scale)
    return np.clip(array, 0, 1) if low < 0 or high > scale else array


def colours(image: Image) -> dict[int, str]:
    """Return {index: colour} of the palette indices that occur, as "#rrggbb"; {} if the image has no palette.

    Colours are "#rrggbbaa" where only alpha tells two of them apart.
    """
    if image.palette is None:
        return {}
    present = np.flatnonzero(np.bincount(image.array.reshape(-1), minlength=len(image.palette)))
    used = image.palette[present[present < len(image.palette)]]
    parts = 3 if len(np.unique(used[:, :3], axis=0)) == len(used) else used.shape[1]
    return {int(i): f"#{bytes(colour[:parts]).hex()}" for i, colour in zip(present, used, strict=False)}


def one_palette(path: str | Path, colours_here: dict[int, str], seen: dict[int, tuple[str, str]]) -> None:
    """Check that a file gives each label the colour that the files before it gave, and add its own colours to theirs.

    Args:
        colours_here: {label: colour} of this file, from `colours`.
        seen: {label: (colour, path of the first file that has it)}; extended in place.

    Raises:
        FileError: a label has another colour here; its number then means something else.
    """
    for label in sorted(colours_here.keys() & seen.keys()):
        colour, (first_colour, first_path) = colours_here[label], seen[label]
        if colour != first_colour:
            got = f"{colour}. Save both with one palette, or as grey values."
            raise FileError(f"{path}: expected {first_colour} for label {label} as in {first_path}, got {got}")
    seen.update((label, (colour, str(path))) for label, colour in colours_here.items() if label not in seen)


def _one_channel(path: Path, image: Image) -> np.ndarray:
    """Return the values of an image, (*S) of any dtype; channels that are equal become one.

    Raise FileError if `Image.no_labels` has a reason, channels differ, or a value is nan or infinite.
    """
    if image.no_labels:
        raise FileError(f"{path}: expected labels, got {image.no_labels}")
    array = image.array
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise FileError(f"{path}: expected numbers, got nan or infinity ({int((~finite).sum())} voxels).")
    if array.ndim > image.spatial_ndim:
        # an opaque alpha channel, which the file may not call so
        opaque = array.dtype.kind in "iu" and bool((array[..., -1] == np.iinfo(array.dtype).max).all())
        channels = range(1, array.shape[-1] - (opaque and array.shape[-1] in (2, 4)))
        # grey pictures are often saved as colour; the channels of a medical volume never stand for one map
        if image.place.axes == "xyz" or any((array[..., 0] != array[..., i]).any() for i in channels):
            of_floats = "Save the argmax of probabilities, or one file per class."
            advice = of_floats if array.dtype.kind == "f" else "Save the channel of the labels alone."
            raise FileError(f"{path}: expected one label per voxel, got {array.shape[-1]} channels. {advice}")
        array = array[..., 0]
    return array
