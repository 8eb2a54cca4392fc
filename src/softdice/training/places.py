"""Where each number of a label map lies, to tell whether numbers are objects (instances), and which are left and right.

A number is a label value of a map; n is how many distinct ones a map has. A number is one piece if its voxels are one
connected component, where corners touch. In shapes *S are the axes of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MOST_VOXELS = 2**21
"""Voxels of a map that are looked at, at most: every second one along each axis, or every third, and so on."""
LEAST_OBJECTS = 10
"""Fewest numbers in an image that may number objects."""
LOOKED_AT = 100
"""Numbers of an image that are checked for being one piece, at most twice as many."""
ONE_PIECE = 0.9
"""Share of the numbers that are one piece, where numbers are objects."""
ACROSS = 0.9
"""Share of the image from which on a piece is a layer of it, and no object in it."""
IN_ORDER = 0.9
"""Rank correlation between number and first voxel of what was numbered in the order of its voxels."""
SCATTERED = 0.5
"""Least variance of one number's centres over the images, as a share of all centres' variance: about 1 for objects."""
AGREED = 0.9
"""Share of the images in which one class lies left of another, where left and right are two classes."""


@dataclass(frozen=True)
class Places:
    """Where the numbers of one label map lie, after it was thinned out as `places` says.

    Args:
        numbers: (n,), ascending. centre, deviation: (n, axes) mean and standard deviation of the voxels, in voxels.
        first: (n,) index of the first voxel in the flat map. shape: of the map.
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
    """Return where the numbers of a label map (*S), bool or integers, lie.

    A large map is thinned out first: every k-th voxel along each axis, so that at most about `MOST_VOXELS` remain.

    Example:
        >>> places(np.array([[0, 0, 7], [0, 0, 7]])).centre.tolist()
        [[0.5, 0.5], [0.5, 2.0]]
    """
    step = math.ceil((label.size / MOST_VOXELS) ** (1 / label.ndim))
    label = label[(slice(None, None, step),) * label.ndim]
    ranks = _ranked(label)
    n = int(ranks.max()) + 1
    first = np.empty(n, np.int64)
    first[ranks.ravel()[::-1]] = np.arange(label.size)[::-1]  # backwards: the value that stays is the first index
    centre, deviation = np.empty((n, label.ndim)), np.empty((n, label.ndim))
    for axis, size in enumerate(label.shape):
        coordinates = np.arange(size)
        along = coordinates.reshape([-1 if a == axis else 1 for a in range(label.ndim)])
        # voxels of each number (rows) at each coordinate of the axis (columns)
        counts = np.bincount((ranks * size + along).ravel(), minlength=n * size).reshape(n, size)
        voxels = counts.sum(1)
        centre[:, axis] = counts @ coordinates / voxels
        # sqrt(E[x^2] - E[x]^2)
        deviation[:, axis] = np.sqrt(np.maximum(counts @ coordinates**2 / voxels - centre[:, axis] ** 2, 0))
    pieces = _one_piece(ranks) if n > LEAST_OBJECTS else math.nan
    return Places(label.ravel()[first], centre, deviation, first, label.shape, pieces)


def _ranked(label: np.ndarray) -> np.ndarray:
    """Return for each voxel of a label map (*S) the rank of its number among all, 0 to n - 1, (*S) int64."""
    lowest, highest = int(label.min()), int(label.max())
    if highest - lowest >= MOST_VOXELS or highest >= 2**63:
        return np.unique(label, return_inverse=True)[1].reshape(label.shape)
    above = label.astype(np.int64) - lowest  # no sorting, which takes longer than reading a picture
    return (np.cumsum(np.bincount(above.ravel()) > 0) - 1)[above]


def _one_piece(ranks: np.ndarray) -> float:
    """Return the share of ranks that are one piece each, in a map (*S) of ranks.

    Rank 0, the lowest number, is left out as the background; of many others a sample is checked.
    """
    from scipy import ndimage

    boxes = [*enumerate(ndimage.find_objects(ranks.astype(np.int32)), 1)]
    corners = np.ones([3] * ranks.ndim)
    looked_at = boxes[:: math.ceil(len(boxes) / LOOKED_AT)]
    return float(np.mean([ndimage.label(ranks[box] == rank, corners)[1] == 1 for rank, box in looked_at]))


def are_objects(images: Sequence[Places]) -> bool:
    """Return whether numbers are objects rather than classes, from the places in each label map, without background.

    They are if an image has at least ten, most are one piece each, most do not cross the image, and one of three signs
    says that a number has no meaning: (a) numbers follow the order of their first voxels; (b) most occur in one image
    alone; (c) most maps count from 1, and one number lies anywhere.
    """
    many = [image for image in images if len(image.numbers) >= LEAST_OBJECTS]
    if not many or np.nanmean([image.pieces for image in many]) < ONE_PIECE:
        return False
    # a uniform layer from edge to edge has deviation 1 / sqrt(12) of the size: width 1
    widths = [(image.deviation / image.shape).max(1) * 12**0.5 for image in many]
    if np.mean(np.concatenate(widths) > ACROSS) > 0.5:
        return False
    # rank correlation of number and first voxel
    ranks = [np.corrcoef(np.argsort(np.argsort(image.first)), np.arange(len(image.first)))[0, 1] for image in many]
    # each number, and how many maps have it
    numbers, times = np.unique(np.concatenate([image.numbers for image in images]), return_counts=True)
    # share of the maps that count from 1 on with few gaps
    counted = np.mean([image.numbers[0] == 1 and image.numbers[-1] <= 1.5 * len(image.numbers) for image in many])
    return bool(
        np.median(ranks) >= IN_ORDER  # (a)
        or (len(images) > 2 and np.mean(times == 1) > 0.5)  # (b)
        or (counted > 0.5 and _scatter(images, numbers[times > 1]) >= SCATTERED)  # (c)
    )


def _scatter(images: Sequence[Places], numbers: np.ndarray) -> float:
    """Return the variance of centres within a number, pooled over `numbers`, as a share of the variance of all centres.

    It is about 1 if a number does not say where it lies, and 0 without numbers. Each occurs in at least two images.
    """
    all_centres = np.concatenate([image.centre / image.shape for image in images])
    all_numbers = np.concatenate([image.numbers for image in images])
    within, degrees = 0.0, 0
    for number in numbers:
        centres = all_centres[all_numbers == number]
        within += float(((centres - centres.mean(0)) ** 2).sum())
        degrees += len(centres) - 1
    return within / degrees / max(float(all_centres.var(0).sum()), 1e-12) if degrees else 0.0


def exchanged(images: Sequence[Places], axis: int) -> tuple[int, int] | None:
    """Return two numbers that change places when images are mirrored along `axis`, the lower one first, or None.

    They lie side by side along the axis, in one order in nearly all images that have both. Or no image has both; then
    one lies in the first half along the axis in nearly all of its images, the other in the second. If several pairs do,
    the one in most images is returned.
    """
    numbers = np.unique(np.concatenate([image.numbers for image in images])) if images else np.empty(0, int)
    n = len(numbers)
    both, ordered = np.zeros((2, n, n))  # images with numbers a and b, and those in which a lies before b
    images_with, low, high = np.zeros((3, n))  # images with a number, and those with it in the first, the second half
    for image in images:
        here = np.searchsorted(numbers, image.numbers)
        gaps = image.centre[None] - image.centre[:, None]  # (a, b): from a to b
        along = gaps[..., axis]
        across = np.abs(np.delete(gaps, axis, -1)).max(-1, initial=0)  # largest distance along the other axes
        wide = image.deviation[:, axis]
        both[np.ix_(here, here)] += 1
        ordered[np.ix_(here, here)] += (along > wide[None] + wide[:, None]) & (along > across)
        middle = (image.shape[axis] - 1) / 2
        images_with[here] += 1
        low[here] += image.centre[:, axis] + wide < middle
        high[here] += image.centre[:, axis] - wide > middle
    sides = np.logical_and.outer(low >= AGREED * images_with, high >= AGREED * images_with)
    pairs = ((both > 0) & (ordered >= AGREED * both)) | ((both == 0) & sides)
    if not pairs.any():
        return None
    a, b = np.unravel_index(int(np.argmax(np.where(pairs, 1 + both, 0))), pairs.shape)  # 1: `both` may be 0
    return int(numbers[a]), int(numbers[b])
