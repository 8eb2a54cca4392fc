"""a pair of files -> counts per class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softdice.images.files import Image, label_names, list_images, read_image
from softdice.metrics.counting import CHUNK, pair_counts
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.doubts import check_grey, check_names, check_scales, unnamed, voxels_of

SAME_PLACE_VOXELS = 0.05
"""Two grids are the same when no corner of the volume lies further apart than this share of a voxel."""


@dataclass(frozen=True)
class Case:
    """One pair, compared: per class the voxels of both, of the prediction and of the truth.

    `keys` are labels, or names of regions; `counts` is (3, keys) int64, float64 sums of probabilities for soft
    predictions. `voxel_ml` is the volume of a voxel, nan where the file does not say. `unnamed` are labels of the truth
    that no option names, with their voxels. Where there was an error nothing was counted.
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


def score_pair(prediction: Path | None, truth: Path, options: Options, case: str = "") -> Case:
    """prediction file, truth file -> Case; None for a prediction without any voxel of any class.

    Raises:
        FileError: a file cannot be read. ScoreError: the two cannot be compared.
    """
    p, t, names, grid = load_pair(prediction, truth, options)
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
    )


def score_classes(prediction: Path | None, truth: Path, options: Options, case: str = "") -> Case:
    """two folders of masks -> Case, whose classes are the names of the files that the truth has.

    Raises:
        FileError: a file cannot be read. ScoreError: one is no mask, or has no partner.
    """
    files = class_files(truth)
    counts, voxels, grid = np.zeros((3, len(files)), np.float64 if options.soft else np.int64), 0, None
    for column, name in enumerate(files):
        p, t, _, grid = load_class(prediction, truth, name, options)
        if options.soft:
            _, one, voxels = _soft_counts(p, t, options)
            counts[:, column] = one[:, 0]
        else:
            counts[:, column] = (p & t).sum(), p.sum(), t.sum()
            voxels = t.size
    ml = math.nan if grid is None else _voxel_ml(grid)
    named = "" if prediction is None else str(prediction)
    return Case(case or truth.name, named, str(truth), tuple(files), counts, voxels, voxel_ml=ml)


def class_files(folder: Path) -> dict[str, Path]:
    """folder -> {class: its mask}: the files of the type that most have, so that a picture beside the masks is none."""
    files = list_images(folder)
    types = [path.name.lower().removesuffix(".gz").rpartition(".")[2] for path in files.values()]
    most = max(types, key=types.count, default="")
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
    t = _labels(truth, _one_channel(truth, truth_image))
    if t.dtype.kind == "f":
        raise ScoreError(f"{truth}: expected labels, got values that are not whole. Give LABELS as label maps.")
    probable = options.soft or options.threshold is not None
    if prediction is None:
        if probable:
            _one_class(truth, t, options)
        p = np.zeros_like(t, np.float32 if options.soft else np.uint8)
        return Loaded(p, t, ({}, label_names(truth_image)), truth_image)
    prediction_image = read_image(prediction)
    names = label_names(prediction_image), label_names(truth_image)
    p = _one_channel(prediction, prediction_image)
    if probable:
        p = _probabilities(prediction, p, options)
    else:
        p = _labels(prediction, p)
        if p.dtype.kind == "f":
            advice = "For probabilities pass --threshold 0.5 or --soft."
            raise ScoreError(f"{prediction}: expected labels, got values that are not whole. {advice}")
    p = _on_grid(prediction, prediction_image, p, truth, truth_image, options)
    if probable:
        _one_class(truth, t, options)
    if options.threshold is not None:
        p = np.where(np.greater(p, options.threshold), np.int32(_class_labels(options)[0]), np.int32(0))
    return Loaded(p, t, names, truth_image)


def _voxel_ml(image: Image) -> float:
    """The volume of a voxel, where the file has lengths."""
    if image.affine is None or image.spatial_ndim != 3:
        return math.nan
    unit = getattr(image.header, "get_xyzt_units", lambda: ("mm", ""))()[0]
    return float(np.prod(image.spacing)) * {"meter": 1e9, "micron": 1e-9}.get(unit, 1.0) / 1000


def region_mask(array: np.ndarray, key: int | str, options: Options) -> np.ndarray:
    """labels, a class -> bool mask of it."""
    return np.isin(array, (options.regions or {}).get(str(key), (key,)) if isinstance(key, str) else (key,))


def _one_channel(path: Path, image: Image) -> np.ndarray:
    if image.suffix in (".jpg", ".jpeg"):
        raise ScoreError(f"{path}: expected labels, got a JPEG, which changes them. Save masks as PNG.")
    array = image.array
    if array.ndim > image.spatial_ndim:
        channels = range(1, array.shape[-1])
        if image.affine is not None or any((array[..., 0] != array[..., i]).any() for i in channels):
            advice = "Save the argmax of probabilities, or one file per class." if array.dtype.kind == "f" else ""
            raise ScoreError(f"{path}: expected one label per voxel, got {array.shape[-1]} channels. {advice}".rstrip())
        array = array[..., 0]  # grey that was saved as colour
    return array


def _labels(path: Path, array: np.ndarray) -> np.ndarray:
    """Floats that are all whole -> the smallest integers that hold them; anything else as it is."""
    if array.dtype.kind != "f":
        return array
    if not np.isfinite(array).all():
        raise ScoreError(f"{path}: expected numbers, got nan or infinity.")
    if not (array == np.rint(array)).all():
        return array
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.int16, np.int32, np.int64):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise ScoreError(f"{path}: expected labels, got values from {low} to {high}.")


def _probabilities(path: Path, array: np.ndarray, options: Options) -> np.ndarray:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ScoreError(f"{path}: expected numbers, got nan or infinity.")
    if options.soft and (array.min() < 0 or array.max() > 1):
        raise ScoreError(f"{path}: --soft: expected probabilities in [0, 1], got {array.min()} to {array.max()}.")
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


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
    if options.transpose:
        if p.ndim != 2:
            raise ScoreError(f"{prediction}: --transpose: expected an image of 2 axes, got shape {p.shape}.")
        p = p.T
    by_position = options.ignore_geometry or options.transpose
    placed = [is_placed(image) for image in (prediction_image, truth_image)]
    if options.resample and a is not None and b is not None and all(placed) and p.ndim == len(shape) == 3:
        if _same_place(a, b, p.shape, shape):
            return p
        if not _overlap(a, b, p.shape, shape):
            raise ScoreError(f"{prediction}: --resample: expected {_apart(truth, p.shape == shape)}")
        return _resampled(p, a, b, shape)
    if p.shape != shape:
        hint = " --resample brings it to the grid of the label." if all(placed) and p.ndim == 3 else ""
        if p.ndim == 2 and p.T.shape == shape:
            hint = " --transpose swaps its axes."
        if p.ndim == len(shape) + 1:  # nnU-Net's .npz, for one
            hint = " Of probabilities of several classes save the argmax, or one file per class."
        raise ScoreError(f"{prediction}: expected shape {shape} as in {truth.name}, got {p.shape}.{hint}")
    if by_position or (a is None and b is None):
        return p
    if a is not None and b is not None and _same_place(a, b, p.shape, shape):
        return p
    if placed[0] != placed[1] or a is None or b is None:
        known = prediction if placed[0] else truth
        or_else = ", --transpose if the rows of one are the columns of the other" if p.ndim == 2 else ""
        advice = f"Pass --ignore-geometry if their axes agree{or_else}."
        raise ScoreError(f"{prediction}: only {known.name} says how its voxels lie in space. {advice}")
    if not _overlap(a, b, p.shape, shape):
        raise ScoreError(f"{prediction}: expected {_apart(truth, True)}")
    advice = "--resample brings the prediction to the grid of the label, --ignore-geometry compares as is."
    got = f"{_axes(a)} voxels elsewhere than the {_axes(b)} voxels of {truth.name}"
    raise ScoreError(f"{prediction}: expected the same orientation and affine, got {got}. {advice}")


def _apart(truth: Path, same_shape: bool) -> str:
    advice = "Was its affine lost? Then --ignore-geometry compares as is." if same_shape else "Check the affines."
    return f"a grid that overlaps that of {truth.name} in space, got one beside it. {advice}"


def is_placed(image: Image) -> bool:
    """Whether the file says where its voxels lie; NIfTI with neither sform nor qform does not."""
    header: Any = image.header
    codes = [header[name] for name in ("sform_code", "qform_code") if name in getattr(header, "keys", tuple)()]
    return image.affine is not None and (not codes or any(code > 0 for code in codes))


def _overlap(a: np.ndarray, b: np.ndarray, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> bool:
    """Whether the boxes around both grids share a place, seen along the axes of either."""
    for one, other, shape, others in ((a, b, shape_a, shape_b), (b, a, shape_b, shape_a)):
        within = (_inverse(one) @ other @ _corners(others, 0.5).T)[:3]
        size = [*shape[:3], *[1] * (3 - len(shape))]
        if any(high < -0.5 or low > n - 0.5 for low, high, n in zip(within.min(1), within.max(1), size, strict=True)):
            return False
    return True


def _inverse(affine: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.inv(affine)
    except np.linalg.LinAlgError:
        raise ScoreError("--resample: expected an affine that can be inverted, got a singular one.") from None


def _corners(shape: tuple[int, ...], margin: float = 0.0) -> np.ndarray:
    """Voxel coordinates of the eight outermost centres, or so far beyond them, (8, 4)."""
    ends = [(-margin, n - 1 + margin) for n in (*shape[:3], *[1] * (3 - min(3, len(shape))))]
    return np.array([[*corner, 1] for corner in product(*ends)])


def _same_place(a: np.ndarray, b: np.ndarray, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> bool:
    if shape_a != shape_b:
        return False
    apart = np.linalg.norm(((a - b) @ _corners(shape_a).T)[:3], axis=0).max()
    return bool(apart <= SAME_PLACE_VOXELS * np.linalg.norm(b[:3, :3], axis=0).min())


def _axes(affine: np.ndarray) -> str:
    """affine -> "RAS", "LPS" ...: where the first, second and third axis point."""
    return "".join(("LR", "PA", "IS")[world][int(sign > 0)] for world, sign in voxel_axes(affine))


def voxel_axes(affine: np.ndarray) -> list[tuple[int, int]]:
    """affine -> per voxel axis the axis of the patient (0 right, 1 front, 2 head) that it runs along most, and 1 or -1.

    Example:
        >>> voxel_axes(np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
        [(1, -1), (2, 1), (0, 1)]
    """
    columns = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    along, left = [(0, 1)] * 3, np.abs(columns)
    for _ in range(3):  # the clearest first, so that no two run along the same
        world, voxel = divmod(int(left.argmax()), 3)
        along[voxel] = world, 1 if columns[world, voxel] >= 0 else -1
        left[world], left[:, voxel] = -1, -1
    return along


def _resampled(p: np.ndarray, from_affine: np.ndarray, to_affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Nearest voxel for labels, linear for probabilities; 0 outside the prediction, which its outermost voxels fill."""
    from scipy.ndimage import affine_transform

    matrix = np.round(_inverse(from_affine) @ to_affine, 9)  # an exact flip stays exact
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
