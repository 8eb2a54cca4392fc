"""labels of a pair -> what no option names, and a refusal where the two cannot mean the same.

Options may name any label: then it means what it says, and is not doubted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from softdice.scoring.classes import Options, ScoreError

_SMALL, _STEP = 9, 32
"""Labels that people number are small; grey values that stand for them are multiples of a large step."""

_LACKED, _MANY = 5, 32
"""Labels that only one side holds, and labels of one side, from which on they may be grey values of an image."""

_SHARE = 0.02
"""Of the voxels that hold a label, those that make it more than a few specks of classes that are not there."""

_SAMPLES = 1 << 20
"""Voxels that are looked at for that."""


def voxels_of(labels: np.ndarray, n: np.ndarray) -> dict[int, int]:
    """labels, how often each occurs (a label may stand several times) -> label: voxels, ascending."""
    values, position = np.unique(labels, return_inverse=True)
    totals = np.zeros(len(values), np.int64)
    np.add.at(totals, position, n)
    return dict(zip(values.tolist(), totals.tolist(), strict=True))


def unnamed(held: dict[int, int], options: Options) -> dict[int, int]:
    """labels of the reference with their voxels -> those that options leave unsaid.

    Nothing where the options name none, and label 0 never: it is the background.
    """
    said = named(options)
    return {label: voxels for label, voxels in held.items() if label not in said and label != 0} if said else {}


def renumbered(p: np.ndarray, t: np.ndarray, n: np.ndarray, options: Options) -> bool:
    """Pairs of labels, how often each occurs -> whether most labels of the reference, and five at least, lie under
    another number in the prediction (IoU above 1/2), as those of objects do, which are numbered as they come.

    Not where options name labels.
    """
    classes = [*dict.fromkeys(t[t != 0].tolist())]
    if len(classes) < _LACKED or options.labels is not None or options.regions is not None:
        return False
    sizes = [dict(voxels_of(labels, n)) for labels in (p, t)]
    moved = sum(
        label_p != label_t != 0 != label_p and 3 * both > sizes[0][label_p] + sizes[1][label_t]
        for label_p, label_t, both in zip(p.tolist(), t.tolist(), n.tolist(), strict=True)
    )
    return moved >= _LACKED and 2 * moved > len(classes)


def named(options: Options) -> set[int]:
    """The labels that options speak of."""
    regions = [label for labels in (options.regions or {}).values() for label in labels]
    return {*regions, *(options.labels or ()), *(options.ignore if regions or options.labels else ()), *options.names}


def check_names(
    prediction: Path, p: dict[int, str], truth: Path, t: dict[int, str], held: set[int], options: Options
) -> None:
    """names of labels in both files, labels that occur -> nothing, where they agree but for spelling.

    Raises:
        ScoreError: one number stands for two things. Not where options say which labels are meant.
    """
    if options.labels is not None or options.regions is not None:
        return
    for label in sorted(held & {*p} & {*t} - {0, *options.ignore}):
        if _plain(p[label]) != _plain(t[label]):
            advice = "Bring both to one table of labels; if the numbers agree, name the --labels."
            raise ScoreError(f"{prediction}: label {label} is {p[label]!r}, but {t[label]!r} in {truth.name}. {advice}")


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def check_scales(prediction: Path, p: Iterable[int], truth: Path, t: Iterable[int], options: Options) -> None:
    """labels that the two hold -> nothing, where they can mean the same.

    Raises:
        ScoreError: small numbers on one side, multiples of a large step on the other (0 and 255, 0 and -1; 0, 128 and
            255), none in common: the scores would all be 0.
    """
    held = [sorted({*labels} - {0}) for labels in (p, t)]
    small, large = sorted(held, key=lambda labels: max(map(abs, labels), default=0) + (labels == [-1]))
    if not small or not large or {*small} & {*large} or {*large} & named(options):
        return
    step = min(map(abs, large))
    steps = {round(label / step): label for label in large}
    grey = (
        step >= _STEP and len(steps) == len(large) and all(abs(k * step - label) <= 2 * k for k, label in steps.items())
    )
    if min(small) < 1 or max(small) > _SMALL or not (grey or large == [-1]):
        return
    words = ["holds " + " and ".join(map(str, [0, *labels])) for labels in held]
    several = len(small) == len(large) > 1
    pairs = [f"{'mask' if not several else f'class {s}'}={s},{g}" for s, g in zip(small, large, strict=False)]
    advice = f"If both mean the same, pass --regions '{'; '.join(pairs)}'; if not, name the --labels."
    raise ScoreError(f"{prediction}: {words[0]}, but {truth.name} {words[1]}. {advice}")


def check_grey(path: Path, array: np.ndarray, held: dict[int, int], others: dict[int, int], options: Options) -> None:
    """an array, labels that it and the other side hold with their voxels -> nothing, where they look like labels.

    Raises:
        ScoreError: an image, or a mask that was resized or compressed as one: many numbers that no option names, most
            of them beside another number more often than not.
    """
    values = {*held} - {0} - named(options)
    lacked = values - {*others}
    share = sum(held[label] for label in lacked) / max(1, sum(held[label] for label in {*held} - {0}))
    alien = len(lacked) >= max(_LACKED, len(values - lacked)) and share >= _SHARE
    if not alien and len(values) <= _MANY:
        return
    looked_at = np.array(sorted(lacked if alien else values))
    flat = array.reshape(-1, order="A")
    here = np.arange(0, flat.size - 1, max(1, flat.size // _SAMPLES))
    here = here[np.isin(flat[here], looked_at)]
    which = np.searchsorted(looked_at, flat[here])
    times, same = np.bincount(which), np.bincount(which, weights=flat[here] == flat[here + 1])
    if times.any() and np.median(same[times > 0] / times[times > 0]) < 0.5:
        got = f"{len(looked_at)} numbers from {looked_at[0]} to {looked_at[-1]}, most of them unlike the next voxel"
        advice = "An image, or a mask that was resized like one? Give masks; if these are labels, name the --labels."
        raise ScoreError(f"{path}: expected labels, got {got}. {advice}")
