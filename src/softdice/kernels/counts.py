"""two label arrays -> how often each pair of labels occurs: the counting loops on the CPU.

Label maps are made of runs, so the bytes are first compared in blocks, which the compiler turns into a few vector
instructions; only where a block holds more than one pair is it counted voxel by voxel. Nothing here depends on the
number of classes. All sums are integers: any split over threads gives the same counts.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK, PART = 64, 16
"""Voxels that are compared at once, and in what pieces a mixed block is compared again."""


@njit(nogil=True, cache=True)
def count_bytes(prediction: np.ndarray, target: np.ndarray, table: np.ndarray) -> None:
    """uint8 labels (V,), (V,) -> table (2, 256, 256) uint32: table[0] + table[1] counts the pairs; V < 2^32.

    Two tables, because a processor waits when it adds twice in a row to the same address.
    """
    V = prediction.size
    whole = V - V % BLOCK
    for start in range(0, whole, BLOCK):
        p, t = prediction[start], target[start]
        mixed = np.uint8(0)
        for i in range(BLOCK):
            mixed |= (prediction[start + i] ^ p) | (target[start + i] ^ t)
        if mixed == 0:
            table[0, p, t] += np.uint32(BLOCK)
            continue
        for part in range(start, start + BLOCK, PART):
            p, t = prediction[part], target[part]
            mixed = np.uint8(0)
            for i in range(PART):
                mixed |= (prediction[part + i] ^ p) | (target[part + i] ^ t)
            if mixed == 0:
                table[1, p, t] += np.uint32(PART)
                continue
            for i in range(part, part + PART, 2):
                table[0, prediction[i], target[i]] += np.uint32(1)
                table[1, prediction[i + 1], target[i + 1]] += np.uint32(1)
    for i in range(whole, V):
        table[0, prediction[i], target[i]] += np.uint32(1)


@njit(nogil=True, cache=True)
def count_labels(prediction: np.ndarray, target: np.ndarray, ignored: int, counts: np.ndarray) -> None:
    """Labels of any integer type (V,), (V,) -> counts (3, C + 1) int64: voxels of both, of prediction, of target.

    The last column takes labels outside [0, C). Voxels with target == ignored are left out; `ignored` in [0, C) or
    outside, -1 - 2^62 for none. Runs of one pair are added once.
    """
    C = counts.shape[1] - 1
    last_p, last_t, run = np.int64(0), np.int64(0), np.int64(0)
    for i in range(prediction.size):
        p, t = np.int64(prediction[i]), np.int64(target[i])
        if p == last_p and t == last_t:
            run += 1
            continue
        if run > 0 and last_t != ignored:
            a = last_p if 0 <= last_p < C else C
            b = last_t if 0 <= last_t < C else C
            counts[1, a] += run
            counts[2, b] += run
            if last_p == last_t:
                counts[0, a] += run
        last_p, last_t, run = p, t, np.int64(1)
    if run > 0 and last_t != ignored:
        a = last_p if 0 <= last_p < C else C
        b = last_t if 0 <= last_t < C else C
        counts[1, a] += run
        counts[2, b] += run
        if last_p == last_t:
            counts[0, a] += run
