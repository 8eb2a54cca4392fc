"""a pair of files -> counts per class."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softdice.images.files import Image, read_image
from softdice.images.geometry import check_same_place, one_shape, same_place
from softdice.images.labels import colours, labels, one_palette, probabilities
from softdice.metrics.counting import CHUNK, pair_counts
from softdice.scoring.classes import Options, ScoreError


@dataclass(frozen=True)
class Case:
    """One pair, compared: per class the voxels of both, of the prediction and of the truth.

    `keys` are labels, or names of regions; `counts` is (3, keys) int64, float64 sums of probabilities for soft
    predictions. Where there was an error nothing was counted. `colours` are those of the labels where the
    truth has a palette.
    """

    case: str
    prediction: str = ""
    truth: str = ""
    keys: tuple[int | str, ...] = ()
    counts: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int64))
    voxels: int = 0
    names: dict[int, str] = field(default_factory=dict)
    colours: dict[int, str] = field(default_factory=dict)
    error: str = ""


def score_pair(prediction: Path, truth: Path, options: Options, case: str = "") -> Case:
    """prediction file, truth file -> Case.

    Raises:
        FileError: a file cannot be read. ScoreError: the two cannot be compared.
    """
    p, t, prediction_image, truth_image = load_pair(prediction, truth, options)
    if p.dtype.kind == "f":
        keys, counts, voxels = _soft_counts(p, t, options)
    else:
        keys, counts, voxels = _label_counts(*pair_counts(p, t), options)
    names = {**prediction_image.names, **truth_image.names}
    return Case(case or truth.name, str(prediction), str(truth), keys, counts, voxels, names, colours(truth_image))


def load_pair(prediction: Path, truth: Path, options: Options) -> tuple[np.ndarray, np.ndarray, Image, Image]:
    """two files -> labels (or, for soft scores, probabilities) and labels on one grid, and what was read."""
    prediction_image, truth_image = read_image(prediction), read_image(truth)
    t = labels(truth, truth_image, rounded=options.round, advice="Give LABELS as label maps.")
    if options.soft or options.threshold is not None:
        option = "--soft" if options.soft else "--threshold"
        p = probabilities(prediction, prediction_image, scale=options.scale, option=option)
    else:
        advice = "For probabilities pass --threshold 0.5 or --soft."
        p = labels(prediction, prediction_image, rounded=options.round, advice=advice)
        seen: dict[int, tuple[str, str]] = {}
        for path, image in ((truth, truth_image), (prediction, prediction_image)):
            one_palette(path, colours(image), seen)
    p = _on_grid(prediction, prediction_image, p, truth, truth_image, options)
    if options.threshold is not None:
        _one_class(truth, t, options)
        p = np.where(p > options.threshold, np.int32(_class_labels(options)[0]), np.int32(0))
    elif options.soft:
        _one_class(truth, t, options)
    elif options.labels is None and options.regions is None:
        _same_scale(prediction, p, truth, t)
    return p, t, prediction_image, truth_image


def region_mask(array: np.ndarray, key: int | str, options: Options) -> np.ndarray:
    """labels, a class -> bool mask of it."""
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


def _same_scale(prediction: Path, p: np.ndarray, truth: Path, t: np.ndarray) -> None:
    """A mask of 0 and 1 against one of 0 and 255 is a mistake that would score 0."""
    tops = [0 if array.size == 0 else int(array.max()) for array in (p, t)]
    if sorted(tops) != [1, 255] or any(array.min() < 0 for array in (p, t)):
        return
    large = (p, t)[tops.index(255)]
    if not ((large == 0) | (large == 255)).all():
        return
    advice = "If both mean the same, pass --regions 'mask=1,255'; if not, name the --labels."
    raise ScoreError(f"{prediction}: holds 0 and {tops[0]}, but {truth.name} holds 0 and {tops[1]}. {advice}")


def _on_grid(
    prediction: Path, prediction_image: Image, p: np.ndarray, truth: Path, truth_image: Image, options: Options
) -> np.ndarray:
    """The prediction on the grid of the truth."""
    a, b, shape = prediction_image.affine, truth_image.affine, truth_image.shape
    if options.resample and a is not None and b is not None and p.ndim == len(shape) == 3:
        return p.reshape(shape) if same_place(prediction_image, truth_image) else _resampled(p, a, b, shape)
    if not one_shape(p.shape, shape):
        hint = (
            " --resample brings it to the grid of the label." if a is not None and b is not None and p.ndim == 3 else ""
        )
        if p.ndim == len(shape) + 1:  # nnU-Net's .npz, for one
            hint = " Of probabilities of several classes save the argmax, or one file per class."
        raise ScoreError(f"{prediction}: expected shape {shape} as in {truth.name}, got {p.shape}.{hint}")
    if not options.ignore_geometry:
        advice = "--resample brings the prediction to the grid of the label, --ignore-geometry compares as is."
        check_same_place(prediction, prediction_image, truth, truth_image, advice=advice)
    return p.reshape(shape)


def _resampled(p: np.ndarray, from_affine: np.ndarray, to_affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Nearest voxel for labels, linear for probabilities; 0 outside the prediction."""
    from scipy.ndimage import affine_transform

    try:
        matrix = np.linalg.inv(from_affine) @ to_affine
    except np.linalg.LinAlgError:
        raise ScoreError("--resample: expected an affine that can be inverted, got a singular one.") from None
    matrix = np.round(matrix, 9)  # an exact flip stays exact
    order = 1 if p.dtype.kind == "f" else 0
    source = p.astype(np.uint8) if p.dtype.kind == "b" else p
    return np.asarray(affine_transform(source, matrix, output_shape=shape, order=order, mode="grid-constant"))


def _label_counts(
    p: np.ndarray, t: np.ndarray, n: np.ndarray, options: Options
) -> tuple[tuple[int | str, ...], np.ndarray, int]:
    """Pairs of labels and how often each occurs -> classes, their counts, and voxels that were counted."""
    counted = ~np.isin(t, options.ignore)
    p, t, n = p[counted], t[counted], n[counted]
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
