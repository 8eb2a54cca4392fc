"""folder -> cases: images and labels that belong together, checked, scaled, with their label values mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softdice.images.files import read_image
from softdice.images.geometry import check_same_place, extended, one_frame, one_shape, reversed_shape
from softdice.images.labels import colours, labels, one_palette
from softdice.training.channels import ONE_FORMAT, emptiness, read_channels, scaled, size
from softdice.training.config import TrainingError
from softdice.training.layout import find_layout

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
        empty: names of images, and what is wrong with them, from which nothing can be learnt.
        left_out: lines that name what else lies in the folders.
        keep_bytes: memory for cases that have been read.
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
    empty: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    keep_bytes: int = 0
    _kept: dict[int, Case] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Case:
        if number in self._kept:
            return self._kept[number]
        case = self.read(number)
        size = case.image.nbytes + case.label.nbytes
        if size <= self.keep_bytes:
            self.keep_bytes -= size
            self._kept[number] = case
        return case

    @property
    def ignore_index(self) -> int | None:
        """Class number that losses and scores leave out."""
        return None if self.ignored is None else IGNORED

    @property
    def mapping(self) -> dict[int, int] | None:
        """{label value: class}, None where the values are the classes."""
        if self.values == list(range(len(self.values))):
            return None
        return {value: number for number, value in enumerate(self.values)}

    def untrained(self, training: Sequence[int]) -> list[int]:
        """Classes of which none of these cases has a voxel, as far as that is known beforehand."""
        seen = set().union(*(self.present[number] for number in training)) if self.present else set(self.values)
        return [number for number, value in enumerate(self.values) if value not in seen]


def read_folder(
    folder: str | Path, *, round: bool = False, ignore_geometry: bool = False, ignore: int | None = None
) -> Cases:
    """folder with `images/` and `labels/`, or as nnU-Net has it -> cases, every file read once and checked.

    Args:
        folder: holds both; `softdice.training.layout`.
        round: round labels that are nearly whole.
        ignore_geometry: an image and its label belong together by position, whatever their affines say.
        ignore: label value of voxels to leave out; None: what nnU-Net's dataset.json calls "ignore", if anything.

    Raises:
        TrainingError, FileError: a folder is missing or empty, names have no partner, a file cannot be read, shape or
            geometry of a pair differ, dimensions differ between files, labels are none, or there is only one class.
    """
    folder = Path(folder)
    layout = find_layout(folder)
    images, label_paths = layout.images, layout.labels
    ignore = layout.ignore if ignore is None else ignore
    names = list(images)
    values: set[int] = set()
    most = MAX_CLASSES - (ignore is not None)
    shapes: list[tuple[int, ...]] = []
    channels: list[int] = []
    seen: dict[int, tuple[str, str]] = {}
    present: list[set[int]] = []
    empty: dict[str, str] = {}
    joint = True
    advice = "Round them, or check the folder."
    for name in names:
        path = images[name][min(images[name])]
        image, array, together = read_channels(images[name], ignore_geometry=ignore_geometry)
        joint &= together
        if problem := emptiness(array, together):
            empty[name] = problem
        label = extended(read_image(label_paths[name]), image)
        shape, classes = image.shape, labels(label_paths[name], label, rounded=round, advice=advice)
        one_palette(label_paths[name], colours(label), seen)
        if not one_shape(shape, classes.shape):
            turned = not one_frame(image, label) and reversed_shape(shape, classes.shape)
            raise TrainingError(
                f"softdice train: expected one shape, got {size(shape)} for {path} and {size(classes.shape)} "
                f"for {label_paths[name]}. {ONE_FORMAT if turned else 'Resample one of them.'}"
            )
        if not ignore_geometry:
            advice_place = "Resample one of them; --ignore-geometry takes them as they are."
            check_same_place(label_paths[name], label, path, image, advice=advice_place, transpose=ONE_FORMAT)
        if len(shape) not in (2, 3) or (shapes and len(shape) != len(shapes[0])):
            raise TrainingError(
                f"softdice train: {path}: expected {'2-D or 3-D' if not shapes else f'{len(shapes[0])}-D'} "
                f"images only, got a {len(shape)}-D one. Put each kind into a folder of its own."
            )
        shapes.append(shape)
        channels.append(array.shape[0])
        found = set(map(int, np.unique(classes)))
        present.append(found)
        values |= found - {ignore}
        if len(values) > most:
            raise TrainingError(
                f"softdice train: {label_paths[name]}: expected at most {most} label values, got {len(values)} "
                "so far. Intensities are no labels: check the folder."
            )
        if len(found) > LABEL_LIKE[0] and (share := _constant_share(classes)) < LABEL_LIKE[1]:
            raise TrainingError(
                f"softdice train: {label_paths[name]}: expected a label map, got {len(found)} values, and neighbours "
                f"that differ in {1 - share:.0%} of the voxels. Intensities are no labels: check the folder."
            )
    if len(values) < 2:
        beside = "" if ignore is None else f" beside {ignore}, which is left out"
        raise TrainingError(
            f"softdice train: expected at least two label values in {label_paths[names[0]].parent}, got only "
            f"{', '.join(map(str, values)) or 'none'}{beside}. There is nothing to tell apart."
        )
    count = max(channels)
    for name, own in zip(names, channels, strict=True):
        if own != count and not (own == 1 and joint):  # a grey picture beside coloured ones
            raise TrainingError(
                f"softdice train: {images[name][0]}: expected {'1 or ' * joint}{count} channels as in the other "
                f"images, got {own}. Convert it."
            )
    ordered = sorted(values)
    every = sorted({*ordered, *(() if ignore is None else (ignore,))})
    known = np.array(every, np.int64 if every[-1] < 2**63 else np.uint64 if every[0] >= 0 else object)
    numbers = np.array([IGNORED if value == ignore else ordered.index(value) for value in every], np.uint8)

    def read(number: int) -> Case:
        name = names[number]
        image, array, _ = read_channels(images[name], ignore_geometry=ignore_geometry)
        array = np.broadcast_to(array, (count, *array.shape[1:]))
        found = labels(label_paths[name], extended(read_image(label_paths[name]), image), rounded=round)
        classes = numbers[np.searchsorted(known, found.astype(known.dtype, copy=False))]
        return Case(name, scaled(array, joint), classes.reshape(shapes[number]))

    class_names = [layout.label_names.get(value) or f"label {value}" for value in ordered]
    return Cases(
        names=names,
        values=ordered,
        class_names=class_names if len(set(class_names)) == len(ordered) else [f"label {value}" for value in ordered],
        spatial_ndim=len(shapes[0]),
        channels=count,
        shapes=shapes,
        read=read,
        present=present,
        ignored=ignore,
        joint=joint,
        by_channel=layout.by_channel,
        empty=empty,
        left_out=layout.left_out,
        keep_bytes=memory_bytes() // 2,
    )


def split(cases: Cases, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """cases -> numbers for training and numbers held out, drawn by the seed; at least one of each."""
    if cases.split is not None:
        return cases.split
    held_out_count = min(max(1, round(val_fraction * len(cases))), len(cases) - 1)
    order = np.random.default_rng([seed, 0]).permutation(len(cases)).tolist()
    return sorted(order[held_out_count:]), sorted(order[:held_out_count])


def _constant_share(classes: np.ndarray) -> float:
    """label map -> share of its voxels whose next one along the longest axis has the same value."""
    return float((np.diff(classes, axis=int(np.argmax(classes.shape))) == 0).mean())


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
