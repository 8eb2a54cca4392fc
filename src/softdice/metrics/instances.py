"""Count the voxels that each pair of objects shares in two maps in which each number is an object.

Such maps are made of runs along one axis. After one comparison of neighbours everything works on runs, which are fewer
than voxels by the width of an object. n and m are the largest numbers of the input and of the target, 0 is the
background, P a pair of objects that share voxels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from softdice import validation
from softdice.metrics.counting import plain_bools

_DENSE = 1 << 22
"""With up to this many possible pairs each has an entry in a table; with more they are sorted."""

_SMALL_NUMBERS = 1 << 22
"""Numbers below it are used as they are; larger ones are replaced by their rank."""


class Overlaps(NamedTuple):
    """Pairs (P,) of objects that share voxels: number in the input, number in the target, and how many; int64."""

    of_input: np.ndarray
    of_target: np.ndarray
    voxels: np.ndarray


def shared_voxels(one: np.ndarray, n: int, other: np.ndarray, m: int, voxels: np.ndarray | None = None) -> Overlaps:
    """Count the pairs of numbers above 0 that stand at one place in two arrays of one shape.

    Args:
        one, other: integers in [0, n] of the input, in [0, m] of the target.
        voxels: integers of the same shape, how many voxels each entry stands for; None for 1.

    Example:
        >>> shared_voxels(np.array([0, 1, 1, 2]), 2, np.array([1, 1, 1, 0]), 1)
        Overlaps(of_input=array([1]), of_target=array([1]), voxels=array([2]))
    """
    shared = (one != 0) & (other != 0)
    codes = one[shared].astype(np.int64) * (m + 1) + other[shared]
    weights = None if voxels is None else voxels[shared]
    if (n + 1) * (m + 1) <= _DENSE:
        table = np.bincount(codes, weights, minlength=1)
        present = np.flatnonzero(table != 0)  # flatnonzero is six times as fast for bools as for floats
        total = table[present]
    else:
        present, position = np.unique(codes, return_inverse=True)
        total = np.bincount(position, weights)
    return Overlaps(present // (m + 1), present % (m + 1), total.astype(np.int64))


def object_overlaps(
    input: np.ndarray, target: np.ndarray, ignore_index: int | None = None
) -> tuple[np.ndarray, np.ndarray, Overlaps]:
    """Measure the objects of two maps (*S), bool or integers of one shape, and how they overlap.

    Voxels where the target has `ignore_index` are in no object. Raise ValueError for a number below 0.

    Returns:
        Voxels of each object of the input, (n + 1,) int64, and of the target, (m + 1,) int64, indexed by the number of
        the object, and the pairs that share voxels. Objects keep the numbers of their map; if one of these is
        `_SMALL_NUMBERS` or more, their ranks take the place, so that the arrays stay short.
    """
    runs_input, runs_target, voxels = _runs(input, target)
    if ignore_index is not None:
        void = runs_target == ignore_index
        runs_input, runs_target = np.where(void, 0, runs_input), np.where(void, 0, runs_target)
    numbers, sizes = [], []
    for name, runs in (("input", runs_input), ("target", runs_target)):
        if runs.size and runs.min() < 0:
            advice = "0 is the background, and each object a number above it; name another with ignore_index."
            validation.fail(f"objects numbered from 1 on in {name}", int(runs.min()), advice)
        if runs.size and runs.max() >= _SMALL_NUMBERS:
            with_zero = np.append(runs, runs.dtype.type(0))  # so that 0 has rank 0
            runs = np.unique(with_zero, return_inverse=True)[1][:-1]
        numbers.append(runs.astype(np.int64))
        sizes.append(np.bincount(numbers[-1], voxels, minlength=1).astype(np.int64))
    shared = shared_voxels(numbers[0], len(sizes[0]) - 1, numbers[1], len(sizes[1]) - 1, voxels)
    return sizes[0], sizes[1], shared


def _runs(input: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split two maps (*S), along memory, into R runs in which neither changes.

    Return the numbers of the runs in the input and in the target, and their voxels, (R,) each.
    """
    order = sorted(range(target.ndim), key=lambda axis: -abs(target.strides[axis]))
    input_V, target_V = (plain_bools(array).transpose(order).reshape(-1) for array in (input, target))
    starts = np.flatnonzero((input_V[1:] != input_V[:-1]) | (target_V[1:] != target_V[:-1])) + 1
    starts = np.concatenate([np.zeros(min(1, input_V.size), np.int64), starts])
    return input_V[starts], target_V[starts], np.diff(starts, append=input_V.size)
