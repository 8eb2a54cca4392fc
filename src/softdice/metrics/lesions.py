"""two masks -> which of their lesions belong together, centre lines, and the scores that are made of them.

A lesion is a connected component of the voxels of a class. Two rules say which belong together:

* by overlap: pairs of a lesion of the input and one of the target, taken by their intersection over union (IoU), the
  largest first, as long as it reaches a threshold and neither is taken yet. From 0.5 on a lesion has no second
  candidate. As in panoptica.
* BraTS 2023: lesions of the target that touch once dilated are one; all lesions of the input that touch it dilated
  are scored together against it as it was. Lesions of the target that are no larger than the challenge's volume do
  not count, whether found or not. Voxels touch by their corners.

A lesion without partner scores 0. Here stand the rules and the formulas; components are labelled by
connected-components-3d, centre lines drawn by scikit-image.

B is a sample, K a class that is scored, S the axes of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from softdice import validation
from softdice.metrics.distances import Compare, measure

Neighbours = Literal["corners", "faces"]
Quality = Literal["pq", "sq", "rq"]
Challenge = Literal["BraTS-GLI", "BraTS-SSA", "BraTS-PED", "BraTS-MEN", "BraTS-MET"]

NEIGHBOURS: tuple[Neighbours, ...] = ("corners", "faces")
QUALITIES: tuple[Quality, ...] = ("pq", "sq", "rq")

CHALLENGES: dict[str, tuple[int, float]] = {
    "BraTS-GLI": (3, 50.0),
    "BraTS-SSA": (3, 50.0),
    "BraTS-PED": (3, 50.0),
    "BraTS-MEN": (1, 50.0),
    "BraTS-MET": (1, 2.0),
}
"""Task of BraTS 2023 -> how often the target is dilated, and the volume, in the cube of the unit of spacing, up to
which its lesions do not count."""

_DENSE = 1 << 22
"""Pairs of lesions up to which each has a place in a table; more are sorted."""


class Lesions(NamedTuple):
    """Of one class: IoU and Dice of the lesions that found a partner, (P,) float64, and how many did not.

    `missed` are lesions of the target, `extra` those of the input.
    """

    iou: np.ndarray
    dice: np.ndarray
    missed: int
    extra: int


# --- lesions -> score


def mean_dice(lesions: Lesions) -> float:
    """lesions -> the mean Dice of pairs, of missed ones and of extra ones, which score 0; nan for none."""
    number = len(lesions.dice) + lesions.missed + lesions.extra
    return float(lesions.dice.sum()) / number if number else math.nan


def quality_of(lesions: Lesions, which: Quality) -> float:
    """lesions -> panoptic, segmentation or recognition quality; nan where there is no lesion."""
    found, others = len(lesions.iou), lesions.missed + lesions.extra
    if not found:
        return 0.0 if others else math.nan
    divisor = {"pq": found + others / 2, "sq": found, "rq": 1.0}[which]
    return float(lesions.iou.sum()) / divisor if which != "rq" else found / (found + others / 2)


# --- masks -> lesions


def by_overlap(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], threshold: float, neighbours: Neighbours
) -> Lesions:
    """mask, mask -> lesions; pairs by their IoU, the largest first, each lesion once."""
    (found, n), (true, m) = components(input, neighbours), components(target, neighbours)
    sizes = np.bincount(found.reshape(-1), minlength=n + 1), np.bincount(true.reshape(-1), minlength=m + 1)
    of_input, of_target, both = overlaps(found, n, true, m)
    together = sizes[0][of_input] + sizes[1][of_target]
    iou = both / (together - both)
    taken: list[int] = []
    free = (np.ones(n + 1, bool), np.ones(m + 1, bool))
    for i in np.argsort(-iou, kind="stable"):
        p, t = of_input[i], of_target[i]
        if iou[i] >= threshold and free[0][p] and free[1][t]:
            free[0][p] = free[1][t] = False
            taken.append(int(i))
    pairs = np.array(taken, np.int64)
    return Lesions(iou[pairs], 2 * both[pairs] / together[pairs], m - len(taken), n - len(taken))


def by_challenge(input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], challenge: str) -> Lesions:
    """mask, mask -> lesions by the rules of a task of BraTS 2023."""
    ndimage = validation.package("lesion_dice", "scipy.ndimage", "lesions")
    dilations, volume = CHALLENGES[challenge]
    around = ndimage.generate_binary_structure(target.ndim, 2)
    # In the box around both masks as in the whole image: of a path between two lesions that leaves the box, the nearest
    # places inside of it are a path, too.
    dilated = ndimage.binary_dilation(target, around, iterations=dilations)
    (found, n), (extent, m) = components(input, "corners"), components(dilated, "corners")
    true = np.where(target, extent, extent.dtype.type(0))
    sizes = np.bincount(found.reshape(-1), minlength=n + 1), np.bincount(true.reshape(-1), minlength=m + 1)
    touching, within = overlaps(found, n, extent, m), overlaps(found, n, true, m)
    both = np.bincount(within[1], within[2], minlength=m + 1)
    predicted = np.bincount(touching[1], sizes[0][touching[0]], minlength=m + 1)
    counted = sizes[1] * math.prod(spacing) > volume
    counted[0] = False
    seen = counted & (predicted > 0)
    together, both = (predicted + sizes[1])[seen], both[seen]
    extra = n - np.unique(touching[0]).size
    return Lesions(both / (together - both), 2 * both / together, int((counted & ~seen).sum()), extra)


def components(mask: np.ndarray, neighbours: Neighbours) -> tuple[np.ndarray, int]:
    """mask -> the number of each voxel's component, from 1 on, 0 outside of the mask; how many there are."""
    cc3d = validation.package("lesion_dice", "cc3d", "lesions")
    touching = {2: {"corners": 8, "faces": 4}, 3: {"corners": 26, "faces": 6}}[mask.ndim][neighbours]
    if mask.ndim == 2:  # of bool, 8-connected, 3.29.0 and 4.1.1 also label voxels outside of the mask: [[0], [0], [1]]
        mask = mask.view(np.uint8)
    labels, number = cc3d.connected_components(mask, connectivity=touching, return_N=True)
    return labels, int(number)


def overlaps(one: np.ndarray, n: int, other: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers up to n and numbers up to m -> pairs that share voxels, and how many: three arrays (P,).

    Example:
        >>> overlaps(np.array([0, 1, 1, 2]), 2, np.array([1, 1, 1, 0]), 1)
        (array([1]), array([1]), array([2]))
    """
    at = (one != 0) & (other != 0)
    codes = one[at].astype(np.int64) * (m + 1) + other[at]
    if (n + 1) * (m + 1) <= _DENSE:
        table = np.bincount(codes, minlength=1)
        seen = np.flatnonzero(table)
        return seen // (m + 1), seen % (m + 1), table[seen]
    seen, voxels = np.unique(codes, return_counts=True)
    return seen // (m + 1), seen % (m + 1), voxels


def skeletons(input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """masks -> the share of the input's centre line inside the target, and of the target's inside the input.

    0 where one of the masks is empty; nan for a mask without centre line: scikit-image thins compact bodies of even
    width, such as 2 x 2 x 2 voxels, to nothing.
    """
    if not (input.any() and target.any()):
        return 0.0, 0.0
    morphology = validation.package("centreline_dice", "skimage.morphology", "lesions")
    shares = []
    for own, other in ((input, target), (target, input)):
        line = np.asarray(morphology.skeletonize(own)) != 0
        shares.append(float((line & other).sum() / line.sum()) if line.any() else math.nan)
    return shares[0], shares[1]


def harmonic(shares: tuple[float, float]) -> float:
    """precision, sensitivity -> their harmonic mean, 0 where both are."""
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


# --- label maps -> score


@validation.public
def lesion_dice(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    matching: float | Challenge = 0.5,
    neighbours: Neighbours = "corners",
    spacing: float | Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the mean Dice of the lesions of each sample and class, (B, C), in [0, 1]

        LD = sum_(p, t) 2 |p and t| / (|p| + |t|) / (matched + missed + extra)

    over pairs (p, t) of a lesion of the input and one of the target that belong together. A lesion of the target
    without partner is missed, one of the input is extra: each scores 0.

    Args:
        matching: an IoU in (0, 1] that a pair must reach, the largest first, each lesion once; or the rules of a task
            of BraTS 2023, by name: "BraTS-GLI", "BraTS-SSA", "BraTS-PED" (the target dilated 3 times, lesions above 50
            volume units), "BraTS-MEN" (once, 50), "BraTS-MET" (once, 2). There p is all that touches t dilated.
        neighbours: voxels of a lesion touch by their "corners" (26 of a voxel, 8 in 2-D) or "faces" (6, 4). BraTS:
            corners.
        spacing: size of a voxel, which says what volume a lesion has. Only the rules of BraTS ask for it.

    The other arguments and errors are those of `hausdorff_distance`.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, 1 is best. nan: the class is in neither map, it is
        `ignore_index`, or none of its lesions counts; 0: it is in one of them only.

    Example:
        >>> import torch
        >>> input, target = torch.tensor([[[1, 1, 0, 0, 0, 1]], [[1, 1, 1, 0, 0, 0]]])
        >>> lesion_dice(input[None], target[None], num_classes=1)  # 0.8 of one lesion, 0 of the extra one
        tensor([[0.4000]], dtype=torch.float64)

    Source: R. Saluja et al., "BraTS 2023 lesion-wise performance metrics for segmentation challenges", 2023,
    github.com/rachitsaluja/BraTS-2023-Metrics (BraTS); F. Kofler et al., "Panoptica: instance-wise evaluation of 3D
    semantic and instance segmentation maps", arXiv:2312.02608, 2023 (matching by overlap).
    """
    compare, formula = matching_rule(matching, neighbours), _first(mean_dice)
    return measure(input, target, [formula], num_classes, spacing, compare, classes, ignore_index)[0]


@validation.public
def panoptic_quality(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    quality: Quality = "pq",
    matching: float = 0.5,
    neighbours: Neighbours = "corners",
    spacing: float | Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the panoptic quality of each sample and class, (B, C), in [0, 1]

        PQ = SQ RQ        SQ = mean_(p, t) IoU(p, t)        RQ = matched / (matched + missed / 2 + extra / 2)

    over pairs (p, t) of a lesion of the input and one of the target that belong together. RQ is the F1 score of the
    detection of lesions.

    Args:
        quality: "pq", "sq" or "rq".
        matching: an IoU in (0, 1] that a pair must reach, the largest first, each lesion once.
        neighbours: see `lesion_dice`.

        spacing: as in the other scores of label maps, so that all take one dict of settings; overlap knows no lengths.

    The other arguments and errors are those of `hausdorff_distance`.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, 1 is best. nan: the class is in neither map, or it
        is `ignore_index`; 0: it is in one of them only, or no two lesions belong together.

    Example:
        >>> import torch
        >>> input, target = torch.tensor([[[1, 1, 0, 0, 0, 1]], [[1, 1, 1, 0, 0, 0]]])
        >>> [panoptic_quality(input[None], target[None], num_classes=1, quality=q).item() for q in ("sq", "rq", "pq")]
        [0.6666666666666666, 0.6666666666666666, 0.4444444444444444]

    Source: A. Kirillov et al., "Panoptic segmentation", CVPR 2019, equations 1 and 2.
    """
    validation.choice("quality", quality, QUALITIES)
    compare, formula = overlap_rule(matching, neighbours), _first(partial(quality_of, which=quality))
    return measure(input, target, [formula], num_classes, spacing, compare, classes, ignore_index)[0]


@validation.public
def centreline_dice(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    spacing: float | Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the centre-line Dice (clDice) of each sample and class, (B, C), in [0, 1]

        clDice = 2 Tp Ts / (Tp + Ts)        Tp = |S(P) and T| / |S(P)|        Ts = |S(T) and P| / |S(T)|

    P and T are the voxels of the class in input and target, S their skeletons, one voxel wide: of vessels, roads or
    fibres the tree that they form, whatever their width.

    Args:
        spacing: as in the other scores of label maps, so that all take one dict of settings; skeletons count voxels.

    The other arguments and errors are those of `hausdorff_distance`.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, 1 is best. nan: the class is in neither map, it is
        `ignore_index`, or a body so compact that nothing is left of it when it is thinned; 0: it is in one map only.

    Example:
        >>> import torch
        >>> input, target = torch.tensor([[[0] * 7, [1] * 5 + [0] * 2, [0] * 7], [[0] * 7, [1] * 7, [0] * 7]])
        >>> centreline_dice(input[None], target[None], num_classes=1)
        tensor([[0.8333]], dtype=torch.float64)

    Source: S. Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation",
    CVPR 2021, equations 1 and 2.
    """
    return measure(input, target, [_first(harmonic)], num_classes, spacing, skeletons, classes, ignore_index)[0]


# --- settings


def matching_rule(matching: float | str, neighbours: Neighbours) -> Compare:
    """How lesions are matched -> masks, masks, spacing -> lesions."""
    if not isinstance(matching, str):
        return overlap_rule(matching, neighbours)
    validation.choice("matching", matching, CHALLENGES)
    if neighbours != "corners":
        advice = "Leave it out: lesions of BraTS touch by their corners."
        validation.fail(f"neighbours 'corners' with matching={matching!r}", repr(neighbours), advice)
    return partial(by_challenge, challenge=matching)


def overlap_rule(matching: float, neighbours: Neighbours) -> Compare:
    """An IoU in (0, 1] -> masks, masks, spacing -> lesions."""
    validation.choice("neighbours", neighbours, NEIGHBOURS)
    validation.number("matching", matching, 0, 1)
    if matching == 0:
        validation.fail("matching above 0", matching, "Pass an intersection over union, such as 0.5.")
    return partial(by_overlap, threshold=matching, neighbours=neighbours)


def _first(formula: Callable[[Any], float]) -> Callable[[Any, int], float]:
    """A formula that is the same for every class."""
    return lambda found, _: formula(found)
