"""Checks whether the labels of a pair can mean the same, and whether files that should hold labels do.

A label that an option names is never doubted. In the whole module `prediction` and `truth` are the two files, for
messages; p stands for the prediction and t for the reference. `labels_p` and `labels_t` are the pairs of labels that
occur at one voxel and `times` how often, (n,) integers each; `voxels_p` and `voxels_t` are label -> number of voxels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softdice.evaluation.labels import ScoreError
from softdice.scoring.options import Options

_LARGEST_CLASS = 9
"""Largest number that is still taken for the number of a class, where grey values may stand for classes."""
_SMALLEST_GREY = 32
"""Smallest step between grey values that stand for classes."""

_FEW = 5
"""From this many labels on, labels without a counterpart are no accident."""
_MANY = 32
"""With more labels than this an array is looked at: it may be an image."""
_SPECKS = 0.02
"""Share of the labelled voxels below which labels without a counterpart are specks of a class that is missing."""

_SAMPLES = 1 << 20
"""Voxels that are compared with their neighbours."""


def voxels_of(labels: np.ndarray, times: np.ndarray) -> dict[int, int]:
    """Return the voxels of each label, ascending, by labels (n,) that stand for `times` (n,) voxels each."""
    distinct, position = np.unique(labels, return_inverse=True)
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, position, times)
    return dict(zip(distinct.tolist(), totals.tolist(), strict=True))


def unnamed(voxels_t: dict[int, int], options: Options) -> dict[int, int]:
    """Return the labels of the reference but 0 that no option names, and their voxels; {} if options name no label."""
    known = named(options)
    return {label: voxels for label, voxels in voxels_t.items() if label not in known and label != 0} if known else {}


def renumbered(labels_p: np.ndarray, labels_t: np.ndarray, times: np.ndarray, options: Options) -> bool:
    """Return whether most labels of the reference have another number in the prediction, as objects do.

    A label is renumbered if its region overlaps the region of another number in the prediction with an IoU above 1/2.
    Fewer than `_FEW` such labels may be an accident: return False. Return False, too, where options name labels.
    """
    classes = {*labels_t[labels_t != 0].tolist()}
    if len(classes) < _FEW or options.labels is not None or options.regions is not None:
        return False
    voxels_p, voxels_t = voxels_of(labels_p, times), voxels_of(labels_t, times)
    moved = sum(
        p != t and p != 0 and t != 0 and 3 * both > voxels_p[p] + voxels_t[t]  # both / (p + t - both) > 1/2
        for p, t, both in zip(labels_p.tolist(), labels_t.tolist(), times.tolist(), strict=True)
    )
    return moved >= _FEW and 2 * moved > len(classes)


def named(options: Options) -> set[int]:
    """Return the labels that options mention."""
    regions = [label for labels in (options.regions or {}).values() for label in labels]
    return {*regions, *(options.labels or ()), *(options.ignore if regions or options.labels else ()), *options.names}


def check_names(
    prediction: Path, names_p: dict[int, str], truth: Path, names_t: dict[int, str], labels: set[int], options: Options
) -> None:
    """Raise ScoreError if one of the `labels` that occur has different names in the two files, spelling aside.

    `names_p` and `names_t` are label -> name, from the files. Where options say which labels are meant, names are not
    compared.
    """
    if options.labels is not None or options.regions is not None:
        return
    for label in sorted(labels & {*names_p} & {*names_t} - {0, *options.ignore}):
        name_p, name_t = names_p[label], names_t[label]
        if _letters(name_p) != _letters(name_t):
            advice = "Bring both to one table of labels; if the numbers agree, name the --labels."
            raise ScoreError(f"{prediction}: label {label} is {name_p!r}, but {name_t!r} in {truth.name}. {advice}")


def _letters(name: str) -> str:
    """Return the letters and digits of a name, without case, to compare spellings."""
    return "".join(filter(str.isalnum, name.casefold()))


def check_scales(
    prediction: Path, voxels_p: dict[int, int], truth: Path, voxels_t: dict[int, int], options: Options
) -> None:
    """Raise ScoreError if one map numbers its classes and the other has grey values for them: all scores would be 0.

    That is the case if one map has labels from 1 to `_LARGEST_CLASS`, and the other, with no label in common, multiples
    of a step of at least `_SMALLEST_GREY` (0 and 255; 0, 128 and 255), or -1 alone.
    """
    maps = [sorted({*voxels} - {0}) for voxels in (voxels_p, voxels_t)]
    # `large` has the larger largest label; for [1] and [-1], a mask in two codings, it is [-1]
    small, large = sorted(maps, key=lambda labels: max(map(abs, labels), default=0) + (labels == [-1]))
    if not small or not large or {*small} & {*large} or {*large} & named(options):
        return
    step = min(map(abs, large))
    multiples = {round(label / step): label for label in large}
    are_grey = (
        step >= _SMALLEST_GREY
        and len(multiples) == len(large)
        and all(abs(k * step - label) <= 2 * k for k, label in multiples.items())  # 0, 128 and 255: rounded steps
    )
    if min(small) < 1 or max(small) > _LARGEST_CLASS or not (are_grey or large == [-1]):
        return
    words = ["holds " + " and ".join(map(str, [0, *labels])) for labels in maps]
    several = len(small) == len(large) > 1
    regions = [f"{f'class {s}' if several else 'mask'}={s},{g}" for s, g in zip(small, large, strict=False)]
    advice = f"If both mean the same, pass --regions '{'; '.join(regions)}'; if not, name the --labels."
    raise ScoreError(f"{prediction}: {words[0]}, but {truth.name} {words[1]}. {advice}")


def check_grey(
    path: Path, array: np.ndarray, voxels: dict[int, int], voxels_other: dict[int, int], options: Options
) -> None:
    """Raise ScoreError if an array looks like an image, or like a mask that was interpolated or compressed as an image.

    Suspects are the numbers that no option names: those that the other file lacks, if they are at least `_FEW`, most of
    the numbers, and a share of `_SPECKS` of the labelled voxels; else all, if they are more than `_MANY`. A label fills
    regions: the array is an image if most suspects differ from the next voxel more often than not. `array` (*S), read
    from `path`, has `voxels` (label -> number of voxels); the other file of the pair has `voxels_other`.
    """
    labels = {*voxels} - {0} - named(options)
    unmatched = labels - {*voxels_other}
    share = sum(voxels[label] for label in unmatched) / max(1, sum(voxels[label] for label in {*voxels} - {0}))
    mostly_unmatched = len(unmatched) >= max(_FEW, len(labels - unmatched)) and share >= _SPECKS
    if not mostly_unmatched and len(labels) <= _MANY:
        return
    suspects = np.array(sorted(unmatched if mostly_unmatched else labels))
    flat = array.reshape(-1, order="A")
    sampled = np.arange(0, flat.size - 1, max(1, flat.size // _SAMPLES))
    sampled = sampled[np.isin(flat[sampled], suspects)]
    rank = np.searchsorted(suspects, flat[sampled])
    # for each suspect: how many samples, and how many of them have the next voxel's value
    times, same = np.bincount(rank), np.bincount(rank, weights=flat[sampled] == flat[sampled + 1])
    if times.any() and np.median(same[times > 0] / times[times > 0]) < 0.5:
        got = (
            f"{len(suspects)} numbers from {suspects[0]} to {suspects[-1]}, most of them different from the next voxel"
        )
        advice = "An image, or a mask that was resized like one? Give masks; if these are labels, name the --labels."
        raise ScoreError(f"{path}: expected labels, got {got}. {advice}")
