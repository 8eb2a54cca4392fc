"""Loops over the probabilities of one sample and class on the CPU, for `softdice.decisions`.

They index the array: LLVM does not vectorise a loop over the array itself. A row is prob_V, the probabilities of V
voxels, float32 or float64, and bits_V, the same memory as int32 or int64. Values need not be in [0, 1]: the caller
checks the least and the largest bits afterwards. A cut is a threshold; the mask of a cut is the voxels above it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 1024
"""Number of values that are summed and then copied while they are in the first-level cache."""
LIKELY = 0.25
"""The first cut. Most of the best cuts lie above it, and few probabilities of a network's output do."""

TINY = 1e-300
"""Replaces a denominator of 0."""

LANES = {"reassoc", "contract", "nsz"}
"""LLVM's fast-math flags that let a sum be taken in the lanes of a SIMD register; NaN and infinity keep their meaning.
"""


@njit(nogil=True, fastmath=LANES)
def _total(prob_V: np.ndarray) -> float:
    """Return the sum of the values."""
    total = 0.0
    for i in range(prob_V.size):
        total += prob_V[i]
    return total


@njit(nogil=True)
def _range(bits_V: np.ndarray) -> tuple[int, int]:
    """Return the least and the largest of the bits of some floats, as signed integers.
    Bits of floats >= 0 are in the order of the floats; those of negative floats are negative; those of a NaN
    are negative with its sign set, else above all others."""
    least, most = bits_V[0], bits_V[0]
    for i in range(bits_V.size):
        least = bits_V[i] if bits_V[i] < least else least
        most = bits_V[i] if bits_V[i] > most else most
    return least, most


@njit(nogil=True)
def _select(prob_V: np.ndarray, bits_V: np.ndarray, cut: float, selected: np.ndarray) -> tuple[int, float, int, int]:
    """Copy the values above `cut` to the front of `selected`, and return (number of values above, sum of all values,
    least bits, largest bits). To need no branch, write each value, and advance only if it is above the cut: the next
    one overwrites it if not. `selected` is (V + 1) of the dtype of prob_V, since the last value may end there."""
    number, total, least, most = 0, 0.0, bits_V[0], bits_V[0]
    for start in range(0, prob_V.size, BLOCK):
        block = prob_V[start : start + BLOCK]
        total += _total(block)
        block_least, block_most = _range(bits_V[start : start + BLOCK])
        least, most = min(least, block_least), max(most, block_most)
        for i in range(block.size):
            selected[number] = block[i]
            number += block[i] > cut
    return number, total, least, most


@njit(nogil=True, fastmath=LANES)
def _above(prob_V: np.ndarray, cut: float) -> tuple[float, int]:
    """Return (sum, number) of the values above `cut`."""
    total, number = 0.0, 0
    for i in range(prob_V.size):
        total += prob_V[i] if prob_V[i] > cut else 0.0
        number += prob_V[i] > cut
    return total, number


@njit(nogil=True, cache=True)
def cut(prob_V: np.ndarray, bits_V: np.ndarray, present: bool, selected: np.ndarray) -> tuple[float, int, int]:
    """Return (cut, least bits, largest bits): the best cut of a row, or 1 if no value is above 0.5 and not `present`.

    The expected Dice of the mask of a cut is 2 sum(p above it) / (number above it + sum of all p). Half of that is a
    better cut, until it stays the same: Dinkelbach's iteration. The first cut is LIKELY, or a lower one. From there on
    cuts grow, so that only the values above the first one are read again.

    present: whether the class is known to be there. selected: scratch memory, (V + 1) of the dtype of prob_V.
    """
    number, total, least, most = _select(prob_V, bits_V, LIKELY, selected)
    _, number_above = _above(selected[:number], 0.5)  # they are all selected: LIKELY is lower
    if number_above == 0 and not present:
        return 1.0, least, most
    sum_above, number_above = _above(selected[:number], LIKELY)
    value = sum_above / max(number_above + total, TINY)  # half the expected Dice of the mask of LIKELY
    if value < LIKELY:  # the best cut may be lower than LIKELY: start from this one
        number = _select(prob_V, bits_V, value, selected)[0]
    last = -1.0
    while value > last:
        sum_above, number_above = _above(selected[:number], value)
        last, value = value, max(value, sum_above / max(number_above + total, TINY))
    return value, least, most
