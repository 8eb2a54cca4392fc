"""Files of one image as (channels, *S), scaled: one way for training and for prediction.

An image is one file, or as nnU-Net keeps it one file per channel, `case_0000.nii.gz`, `case_0001.nii.gz` and so on. The
three colours of a picture are scaled together, since their proportions are what one sees; other channels, which may be
of any units, each by itself. NaN replaces missing data: the nodata value of GDAL's tag, or the one that a user names.

In shapes *S are the spatial axes of an image.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from softdice.images.files import FileError, Image, read_image
from softdice.images.orientation import axes_of, check_turned, turn_of, turned, turned_like, unturned
from softdice.training.config import refusal, size

PERCENTILES = (0.5, 99.5)
"""Intensities between these two set the scale; see `normalise` and `lonely_value`."""
FAR = 10
"""Intensities beyond the percentiles are compressed: they end at most this many times their distance away from them."""
SINGLE, OFFSET, DOUBLE = (1e-18, 1e18), 1e4, 1e150
"""Ranges of intensities, largest one as a multiple of its range, for float32; and largest one for float64."""
SAMPLED_VOXELS = 1_000_000
"""With more voxels, percentiles are taken from every n-th voxel: a sample of one to two times this number."""
COLOURS = 3
LONELY_SHARE = 0.03
"""Share of the voxels that must hold one value before it may stand for missing data."""

ONE_FORMAT = "Their axes stand in reversed order: save both in one format."
"""What to do about a picture beside a medical image, one of which has columns first, the other rows."""

Files = Mapping[int, Path]
"""Channel number -> file."""


def channel_files(files: Mapping[str, Path], cases: Collection[str] | None = None) -> dict[str, dict[int, Path]]:
    """Return {name of a case: {channel number: file}} for {stem: file}: `a_0001` is the second channel of `a`.

    Args:
        files: the images of a folder.
        cases: names of all cases: `a_0001` is a channel of `a` only if `a` is one of them, and `a_0001` is not. None:
            they are not known, and every stem that ends in four digits is a channel.

    Raises:
        TrainingError: two files for one channel, `a.png` and `a_0000.png`.

    Example:
        >>> files = {stem: Path(f"{stem}.png") for stem in ("a_0000", "a_0001", "b")}
        >>> {name: sorted(of_case) for name, of_case in channel_files(files).items()}
        {'a': [0, 1], 'b': [0]}
        >>> list(channel_files(files, ["a_0000", "a_0001", "b"]))
        ['a_0000', 'a_0001', 'b']
    """
    files_by_name: dict[str, dict[int, Path]] = {}
    for stem, path in files.items():
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match and cases is not None and (stem in cases or match[1] not in cases):
            match = None
        name, number = (match[1], int(match[2])) if match else (stem, 0)
        channels = files_by_name.setdefault(name, {})
        if number in channels:
            expected, got = f"one file for channel {number} of {name}", f"{channels[number].name} and {path.name}"
            raise refusal(expected, f"{got} in {path.parent}", "Keep one of them.", command="softdice")
        channels[number] = path
    return files_by_name


@dataclass(frozen=True)
class Reading:
    """An image as training and prediction take it.

    Args:
        stored: the first of its files as `_as_shown` reads it: a mask is written on its grid.
        turn: nibabel's orientation (axes, 2) that was applied to its axes; `turned_back` undoes it.
        axes: what the axes mean now: "RAS", or letters such as "zyx".
        array: (channels, *S) of the file's dtype, turned; floats with NaN where there are no data.
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
    """Read the channels of an image; turn volumes in a patient to RAS, and pictures to rows before columns.

    Args:
        files: of one image, at least one.
        ignore_geometry: channels belong together by position, whatever their affines say.
        nodata: value that stands for missing data, beside the one that GDAL's tag names; in a palette the index.
        as_stored: do not turn, for models that were trained on volumes as they were stored.

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
    stored_images = [_as_shown(files[number], nodata) for number in numbers]
    images, stored = stored_images, stored_images[0]
    try:
        turn = unturned(stored) if as_stored else turn_of(stored)
    except FileError as error:
        raise FileError(f"{files[0]}: {error}") from error
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
            check_turned(files[number], stored_images[number], files[0], stored, advice=advice, transpose=ONE_FORMAT)
    # an axis of channels, if there is one, is the last in a file
    array = np.concatenate([np.moveaxis(i.array.reshape(*i.shape, -1), -1, 0) for i in images])
    picture = len(images) == 1 and first.place.axes == "zyx" and array.shape[0] == COLOURS
    return Reading(stored, turn, axes_of(stored), array, picture or array.shape[0] == 1)


def fits_among(count: int, channels: int, joint: bool) -> bool:
    """Return whether an image of `count` channels suits a model of `channels`: a grey one does if these are colours.

    `joint`: whether the model's channels are scaled together, as colours are.
    """
    return count == channels or (joint and count == 1)


def scaled(array: np.ndarray, joint: bool, channels: int | None = None, *, clipped: bool = False) -> np.ndarray:
    """Return an image as the network takes it, (channels, *S) float32 of about mean 0 and standard deviation 1.

    Args:
        array: (channels, *S) of any scale.
        joint: one mean and deviation for all channels; False: each has its own.
        channels: number that the network takes; a single grey channel is repeated to it. None: as `array` has.
        clipped: cut off what lies beyond the percentiles, as models of earlier releases were trained.

    Example:
        >>> apart = scaled(np.array([[[0, 1], [2, 3]], [[0, 1000], [2000, 3000]]]), joint=False)
        >>> apart.std((1, 2)).round(1).tolist()
        [1.0, 1.0]
    """
    array = np.broadcast_to(array, (channels or len(array), *array.shape[1:]))
    if joint:
        return normalise(array, clipped=clipped)
    return np.stack([normalise(channel, clipped=clipped) for channel in array])


def normalise(array: np.ndarray, *, clipped: bool = False) -> np.ndarray:
    """Return the intensities of one image, of any scale and shape, as float32.

    Those between the 0.5 and 99.5 percentiles have about mean 0 and standard deviation 1, so that a few bright voxels
    do not set the scale. Those beyond keep their order, and are drawn in to at most `FAR`: an object smaller than
    0.5 % of the image still stands out. Values that are not finite count as the lowest finite one. An image of one
    value becomes 0.

    Args:
        clipped: cut off what lies beyond the percentiles, as models of earlier releases were trained.

    Example:
        >>> image = normalise(np.array([[0, 1000], [2000, 3000]]))
        >>> round(float(image.mean()), 1), round(float(image.std()), 1)
        (0.0, 1.0)
    """
    array = as_float32(array)
    finite = np.isfinite(array)
    if not finite.all():
        array = np.where(finite, array, array[finite].min() if finite.any() else 0)
    low, high = _percentiles(array.ravel())
    if low == high and not clipped:  # nearly all is one value: the rest, however little, is the picture
        low, high = array.min(), array.max()
    inner = np.clip(array, low, high)
    mean, deviation = inner.mean(), float(inner.std())
    if not clipped and low < high:
        beyond, farthest = array - inner, FAR * (high - low)
        inner += farthest * (beyond / (farthest + np.abs(beyond)))
    return ((inner - mean) / (deviation if deviation > 0 else 1.0)).astype(np.float32)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return the intensities of an image, of any dtype and shape, as float32, or as float64 where float32 loses them.

    That is where they are large beside their range, or the range is extreme. Beyond `DOUBLE` they become infinite.
    """
    finite = _finite(array)
    low, high = map(float, _percentiles(finite)) if finite.size else (0.0, 0.0)
    if low == high and finite.size:  # as in `normalise`
        low, high = float(finite.min()), float(finite.max())
    spread, largest = high - low, max(abs(low), abs(high))
    exact = spread == 0 or (SINGLE[0] < spread < SINGLE[1] and largest < OFFSET * spread)
    return array.astype(np.float32 if exact or largest > DOUBLE else np.float64)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the `PERCENTILES` of finite values (n,), at least one, or of a sample of them."""
    low, high = np.percentile(values[:: max(1, len(values) // SAMPLED_VOXELS)], PERCENTILES)
    return low, high


def _as_shown(path: Path, nodata: float | None) -> Image:
    """Read an image with the colours of its palette in the place of their indices, grey as one channel; bool as 0, 1.

    NaN replaces missing data: where the file, an index of its palette included, has `nodata`, if not None, or the value
    that it names. The palette itself is kept. Raise FileError as `read_image` does.
    """
    image = read_image(path)
    array, missing = image.shown, _missing(image, nodata)
    if image.palette is not None:
        if (array == array[..., :1]).all():
            array = array[..., 0]
        else:
            missing = missing[..., None]
    elif array.dtype == bool:
        array = array.astype(np.uint8)
    if missing.any():
        dtype = np.result_type(array, np.float32)
        array = np.where(missing, dtype.type(np.nan), array.astype(dtype))
    return replace(image, array=array)


def _missing(image: Image, nodata: float | None) -> np.ndarray:
    """Return where an image, as it is stored, has `nodata`, if not None, or the value that its file names."""
    array = image.array
    missing = np.zeros(array.shape, bool)
    with np.errstate(over="ignore"):  # the lowest float32, written with fewer digits, may overflow
        for number in (nodata, image.nodata):
            if number is not None:
                missing |= array == (array.dtype.type(number) if array.dtype.kind == "f" else number)
    return missing


def _finite(channel: np.ndarray) -> np.ndarray:
    """Return the finite values (n,) of a channel of any shape."""
    return channel[np.isfinite(channel)] if channel.dtype.kind == "f" else channel.ravel()


def lonely_value(channels: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Return the first value in channels (*S) that may stand for missing data, and its share of the channel's voxels.

    It is the lowest or highest value of a channel, at least `LONELY_SHARE` of the voxels have it, and its distance to
    all others is larger than the distance between the `PERCENTILES` of those. None where there is no such value.

    Example:
        >>> lonely_value([np.array([-9999.0] * 2 + [0.1, 0.2, 0.3, 0.4])])
        (-9999.0, 0.3333333333333333)
        >>> lonely_value([np.array([0.0] * 2 + [0.1, 0.2, 0.3, 0.4])])
    """
    for channel in channels:
        finite = _finite(channel)
        for value in (finite.min(), finite.max()) if finite.size else ():
            equal = finite == value
            share = float(equal.sum() / channel.size)
            if share < LONELY_SHARE or equal.all():
                continue
            others = finite[~equal]
            low, high = _percentiles(others)
            nearest = others.min() if value < others[0] else others.max()  # all others lie on one side of it
            if abs(float(nearest) - float(value)) > high - low > 0:
                return float(value), share
    return None


def emptiness(array: np.ndarray, joint: bool) -> str:
    """Return why nothing can be learnt from a channel, or if `joint` from the whole image (channels, *S), else "".

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
