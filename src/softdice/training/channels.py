"""Files of one image as (channels, *S), scaled: one way for training and for prediction.

An image is one file, or as nnU-Net keeps it one file per channel, `case_0000.nii.gz`, `case_0001.nii.gz` and so on. The
three colours of a picture are scaled together, since their proportions are what one sees; other channels, which may be
of any units, each by itself. NaN stands where a raster holds no data: the value that GDAL's tag names, or a person.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from softdice.images.files import FileError, Image, read_image
from softdice.images.orientation import axes_of, check_turned, turn_of, turned, turned_like, unturned
from softdice.training.config import refusal
from softdice.validation import package

PERCENTILES = (0.5, 99.5)
"""Between them lie the intensities that set the scale; and their distance is how far a lonely value is from them."""
SAMPLED_VOXELS = 1_000_000
COLOURS = 3
GDAL_NODATA = 42113
"""Tag of TIFF in which GDAL writes the value, in words."""
LONELY_SHARE = 0.03
"""Of the voxels, so many must hold one value that stands for missing data."""

ONE_FORMAT = "Their axes stand in reversed order: save both in one format."
"""What to do about a picture beside a medical image, one of which has columns first, the other rows."""

Files = Mapping[int, Path]
"""Channel number -> file."""


def channel_files(files: Mapping[str, Path], cases: Collection[str] | None = None) -> dict[str, dict[int, Path]]:
    """Return {name of a case: its files} for {stem: file}: `a_0001` is the second channel of `a`.

    Args:
        files: what a folder holds.
        cases: the names that there are; a stem among them is a case of its own, whatever its end. None: unknown, every
            stem that ends like a channel is one.

    Raises:
        TrainingError: two files for one channel, `a.png` and `a_0000.png`.

    Example:
        >>> files = {stem: Path(f"{stem}.png") for stem in ("a_0000", "a_0001", "b")}
        >>> {name: sorted(of_case) for name, of_case in channel_files(files).items()}
        {'a': [0, 1], 'b': [0]}
        >>> list(channel_files(files, ["a_0000", "a_0001", "b"]))
        ['a_0000', 'a_0001', 'b']
    """
    of_name: dict[str, dict[int, Path]] = {}
    for stem, path in files.items():
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        channel = match and (cases is None or (stem not in cases and match[1] in cases))
        name, number = (match[1], int(match[2])) if match and channel else (stem, 0)
        of_case = of_name.setdefault(name, {})
        if number in of_case:
            expected, got = f"one file for channel {number} of {name}", f"{of_case[number].name} and {path.name}"
            raise refusal(expected, f"{got} in {path.parent}", "Keep one of them.", command="softdice")
        of_case[number] = path
    return of_name


@dataclass(frozen=True)
class Reading:
    """An image as training and prediction take it.

    Args:
        stored: the first of its files as it was read: a mask is written on its grid.
        turn: what was done to its axes. axes: what they mean now.
        array: (channels, *S), turned, NaN where there are no data.
        joint: channels are the colours of a picture, or there is only one: they are scaled together.
    """

    stored: Image
    turn: np.ndarray
    axes: str
    array: np.ndarray
    joint: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes, turned."""
        return self.array.shape[1:]


def read_channels(
    files: Files, *, ignore_geometry: bool = False, nodata: float | None = None, as_stored: bool = False
) -> Reading:
    """Read the channels of an image, turned as `softdice.images.orientation` says, unless `as_stored`.

    Raises:
        FileError: a file cannot be read, a channel is missing, or channels differ in shape or place.
    """
    numbers = sorted(files)
    if numbers != [*range(len(numbers))]:
        got = ", ".join(files[number].name for number in numbers)
        missing = next(number for number in range(len(numbers)) if number not in files)
        raise FileError(
            f"{files[numbers[0]]}: expected every channel from _0000 on, got {got}. Add that of _{missing:04d}."
        )
    images = [_without_nodata(read_image(files[number]), files[number], nodata) for number in numbers]
    stored = images[0]
    try:
        turn = unturned(stored) if as_stored else turn_of(stored)
    except FileError as error:
        raise FileError(f"{files[0]}: {error}") from error
    whole = images
    if not as_stored:
        images = [turned(stored, turn), *(turned_like(i, stored, by_position=ignore_geometry) for i in images[1:])]
    first = images[0]
    for number, image in enumerate(images[1:], 1):
        if image.shape != first.shape:
            raise FileError(
                f"{files[number]}: expected the shape of {files[0].name}, {size(first.shape)}, "
                f"got {size(image.shape)}. Resample it."
            )
        if not ignore_geometry:
            advice = "Resample one of them."
            check_turned(files[number], whole[number], files[0], stored, advice=advice, transpose=ONE_FORMAT)
    array = np.concatenate([np.moveaxis(i.array.reshape(*i.shape, -1), -1, 0) for i in images])
    picture = len(images) == 1 and first.place.axes == "zyx" and array.shape[0] == COLOURS
    return Reading(stored, turn, axes_of(stored), array, picture or array.shape[0] == 1)


def scaled(array: np.ndarray, joint: bool) -> np.ndarray:
    """Return (channels, *S) as the network takes it: all of one mean and deviation, or each channel of its own.

    Example:
        >>> apart = scaled(np.array([[[0, 1], [2, 3]], [[0, 1000], [2000, 3000]]]), joint=False)
        >>> apart.std((1, 2)).round(3).tolist()
        [1.0, 1.0]
    """
    return normalise(array) if joint else np.stack([normalise(channel) for channel in array])


def normalise(array: np.ndarray) -> np.ndarray:
    """Return the intensities of one image, of any scale, as float32 with mean 0 and standard deviation 1.

    Clipped to the 0.5 and 99.5 percentiles first, since a few bright voxels would set the scale otherwise. Values that
    are not finite count as the lowest finite one. An image of one value becomes 0.

    Example:
        >>> import numpy as np
        >>> image = normalise(np.array([[0, 1000], [2000, 3000]]))
        >>> round(float(image.mean()), 3), round(float(image.std()), 3)
        (0.0, 1.0)
    """
    array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        array = np.where(finite, array, array[finite].min() if finite.any() else 0)
    step = max(1, array.size // SAMPLED_VOXELS)
    low, high = np.percentile(array.ravel()[::step], PERCENTILES)
    array = np.clip(array, low, high)
    deviation = float(array.std())
    return ((array - array.mean()) / (deviation if deviation > 0 else 1.0)).astype(np.float32)


def _without_nodata(image: Image, path: Path, value: float | None) -> Image:
    """Return an image with NaN in the place of what its file, or a person, names as missing data."""
    values = [number for number in (value, _declared_nodata(path)) if number is not None]
    array = image.array
    missing = np.zeros(array.shape, bool)
    with np.errstate(over="ignore"):  # the lowest float32, in fewer digits
        for number in values:
            missing |= array == (array.dtype.type(number) if array.dtype.kind == "f" else number)
    if not missing.any():
        return image
    wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    return replace(image, array=np.where(missing, wide.dtype.type(np.nan), wide))


def _declared_nodata(path: Path) -> float | None:
    """Return the value that the tag of a TIFF file names, None where there is none."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    with package("softdice train", "tifffile", "images").TiffFile(path) as file:
        text = str(file.pages[0].tags.valueof(GDAL_NODATA, "")).strip("\0 ")
    try:
        return float(text)
    except ValueError:
        return None


def _finite(channel: np.ndarray) -> np.ndarray:
    """Return the finite values (n,) of a channel."""
    return channel[np.isfinite(channel)] if channel.dtype.kind == "f" else channel.ravel()


def lonely_value(channels: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Return the lowest or highest value of a channel, and its share, if many voxels hold it and all others are far.

    Example:
        >>> lonely_value([np.array([-9999.0] * 2 + [0.1, 0.2, 0.3, 0.4])])
        (-9999.0, 0.3333333333333333)
        >>> lonely_value([np.array([0.0] * 2 + [0.1, 0.2, 0.3, 0.4])])
    """
    for channel in channels:
        finite = _finite(channel)
        for value in (finite.min(), finite.max()) if finite.size else ():
            held = finite == value
            share = float(held.sum() / channel.size)
            if share < LONELY_SHARE or held.all():
                continue
            others = finite[~held]
            low, high = np.percentile(others[:: max(1, others.size // SAMPLED_VOXELS)], PERCENTILES)
            nearest = float(others.min()) - float(value) if value < others[0] else float(value) - float(others.max())
            if nearest > high - low > 0:
                return float(value), share
    return None


def emptiness(array: np.ndarray, joint: bool) -> str:
    """Return what is wrong with the first channel from which nothing can be learnt; "" where there is none.

    Example:
        >>> emptiness(np.array([[1.0, 2.0], [0.0, 0.0]]), joint=False)
        'channel 1 is all 0'
        >>> emptiness(np.full((1, 2), np.nan), joint=True)
        'no finite value'
    """
    for number, channel in enumerate([array] if joint else array):
        finite = _finite(channel)
        where = "" if joint else f"channel {number} {'is' if finite.size else 'has'} "
        if finite.size == 0:
            return f"{where}no finite value"
        if finite.min() == finite.max():
            return f"{where}all {float(finite[0]):g}"
    return ""


def size(shape: Sequence[int]) -> str:
    """Return a shape as messages have it."""
    return "x".join(map(str, shape))
