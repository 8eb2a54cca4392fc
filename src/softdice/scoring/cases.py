"""a pair of files -> counts per class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softdice.images.files import Image, list_images, read_image, split_name
from softdice.images.formats import BY_SUFFIX
from softdice.images.geometry import (
    apart,
    check_inverse,
    check_same_place,
    extended,
    one_frame,
    one_shape,
    overlap,
    reversed_shape,
    same_place,
)
from softdice.images.labels import colours, labels, one_palette, probabilities
from softdice.metrics.counting import CHUNK, pair_counts
from softdice.scoring.classes import OBJECTS, Options, ScoreError
from softdice.scoring.doubts import check_grey, check_names, check_scales, renumbered, unnamed, voxels_of
from softdice.scoring.measured import mask_scores, measured_scores


@dataclass(frozen=True)
class Case:
    """One pair, compared: per class the voxels of both, of the prediction and of the truth.

    `keys` are labels, or names of regions; `counts` is (3, keys) int64, float64 sums of probabilities for soft
    predictions. `voxel_ml` is the volume of a voxel, nan where the file does not say. `unnamed` are labels of the truth
    that no option names, with their voxels; `colours` those of its labels where it has a palette. `measured` is
    (M, keys): the columns of `Options.measured`. `renumbered`: most labels of the truth lie under other numbers in the
    prediction, as those of objects do. Where there was an error nothing was counted.
    """

    case: str
    prediction: str = ""
    truth: str = ""
    keys: tuple[int | str, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int64))
    voxels: int = 0
    names: dict[int, str] = field(default_factory=dict)
    error: str = ""
    voxel_ml: float = math.nan
    unnamed: dict[int, int] = field(default_factory=dict)
    colours: dict[int, str] = field(default_factory=dict)
    measured: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    renumbered: bool = False


def score_pair(prediction: Path | None, truth: Path, options: Options, case: str = "") -> Case:
    """prediction file, truth file -> Case; None for a prediction without any voxel of any class.

    Raises:
        FileError: a file cannot be read. ScoreError: the two cannot be compared.
    """
    p, t, names, grid = load_pair(prediction, truth, options)
    if options.instances:
        return _score_objects(prediction, truth, p, t, grid, options, case)
    soft = p.dtype.kind == "f"
    labels_p, labels_t, n = pair_counts(t if soft else p, t)
    counted = ~np.isin(labels_t, options.ignore)
    labels_p, labels_t, n = labels_p[counted], labels_t[counted], n[counted]
    held = voxels_of(labels_p, n), voxels_of(labels_t, n)
    if prediction is not None and not soft:
        check_names(prediction, names[0], truth, names[1], {*held[0], *held[1]}, options)
        check_scales(prediction, held[0], truth, held[1], options)
        check_grey(prediction, p, *held, options)
    check_grey(truth, t, held[1], held[0], options)
    keys, counts, voxels = _soft_counts(p, t, options) if soft else _label_counts(labels_p, labels_t, n, options)
    known = {**names[0], **names[1], **options.names}
    found = measured_scores(prediction or truth, p, t, grid, keys, known, options)
    return Case(
        case or truth.name,
        "" if prediction is None else str(prediction),
        str(truth),
        keys,
        counts,
        voxels,
        {**names[0], **names[1]},
        voxel_ml=_voxel_ml(grid),
        unnamed=unnamed(held[1], options),
        colours=colours(grid),
        measured=found,
        renumbered=not soft and renumbered(labels_p, labels_t, n, options),
    )


def _score_objects(
    prediction: Path | None, truth: Path, p: np.ndarray, t: np.ndarray, grid: Image, options: Options, case: str
) -> Case:
    """Maps in which each number is an object -> Case of one class: where there is an object at all."""
    for path, array in ((prediction or truth, p), (truth, t)):
        lowest = array.min(initial=0, where=~np.isin(array, options.ignore))
        if lowest < 0:
            advice = "Name it with --ignore where it marks voxels that nobody annotated."
            raise ScoreError(f"{path}: --instances: expected objects numbered from 1 on, got {lowest}. {advice}")
    if options.ignore:
        counted = ~np.isin(t, options.ignore)
        p, t = np.where(counted, p, p.dtype.type(0)), np.where(counted, t, t.dtype.type(0))
        voxels = int(counted.sum())
    else:
        voxels = t.size
    in_p, in_t = p != 0, t != 0
    counts = np.array([[(in_p & in_t).sum()], [in_p.sum()], [in_t.sum()]])
    measured = measured_scores(prediction or truth, p, t, grid, (OBJECTS,), {}, options)
    named = "" if prediction is None else str(prediction)
    return Case(
        case or truth.name, named, str(truth), (OBJECTS,), counts, voxels, voxel_ml=_voxel_ml(grid), measured=measured
    )


def score_classes(prediction: Path | None, truth: Path, options: Options, case: str = "") -> Case:
    """two folders of masks -> Case, whose classes are the names of the files that the truth has.

    Raises:
        FileError: a file cannot be read. ScoreError: one is no mask, or has no partner.
    """
    files = class_files(truth)
    counts, voxels, grid = np.zeros((3, len(files)), np.float64 if options.soft else np.int64), 0, None
    found = np.zeros((len(options.measured), len(files)))
    for column, name in enumerate(files):
        p, t, _, grid = load_class(prediction, truth, name, options)
        if options.soft:
            _, one, voxels = _soft_counts(p, t, options)
            counts[:, column] = one[:, 0]
        else:
            counts[:, column] = (p & t).sum(), p.sum(), t.sum()
            voxels = t.size
        if options.measured:
            found[:, [column]] = mask_scores(files[name], p, t, grid, name, options)
    ml = math.nan if grid is None else _voxel_ml(grid)
    named = "" if prediction is None else str(prediction)
    return Case(case or truth.name, named, str(truth), tuple(files), counts, voxels, voxel_ml=ml, measured=found)


def class_files(folder: Path) -> dict[str, Path]:
    """folder -> {class: its mask}: the files of the type that most have, so that a picture beside the masks is none."""
    files = list_images(folder)
    types = [BY_SUFFIX[name[1]] for name in map(split_name, files.values()) if name]
    most = max(types, key=types.count, default=None)
    return {name: path for (name, path), kind in zip(files.items(), types, strict=True) if kind == most}


def load_class(prediction: Path | None, truth: Path, name: str, options: Options) -> Loaded:
    """two folders, a class -> its masks in both, bool; the prediction's probabilities for soft scores."""
    file = None if prediction is None else class_files(prediction).get(name)
    if prediction is not None and file is None and options.missing == "skip":
        advice = "--missing 0 counts it as empty."
        raise ScoreError(f"{prediction}: expected a file for each class of {truth}, got none for {name!r}. {advice}")
    truth_file = class_files(truth)[name]
    p, t, names, grid = load_pair(file, truth_file, options)
    for path, array in ((file, p), (truth_file, t)):
        values = {*np.unique(array).tolist()} - {0} if array.dtype.kind != "f" else ()
        if len(values) > 1:
            raise ScoreError(f"{path}: expected a mask of one class, got the labels {_list(sorted(values))}.")
    return Loaded(p if p.dtype.kind == "f" else p != 0, t != 0, names, grid)


class Loaded(NamedTuple):
    """A pair on one grid: labels (or probabilities) and labels, names of labels in both, the image of the truth."""

    p: np.ndarray
    t: np.ndarray
    names: tuple[dict[int, str], dict[int, str]]
    grid: Image


def load_pair(prediction: Path | None, truth: Path, options: Options) -> Loaded:
    """two files -> labels (or, for soft scores, probabilities) and labels on one grid."""
    truth_image = read_image(truth)
    prediction_image = None if prediction is None else read_image(prediction)
    if prediction_image is not None:
        truth_image = extended(truth_image, prediction_image)
        prediction_image = extended(prediction_image, truth_image)
    t = labels(truth, truth_image, rounded=options.round, advice="Give LABELS as label maps.")
    probable = options.soft or options.threshold is not None
    if prediction is None or prediction_image is None:
        if probable:
            _one_class(truth, t, options)
        p = np.zeros_like(t, np.float32 if options.soft else np.uint8)
        return Loaded(p, t, ({}, truth_image.names), truth_image)
    if probable:
        option = "--soft" if options.soft else "--threshold"
        p = probabilities(prediction, prediction_image, scale=options.scale, option=option)
    else:
        advice = "For probabilities pass --threshold 0.5 or --soft."
        p = labels(prediction, prediction_image, rounded=options.round, advice=advice)
        seen: dict[int, tuple[str, str]] = {}
        for path, image in ((truth, truth_image), (prediction, prediction_image)):
            one_palette(path, colours(image), seen)
    p = _on_grid(prediction, prediction_image, p, truth, truth_image, options)
    if probable:
        _one_class(truth, t, options)
    if options.threshold is not None:
        p = np.where(np.greater(p, options.threshold), np.int32(_class_labels(options)[0]), np.int32(0))
    return Loaded(p, t, (prediction_image.names, truth_image.names), truth_image)


def _voxel_ml(image: Image) -> float:
    """The volume of a voxel, where the file has lengths."""
    sizes = image.spacing_mm
    return math.nan if sizes is None or image.spatial_ndim != 3 else math.prod(sizes) / 1000


def region_mask(array: np.ndarray, key: int | str, options: Options) -> np.ndarray:
    """labels, a class -> bool mask of it."""
    if options.instances:
        return array != 0
    return np.isin(array, (options.regions or {}).get(str(key), (key,)) if isinstance(key, str) else (key,))


def _class_labels(options: Options) -> tuple[int, ...]:
    """The labels of the one class that probabilities are about."""
    if options.regions is not None:
        return next(iter(options.regions.values()))
    return options.labels if options.labels is not None else (1,)


def _one_class(truth: Path, t: np.ndarray, options: Options) -> None:
    inside, given = _class_labels(options), options.labels is not None or options.regions is not None
    if given or t.dtype.kind == "b":
        return
    present = [int(label) for label in np.unique(t) if label not in (0, *inside, *options.ignore)]
    if present:
        advice = "Say with --labels or --regions what the probabilities are about."
        raise ScoreError(f"{truth}: expected labels 0 and {inside[0]}, got {_list(present)} too. {advice}")


def _on_grid(
    prediction: Path, prediction_image: Image, p: np.ndarray, truth: Path, truth_image: Image, options: Options
) -> np.ndarray:
    """The prediction on the grid of the truth."""
    a, b, shape = prediction_image.affine, truth_image.affine, truth_image.shape
    long = p.reshape([n for n in p.shape if n != 1])
    if options.transpose:
        if long.ndim not in (2, 3):
            raise ScoreError(f"{prediction}: --transpose: expected an image of 2 or 3 axes, got shape {p.shape}.")
        p = long.T
    placed = one_frame(prediction_image, truth_image) and p.ndim <= 3 and len(shape) <= 3
    if options.resample and placed and a is not None and b is not None:
        if same_place(prediction_image, truth_image):
            return p.reshape(shape)
        check_inverse(prediction, prediction_image, truth, truth_image)
        if not overlap(prediction_image, truth_image):
            raise ScoreError(f"{prediction}: --resample: expected {apart(truth, p.shape == shape)}")
        return resampled(p, a, b, shape)
    if not one_shape(p.shape, shape):
        hint = " --resample brings it to the grid of the label." if placed else ""
        if not placed and reversed_shape(p.shape, shape):
            hint = " --transpose swaps its axes."
        if long.ndim == len(shape) + 1:  # nnU-Net's .npz, for one
            hint = " Of probabilities of several classes save the argmax, or one file per class."
        for path, image in ((prediction, prediction_image), (truth, truth_image)):
            if image.place.partial and not placed:
                hint = f" {path.name} leaves out what holds nothing: export it on the whole grid of its image."
        raise ScoreError(f"{prediction}: expected shape {shape} as in {truth.name}, got {p.shape}.{hint}")
    if not (options.ignore_geometry or options.transpose):
        advice = "--resample brings the prediction to the grid of the label, --ignore-geometry compares as is."
        transpose = "Pass --transpose, which reverses the axes of the prediction."
        check_same_place(prediction, prediction_image, truth, truth_image, advice=advice, transpose=transpose)
    return p.reshape(shape)


def resampled(p: np.ndarray, from_affine: np.ndarray, to_affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Nearest voxel for labels, linear for probabilities; 0 outside the prediction, which its outermost voxels fill."""
    from scipy.ndimage import affine_transform

    if p.ndim < 3 or len(shape) < 3:
        volumes = [(*each, *[1] * (3 - len(each))) for each in (p.shape, shape)]
        return resampled(p.reshape(volumes[0]), from_affine, to_affine, volumes[1]).reshape(shape)
    matrix = np.round(np.linalg.inv(from_affine) @ to_affine, 9)  # an exact flip stays exact
    source = p.astype(np.uint8) if p.dtype.kind == "b" else p
    if p.dtype.kind != "f":
        return np.asarray(affine_transform(source, matrix, output_shape=shape, order=0, mode="grid-constant"))
    values = affine_transform(source, matrix, output_shape=shape, order=1, mode="nearest")
    inside = affine_transform(np.ones(p.shape, np.uint8), matrix, output_shape=shape, order=0, mode="grid-constant")
    return np.where(inside, values, values.dtype.type(0))


def _label_counts(
    p: np.ndarray, t: np.ndarray, n: np.ndarray, options: Options
) -> tuple[tuple[int | str, ...], np.ndarray, int]:
    """Pairs of labels that count and how often each occurs -> classes, their counts, and voxels that were counted."""
    if options.regions is not None:
        counts = np.zeros((3, len(options.regions)), np.int64)
        for column, inside in enumerate(options.regions.values()):
            in_p, in_t = np.isin(p, inside), np.isin(t, inside)
            counts[:, column] = n[in_p & in_t].sum(), n[in_p].sum(), n[in_t].sum()
        return tuple(options.regions), counts, int(n.sum())
    every = np.unique(np.concatenate([p, t]))
    summed = np.zeros((3, len(every)), np.int64)
    position_p, position_t, same = np.searchsorted(every, p), np.searchsorted(every, t), p == t
    for row, position, times in zip(summed, (position_p[same], position_p, position_t), (n[same], n, n), strict=True):
        np.add.at(row, position, times)
    labels = options.labels if options.threshold is None else _class_labels(options)
    found = dict(zip(every.tolist(), summed.T, strict=True))
    if labels is None:
        labels = tuple(label for label in found if label != 0 or options.include_background)
    labels = tuple(label for label in labels if label not in options.ignore)  # ignored: not a class that is scored
    counts = np.zeros((3, len(labels)), np.int64)
    for column, label in enumerate(labels):
        if label in found:
            counts[:, column] = found[label]
    return labels, counts, int(n.sum())


def _soft_counts(p: np.ndarray, t: np.ndarray, options: Options) -> tuple[tuple[int | str, ...], np.ndarray, int]:
    """Probabilities and labels -> the one class, its sums, added in float64, and voxels that were counted."""
    inside, total, voxels = _class_labels(options), np.zeros(3), 0
    if p.flags.f_contiguous and t.flags.f_contiguous:
        p, t = p.T, t.T  # as NIfTI files are read: flat without a copy
    flat_p, flat_t = p.reshape(-1), t.reshape(-1)
    for start in range(0, p.size, CHUNK):
        piece_p, piece_t = flat_p[start : start + CHUNK].astype(np.float64), flat_t[start : start + CHUNK]
        counted = ~np.isin(piece_t, options.ignore)
        mask = np.isin(piece_t, inside) & counted
        total += piece_p[mask].sum(), piece_p[counted].sum(), mask.sum()
        voxels += int(counted.sum())
    key = next(iter(options.regions)) if options.regions is not None else inside[0]
    return (key,), total[:, None], voxels


def _list(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:8])) + (" ..." if len(labels) > 8 else "")
