"""Scores of lesions, which are matched between two masks, and of centre lines.

A lesion is a connected component of the voxels of a class. Two rules say which lesions match:

* by overlap: pairs of a lesion of the input and one of the target, taken by their intersection over union (IoU), the
  largest first, as long as it is above a threshold ("above", as in Kirillov et al.) or reaches it ("at_least", as in
  panoptica), and neither is taken yet. Above 0.5 a lesion has no second candidate.
* BraTS 2023: lesions of the target that touch once dilated are one; all lesions of the input that touch it dilated
  are scored together against it as it was. Lesions of the target that are no larger than the challenge's volume do
  not count, whether found or not. Voxels touch by their corners.

A lesion without partner scores 0. connected-components-3d labels the components, scikit-image draws centre lines.

B is a sample, K a class that is scored, S the 2 or 3 axes of an image, F a formula, P a matched pair of lesions; n and
m are the numbers of lesions in the input and in the target. Masks are bool arrays (*S). `by_overlap`, `by_challenge`
and `skeletons` are called as `distances.Compare`: with the box of one class in one sample, which has a margin of one
voxel that is False, and where at least one mask has a voxel. Their `spacing` is the size of a voxel along each axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice import validation
from softdice.internals import untraced
from softdice.metrics.distances import Compare, Formula, integer_pair, measure
from softdice.metrics.instances import Overlaps, object_overlaps, shared_voxels

Neighbours = Literal["corners", "faces"]
Quality = Literal["pq", "sq", "rq", "ap"]
Reach = Literal["above", "at_least"]
Objects = Literal["components", "numbers"]
Challenge = Literal["BraTS-GLI", "BraTS-SSA", "BraTS-PED", "BraTS-MEN", "BraTS-MET"]

NEIGHBOURS: tuple[Neighbours, ...] = ("corners", "faces")
QUALITIES: tuple[Quality, ...] = ("pq", "sq", "rq", "ap")
REACHES: tuple[Reach, ...] = ("above", "at_least")
OBJECTS: tuple[Objects, ...] = ("components", "numbers")

CHALLENGES: dict[str, tuple[int, float]] = {
    "BraTS-GLI": (3, 50.0),
    "BraTS-SSA": (3, 50.0),
    "BraTS-PED": (3, 50.0),
    "BraTS-MEN": (1, 50.0),
    "BraTS-MET": (1, 2.0),
}
"""Tasks of BraTS 2023: how often the target is dilated, and the volume up to which its lesions do not count, in the
cube of the unit of spacing."""


class Lesions(NamedTuple):
    """The lesions of one class in one sample, matched.

    Args:
        iou, dice: of each pair, (P,) float64 in [0, 1], in one order.
        missed, extra: number of lesions of the target, and of the input, without a partner.
    """

    iou: np.ndarray
    dice: np.ndarray
    missed: int
    extra: int


# --- lesions -> score


def mean_dice(lesions: Lesions) -> float:
    """Return the mean Dice of all lesions, of which missed and extra ones score 0; nan without lesions."""
    number = len(lesions.dice) + lesions.missed + lesions.extra
    return float(lesions.dice.sum()) / number if number else math.nan


def quality_of(lesions: Lesions, which: Quality) -> float:
    """Return a score in [0, 1] of matched lesions; 0 where no two match, nan where neither mask has a lesion.

    Args:
        lesions: IoU of each matched pair, and numbers of missed lesions of the target and extra ones of the input.
        which: "pq" panoptic, "sq" segmentation or "rq" recognition quality, or "ap" average precision.
    """
    matched, unmatched = len(lesions.iou), lesions.missed + lesions.extra
    if not matched:
        return 0.0 if unmatched else math.nan
    iou_sum = float(lesions.iou.sum())
    return {
        "pq": iou_sum / (matched + unmatched / 2),
        "sq": iou_sum / matched,
        "rq": matched / (matched + unmatched / 2),
        "ap": matched / (matched + unmatched),
    }[which]


# --- masks -> lesions


def by_overlap(
    input: np.ndarray,
    target: np.ndarray,
    spacing: tuple[float, ...],
    threshold: float,
    neighbours: Neighbours,
    reach: Reach,
) -> Lesions:
    """Match the connected components of two masks by their IoU, the largest first, each component once.

    A pair matches if its IoU is above `threshold`, in [0, 1], or with reach="at_least" equal to it. `spacing` is not
    used: overlap does not depend on lengths.
    """
    (input_numbers, n), (target_numbers, m) = components(input, neighbours), components(target, neighbours)
    shared = shared_voxels(input_numbers, n, target_numbers, m)
    return paired(_sizes(input_numbers, n), _sizes(target_numbers, m), shared, threshold, reach)


def _sizes(numbers: np.ndarray, count: int) -> np.ndarray:
    """Return how many voxels of an array (*S) have each of the numbers 0 to `count`, (count + 1,) int64."""
    return np.bincount(numbers.reshape(-1), minlength=count + 1)


def paired(
    input_sizes: np.ndarray, target_sizes: np.ndarray, shared: Overlaps, threshold: float, reach: Reach
) -> Lesions:
    """Match lesions by their IoU, the largest first, each lesion once.

    Args:
        input_sizes, target_sizes: voxels of each number, (n + 1,) and (m + 1,) integers; 0 for a number that no lesion
            has; entry 0, the background, is not read.
        shared: the pairs of numbers that have voxels in common, and how many.
        threshold: in [0, 1]; the IoU of a pair is above it, or with reach="at_least" it may also be equal to it.
    """
    numbers_input, numbers_target, both = shared
    size_sum = input_sizes[numbers_input] + target_sizes[numbers_target]
    iou = both / (size_sum - both)
    candidates = np.flatnonzero(iou >= threshold if reach == "at_least" else iou > threshold)
    pairs: list[int] = []  # positions in `shared`
    taken_input, taken_target = set[int](), set[int]()
    for i in candidates[np.argsort(-iou[candidates], kind="stable")].tolist():
        p, t = int(numbers_input[i]), int(numbers_target[i])
        if p not in taken_input and t not in taken_target:
            taken_input.add(p)
            taken_target.add(t)
            pairs.append(i)
    n, m = (int(np.count_nonzero(sizes[1:])) for sizes in (input_sizes, target_sizes))
    return Lesions(iou[pairs], 2 * both[pairs] / size_sum[pairs], m - len(pairs), n - len(pairs))


def by_challenge(input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], challenge: str) -> Lesions:
    """Match the lesions of two masks by the rules of a task of BraTS 2023, a key of `CHALLENGES`.

    A lesion of the target is paired with all lesions of the input, taken together, that share a voxel with it once it
    is dilated. A lesion of the input that no dilated lesion reaches is extra. `spacing` is in mm.
    """
    ndimage = validation.package("lesion_dice", "scipy.ndimage", "lesions")
    dilations, largest_ignored_volume = CHALLENGES[challenge]
    neighbourhood = ndimage.generate_binary_structure(target.ndim, 2)  # by faces and edges, as BraTS dilates
    # Lesions that join when the whole image is dilated join in this box, too: where a path of dilated voxels leaves it,
    # the voxels of the box beside the path are dilated as well.
    dilated = ndimage.binary_dilation(target, neighbourhood, iterations=dilations)
    (input_numbers, n), (dilated_numbers, m) = components(input, "corners"), components(dilated, "corners")
    target_numbers = np.where(target, dilated_numbers, dilated_numbers.dtype.type(0))
    input_sizes, target_sizes = _sizes(input_numbers, n), _sizes(target_numbers, m)
    touching = shared_voxels(input_numbers, n, dilated_numbers, m)
    inside = shared_voxels(input_numbers, n, target_numbers, m)
    # per lesion of the target: voxels shared with the input, and voxels of all lesions of the input that touch it
    both = np.bincount(inside.of_target, inside.voxels, minlength=m + 1)
    touching_sizes = np.bincount(touching.of_target, input_sizes[touching.of_input], minlength=m + 1)
    counted = target_sizes * math.prod(spacing) > largest_ignored_volume
    counted[0] = False  # the background
    matched = counted & (touching_sizes > 0)
    size_sum, both = (touching_sizes + target_sizes)[matched], both[matched]
    extra = n - np.unique(touching.of_input).size
    return Lesions(both / (size_sum - both), 2 * both / size_sum, int((counted & ~matched).sum()), extra)


def components(mask: np.ndarray, neighbours: Neighbours) -> tuple[np.ndarray, int]:
    """Number the connected components of a mask (*S): return (*S) unsigned integers, 0 outside the mask, and n.

    The components have the numbers 1 to n.
    """
    cc3d = validation.package("lesion_dice", "cc3d", "lesions")
    connectivity = {2: {"corners": 8, "faces": 4}, 3: {"corners": 26, "faces": 6}}[mask.ndim][neighbours]
    if mask.ndim == 2:  # with bool and 8 neighbours, 3.29.0 and 4.1.1 label voxels outside: [[False], [False], [True]]
        mask = mask.view(np.uint8)
    numbers, n = cc3d.connected_components(mask, connectivity=connectivity, return_N=True)
    return numbers, int(n)


def skeletons(input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """Return the share of the input's centre line that is inside the target, and the other way round, in [0, 1].

    Both are 0 if one of the masks is empty. `spacing` is not used: skeletons count voxels.
    """
    if not (input.any() and target.any()):
        return 0.0, 0.0
    input_line, target_line = centre_line(input), centre_line(target)
    return (
        float((input_line & target).sum() / input_line.sum()),
        float((target_line & input).sum() / target_line.sum()),
    )


def centre_line(mask: np.ndarray) -> np.ndarray:
    """Return the skeleton of a mask (*S) by scikit-image as a mask, with a line in every connected component.

    scikit-image (0.26 and older) thins bodies of even width, such as a straight vessel of 4 x 4 voxels, to nothing
    (https://github.com/scikit-image/scikit-image/issues/3757). Such a component is thinned again one voxel narrower.
    """
    morphology = validation.package("centreline_dice", "skimage.morphology", "lesions")
    ndimage = validation.package("centreline_dice", "scipy.ndimage", "lesions")
    line = np.asarray(morphology.skeletonize(mask)) != 0
    numbers, n = components(mask, "corners")
    without_line = np.setdiff1d(np.arange(1, n + 1), numbers[line])
    boxes = ndimage.find_objects(numbers) if without_line.size else ()
    for number in without_line.tolist():
        box = boxes[number - 1]
        component = np.pad(numbers[box] == number, 1)
        line[box] |= _narrowed_line(component, morphology, ndimage)[(slice(1, -1),) * mask.ndim]
    return line


def _narrowed_line(component: np.ndarray, morphology: Any, ndimage: Any) -> np.ndarray:
    """Return the skeleton of a component after it is made one voxel narrower along one axis, as a mask of its shape.

    The axis that leaves the longest line is taken. If no line is left, the component is made narrower along two axes,
    then along three; if that fails too, the line is its deepest voxel. The component is a mask (*S) with a margin of
    one voxel; `morphology` and `ndimage` are modules.
    """
    for count in range(1, component.ndim + 1):
        lines = []
        for axes in combinations(range(component.ndim), count):
            narrow = component
            for axis in axes:  # erosion by one voxel; the margin is what `roll` moves around the end of the axis
                narrow = narrow & np.roll(narrow, -1, axis)
            lines.append(np.asarray(morphology.skeletonize(narrow)) != 0)
        longest = max(lines, key=np.count_nonzero)
        if longest.any():
            return longest
    line = np.zeros_like(component)
    line.flat[int(ndimage.distance_transform_edt(component).argmax())] = True
    return line


def harmonic(shares: tuple[float, float]) -> float:
    """Return the harmonic mean of two shares in [0, 1], 0 if both are 0."""
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


# --- label maps -> score


@validation.public
def lesion_dice(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    matching: float | Challenge = 0.5,
    reach: Reach = "above",
    neighbours: Neighbours = "corners",
    objects: Objects = "components",
    spacing: float | Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the mean Dice of the lesions of each sample and class, (B, C), in [0, 1]

        LD = sum_(p, t) 2 |p and t| / (|p| + |t|) / (matched + missed + extra)

    over pairs (p, t) of a lesion of the input and one of the target that belong together. A lesion of the target
    without partner is missed, one of the input is extra: each scores 0.

    Args:
        matching: the IoU above which pairs match, the largest first, each lesion once; or the rules of a task of
            BraTS 2023, by name: "BraTS-GLI", "BraTS-SSA", "BraTS-PED" (the target dilated 3 times, lesions above 50
            volume units), "BraTS-MEN" (once, 50), "BraTS-MET" (once, 2). There p is all that touches t dilated.
        reach: whether the IoU has to be "above" `matching`, as `panoptic_quality` has it, or "at_least" that, as in
            panoptica. The rules of BraTS do not read it.
        neighbours: voxels of a lesion touch by their "corners" (26 of a voxel, 8 in 2-D) or "faces" (6, 4). BraTS:
            corners.
        objects: a lesion is one of the "components" of a class, or, with num_classes=1, all voxels of one of the
            "numbers" of the map above 0, as cellpose and StarDist write them. Which number an object has in the two
            maps does not matter.
        spacing: size of a voxel, which says what volume a lesion has. Only the rules of BraTS ask for it.

    input, target: integer labels (B, *S) with 2 or 3 axes S. Other arguments and errors: see `hausdorff_distance`.

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
    formulas: list[Formula] = [lambda lesions, _: mean_dice(lesions)]
    rule = Rule(matching, reach, neighbours, objects)
    return rule.measure(input, target, formulas, num_classes, spacing, classes, ignore_index)[0]


@validation.public
def panoptic_quality(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    quality: Quality = "pq",
    matching: float = 0.5,
    reach: Reach = "above",
    neighbours: Neighbours = "corners",
    objects: Objects = "components",
    spacing: float | Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the panoptic quality of each sample and class, (B, C), in [0, 1]

        PQ = SQ RQ        SQ = mean_(p, t) IoU(p, t)        RQ = matched / (matched + missed / 2 + extra / 2)

    over pairs (p, t) of a lesion of the input and one of the target that belong together. RQ is the F1 score of the
    detection of lesions; AP = matched / (matched + missed + extra) is what is reported of cells under that name.

    Args:
        quality: "pq", "sq", "rq" or "ap".
        matching: the IoU above which pairs match, the largest first, each lesion once; in [0, 1).
        reach: "above", as in the paper, or "at_least", as in panoptica: then `matching` is in (0, 1].
        neighbours: voxels of a lesion touch by their "corners" (26 of a voxel, 8 in 2-D) or "faces" (6, 4).
        objects: a lesion is one of the "components" of a class, or, with num_classes=1, one of the "numbers" above 0.
        spacing: as in the other scores of label maps, so that all take one dict of settings; overlap knows no lengths.

    input, target: integer labels (B, *S) with 2 or 3 axes S. Other arguments and errors: see `hausdorff_distance`.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, 1 is best. nan: the class is in neither map, or it
        is `ignore_index`; 0: it is in one of them only, or no two lesions belong together.

    Example:
        >>> import torch
        >>> input, target = torch.tensor([[[1, 1, 0, 0, 0, 1]], [[1, 1, 1, 0, 0, 0]]])
        >>> [panoptic_quality(input[None], target[None], num_classes=1, quality=q).item() for q in ("sq", "rq", "pq")]
        [0.6666666666666666, 0.6666666666666666, 0.4444444444444444]

    Source: A. Kirillov et al., "Panoptic segmentation", CVPR 2019, equations 1 and 2; J. C. Caicedo et al., "Nucleus
    segmentation across imaging experiments: the 2018 Data Science Bowl", Nature Methods 16, 2019 (AP, "at_least").
    """
    validation.choice("quality", quality, QUALITIES)
    no_challenge(matching)
    formulas: list[Formula] = [lambda lesions, _: quality_of(lesions, quality)]
    rule = Rule(matching, reach, neighbours, objects)
    return rule.measure(input, target, formulas, num_classes, spacing, classes, ignore_index)[0]


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
    fibres the tree that they form, whatever their width. Skeletons are scikit-image's; a component that these leave
    nothing of, as a straight vessel of 4 x 4 voxels, is thinned again one voxel narrower, so that each has a line.

    Args:
        spacing: as in the other scores of label maps, so that all take one dict of settings; skeletons count voxels.

    input, target: integer labels (B, *S) with 2 or 3 axes S. Other arguments and errors: see `hausdorff_distance`.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, 1 is best. nan: the class is in neither map, or it
        is `ignore_index`; 0: it is in one of them only, or lies wholly beside the target.

    Example:
        >>> import torch
        >>> input, target = torch.tensor([[[0] * 7, [1] * 5 + [0] * 2, [0] * 7], [[0] * 7, [1] * 7, [0] * 7]])
        >>> centreline_dice(input[None], target[None], num_classes=1)
        tensor([[0.8333]], dtype=torch.float64)

    Source: S. Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation",
    CVPR 2021, equations 1 and 2.
    """
    formulas: list[Formula] = [lambda shares, _: harmonic(shares)]
    return measure(input, target, formulas, num_classes, spacing, skeletons, classes, ignore_index)[0]


# --- settings


@dataclass(frozen=True)
class Rule:
    """What a lesion is, and which lesions match. For the settings, their types and ranges see `lesion_dice`."""

    matching: float | str = 0.5
    reach: Reach = "above"
    neighbours: Neighbours = "corners"
    objects: Objects = "components"

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for a setting out of its range, or for two that exclude each other."""
        object.__setattr__(self, "matching", validation.numbers_of(self.matching))
        for name, allowed in (("reach", REACHES), ("neighbours", NEIGHBOURS), ("objects", OBJECTS)):
            validation.choice(name, getattr(self, name), allowed)
        if isinstance(self.matching, str):
            validation.choice("matching", self.matching, CHALLENGES)
            if self.neighbours != "corners":
                advice = "Leave it out: lesions of BraTS touch by their corners."
                validation.fail(f"neighbours 'corners' with matching={self.matching!r}", repr(self.neighbours), advice)
        else:
            validation.number("matching", self.matching, 0, 1)
            if self.matching == (1 if self.reach == "above" else 0):  # no pair would match, or every one
                words = {"above": ("below 1", "at_least"), "at_least": ("above 0", "above")}[self.reach]
                advice = f"Pass an intersection over union, such as 0.5, or reach={words[1]!r}."
                validation.fail(f"matching {words[0]} with reach={self.reach!r}", self.matching, advice)
        if self.objects == "numbers" and (isinstance(self.matching, str) or self.neighbours != "corners"):
            got = f"matching={self.matching!r}, neighbours={self.neighbours!r}"
            advice = "Leave neighbours out, and pass an intersection over union, such as 0.5, for matching."
            validation.fail("a number as matching and no neighbours with objects='numbers'", got, advice)

    @property
    def compare(self) -> Compare:
        """Return the function that matches the components of two masks, `by_challenge` or `by_overlap`."""
        if isinstance(self.matching, str):
            return partial(by_challenge, challenge=self.matching)
        return partial(by_overlap, threshold=self.matching, neighbours=self.neighbours, reach=self.reach)

    @property
    def threshold(self) -> float:
        """Return the IoU that matching lesions exceed or reach; 0.5 for a challenge, whose rules have no IoU."""
        return 0.5 if isinstance(self.matching, str) else self.matching

    @untraced
    def measure(
        self,
        input: Tensor,
        target: Tensor,
        formulas: Sequence[Formula],
        num_classes: int,
        spacing: float | Sequence[float] | None,
        classes: Sequence[int] | None,
        ignore_index: int | None,
    ) -> Tensor:
        """Match the lesions of each sample and class, and return the scores formula(lesions, k), (F, B, K) float64.

        `lesions` are the `Lesions` of the k-th scored class. Label maps (B, *S) and settings come unchecked from the
        user: raise the errors of `lesion_dice`.
        """
        if self.objects == "components":
            return measure(input, target, formulas, num_classes, spacing, self.compare, classes, ignore_index)
        if num_classes != 1 or classes is not None:
            got = f"num_classes={num_classes!r}, classes={classes!r}"
            validation.fail("num_classes=1 and no classes with objects='numbers'", got, "All numbers are of one class.")
        input, target = integer_pair(input, target, ignore_index)
        if input.is_meta or target.is_meta:
            return torch.empty((len(formulas), len(input), 1), dtype=torch.float64, device="meta")
        scores_BF = [
            [formula(self.match(*pair, ignore_index), 0) for formula in formulas]
            for pair in zip(input.detach().cpu().numpy(), target.detach().cpu().numpy(), strict=True)
        ]
        scores_BF1 = torch.tensor(scores_BF, dtype=torch.float64).reshape(-1, len(formulas), 1)
        return scores_BF1.movedim(1, 0).to(input.device)

    def match(self, input: np.ndarray, target: np.ndarray, ignore_index: int | None = None) -> Lesions:
        """Match the objects of two maps (*S), bool or integers, in which each number above 0 is an object.

        Voxels where the target has `ignore_index` are in no object. Raise ValueError for a number below 0.
        """
        return paired(*object_overlaps(input, target, ignore_index), self.threshold, self.reach)


def no_challenge(matching: object) -> None:
    """Raise TypeError if a user's `matching` is the name of a challenge, whose rules have no panoptic quality."""
    if isinstance(matching, str):
        validation.number("matching", matching, 0, 1)
