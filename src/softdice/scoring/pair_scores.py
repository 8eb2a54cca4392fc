"""A pair of files, or of folders with a file per class -> counts of voxels per class, and the scores that need masks.

`prediction` and `truth` are the two files, p and t their arrays (*S) on one grid, bool or integer labels; a float p
holds probabilities (--soft). `grid` is the reference's image, for the size of a voxel. K is a class, M a column of
`Options.measured`. A pair of labels is one of p and one of t at the same voxel: `labels_p` and `labels_t` are the pairs
that occur, `times` how often, (n,) integers each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from softdice.evaluation.labels import ScoreError
from softdice.images.files import Image, stored
from softdice.images.labels import colours
from softdice.metrics.counting import CHUNK, pair_counts
from softdice.scoring.options import OBJECTS, Options
from softdice.scoring.pair_loading import class_files, class_labels, load_class, load_pair
from softdice.scoring.plausibility import check_grey, check_names, check_scales, renumbered, unnamed, voxels_of
from softdice.scoring.shapes import mask_scores, shape_scores


@dataclass(frozen=True)
class Case:
    """One scored pair; with an `error` nothing was counted.

    Args:
        keys: the classes, labels or names of regions.
        counts: voxels of each class in both maps, in the prediction, and in the reference, (3, K) int64; sums of
            probabilities, float64, for soft predictions.
        voxels: how many voxels were counted.
        names: names of labels that the files hold.
        voxel_ml: volume of a voxel, nan where the file does not say.
        unnamed: labels of the reference that no option names, with their voxels.
        colours: colours of its labels where it has a palette.
        measured: scores that need masks, (M, K), the columns of `Options.measured`.
        renumbered: whether most labels of the reference have another number in the prediction, as objects would.
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
    """Score a prediction file against a reference file; None stands for a prediction without any voxel of any class.

    `case` is its name in tables, by default the reference's. Raise FileError if a file cannot be read, ScoreError if
    grids or labels of the two say that they cannot be compared.
    """
    p, t, names, grid = load_pair(prediction, truth, options)
    unscored = _unscored(prediction, truth, case, grid)
    if options.instances:
        return _score_objects(unscored, prediction or truth, p, truth, t, grid, options)
    soft = p.dtype.kind == "f"
    labels_p, labels_t, times = pair_counts(t if soft else p, t)  # probabilities have no labels: those of t alone
    counted = ~np.isin(labels_t, options.ignore)
    labels_p, labels_t, times = labels_p[counted], labels_t[counted], times[counted]
    voxels_p, voxels_t = voxels_of(labels_p, times), voxels_of(labels_t, times)
    # refuse files whose labels cannot mean the same
    if prediction is not None and not soft:
        check_names(prediction, names[0], truth, names[1], {*voxels_p, *voxels_t}, options)
        check_scales(prediction, voxels_p, truth, voxels_t, options)
        check_grey(prediction, p, voxels_p, voxels_t, options)
    check_grey(truth, t, voxels_t, voxels_p, options)
    if soft:
        keys, counts, voxels = _soft_counts(p, t, options)
    else:
        keys, counts, voxels = _label_counts(labels_p, labels_t, times, options)
    names_of_files = {**names[0], **names[1]}
    return replace(
        unscored,
        keys=keys,
        counts=counts,
        voxels=voxels,
        names=names_of_files,
        unnamed=unnamed(voxels_t, options),
        colours=colours(grid),
        measured=shape_scores(prediction or truth, p, t, grid, keys, {**names_of_files, **options.names}, options),
        renumbered=not soft and renumbered(labels_p, labels_t, times, options),
    )


def _unscored(prediction: Path | None, truth: Path, case: str, grid: Image | None) -> Case:
    """Return a case with its files and the volume of a voxel in ml, and no scores yet.

    The volume is nan where the file does not say how large a voxel is, or is no volume, and without a grid.
    """
    sizes_mm = grid.spacing_mm if grid is not None and grid.spatial_ndim == 3 else None
    voxel_ml = math.nan if sizes_mm is None else math.prod(sizes_mm) / 1000
    return Case(case or truth.name, str(prediction or ""), str(truth), voxel_ml=voxel_ml)


def _score_objects(
    unscored: Case, path: Path, p: np.ndarray, truth: Path, t: np.ndarray, grid: Image, options: Options
) -> Case:
    """Return the case with the scores of maps in which each number is an object, as one class that holds all objects.

    Raise ScoreError for a number below 0 that is not ignored, and for annotations of COCO, whose numbers are
    categories. `path` is the prediction's file, for messages; the reference's where it has none.
    """
    for file, array in ((path, p), (truth, t)):
        if stored(file) != file:
            advice = "Draw each with a number of its own, in one map per image, such as by pycocotools' annToMask."
            raise ScoreError(f"{file}: --instances: expected a map of objects, got annotations by category. {advice}")
        lowest = array.min(initial=0, where=~np.isin(array, options.ignore))
        if lowest < 0:
            advice = "Name it with --ignore where it marks voxels that nobody annotated."
            raise ScoreError(f"{file}: --instances: expected objects numbered from 1 on, got {lowest}. {advice}")
    voxels = t.size
    if options.ignore:
        counted = ~np.isin(t, options.ignore)
        p, t = np.where(counted, p, p.dtype.type(0)), np.where(counted, t, t.dtype.type(0))
        voxels = int(counted.sum())
    in_p, in_t = p != 0, t != 0
    counts_31 = np.array([[(in_p & in_t).sum()], [in_p.sum()], [in_t.sum()]])
    measured_M1 = shape_scores(path, p, t, grid, (OBJECTS,), {}, options)
    return replace(unscored, keys=(OBJECTS,), counts=counts_31, voxels=voxels, measured=measured_M1)


def score_classes(prediction: Path | None, truth: Path, options: Options, case: str = "") -> Case:
    """Score a folder of masks, a file for each class, against another; the classes are the reference's file names.

    Args:
        prediction: None scores an empty prediction. case: its name in tables, by default the folder's.

    Raises:
        FileError: a file cannot be read. ScoreError: a file is no mask, has no partner where `options.missing` is
            "skip", or has another grid than the files before it.
    """
    files = class_files(truth)
    counts_3K, voxels, grid = np.zeros((3, len(files)), np.float64 if options.soft else np.int64), 0, None
    measured_MK, grids = np.zeros((len(options.measured), len(files))), set[tuple[tuple[int, ...], bytes]]()
    for k, name in enumerate(files):
        p, t, _, grid = load_class(prediction, truth, name, options)
        grids.add((grid.shape, np.round(grid.spacing_mm or (), 6).tobytes()))
        if len(grids) > 1:
            advice = "Save all masks of a case on one grid."
            raise ScoreError(f"{files[name]}: expected the grid of the other classes of {truth}, got another. {advice}")
        if options.soft:
            _, counts_31, voxels = _soft_counts(p, t, options)
            counts_3K[:, k] = counts_31[:, 0]
        else:
            counts_3K[:, k] = (p & t).sum(), p.sum(), t.sum()
            voxels = t.size
        if options.measured:
            measured_MK[:, [k]] = mask_scores(files[name], p, t, grid, name, options)
    unscored = _unscored(prediction, truth, case, grid)
    return replace(unscored, keys=tuple(files), counts=counts_3K, voxels=voxels, measured=measured_MK)


Counts = tuple[tuple[int | str, ...], np.ndarray, int]
"""Classes, their `Case.counts` (3, K), and how many voxels were counted."""


def _label_counts(labels_p: np.ndarray, labels_t: np.ndarray, times: np.ndarray, options: Options) -> Counts:
    """Count the voxels of each class from pairs of labels; the caller has removed pairs with an ignored label.

    Return the classes, the voxels in both maps, in p and in t, (3, K) int64, and the number of all voxels.
    """
    if options.regions is not None:
        counts = np.zeros((3, len(options.regions)), np.int64)
        for k, region in enumerate(options.regions.values()):
            in_p, in_t = np.isin(labels_p, region), np.isin(labels_t, region)
            counts[:, k] = times[in_p & in_t].sum(), times[in_p].sum(), times[in_t].sum()
        return tuple(options.regions), counts, int(times.sum())
    same = labels_p == labels_t
    voxels_both, voxels_p, voxels_t = (
        voxels_of(*pair) for pair in ((labels_p[same], times[same]), (labels_p, times), (labels_t, times))
    )
    labels = options.labels if options.threshold is None else class_labels(options)  # --threshold: of one class
    if labels is None:
        labels = tuple(label for label in sorted({*voxels_p, *voxels_t}) if label != 0 or options.include_background)
    labels = tuple(label for label in labels if label not in options.ignore)
    rows = [[voxels.get(label, 0) for label in labels] for voxels in (voxels_both, voxels_p, voxels_t)]
    return labels, np.array(rows, np.int64).reshape(3, len(labels)), int(times.sum())


def _soft_counts(p: np.ndarray, t: np.ndarray, options: Options) -> Counts:
    """Return the one class, its counts (3, 1) float64, and the number of voxels, without ignored labels in t.

    The counts are the sum of p where t has the class, the sum of all p, and the number of voxels of the class in t.
    Sums are float64, chunk by chunk: no float64 copy of p exists.
    """
    region, total, voxels = class_labels(options), np.zeros(3), 0
    if p.flags.f_contiguous and t.flags.f_contiguous:
        p, t = p.T, t.T  # NIfTI files are read in this order; the transposed arrays become flat without a copy
    flat_p, flat_t = p.reshape(-1), t.reshape(-1)
    for start in range(0, p.size, CHUNK):
        chunk_p, chunk_t = flat_p[start : start + CHUNK].astype(np.float64), flat_t[start : start + CHUNK]
        counted = ~np.isin(chunk_t, options.ignore)
        mask = np.isin(chunk_t, region) & counted
        total += chunk_p[mask].sum(), chunk_p[counted].sum(), mask.sum()
        voxels += int(counted.sum())
    key = next(iter(options.regions)) if options.regions is not None else region[0]
    return (key,), total[:, None], voxels
