"""Loops over the probabilities of one sample and class on the CPU, for `softdice.decisions`.

They go by index: a loop over the array itself is not turned into vector instructions.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 1024
"""Values that are summed and then copied while they are in the nearest cache."""


LIKELY = 0.25
"""A cut that most of the best ones lie above, and few voxels of a network."""

TINY = 1e-300
"""In the place of a denominator of 0."""

LANES = {"reassoc", "contract", "nsz"}
"""How sums may be taken: in lanes."""


@njit(nogil=True, fastmath=LANES)
def _total(prob_V: np.ndarray) -> float:
    """Return the sum of some values."""
    total = 0.0
    for i in range(prob_V.size):
        total += prob_V[i]
    return total


@njit(nogil=True)
def _range(bits_V: np.ndarray) -> tuple[int, int]:
    """Return the least and the largest bits of some floats, as signed integers.

    Those of floats >= 0 are in the order of the floats, those of others are negative, those of a NaN beyond all.
    """
    least, most = bits_V[0], bits_V[0]
    for i in range(bits_V.size):
        least = bits_V[i] if bits_V[i] < least else least
        most = bits_V[i] if bits_V[i] > most else most
    return least, most


@njit(nogil=True)
def _taken(prob_V: np.ndarray, bits_V: np.ndarray, cut: float, taken_V: np.ndarray) -> tuple[int, float, int, int]:
    """Copy the values above `cut` to `taken_V`, which has one place more than there are values.

    Returns their number, the sum of all values, and the least and the largest of their bits.
    """
    number, total, least, most = 0, 0.0, bits_V[0], bits_V[0]
    for start in range(0, prob_V.size, BLOCK):
        block = prob_V[start : start + BLOCK]
        total += _total(block)
        block_least, block_most = _range(bits_V[start : start + BLOCK])
        least, most = min(least, block_least), max(most, block_most)
        for i in range(block.size):
            taken_V[number] = block[i]
            number += block[i] > cut
    return number, total, least, most


@njit(nogil=True, fastmath=LANES)
def _above(prob_V: np.ndarray, cut: float) -> tuple[float, int]:
    """Return the sum and the number of the values above `cut`."""
    total, number = 0.0, 0
    for i in range(prob_V.size):
        total += prob_V[i] if prob_V[i] > cut else 0.0
        number += prob_V[i] > cut
    return total, number


@njit(nogil=True, cache=True)
def cut(prob_V: np.ndarray, bits_V: np.ndarray, present: bool, taken_V: np.ndarray) -> tuple[float, int, int]:
    """Return the threshold E / 2 of a row, or 1 where nothing is above 0.5 and the class is not known to be present.

    Each step raises the cut, so that a voxel below the first one need not be looked at again.

    Args:
        bits_V: the bits of the values. taken_V: room for one value more than there are.

    Returns:
        The cut; the least and the largest of the bits, for the check of the range.
    """
    number, total, least, most = _taken(prob_V, bits_V, LIKELY, taken_V)
    sum_above, number_above = _above(taken_V[:number], 0.5)
    if number_above == 0 and not present:
        return 1.0, least, most
    sum_above, number_above = _above(taken_V[:number], LIKELY)
    value = sum_above / max(number_above + total, TINY)
    if value < LIKELY:
        number = _taken(prob_V, bits_V, value, taken_V)[0]
    last = -1.0
    while value > last:
        sum_above, number_above = _above(taken_V[:number], value)
        last, value = value, max(value, sum_above / max(number_above + total, TINY))
    return value, least, most
