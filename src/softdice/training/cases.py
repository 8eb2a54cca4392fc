"""Cases of a folder: images and labels that belong together, checked, scaled, with their label values mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softdice.images.files import Image, read_image
from softdice.images.geometry import extended, one_frame, one_shape, reversed_shape
from softdice.images.labels import colours, labels, one_palette
from softdice.images.orientation import check_turned, lies, turned_like
from softdice.training.channels import ONE_FORMAT, Reading, emptiness, lonely_value, read_channels, scaled, size
from softdice.training.config import refusal
from softdice.training.layout import find_layout
from softdice.training.places import LEAST_OBJECTS, Places, are_objects, places

MAX_CLASSES = 256
IGNORED = 255
"""Class number of voxels that are left out."""
LABEL_LIKE = 32, 0.5
"""Of an image with more values than this, so large a share of voxels has the value of the next one, if it is labels."""


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
        present: label values of each case, where they are known beforehand.
        ignored: the label value of voxels that are left out, or None.
        joint: channels are the colours of pictures, scaled together. by_channel: images are one file per channel.
        axes: what the axes of images and labels mean: "RAS", or letters such as "zyx". placed: in a patient.
        places: where the numbers of each label map lie, if anyone asks.
        empty: names of images, and what is wrong with them, from which nothing can be learnt.
        lonely: names of images, and a value far from all others, with its share, that may stand for missing data.
        left_out: lines that name what else lies in the folders.
        unscaled: images and labels that were read with their folder, until their case is asked for.
        keep_bytes: memory for further cases.
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
    axes: str = "yx"
    placed: bool = False
    places: list[Places] = field(default_factory=list)
    empty: dict[str, str] = field(default_factory=dict)
    lonely: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unscaled: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    keep_bytes: int = 0
    _kept: dict[int, Case] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Case:
        if number in self._kept:
            return self._kept[number]
        self.keep_bytes += sum(part.nbytes for part in self.unscaled.get(number, ()))
        case = self.read(number)
        size = case.image.nbytes + case.label.nbytes
        if size <= self.keep_bytes:
            self.keep_bytes -= size
            self._kept[number] = case
        return case

    def keep_unscaled(self, number: int, image: np.ndarray, label: np.ndarray) -> None:
        """Keep what was read of a case until it is asked for, so that no file is read twice, if there is memory."""
        image = image if image.itemsize <= 4 else image.astype(np.float32)  # as it will be scaled
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
        """Return the classes of which none of these cases has a voxel, as far as that is known beforehand."""
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
        folder: holds both; `softdice.training.layout`.
        round: round labels that are nearly whole.
        ignore_geometry: an image and its label belong together by position, whatever their affines say.
        ignore: label value of voxels to leave out; None: what nnU-Net's dataset.json calls "ignore", if anything.
        nodata: value of voxels of the images that hold no data, beside what GDAL's tag names.
        foreground: all label values but 0 are one class. None: they are not, and a doubt is raised where they look like
            numbers of objects; False: they are classes, without a doubt.

    Raises:
        TrainingError, FileError: a folder is missing or empty, names have no partner, a file cannot be read, shape or
            geometry of a pair differ, dimensions or axes differ between files, labels are none, or number objects, or
            there is only one class.
    """
    layout = find_layout(Path(folder))
    images, names = layout.images, list(layout.images)
    ignore = layout.ignore if ignore is None else ignore
    object_class = 2 if ignore == 1 else 1
    most = MAX_CLASSES - (ignore is not None)
    channels: list[int] = []
    values: set[int] = set()
    palettes: dict[int, tuple[str, str]] = {}

    def read_pair(name: str) -> tuple[Reading, Image, Image]:
        reading = read_channels(images[name], ignore_geometry=ignore_geometry, nodata=nodata)
        label = extended(read_image(layout.labels[name]), reading.stored)
        return reading, label, turned_like(label, reading.stored, by_position=ignore_geometry)

    def numbers_of(name: str, label: Image) -> np.ndarray:
        advice = "Round them, or check the folder."
        numbers = labels(layout.labels[name], label, rounded=round, advice=advice)
        if foreground:
            out = np.zeros(numbers.shape, bool) if ignore is None else numbers == ignore
            numbers = np.where(out, ignore or 0, np.where(numbers == 0, 0, object_class))
        return numbers

    def read(number: int) -> Case:
        name, shape = names[number], cases.shapes[number]
        if number in cases.unscaled:
            array, numbers = cases.unscaled.pop(number)
        else:
            reading, _, label = read_pair(name)
            array, numbers = reading.array, numbers_of(name, label)
        label_classes = classes[np.searchsorted(known, numbers.reshape(shape).astype(known.dtype, copy=False))]
        return Case(name, scaled(np.broadcast_to(array, (cases.channels, *shape)), cases.joint), label_classes)

    cases = Cases(names, [], [], 0, 0, [], read, ignored=ignore, left_out=layout.left_out)
    cases.by_channel, cases.keep_bytes = layout.by_channel, memory_bytes() // 2
    for number, name in enumerate(names):
        path, label_path = images[name][min(images[name])], layout.labels[name]
        reading, stored_label, label = read_pair(name)
        if number == 0:
            cases.spatial_ndim, cases.axes = reading.stored.spatial_ndim, reading.axes
        _check_axes(path, reading, cases, "" if number == 0 else images[names[0]][0].name)
        if problem := emptiness(reading.array, reading.joint):
            cases.empty[name] = problem
        if outlier := lonely_value([reading.array] if reading.joint else [*reading.array]):
            cases.lonely[name] = outlier
        numbers = numbers_of(name, label)
        one_palette(label_path, colours(label), palettes)
        if not one_shape(reading.shape, numbers.shape):
            swapped = not one_frame(reading.stored, label) and reversed_shape(reading.shape, numbers.shape)
            got = f"{size(reading.shape)} for {path} and {size(numbers.shape)} for {label_path}"
            raise refusal("one shape", got, ONE_FORMAT if swapped else "Resample one of them.")
        if not ignore_geometry:
            advice = "Resample one of them; --ignore-geometry takes them as they are."
            check_turned(label_path, stored_label, path, reading.stored, advice=advice, transpose=ONE_FORMAT)
        present = set(map(int, np.unique(numbers)))
        values |= present - {ignore}
        if not foreground and (numbers.ndim == 2 or (foreground is None and len(present) > LEAST_OBJECTS)):
            cases.places.append(places(numbers).without(ignore))
        last = len(values) > most or name == names[-1]
        unnamed = foreground is None and not {*values} - {0} <= {*layout.label_names}
        _check_numbers(label_path, numbers, present, values, most, cases.places if last and unnamed else [])
        cases.present.append(present)
        cases.shapes.append(reading.shape)
        cases.keep_unscaled(number, reading.array, numbers)
        channels.append(len(reading.array))
        cases.joint, cases.placed = cases.joint and reading.joint, cases.placed or reading.stored.placed
    if len(values) < 2:
        beside = "" if ignore is None else f" beside {ignore}, which is left out"
        got = f"only {', '.join(map(str, values)) or 'none'}{beside}"
        expected = f"at least two label values in {layout.labels[names[0]].parent}"
        raise refusal(expected, got, "There is nothing to tell apart.")
    cases.channels = max(channels)
    for name, count in zip(names, channels, strict=True):
        if count != cases.channels and not (cases.joint and count == 1):  # a grey one beside coloured ones
            expected = f"{'1 or ' * cases.joint}{cases.channels} channels as in the other images"
            raise refusal(expected, count, "Convert it.", path=images[name][0])
    cases.values = ordered = sorted(values)
    names_by_value = {0: "background", object_class: "foreground"} if foreground else layout.label_names
    cases.class_names = _class_names(ordered, names_by_value)
    every = sorted({*ordered, *(() if ignore is None else (ignore,))})
    known = np.array(every, np.int64 if every[-1] < 2**63 else np.uint64 if every[0] >= 0 else object)
    classes = np.array([IGNORED if value == ignore else ordered.index(value) for value in every], np.uint8)
    return cases


def _class_names(values: Sequence[int], names: Mapping[int, str]) -> list[str]:
    """Return a name for each label value, no two alike."""
    plain = [f"label {value}" for value in values]
    named = [names.get(value) or other for value, other in zip(values, plain, strict=True)]
    return named if len(set(named)) == len(named) else plain


def _check_axes(path: Path, reading: Reading, cases: Cases, first: str) -> None:
    """Raise TrainingError unless an image has 2 or 3 axes, as many as that named `first`, and in the same order."""
    ndim = reading.stored.spatial_ndim
    if ndim not in (2, 3) or ndim != cases.spatial_ndim:
        expected = f"{f'{cases.spatial_ndim}-D' if first else '2-D or 3-D'} images only"
        raise refusal(expected, f"a {ndim}-D one", "Put each kind into a folder of its own.", path=path)
    if reading.axes != cases.axes:
        expected = f"an image {lies(cases.axes)}, as {first}"
        raise refusal(expected, f"one {lies(reading.axes)}", "Save all images in one format.", path=path)


def _check_numbers(
    path: Path, numbers: np.ndarray, present: set[int], values: set[int], most: int, where: Sequence[Places]
) -> None:
    """Raise TrainingError if the numbers of a label map, or of all so far, are those of objects, or intensities.

    Args:
        present: the numbers of this map. values: of all maps so far. most: how many may be classes.
        where: the places of all numbers, where they may be objects.
    """
    share = _constant_share(numbers) if len(present) > LEAST_OBJECTS else 1.0
    if where and share >= LABEL_LIKE[1] and are_objects([each.without(0) for each in where]):
        raise refusal(
            "a number for each class", f"{len(values - {0})} so far, which seem to count objects",
            "Pass --foreground to train all objects as one class; if each number is a class, pass --no-foreground.",
            path=path,
        )  # fmt: skip
    advice = "Intensities are no labels: check the folder."
    if len(values) > most:
        advice += " If the numbers count objects, pass --foreground."
        raise refusal(f"at most {most} label values", f"{len(values)} so far", advice, path=path)
    if len(present) > LABEL_LIKE[0] and share < LABEL_LIKE[1]:
        got = f"{len(present)} values, and neighbours that differ in {1 - share:.0%} of the voxels"
        raise refusal("a label map", got, advice, path=path)


def split(cases: Cases, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return numbers for training and numbers held out, drawn by the seed; at least one of each."""
    if cases.split is not None:
        return cases.split
    held_out_count = min(max(1, round(val_fraction * len(cases))), len(cases) - 1)
    order = np.random.default_rng([seed, 0]).permutation(len(cases)).tolist()
    return sorted(order[held_out_count:]), sorted(order[:held_out_count])


def _constant_share(classes: np.ndarray) -> float:
    """Return the share of the voxels whose next one along the longest axis has the same value."""
    return float((np.diff(classes, axis=int(np.argmax(classes.shape))) == 0).mean())


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
