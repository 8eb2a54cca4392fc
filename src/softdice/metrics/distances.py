"""Distances between the surfaces of label maps: Hausdorff distance, average surface distance, surface Dice.

Labels are scored one by one, each in the box that holds it in both maps, on as many threads as torch may use.
`surfaces` decides what an element of a boundary is and how its distance is measured; `counting` decides what a label
map is and what is ignored.

B is a sample, C a class, K a class that is scored, S the 2 or 3 axes of an image, F a formula (`Formula`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice import validation
from softdice.internals import untraced
from softdice.metrics import counting, surfaces
from softdice.metrics.counting import as_tensor
from softdice.metrics.surfaces import Definition, Direction
from softdice.parallel.threads import for_each

_CHUNK = 1 << 20
"""Voxels of a task that looks for the boxes of labels."""

_ONE_THREAD = 1 << 16
"""With up to this many voxels a second thread does not pay."""

Compare = Callable[[np.ndarray, np.ndarray, tuple[float, ...]], Any]
"""Compares the masks of a class in the input and in the target, bool (*S), which have a margin of one voxel and are not
both empty; the third argument is the size of a voxel along each axis."""

Formula = Callable[[Any, int], float]
"""Turns what a `Compare` returned, and the position of the class among those that are scored, into a score."""


@validation.public
def hausdorff_distance(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    percentile: float | None = None,
    spacing: float | Sequence[float] | None = None,
    definition: Definition = "voxels",
    direction: Direction = "symmetric",
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the Hausdorff distance of each sample and class, (B, C), in the unit of spacing

        HD = max(max_a d(a, T), max_b d(b, P))        d(a, T) = min_b |a - b|

    a and b are the elements of the boundaries P of the input and T of the target. With a percentile the inner maxima
    are percentiles: HD95.

    Args:
        input: bool or integer labels in [0, C), (B, *S) with 2 or 3 axes S; axes of length 1 do not count. For logits
            pass `logits.argmax(1)`. Input and target that are both one-hot (B, C, *S) are taken as that. Tensors,
            arrays of NumPy, or anything that speaks DLPack.
        target: bool or integer labels of the same shape, in [0, C) or `ignore_index`.
        num_classes: C. With C = 1 the maps are masks and their one class is 1.
        percentile: None for the maximum, or a number in [0, 100]. "voxels": linear interpolation between the two
            distances around it, as MONAI; "surface": the first distance that this share of the area reaches.
        spacing: size of a voxel along each axis of S, > 0, or one number for all; None for 1.
        definition: what the boundary is. "voxels": those of the class with a neighbour outside (MONAI, MedPy);
            "surface": surface elements weighted by their area (DeepMind).
        direction: "symmetric", or the distances "from_input" to the target or "from_target" to the input only.
        classes: those that are scored, None for all; `range(1, C)` leaves the background out, which takes most time.
        ignore_index: voxels where target has this label are in no class, in both maps; that class is not scored.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, >= 0, 0 is best. nan: the class is in neither map,
        or it is `ignore_index`; inf: it is in one of them only. On the device of `input`; computed on the CPU.

    Raises:
        ValueError: shapes differ, a label is out of range, a setting is. TypeError: no arrays, or labels that are not
            integers.

    Example:
        >>> import torch
        >>> input, target = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> input[0, 2:5, 2:5], target[0, 2:5, 2:7] = 1, 1
        >>> hausdorff_distance(input, target, num_classes=3, classes=[1, 2], spacing=(1.0, 0.5))
        tensor([[1., nan]], dtype=torch.float64)

    Source: D. P. Huttenlocher et al., "Comparing images using the Hausdorff distance", IEEE TPAMI 15, 1993.
    """
    percentile = checked_percentile(percentile)
    validation.choice("direction", direction, surfaces.DIRECTIONS)
    formulas: list[Formula] = [lambda distances, _: surfaces.hausdorff(distances, percentile, direction)]
    compare = surfaces.between(definition)
    return measure(input, target, formulas, num_classes, spacing, compare, classes, ignore_index)[0]


@validation.public
def average_surface_distance(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    spacing: float | Sequence[float] | None = None,
    definition: Definition = "voxels",
    direction: Direction = "symmetric",
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the mean distance between boundaries of each sample and class, (B, C), in the unit of spacing

        ASSD = (sum_a w_a d(a, T) + sum_b w_b d(b, P)) / (sum_a w_a + sum_b w_b)

    a and b are the elements of the boundaries P of the input and T of the target, w their weights: 1 for voxels, the
    area for surface elements. From one side only its own sums stand.

    Args:
        direction: "symmetric", the mean over the elements of both boundaries, or the one "from_input" to the target
            or "from_target" to the input.

    input, target: integer labels (B, *S) with 2 or 3 axes S. Other arguments, results, errors: `hausdorff_distance`.

    Example:
        >>> import torch
        >>> input, target = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> input[0, 2:4, 2:4], target[0, 2:4, 2:5] = 1, 1
        >>> average_surface_distance(input, target, num_classes=1)
        tensor([[0.2000]], dtype=torch.float64)

    Source: T. Heimann et al., "Comparison and evaluation of methods for liver segmentation from CT datasets", IEEE
    Transactions on Medical Imaging 28, 2009.
    """
    validation.choice("direction", direction, surfaces.DIRECTIONS)
    formulas: list[Formula] = [lambda distances, _: surfaces.average(distances, direction)]
    compare = surfaces.between(definition)
    return measure(input, target, formulas, num_classes, spacing, compare, classes, ignore_index)[0]


@validation.public
def surface_dice(
    input: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    tolerance: float | Sequence[float],
    spacing: float | Sequence[float] | None = None,
    definition: Definition = "voxels",
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the surface Dice at a tolerance (NSD) of each sample and class, (B, C), in [0, 1]

        NSD = (|{a: d(a, T) <= tolerance}| + |{b: d(b, P) <= tolerance}|) / (|P| + |T|)

    a and b are the elements of the boundaries P of the input and T of the target, and |.| adds their weights: 1 for
    voxels, the area for surface elements.

    Args:
        tolerance: 0 or more, in the unit of spacing; one number, or one for each class that is scored. Distances that
            exceed it by rounding alone (a millionth) are within.

    input, target: integer labels (B, *S) with 2 or 3 axes S. Other arguments and errors: see `hausdorff_distance`.

    Returns:
        (B, C), or one column for each entry of `classes`; float64, 1 is best. nan: the class is in neither map, or it
        is `ignore_index`; 0: it is in one of them only.

    Example:
        >>> import torch
        >>> input, target = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> input[0, 2:4, 2:4], target[0, 2:4, 2:6] = 1, 1
        >>> surface_dice(input, target, num_classes=1, tolerance=1)
        tensor([[0.8333]], dtype=torch.float64)

    Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", J.
    Medical Internet Research 23, 2021.
    """
    numbers = scored(num_classes, classes)
    tolerances = each_class("tolerance", tolerance, len(numbers))
    formulas: list[Formula] = [lambda distances, k: surfaces.surface_overlap(distances, tolerances[k])]
    compare = surfaces.between(definition)
    return measure(input, target, formulas, num_classes, spacing, compare, classes, ignore_index)[0]


# --- settings


def checked_percentile(percentile: float | None) -> float | None:
    """Return a user's percentile, None or a number in [0, 100]; raise ValueError or TypeError for another value."""
    percentile = validation.numbers_of(percentile)
    if percentile is not None:
        validation.number("percentile", percentile, 0, 100)
        if 0 < percentile < 1:  # nearly the least distance, which is no Hausdorff distance
            advice = f"Pass {100 * percentile:g} for the {100 * percentile:g}th percentile."
            validation.fail("percentile in percent", percentile, advice)
    return percentile


def scored(num_classes: int, classes: Sequence[int] | None) -> tuple[int, ...]:
    """Check a user's settings, and return the K labels that are scored; (1,) for masks, which have num_classes=1."""
    C = validation.num_classes(num_classes)
    numbers = tuple(range(C)) if classes is None else validation.class_numbers("classes", classes, C)
    return (1,) if C == 1 else numbers


def each_class(name: str, values: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Return `count` numbers, one for each class that is scored, from one for all classes or one for each.

    Raise ValueError or TypeError if they are not finite and >= 0, or not `count`. `name` is the user's argument.
    """
    plain = validation.numbers_of(values)
    numbers = plain if isinstance(plain, tuple) else (plain,) * count
    for value in numbers:
        validation.number(name, value, 0)
    if len(numbers) != count:
        advice = "Pass one number for all, or one for each class that is scored."
        validation.fail(f"{name} of {count} numbers", len(numbers), advice)
    return tuple(map(float, numbers))


# --- label maps -> scores


@untraced
def measure(
    input: Tensor,
    target: Tensor,
    formulas: Sequence[Formula],
    num_classes: int,
    spacing: float | Sequence[float] | None,
    compare: Compare,
    classes: Sequence[int] | None,
    ignore_index: int | None,
) -> Tensor:
    """Score each sample and class by each formula, from one comparison of the class's two masks.

    `compare` measures, for example, the distances between the boundaries of two masks; a formula makes a score of
    them. Label maps (B, *S) and settings come unchecked from the user: raise the errors of `hausdorff_distance`.

    Returns:
        (F, B, K) float64 on the device of `input`; nan where the class is in neither map or is ignored.
    """
    numbers = scored(num_classes, classes)
    input, target = integer_pair(input, target, ignore_index)
    if input.is_meta or target.is_meta:
        return torch.empty((len(formulas), len(input), len(numbers)), dtype=torch.float64, device="meta")
    maps = counting.label_maps(input.detach().cpu(), target.detach().cpu(), num_classes, ignore_index)
    C = max(num_classes, 2)  # a map of one class is a mask, with the labels 0 and 1
    return measure_maps(*maps, formulas, C, spacing, compare, numbers, ignore_index).to(input.device)


def integer_pair(input: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return two arrays of a user as tensors; raise TypeError or ValueError unless both are integers of one shape."""
    input, target = as_tensor(input), as_tensor(target)
    validation.are_tensors(input=input, target=target)
    counting.check_ignore_index(ignore_index)
    counting.check_maps("input", input, target)
    return input, target


@untraced
def measure_maps(
    input: Tensor,
    target: Tensor,
    formulas: Sequence[Formula],
    num_classes: int,
    spacing: float | Sequence[float] | None,
    compare: Compare,
    numbers: Sequence[int],
    ignore_index: int | None,
) -> Tensor:
    """Score the K labels `numbers` by each of F formulas, (F, B, K) float64; nan for a label that is in neither map.

    Maps are bool or integers (B, *S) on the CPU, of one shape; num_classes is 2 for masks; compare and formulas are
    those of `measure`. Raise ValueError unless S are 2 or 3 axes, spacing fits them, and labels are in [0, C).
    """
    sizes = validation.voxel_sizes(spacing, tuple(input.shape[1:]))
    # drop axes of length 1, the first ones first, as long as two axes remain
    axes = sorted(range(1, input.dim()), key=lambda axis: (input.shape[axis] == 1, -axis))
    axes = sorted(axes[: max(2, sum(n != 1 for n in input.shape[1:]))])
    if len(axes) not in (2, 3) or input.dim() < 3:
        advice = "Label maps have 2 or 3 axes beside the batch; for one image add it with unsqueeze(0)."
        validation.fail("input of shape (B, *S) with 2 or 3 axes S", tuple(input.shape), advice)
    shape = [input.shape[0], *(input.shape[axis] for axis in axes)]
    spacing_of_axes = tuple(sizes[axis - 1] for axis in axes)
    scores_FBK = np.full((len(formulas), shape[0], len(numbers)), np.nan)
    for b, (input_S, target_S) in enumerate(zip(input.reshape(shape), target.reshape(shape), strict=True)):
        pair = _LabelPair(input_S, target_S, num_classes, ignore_index)

        def score(k: int, b: int = b, pair: _LabelPair = pair) -> None:
            """Write the scores of the k-th class in sample b, on a thread of the pool."""
            masks = pair.masks(numbers[k])
            if masks is not None:
                comparison = compare(*masks, spacing_of_axes)
                scores_FBK[:, b, k] = [formula(comparison, k) for formula in formulas]

        voxels = {k: int(pair.voxels[label]) for k, label in enumerate(numbers) if label != ignore_index}
        threads = min(torch.get_num_threads(), len(voxels)) if sum(voxels.values()) > _ONE_THREAD else 1
        for_each(score, sorted(voxels, key=lambda k: -voxels[k]), threads)  # large classes first
    return torch.from_numpy(scores_FBK)


class _LabelPair:
    """Two label maps (*S) of one sample, and for each label the box that holds it in both.

    low, high: (C + 1, S) int64, the first and the last index of each box along each axis. voxels: (C + 1,) int64, the
    size of each box, 0 for an absent label. The last row is for labels outside [0, C). S stands for the number of axes.
    """

    def __init__(self, input: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> None:
        """Find the boxes in two maps (*S) of one shape; raise ValueError for a label that counts outside [0, C)."""
        self.input, self.target, self.ignore_index = input, target, ignore_index
        boxes_of_maps = [_boxes(labels.numpy(), num_classes) for labels in (input, target)]
        for name, labels, boxes in zip(("input", "target"), (input, target), boxes_of_maps, strict=True):
            if boxes[num_classes, 3] >= 0:  # there are labels outside [0, C): right only where they are ignored
                ignore = ignore_index if name == "target" else None
                counting.check_labels(name, labels, num_classes, ignore, counting.ignored(target, ignore_index))

        axes = slice(3 - input.ndim, 3)  # boxes have three axes, of which an image in 2-D lacks the first
        self.low = np.min([boxes[:, axes] for boxes in boxes_of_maps], 0)
        self.high = np.max([boxes[:, 3:][:, axes] for boxes in boxes_of_maps], 0)
        self.voxels = (self.high + 1 - self.low).clip(0).prod(1)

    def masks(self, label: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the masks of a label in [0, C) in input and target, bool, cut to its box with a margin of one voxel.

        None if no voxel that counts has the label in either map. `ignore_index` marks voxels that do not count.
        """
        if not self.voxels[label]:
            return None
        box = tuple(map(slice, self.low[label].tolist(), (self.high[label] + 1).tolist()))
        masks = np.zeros((2, *(n + 2 for n in self.input[box].shape)), np.bool_)
        inside = masks[(slice(None), *(slice(1, -1) for _ in box))]
        for mask, labels in zip(inside, (self.input, self.target), strict=True):
            np.equal(counting.plain_bools(labels[box].numpy()), label, out=mask)
        if self.ignore_index is not None:
            inside &= ~counting.ignored(self.target[box], self.ignore_index).numpy()
        return (masks[0], masks[1]) if masks.any() else None


def _boxes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the bounding box of each label of a map (*S) of bool or integers, (C + 1, 6) int64.

    A row is the lowest x, y, z of a label and its highest x, y, z, which are -1 if it is absent; the last row is for
    labels outside [0, C). A 2-D map has x = 0. Labels are read in the order of memory, in chunks along its first axis;
    at the end the columns are put back in the order of the map's axes.
    """
    boxes = np.repeat([[np.iinfo(np.int64).max] * 3 + [-1] * 3], num_classes + 1, 0)
    order = sorted(range(labels.ndim), key=lambda axis: -abs(labels.strides[axis]))
    in_memory_order = labels.transpose(order)[(None,) * (3 - labels.ndim)]  # three axes
    kernels = surfaces.kernels()
    find = _find_boxes if kernels is None else kernels.find_boxes
    rows = max(1, _CHUNK // max(1, math.prod(in_memory_order.shape[1:])))
    tasks = [(start, boxes.copy()) for start in range(0, len(in_memory_order), rows)]

    def search(task: tuple[int, np.ndarray]) -> None:
        """Write the boxes of one chunk, on a thread of the pool."""
        start, chunk_boxes = task
        chunk = counting.plain_bools(in_memory_order[start : start + rows])
        dtype = np.uint8 if chunk.dtype in (np.bool_, np.uint8) else np.int64
        find(chunk.astype(dtype, copy=False), chunk_boxes)
        chunk_boxes[chunk_boxes[:, 3] >= 0, ::3] += start  # along the axis that is cut into chunks

    for_each(search, tasks, min(torch.get_num_threads(), len(tasks)) if labels.size > _ONE_THREAD else 1)
    for _, chunk_boxes in tasks:
        np.minimum(boxes[:, :3], chunk_boxes[:, :3], out=boxes[:, :3])
        np.maximum(boxes[:, 3:], chunk_boxes[:, 3:], out=boxes[:, 3:])
    axes = np.arange(3)  # where each axis of the image is in the order of memory
    axes[3 - labels.ndim :] = 3 - labels.ndim + np.argsort(order)
    return np.concatenate([boxes[:, axes], boxes[:, 3 + axes]], 1)


def _find_boxes(labels: np.ndarray, boxes: np.ndarray) -> None:
    """Widen boxes (C + 1, 6), in place, to hold all labels (X, Y, Z): `surfaces_kernel.find_boxes` without Numba."""
    C = len(boxes) - 1
    for label in np.unique(labels).tolist():
        positions = np.argwhere(labels == label)
        box = boxes[label if 0 <= label < C else C]
        box[:3], box[3:] = np.minimum(box[:3], positions.min(0)), np.maximum(box[3:], positions.max(0))
