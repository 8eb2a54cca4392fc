"""Cases of a folder: images and labels that belong together, checked, scaled, with their label values mapped.

In shapes *S are the spatial axes of an image, turned as `softdice.images.orientation` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softdice.images.files import read_image
from softdice.images.geometry import extended, one_frame, one_shape, reversed_shape
from softdice.images.labels import colours, labels, one_palette
from softdice.images.orientation import check_turned, lies, turned_like
from softdice.training.channels import (
    ONE_FORMAT,
    Reading,
    as_float32,
    emptiness,
    fits_among,
    lonely_value,
    read_channels,
    scaled,
)
from softdice.training.config import refusal, size
from softdice.training.layout import Layout, find_layout
from softdice.training.places import LEAST_OBJECTS, Places, are_objects, places

MAX_CLASSES = 256
IGNORED = 255
"""Class number of voxels that are left out."""
MANY_LABELS, LIKE_NEXT = 32, 0.5
"""In a label map of more values than this, at least such a share of the voxels has the value of the next voxel."""


@dataclass(frozen=True)
class Case:
    """One image with its labels: `image` (channels, *S) float32, scaled; `label` (*S) class numbers or `IGNORED`."""

    name: str
    image: np.ndarray
    label: np.ndarray


@dataclass
class Cases:
    """A set of cases that are read when they are needed and kept while they fit into memory.

    Attributes:
        names: of all cases.
        values: label value of each class, ascending; the class is the position.
        class_names: what to call the classes; the first is the background.
        spatial_ndim: 2 or 3. channels: of every image. shapes: (*S) per case.
        read: case number -> case.
        split: a split that the data prescribe, (training, held out), or None.
        present: label values of each case; [] where they are not known before the case is read.
        ignored: the label value of voxels that are left out, or None.
        joint: channels are the colours of pictures, scaled together. by_channel: images are one file per channel.
        clipped: cut off intensities as `normalise` says, for a run that an earlier release started.
        axes: what the axes of images and labels mean: "RAS", or letters such as "zyx".
        placed: whether an image says how it lies in a patient.
        places: of the label values by case number: of 2-D cases, for mirroring, and of those that may number objects.
        empty: name of an image from which nothing can be learnt -> what is wrong with it.
        void: label values, beside 0 and `ignored`, that stand for missing data as the label files say.
        lonely: name of an image -> a value that may stand for missing data, and its share of the voxels.
        left_out: lines that name what else lies in the folders.
        unscaled: case number -> image and label values as `read_folder` read them, until the case is asked for.
        keep_bytes: memory for further cases; 0 keeps none. _kept: those in memory, by number.
    """

    names: list[str]
    values: list[int]
    class_names: list[str]
    spatial_ndim: int
    channels: int
    shapes: list[tuple[int, ...]]
    read: Callable[[int], Case]
    split: tuple[list[int], list[int]] | None = None
    present: list[set[int]] = field(default_factory=list)
    ignored: int | None = None
    joint: bool = True
    by_channel: bool = False
    clipped: bool = False
    axes: str = "yx"
    placed: bool = False
    places: dict[int, Places] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)
    void: set[int] = field(default_factory=set)
    lonely: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unscaled: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    keep_bytes: int = 0
    _kept: dict[int, Case] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Case:
        """Return a case, and keep it if `keep_bytes` allow; raise FileError or TrainingError if its files changed."""
        if number in self._kept:
            return self._kept[number]
        # the case takes the place of its unscaled arrays in memory, which `read` removes
        self.keep_bytes += sum(part.nbytes for part in self.unscaled.get(number, ()))
        case = self.read(number)
        case_bytes = case.image.nbytes + case.label.nbytes
        if case_bytes <= self.keep_bytes:
            self.keep_bytes -= case_bytes
            self._kept[number] = case
        return case

    def keep_unscaled(self, number: int, image: np.ndarray, label: np.ndarray) -> None:
        """Keep image (channels, *S) and label values (*S) until `read`, if there is memory: no file is read twice."""
        if image.itemsize > 4:  # as it will be scaled
            image = np.stack([as_float32(channel) for channel in image])
        if image.nbytes + label.nbytes <= self.keep_bytes:
            self.keep_bytes -= image.nbytes + label.nbytes
            self.unscaled[number] = image, label

    @property
    def ignore_index(self) -> int | None:
        """Return the class number that losses and scores leave out."""
        return None if self.ignored is None else IGNORED

    @property
    def mapping(self) -> dict[int, int] | None:
        """Return {label value: class}, None where the values are the classes."""
        if self.values == list(range(len(self.values))):
            return None
        return {value: number for number, value in enumerate(self.values)}

    def untrained(self, training: Sequence[int]) -> list[int]:
        """Return the classes without a voxel in all of the cases `training`, [] where `present` does not say."""
        seen = set().union(*(self.present[number] for number in training)) if self.present else set(self.values)
        return [number for number, value in enumerate(self.values) if value not in seen]


def read_folder(
    folder: str | Path,
    *,
    round: bool = False,
    ignore_geometry: bool = False,
    ignore: int | None = None,
    nodata: float | None = None,
    foreground: bool | None = None,
) -> Cases:
    """Return the cases of a folder with `images/` and `labels/`, or as nnU-Net has it, every file read and checked.

    Args:
        folder: holds images/ and labels/, or nnU-Net's imagesTr/ and labelsTr/.
        round: round labels that are nearly whole.
        ignore_geometry: an image and its label belong together by position, whatever their affines say.
        ignore: label value of voxels to leave out; None: what nnU-Net's dataset.json calls "ignore", if anything.
        nodata: value of voxels of the images that hold no data, beside what GDAL's tag names.
        foreground: True makes all label values but 0 one class. None: each value is a class, and values that seem to
            number objects raise an error; False: each value is a class, whatever it seems to be.

    Raises:
        TrainingError, FileError: a folder is missing or empty, names have no partner, a file cannot be read, shape or
            geometry of a pair differ, dimensions or axes differ between files, a label file holds intensities or
            numbers of objects, or there is only one class.
    """
    layout = find_layout(Path(folder))
    ignore = layout.ignore if ignore is None else ignore
    pairs = _Pairs(layout, round, ignore_geometry, ignore, nodata, foreground)

    def read(number: int) -> Case:
        """Return a case; its files are read again unless their arrays were kept."""
        name = cases.names[number]
        if number in cases.unscaled:
            array, numbers = cases.unscaled.pop(number)
        else:
            reading, numbers = pairs.read(name)
            array = reading.array
        image = scaled(array, cases.joint, cases.channels, clipped=cases.clipped)
        return Case(name, image, _classes(numbers, cases.values, ignore))

    # `_survey` fills in what only the files say: values, shapes, axes ...
    cases = Cases([*layout.images], [], [], 0, 0, [], read, ignored=ignore, left_out=layout.left_out)
    cases.by_channel, cases.keep_bytes, cases.void = layout.by_channel, memory_bytes() // 2, pairs.void
    channels = [_survey(cases, number, pairs) for number in range(len(cases))]
    if len(cases.values) < 2:
        beside = "" if ignore is None else f" beside {ignore}, which is left out"
        got = f"only {', '.join(map(str, cases.values)) or 'none'}{beside}"
        expected = f"at least two label values in {layout.labels[cases.names[0]].parent}"
        raise refusal(expected, got, "There is nothing to tell apart.")
    cases.channels = max(channels)
    for name, count in zip(cases.names, channels, strict=True):
        if not fits_among(count, cases.channels, cases.joint):
            expected = f"{'1 or ' * cases.joint}{cases.channels} channels as in the other images"
            raise refusal(expected, count, "Convert it.", path=layout.images[name][0])
    names = {0: "background", pairs.object_value: "foreground"} if foreground else layout.label_names
    cases.class_names = _class_names(cases.values, names)
    return cases


@dataclass
class _Pairs:
    """Reads the pairs of a folder. Fields are the arguments of `read_folder`; `ignore` may come from dataset.json.

    Attributes:
        palettes: label value -> its colour in the palettes so far, and the first file that has it.
        first: (file name, number of axes, meaning of the axes) of the first image; None before it is read.
        void: as in `Cases`, of the files so far.
    """

    layout: Layout
    round: bool
    ignore_geometry: bool
    ignore: int | None
    nodata: float | None
    foreground: bool | None
    palettes: dict[int, tuple[str, str]] = field(default_factory=dict)
    first: tuple[str, int, str] | None = None
    void: set[int] = field(default_factory=set)

    @property
    def object_value(self) -> int:
        """Return the label value that replaces all others but 0 and `ignore`, if `foreground`."""
        return 2 if self.ignore == 1 else 1

    def read(self, name: str) -> tuple[Reading, np.ndarray]:
        """Return the image of the case `name` and its label values, (*S) bool or integers, turned alike.

        Labels in a file that omits empty slices are padded to the image.

        Raises:
            FileError: a file cannot be read, the label file holds other than whole numbers, its affine differs from the
                image's, or its palette from an earlier one. TrainingError: shapes, dimensions or axes differ.
        """
        files, label_path = self.layout.images[name], self.layout.labels[name]
        reading = read_channels(files, ignore_geometry=self.ignore_geometry, nodata=self.nodata)
        path = files[0]
        self._check_axes(path, reading)
        stored_label = extended(read_image(label_path), reading.stored)
        label = turned_like(stored_label, reading.stored, by_position=self.ignore_geometry)
        numbers = labels(label_path, label, rounded=self.round, advice="Round them, or check the folder.")
        one_palette(label_path, colours(label), self.palettes)
        if not one_shape(reading.shape, numbers.shape):
            # a picture (rows first) beside a medical image (columns first): they have no frame in common
            swapped = not one_frame(reading.stored, label) and reversed_shape(reading.shape, numbers.shape)
            got = f"{size(reading.shape)} for {path} and {size(numbers.shape)} for {label_path}"
            if numbers.shape in (reading.shape[1:], reading.shape[:-1]):
                advice = "If one axis is that of channels: save colours as PNG or TIFF, others as one file each."
            else:
                advice = ONE_FORMAT if swapped else "Resample one of them."
            raise refusal("one shape", got, advice)
        if not self.ignore_geometry:
            advice = "Resample one of them; --ignore-geometry takes them as they are."
            check_turned(label_path, stored_label, path, reading.stored, advice=advice, transpose=ONE_FORMAT)
        void = label.nodata
        if void not in (None, 0, self.ignore) and (numbers == void).any():
            self.void.add(int(void))
        if self.foreground:  # one value for all but 0 and `ignore`
            ignored = np.zeros(numbers.shape, bool) if self.ignore is None else numbers == self.ignore
            numbers = np.where(ignored, self.ignore or 0, np.where(numbers == 0, 0, self.object_value))
        return reading, numbers.reshape(reading.shape)  # without more or fewer axes of length 1

    def _check_axes(self, path: Path, reading: Reading) -> None:
        """Raise TrainingError unless the image at `path` has 2 or 3 axes, of the number and order of the first image.

        The first image that is checked becomes `first`.
        """
        ndim = reading.stored.spatial_ndim
        first_name, first_ndim, first_axes = self.first or ("", ndim, reading.axes)
        if ndim not in (2, 3) or ndim != first_ndim:
            expected = f"{f'{first_ndim}-D' if first_name else '2-D or 3-D'} images only"
            raise refusal(expected, f"a {ndim}-D one", "Put each kind into a folder of its own.", path=path)
        if reading.axes != first_axes:
            expected = f"an image {lies(first_axes)}, as {first_name}"
            raise refusal(expected, f"one {lies(reading.axes)}", "Save all images in one format.", path=path)
        self.first = self.first or (path.name, ndim, reading.axes)


def _survey(cases: Cases, number: int, pairs: _Pairs) -> int:
    """Read the pair of a case, add what it shows to the fields of `cases`, and return the channels of its image.

    Cases are surveyed in the order of their numbers. Raise FileError or TrainingError if the pair cannot be read, does
    not fit together or to the first pair, or if its labels seem to count objects or to be intensities.
    """
    name, ignore = cases.names[number], cases.ignored
    reading, numbers = pairs.read(name)
    cases.spatial_ndim, cases.axes = reading.stored.spatial_ndim, reading.axes
    # scaled together only if all have one channel or the colours of a picture; placed in a patient if one is
    cases.joint, cases.placed = cases.joint and reading.joint, cases.placed or reading.stored.placed
    if problem := emptiness(reading.array, reading.joint):
        cases.empty[name] = problem
    outlier = lonely_value([reading.array] if reading.joint else [*reading.array])
    if outlier and reading.stored.palette is None:  # a colour is no value of the file, which --nodata could name
        cases.lonely[name] = outlier
    present = {int(value) for value in np.unique(numbers)}
    cases.values = sorted({*cases.values} | present - {ignore})
    # where the values lie says whether they count objects, and in pictures whether mirroring would exchange two classes
    may_be_objects = pairs.foreground is None and len(present) > LEAST_OBJECTS
    if may_be_objects or (numbers.ndim == 2 and not pairs.foreground):
        cases.places[number] = places(numbers).without(ignore)
    # look for objects once, at the last case or where classes are too many; not if dataset.json names every value
    most = MAX_CLASSES - (ignore is not None)
    enough_seen = len(cases.values) > most or number == len(cases) - 1
    unnamed = pairs.foreground is None and not {*cases.values} - {0} <= {*pairs.layout.label_names}
    all_places = [*cases.places.values()] if enough_seen and unnamed else []
    _check_numbers(pairs.layout.labels[name], numbers, present, cases.values, most, all_places)
    cases.present.append(present)
    cases.shapes.append(reading.shape)
    cases.keep_unscaled(number, reading.array, numbers)
    return len(reading.array)


def _classes(numbers: np.ndarray, values: Sequence[int], ignore: int | None) -> np.ndarray:
    """Return class numbers (*S) uint8 of label values (*S): positions in `values`, which ascend, or `IGNORED`.

    `numbers` are bool or integers, each of them among `values` or `ignore`.
    """
    known = sorted({*values, *([] if ignore is None else [ignore])})
    dtype = np.int64 if known[-1] < 2**63 else np.uint64 if known[0] >= 0 else object
    classes = np.array([IGNORED if value == ignore else values.index(value) for value in known], np.uint8)
    return classes[np.searchsorted(np.array(known, dtype), numbers.astype(dtype, copy=False))]


def _class_names(values: Sequence[int], names: Mapping[int, str]) -> list[str]:
    """Return a name for each label value: the one in `names`, else "label 7". If two are alike, all are "label 7"."""
    plain = [f"label {value}" for value in values]
    named = [names.get(value) or other for value, other in zip(values, plain, strict=True)]
    return named if len(set(named)) == len(named) else plain


def _check_numbers(
    path: Path, numbers: np.ndarray, present: set[int], values: Sequence[int], most: int, all_places: Sequence[Places]
) -> None:
    """Raise TrainingError if the numbers of a label map, or of all so far, seem to count objects or be intensities.

    Args:
        path: of the label map, for messages. numbers: its label values (*S). present: the distinct ones.
        values: the distinct ones of all maps so far. most: how many classes there may be.
        all_places: where the numbers of all maps so far lie; [] leaves out the check for objects.
    """
    share = 1.0  # of the voxels whose next one along the longest axis has the same value
    if len(present) > LEAST_OBJECTS:
        share = float((np.diff(numbers, axis=int(np.argmax(numbers.shape))) == 0).mean())
    if all_places and share >= LIKE_NEXT and are_objects([each.without(0) for each in all_places]):
        raise refusal(
            "a number for each class", f"{len({*values} - {0})} so far, which seem to count objects",
            "Pass --foreground to train all objects as one class; if each number is a class, pass --no-foreground.",
            path=path,
        )  # fmt: skip
    advice = "Intensities are no labels: check the folder."
    if len(values) > most:
        advice += " If the numbers count objects, pass --foreground."
        raise refusal(f"at most {most} label values", f"{len(values)} so far", advice, path=path)
    if len(present) > MANY_LABELS and share < LIKE_NEXT:
        got = f"{len(present)} values, and neighbours that differ in {1 - share:.0%} of the voxels"
        raise refusal("a label map", got, advice, path=path)


def split(cases: Cases, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the cases for training and of those held out, a share of `val_fraction`, both sorted.

    The seed draws them. Either part has at least one of the cases, which are at least two. A split that the data
    prescribe is taken as it is.
    """
    if cases.split is not None:
        return cases.split
    held_out_count = min(max(1, round(val_fraction * len(cases))), len(cases) - 1)
    order = np.random.default_rng([seed, 0]).permutation(len(cases)).tolist()
    return sorted(order[held_out_count:]), sorted(order[:held_out_count])


def memory_bytes() -> int:
    """Return the memory of this machine; 8 GiB where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
