"""Where each number of a label map lies: which numbers are objects and no classes, and which are left and right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MOST_VOXELS = 2**21
"""Of a larger map every second voxel along each axis is looked at, or every third, and so on."""
LEAST_OBJECTS = 10
"""Numbers of an image from which on they may be those of objects."""
LOOKED_AT = 100
"""Numbers of an image of which it is seen whether each is one piece."""
ONE_PIECE = 0.9
"""Share of the numbers that are one piece, where numbers are objects."""
ACROSS = 0.9
"""Share of the image from which on a piece is a layer of it, and no object in it."""
IN_ORDER = 0.9
"""Rank correlation between number and first voxel of what was numbered in the order of its voxels."""
SCATTERED = 0.5
"""Variance of the places of one number in many images, as a share of that of all numbers: 1 where it means nothing."""
AGREED = 0.9
"""Share of the images in which one class lies left of another, where left and right are two classes."""


@dataclass(frozen=True)
class Places:
    """Where the numbers of one label map lie.

    Args:
        numbers: (n,), ascending. centre, deviation: (n, axes), in voxels.
        first: (n,) index of the first voxel. shape: of the map.
        pieces: share of the numbers that are one piece, nan where that was not looked at.
    """

    numbers: np.ndarray
    centre: np.ndarray
    deviation: np.ndarray
    first: np.ndarray
    shape: tuple[int, ...]
    pieces: float

    def without(self, *numbers: int | None) -> Places:
        """Return the places of all other numbers."""
        kept = ~np.isin(self.numbers, [number for number in numbers if number is not None])
        parts = {name: getattr(self, name)[kept] for name in ("numbers", "centre", "deviation", "first")}
        return replace(self, **parts)


def places(label: np.ndarray) -> Places:
    """Return where the numbers of a label map lie.

    Example:
        >>> places(np.array([[0, 0, 7], [0, 0, 7]])).centre.tolist()
        [[0.5, 0.5], [0.5, 2.0]]
    """
    step = math.ceil((label.size / MOST_VOXELS) ** (1 / label.ndim))
    label = label[(slice(None, None, step),) * label.ndim]
    which = _ranked(label)
    n = int(which.max()) + 1
    first = np.empty(n, np.int64)
    first[which.ravel()[::-1]] = np.arange(label.size)[::-1]  # the last one written is the first one
    numbers = label.ravel()[first]
    centre, deviation = np.empty((n, label.ndim)), np.empty((n, label.ndim))
    for axis, size in enumerate(label.shape):
        where = np.arange(size).reshape([-1 if a == axis else 1 for a in range(label.ndim)])
        counts = np.bincount((which * size + where).ravel(), minlength=n * size).reshape(n, size)
        voxels = counts.sum(1)
        centre[:, axis] = counts @ np.arange(size) / voxels
        deviation[:, axis] = np.sqrt(np.maximum(counts @ np.arange(size) ** 2 / voxels - centre[:, axis] ** 2, 0))
    pieces = _one_piece(which) if n > LEAST_OBJECTS else float("nan")
    return Places(numbers, centre, deviation, first, label.shape, pieces)


def _ranked(label: np.ndarray) -> np.ndarray:
    """Return the rank of the number of each voxel among the numbers of a label map."""
    lowest, highest = int(label.min()), int(label.max())
    if highest - lowest >= MOST_VOXELS or highest >= 2**63:
        return np.unique(label, return_inverse=True)[1].reshape(label.shape)
    above = label.astype(np.int64) - lowest  # no sorting, which takes longer than reading a picture
    return (np.cumsum(np.bincount(above.ravel()) > 0) - 1)[above]


def _one_piece(which: np.ndarray) -> float:
    """Return the share of the numbers 1, 2, ... that are one piece each, corners touching."""
    from scipy import ndimage

    boxes = ndimage.find_objects(which.astype(np.int32))
    step = -(-len(boxes) // LOOKED_AT)
    corners = np.ones([3] * which.ndim)
    whole = [
        ndimage.label(which[box] == number, corners)[1] == 1
        for number, box in list(enumerate(boxes, 1))[::step]
        if box is not None
    ]
    return float(np.mean(whole))


def are_objects(images: Sequence[Places]) -> bool:
    """Return whether the numbers of label maps, without that of the background, are objects rather than classes.

    Most are one piece each that does not cross the image, at least ten in an image, and say nothing of what they are:
    they are numbered in the order of their voxels, or most occur in one image alone, or each map counts from 1 and a
    number lies anywhere.
    """
    many = [image for image in images if len(image.numbers) >= LEAST_OBJECTS]
    if not many or np.nanmean([image.pieces for image in many]) < ONE_PIECE:
        return False
    widths = [(image.deviation / image.shape).max(1) * 12**0.5 for image in many]  # 1 of a layer from edge to edge
    if np.mean(np.concatenate(widths) > ACROSS) > 0.5:
        return False
    ranks = [np.corrcoef(np.argsort(np.argsort(image.first)), np.arange(len(image.first)))[0, 1] for image in many]
    numbers, times = np.unique(np.concatenate([image.numbers for image in images]), return_counts=True)
    counted = np.mean([image.numbers[0] == 1 and image.numbers[-1] <= 1.5 * len(image.numbers) for image in many])
    return bool(
        np.median(ranks) >= IN_ORDER
        or (len(images) > 2 and np.mean(times == 1) > 0.5)
        or (counted > 0.5 and _scatter(images, numbers[times > 1]) >= SCATTERED)
    )


def _scatter(images: Sequence[Places], numbers: np.ndarray) -> float:
    """Return the variance of the places of one number, as a share of that of all numbers."""
    every = np.concatenate([image.centre / image.shape for image in images])
    which = np.concatenate([image.numbers for image in images])
    within, degrees = 0.0, 0
    for number in numbers:
        centres = every[which == number]
        within += float(((centres - centres.mean(0)) ** 2).sum())
        degrees += len(centres) - 1
    return within / degrees / max(float(every.var(0).sum()), 1e-12) if degrees else 0.0


def exchanged(images: Sequence[Places], axis: int) -> tuple[int, int] | None:
    """Return two numbers that exchange places when images are mirrored along an axis, the first one before the second.

    They stand side by side along it, in one order in nearly all images that have both; or no image has both, and one
    lies in the first half of its images, the other in the second.
    """
    numbers = np.unique(np.concatenate([image.numbers for image in images])) if images else np.empty(0, int)
    n = len(numbers)
    both, ordered = np.zeros((n, n)), np.zeros((n, n))
    single, low, high = np.zeros(n), np.zeros(n), np.zeros(n)
    for image in images:
        here = np.searchsorted(numbers, image.numbers)
        gaps = image.centre[None] - image.centre[:, None]  # (a, b): from a to b
        along = gaps[..., axis]
        across = np.abs(np.delete(gaps, axis, -1)).max(-1, initial=0)
        wide = image.deviation[:, axis]
        both[np.ix_(here, here)] += 1
        ordered[np.ix_(here, here)] += (along > wide[None] + wide[:, None]) & (along > across)
        middle = (image.shape[axis] - 1) / 2
        single[here] += 1
        low[here] += image.centre[:, axis] + wide < middle
        high[here] += image.centre[:, axis] - wide > middle
    sides = np.logical_and.outer(low >= AGREED * single, high >= AGREED * single)
    pairs = ((both > 0) & (ordered >= AGREED * both)) | ((both == 0) & sides)
    if not pairs.any():
        return None
    a, b = np.unravel_index(int(np.argmax(np.where(pairs, 1 + both, 0))), pairs.shape)
    return int(numbers[a]), int(numbers[b])
