"""A pair of files, or of folders with a file per class -> label maps (or probabilities) on one grid.

`prediction` and `truth` are the two files of a case, p and t their arrays (*S) of bool or integer labels. The file of a
prediction with --soft or --threshold holds probabilities, float32 or float64 in [0, 1]. A grid is shape and affine.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from softdice.evaluation.labels import ScoreError
from softdice.images import geometry
from softdice.images.files import Image, list_images, read_image, split_name
from softdice.images.formats import BY_SUFFIX
from softdice.images.labels import colours, labels, one_palette, probabilities
from softdice.scoring.options import Options


class LoadedPair(NamedTuple):
    """A pair on one grid: the arrays, the names of labels in both files, and the image of the reference.

    With --soft `p` holds probabilities.
    """

    p: np.ndarray
    t: np.ndarray
    names: tuple[dict[int, str], dict[int, str]]
    grid: Image


def class_files(folder: Path) -> dict[str, Path]:
    """Return the mask of each class in a folder, by stem: only files of the most frequent format."""
    files = list_images(folder)
    formats = [BY_SUFFIX[name[1]] for name in map(split_name, files.values()) if name]
    most_frequent = max(formats, key=formats.count, default=None)
    return {name: path for (name, path), format in zip(files.items(), formats, strict=True) if format == most_frequent}


def load_class(prediction: Path | None, truth: Path, name: str, options: Options) -> LoadedPair:
    """Read the masks of one class from two folders, (*S) bool; with --soft the prediction's probabilities.

    `name` is the class, a key of the reference's `class_files`. Raise FileError for a file that cannot be read, and
    ScoreError if the prediction has no file of the class and `options.missing` is "skip", if a file has several labels,
    or if the grids differ.
    """
    file = None if prediction is None else class_files(prediction).get(name)
    if prediction is not None and file is None and options.missing == "skip":
        advice = "--missing 0 counts it as empty."
        raise ScoreError(f"{prediction}: expected a file for each class of {truth}, got none for {name!r}. {advice}")
    truth_file = class_files(truth)[name]
    p, t, names, grid = load_pair(file, truth_file, options)
    for path, array in ((file, p), (truth_file, t)):
        values = {*np.unique(array).tolist()} - {0} if array.dtype.kind != "f" else ()
        if len(values) > 1:
            raise ScoreError(f"{path}: expected a mask of one class, got the labels {_listed(sorted(values))}.")
    return LoadedPair(p if p.dtype.kind == "f" else p != 0, t != 0, names, grid)


def load_pair(prediction: Path | None, truth: Path, options: Options) -> LoadedPair:
    """Read two files: return p and t (*S) on the grid of the reference, the names of their labels, and its image.

    p and t hold labels, p with --soft probabilities. With --threshold p has the label of the one class (of a region the
    first) where the probability exceeds the threshold, else 0. `prediction` None stands for an empty one. Slices that
    a DICOM segmentation omits because they are empty are filled with 0.

    Raise FileError or ScoreError if a file cannot be read, the grids or palettes differ, or probabilities are of
    several classes.
    """
    truth_image = read_image(truth)
    prediction_image = None if prediction is None else read_image(prediction)
    if prediction_image is not None:
        truth_image = geometry.extended(truth_image, prediction_image)
        prediction_image = geometry.extended(prediction_image, truth_image)
    t = labels(truth, truth_image, rounded=options.round, advice="Give LABELS as label maps.")
    probable = options.soft or options.threshold is not None
    if prediction is None or prediction_image is None:
        if probable:
            _check_one_class(truth, t, options)
        p = np.zeros_like(t, np.float32 if options.soft else np.uint8)
        return LoadedPair(p, t, ({}, truth_image.names), truth_image)
    if probable:
        option = "--soft" if options.soft else "--threshold"
        p = probabilities(prediction, prediction_image, scale=options.scale, option=option)
    else:
        advice = "For probabilities pass --threshold 0.5 or --soft."
        p = labels(prediction, prediction_image, rounded=options.round, advice=advice)
        palette: dict[int, tuple[str, str]] = {}
        for path, image in ((truth, truth_image), (prediction, prediction_image)):
            one_palette(path, colours(image), palette)
    p = _on_grid(prediction, prediction_image, p, truth, truth_image, options)
    if probable:
        _check_one_class(truth, t, options)
    if options.threshold is not None:
        p = np.where(np.greater(p, options.threshold), np.int32(class_labels(options)[0]), np.int32(0))
    names_t, nodata = truth_image.names, truth_image.nodata  # that of a prediction may be a class of the reference
    if isinstance(nodata, int) and nodata != 0:  # 0 is the background
        names_t = {nodata: "nodata", **names_t}
    return LoadedPair(p, t, (prediction_image.names, names_t), truth_image)


def region_mask(array: np.ndarray, key: int | str, options: Options) -> np.ndarray:
    """Return the mask (*S) of a class in a label map: of the label or region `key`, of all objects with --instances."""
    if options.instances:
        return array != 0
    return np.isin(array, options.regions[key] if options.regions and isinstance(key, str) else (key,))


def class_labels(options: Options) -> tuple[int, ...]:
    """Return the labels of the one class that probabilities are about."""
    if options.regions is not None:
        return next(iter(options.regions.values()))
    return options.labels if options.labels is not None else (1,)


def _check_one_class(truth: Path, t: np.ndarray, options: Options) -> None:
    """Raise ScoreError if the reference t has several classes and no option says which one probabilities are about."""
    if options.labels is not None or options.regions is not None or t.dtype.kind == "b":
        return  # the options say it, or the reference has one class
    region = class_labels(options)
    others = [int(label) for label in np.unique(t) if label not in (0, *region, *options.ignore)]
    if others:
        advice = "Say with --labels or --regions what the probabilities are about."
        raise ScoreError(f"{truth}: expected labels 0 and {region[0]}, got {_listed(others)} too. {advice}")


def _on_grid(
    prediction: Path, prediction_image: Image, p: np.ndarray, truth: Path, truth_image: Image, options: Options
) -> np.ndarray:
    """Return the prediction on the grid of the reference: as it is, transposed or resampled, as the options say.

    The images are what was read from the two files, p the labels or probabilities in the shape of its image. Raise
    ScoreError if the shapes differ or the grids do not overlap, FileError if the files say that voxels at the same
    index lie elsewhere, or if an affine cannot be inverted.
    """
    affine_p, affine_t, shape = prediction_image.affine, truth_image.affine, truth_image.shape
    # 1. --transpose: the axes in reverse order
    squeezed = p.reshape([n for n in p.shape if n != 1])
    if options.transpose:
        if squeezed.ndim not in (2, 3):
            raise ScoreError(f"{prediction}: --transpose: expected an image of 2 or 3 axes, got shape {p.shape}.")
        p = squeezed.T
    # 2. --resample, where both files say in which place of one space their voxels lie
    placed = geometry.one_frame(prediction_image, truth_image) and p.ndim <= 3 and len(shape) <= 3
    if options.resample and placed and affine_p is not None and affine_t is not None:
        if geometry.same_place(prediction_image, truth_image):
            return p.reshape(shape)
        geometry.check_inverse(prediction, prediction_image, truth, truth_image)
        if not geometry.overlap(prediction_image, truth_image):
            raise ScoreError(f"{prediction}: --resample: expected {geometry.apart(truth, p.shape == shape)}")
        return resampled(p, affine_p, affine_t, shape)
    # 3. otherwise shapes must agree, apart from axes of length 1; the error has the hint that fits best, set last
    if not geometry.one_shape(p.shape, shape):
        hint = " --resample brings it to the grid of the label." if placed else ""
        if not placed and geometry.reversed_shape(p.shape, shape):
            hint = " --transpose swaps its axes."
        if squeezed.ndim == len(shape) + 1:  # such as nnU-Net's .npz of probabilities
            hint = " If it holds probabilities of several classes, save their argmax, or one file per class."
        for path, image in ((prediction, prediction_image), (truth, truth_image)):
            if image.place.partial and not placed:
                hint = f" {path.name} leaves out empty parts of its image: export it on the whole grid."
        raise ScoreError(f"{prediction}: expected shape {shape} as in {truth.name}, got {p.shape}.{hint}")
    # 4. and so must the places of voxels, as far as the files say
    if not (options.ignore_geometry or options.transpose):
        advice = "--resample brings the prediction to the grid of the label, --ignore-geometry compares as is."
        transpose = "Pass --transpose, which reverses the axes of the prediction."
        geometry.check_same_place(prediction, prediction_image, truth, truth_image, advice=advice, transpose=transpose)
    return p.reshape(shape)


def resampled(p: np.ndarray, from_affine: np.ndarray, to_affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample a prediction: labels to the nearest voxel, probabilities linearly; 0 outside the prediction.

    The prediction ends at the faces, not the centres, of its outermost voxels. The affines (4, 4) map indices of the
    prediction, and of the result, to one space, and can be inverted; `shape` is the result's. Both have up to 3 axes.
    """
    from scipy.ndimage import affine_transform

    if p.ndim < 3 or len(shape) < 3:
        volumes = [(*sizes, *[1] * (3 - len(sizes))) for sizes in (p.shape, shape)]
        return resampled(p.reshape(volumes[0]), from_affine, to_affine, volumes[1]).reshape(shape)
    # from indices of the result to indices of the prediction; rounding keeps an exact flip exact
    matrix = np.round(np.linalg.inv(from_affine) @ to_affine, 9)
    if p.dtype.kind != "f":
        labels_p = p.astype(np.uint8) if p.dtype.kind == "b" else p
        return np.asarray(affine_transform(labels_p, matrix, output_shape=shape, order=0, mode="grid-constant"))
    values = affine_transform(p, matrix, output_shape=shape, order=1, mode="nearest")
    inside = affine_transform(np.ones(p.shape, np.uint8), matrix, output_shape=shape, order=0, mode="grid-constant")
    return np.where(inside, values, values.dtype.type(0))


def _listed(labels: list[int]) -> str:
    """Return the first eight labels as a text."""
    return ", ".join(map(str, labels[:8])) + (" ..." if len(labels) > 8 else "")
