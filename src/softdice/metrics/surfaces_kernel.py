"""label maps, masks -> where each label lies, boundary elements, distances between them: the loops on the CPU.

Distances are exact and need no more than the elements ask for. Along the last axis two scans say how far the next
element of the other boundary is. Along the axis before it every row takes the minimum over the rows around it, row by
row outwards, until these are too far away to change anything; whole rows at once, which the compiler turns into vector
instructions. Along the first axis the same is done for the elements alone. Where the boundaries are d voxels apart that
is some d steps per voxel, with a few voxels per instruction.

X, Y, Z are axes; a 2-D image has X = 1.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64
"""Labels that are compared at once."""

_INF = np.inf
_LEAST = {"nnan", "nsz", "reassoc"}  # a maximum is a vector instruction only where no nan is looked for


@njit(nogil=True, cache=True)
def find_boxes(labels: np.ndarray, boxes: np.ndarray) -> None:
    """labels (X, Y, Z), uint8 or int64 -> boxes (C + 1, 6): the lowest and highest index of each label along each axis.

    The last row takes labels outside [0, C). A label that does not occur keeps what stands in its row.
    """
    C = boxes.shape[0] - 1
    X, Y, Z = labels.shape
    for x in range(X):
        for y in range(Y):
            row = labels[x, y]
            z = 0
            while z < Z:
                label, end = row[z], z + 1
                while end + BLOCK <= Z:
                    unlike = row[end] ^ label
                    for k in range(1, BLOCK):
                        unlike |= row[end + k] ^ label
                    if unlike != 0:
                        break
                    end += BLOCK
                while end < Z and row[end] == label:
                    end += 1
                box = boxes[np.int64(label) if 0 <= label < C else C]
                box[0], box[1], box[2] = min(box[0], x), min(box[1], y), min(box[2], z)
                box[3], box[4], box[5] = max(box[3], x), max(box[4], y), max(box[5], end - 1)
                z = end


@njit(nogil=True, cache=True)
def boundary_voxels(mask: np.ndarray, codes: np.ndarray) -> int:
    """mask (X + 2, Y + 2, Z + 2) of 0 and 1 -> codes (X, Y, Z): 1 where a voxel or one that shares a face is 0.

    Returns how many there are.
    """
    X, Y, Z = codes.shape
    count = 0
    for x in range(X):
        for y in range(Y):
            own, code = mask[x + 1, y + 1], codes[x, y]
            low, high = mask[x, y + 1], mask[x + 2, y + 1]
            left, right = mask[x + 1, y], mask[x + 1, y + 2]
            number = 0
            for z in range(Z):
                inside = own[z] & own[z + 2] & low[z + 1] & high[z + 1] & left[z + 1] & right[z + 1]
                code[z] = own[z + 1] & (inside ^ np.uint8(1))
                number += code[z]
            count += number
    return count


@njit(nogil=True, cache=True)
def surface_elements(mask: np.ndarray, codes: np.ndarray) -> int:
    """mask (X + 1, Y + 1, Z + 1) of 0 and 1 -> codes (X, Y, Z) of the corners between voxels; how many are elements."""
    X, Y, Z = codes.shape
    count = 0
    for x in range(X):
        for y in range(Y):
            a, b, c, d = mask[x, y], mask[x, y + 1], mask[x + 1, y], mask[x + 1, y + 1]
            code = codes[x, y]
            number = 0
            for z in range(Z):
                pair = a[z] << 7 | a[z + 1] << 6 | b[z] << 5 | b[z + 1] << 4
                both = np.uint8(pair | c[z] << 3 | c[z + 1] << 2 | d[z] << 1 | d[z + 1])
                code[z] = both
                number += (both != 0) & (both != 255)
            count += number
    return count


@njit(nogil=True, cache=True, fastmath=_LEAST)
def squares(codes: np.ndarray, spacing: np.ndarray, square: np.ndarray) -> None:
    """codes (X, Y, Z) -> squared distance to the nearest element within the same x, (X, Y, Z) float64; inf for none."""
    X, Y, Z = codes.shape
    along = np.empty((Y, Z))
    some = np.empty(Y, np.bool_)
    step_y, step_z = spacing[1], spacing[2]
    for x in range(X):
        for y in range(Y):
            code, row = codes[x, y], along[y]
            some[y] = False
            away = -1
            for z in range(Z):
                if code[z] != 0 and code[z] != 255:
                    away, some[y] = 0, True
                elif away >= 0:
                    away += 1
                row[z] = away * step_z if away >= 0 else _INF
            if some[y]:
                away = -1
                for z in range(Z - 1, -1, -1):
                    if row[z] == 0.0:
                        away = 0
                    elif away >= 0:
                        away += 1
                        row[z] = min(row[z], away * step_z)
                    row[z] *= row[z]
        for y in range(Y):
            best = square[x, y]
            furthest = 0.0
            for z in range(Z):
                best[z] = along[y, z]
                furthest = max(furthest, best[z])
            for away in range(1, max(y, Y - 1 - y) + 1):
                cost = (away * step_y) * (away * step_y)
                if cost >= furthest:
                    break
                for side in range(2):
                    other = y - away if side == 0 else y + away
                    if other < 0 or other >= Y or not some[other]:
                        continue
                    row = along[other]
                    furthest = 0.0
                    for z in range(Z):
                        near = row[z] + cost
                        least = near if near < best[z] else best[z]
                        best[z] = least
                        furthest = max(furthest, least)


@njit(nogil=True, cache=True)
def distances(codes: np.ndarray, square: np.ndarray, step: float, found: np.ndarray, codes_found: np.ndarray) -> None:
    """Elements of a boundary, what `squares` says of the other -> their distances and codes, (N,), in order."""
    X, Y, Z = codes.shape
    n = 0
    for x in range(X):
        for y in range(Y):
            for z in range(Z):
                code = codes[x, y, z]
                if code == 0 or code == 255:
                    continue
                best = square[x, y, z]
                for away in range(1, max(x, X - 1 - x) + 1):
                    cost = (away * step) * (away * step)
                    if cost >= best:
                        break
                    if x >= away:
                        best = min(best, square[x - away, y, z] + cost)
                    if x + away < X:
                        best = min(best, square[x + away, y, z] + cost)
                found[n] = np.sqrt(best)
                codes_found[n] = code
                n += 1
