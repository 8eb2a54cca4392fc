"""Numba loops that count how often each pair of labels occurs in two arrays.

Label maps are made of runs, so bytes are first compared in blocks, which takes a few vector instructions; only a block
that holds more than one pair is counted in smaller parts. Where most neighbours differ (noise), comparing is wasted:
there each pair is added to a small table. Labels are read eight at a time, because a processor makes few loads and
about one addition to memory per cycle; separate histograms of prediction, target and agreement would take three
additions per voxel. The time does not depend on the number of classes. All sums are integers, so that any split over
threads gives the same counts. V is the number of voxels; a pair is the label of the prediction and that of the target.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE, BLOCK, PART = 1024, 64, 8
"""Voxels of a tile, which is taken for runs or for noise as a whole; of a block, whose voxels are compared at once; and
of a part of a block that holds more than one pair."""

SAMPLES, EQUAL_SAMPLES = 16, 12
"""Places of a tile where neighbours are compared, and how many of them must be equal for a tile of runs."""

HALF = 128
"""Noise is counted in the small table if all labels of the tile are below this."""

_FOUR_COPIES = 0x0001000100010001
"""Times a pair, this is four copies of it side by side."""
_TOP_BITS = 0x8080808080808080
"""The bits of eight labels that are set in labels from HALF on."""


def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of zeros that `count_bytes` adds to, uint32, 576 KiB: small (HALF^2,) and wide (2, 2^16)."""
    return np.zeros(HALF * HALF, np.uint32), np.zeros((2, 1 << 16), np.uint32)


def total(small: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """Return how often each pair occurred, (256, 256) int64 by prediction and target, from `count_bytes`'s tables."""
    counts = wide.sum(0, dtype=np.int64).reshape(256, 256)
    counts[:HALF, :HALF] += small.reshape(HALF, HALF)
    return counts


@njit(nogil=True, cache=True)
def count_bytes(prediction: np.ndarray, target: np.ndarray, small: np.ndarray, wide: np.ndarray) -> None:
    """Count each pair of labels that two maps, contiguous uint8 (V,), have at one voxel, in the tables of `tables`.

    The pair (p, t) adds 1 to small[128 p + t] or to wide[0 or 1, 256 p + t]; `total` adds the three up. `wide` has two
    rows, used in turn, because a processor waits when it adds to one address twice in a row. The entries are uint32:
    all calls with the same tables may count fewer than 2^32 voxels.
    """
    V = prediction.size
    pairs = np.empty(TILE, np.uint16)
    fours = pairs.view(np.uint64)  # four pairs as one number
    one, two = wide[0], wide[1]
    tiles_end = V - V % TILE
    # eight labels as one number
    eights_p, eights_t = prediction[:tiles_end].view(np.uint64), target[:tiles_end].view(np.uint64)
    for start in range(0, tiles_end, TILE):
        equal = 0  # 1. sample neighbours: is the tile made of runs, or is it noise?
        for i in range(start, start + TILE, TILE // SAMPLES):
            equal += (prediction[i] == prediction[i + 1]) & (target[i] == target[i + 1])
        if equal < EQUAL_SAMPLES:  # 2. noise with labels below HALF: voxel by voxel in `small`
            bits_set = np.uint64(0)
            for i in range(start // 8, (start + TILE) // 8):
                bits_set |= eights_p[i] | eights_t[i]
            if bits_set & np.uint64(_TOP_BITS) == 0:
                for i in range(start // 8, (start + TILE) // 8):
                    p_8, t_8 = eights_p[i], eights_t[i]
                    for k in range(8):  # the compiler unrolls it
                        shift = np.uint64(8 * k)
                        p_1, t_1 = (p_8 >> shift) & np.uint64(255), (t_8 >> shift) & np.uint64(255)
                        small[(p_1 << np.uint64(7)) | t_1] += np.uint32(1)
                continue
        for block in range(start, start + TILE, BLOCK):  # 3. runs: a block of one pair at once, else its parts
            p, t = prediction[block], target[block]
            if prediction[block + BLOCK - 1] == p and target[block + BLOCK - 1] == t:
                mixed = np.uint8(0)
                for i in range(BLOCK):
                    different = np.uint8(prediction[block + i] ^ p) | np.uint8(target[block + i] ^ t)
                    mixed = np.uint8(mixed | np.uint8(different))  # without the casts Numba widens to 64 bits
                if mixed == 0:
                    one[(np.uint16(p) << np.uint16(8)) | np.uint16(t)] += np.uint32(BLOCK)
                    continue
            for i in range(BLOCK):
                pairs[i] = (np.uint16(prediction[block + i]) << np.uint16(8)) | np.uint16(target[block + i])
            for part in range(0, BLOCK, PART):
                pair = pairs[part]
                run = np.uint64(pair) * np.uint64(_FOUR_COPIES)
                if fours[part // 4] == run and fours[part // 4 + 1] == run:
                    two[pair] += np.uint32(PART)
                    continue
                for i in range(part, part + PART, 2):
                    one[pairs[i]] += np.uint32(1)
                    two[pairs[i + 1]] += np.uint32(1)
    for i in range(tiles_end, V):  # 4. the voxels after the last tile
        one[(np.uint16(prediction[i]) << np.uint16(8)) | np.uint16(target[i])] += np.uint32(1)


@njit(nogil=True, cache=True)
def gather(source: np.ndarray, rows: np.ndarray) -> None:
    """Copy `source` (X, Y, Z), contiguous along Y, to `rows` (X, Y, Z), contiguous along Z, of the same dtype.

    It is copied in squares that fit in the first-level cache, and whose columns are whole cache lines of the source.
    """
    X, Y, Z = source.shape
    square = np.empty((BLOCK, BLOCK), source.dtype)
    for x in range(X):
        for y_start in range(0, Y, BLOCK):
            for z_start in range(0, Z, BLOCK):
                part = source[x, y_start : y_start + BLOCK, z_start : z_start + BLOCK]
                copied = rows[x, y_start : y_start + BLOCK, z_start : z_start + BLOCK]
                for z in range(part.shape[1]):
                    for y in range(part.shape[0]):
                        square[y, z] = part[y, z]
                for y in range(part.shape[0]):
                    for z in range(part.shape[1]):
                        copied[y, z] = square[y, z]


@njit(nogil=True, cache=True)
def count_labels(prediction: np.ndarray, target: np.ndarray, skip: bool, ignored: int, counts: np.ndarray) -> None:
    """Count the voxels of each class in labels (V,), (V,) of any integer type; add them to counts, (3, C + 1) int64.

    The rows of counts: voxels where both have the class, prediction has it, target has it. The last column takes labels
    outside [0, C). With `skip`, voxels with target == ignored are left out, even if that is a class.
    """
    C, V = counts.shape[1] - 1, prediction.size
    p, t, run = np.int64(0), np.int64(0), np.int64(0)  # run: neighbours with the same pair, which are added at once
    last_p, last_t = p, t
    for i in range(V + 1):  # once more than there are voxels, to add the last run
        if i < V:
            p, t = np.int64(prediction[i]), np.int64(target[i])
            if p == last_p and t == last_t:
                run += 1
                continue
        if run > 0 and not (skip and last_t == ignored):
            column_p = last_p if 0 <= last_p < C else C
            column_t = last_t if 0 <= last_t < C else C
            counts[1, column_p] += run
            counts[2, column_t] += run
            if last_p == last_t:
                counts[0, column_p] += run
        last_p, last_t, run = p, t, np.int64(1)
