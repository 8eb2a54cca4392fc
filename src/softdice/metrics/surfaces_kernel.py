"""label maps, masks -> where each label lies, boundary elements, distances between them: the loops on the CPU.

Distances are exact, and most cost next to nothing: two segmentations that are worth comparing agree on most of their
boundaries. `near` looks around an element, the nearest place first, and stops at the first element of the other
boundary. The few that are left after some hundred places are compared with all elements of the other boundary
(`compare`), or, where they are many, looked up in a transform of the whole box (`squares`, `look_up`). There, two
scans along the last axis say how far the next element is; along the axis before it every row takes the minimum over
the rows around it, row by row outwards until these are too far away to change anything, which the compiler turns into
vector instructions; along the first axis the same is done for the elements that are left.

X, Y, Z are axes; a 2-D image has X = 1. Codes are those of `surfaces.elements`: no element where 0 or 255.
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
def near(
    own: np.ndarray,
    other: np.ndarray,
    steps: np.ndarray,
    reach: np.ndarray,
    found: np.ndarray,
    codes: np.ndarray,
    left: np.ndarray,
) -> int:
    """Codes (X, Y, Z) of two boundaries, steps (K, 3) and their lengths (K,), ascending -> distances and codes (N,).

    Of elements with no other one within these steps the position is written to left (N, 4), with their number among
    all; returns how many these are.
    """
    X, Y, Z = own.shape
    n, remain = 0, 0
    for x in range(X):
        for y in range(Y):
            for z in range(Z):
                code = own[x, y, z]
                if code == 0 or code == 255:
                    continue
                codes[n] = code
                near_by = -1.0
                for k in range(len(reach)):
                    a, b, c = x + steps[k, 0], y + steps[k, 1], z + steps[k, 2]
                    if 0 <= a < X and 0 <= b < Y and 0 <= c < Z and other[a, b, c] != 0 and other[a, b, c] != 255:
                        near_by = reach[k]
                        break
                found[n] = near_by
                if near_by < 0:
                    left[remain, 0], left[remain, 1], left[remain, 2], left[remain, 3] = x, y, z, n
                    remain += 1
                n += 1
    return remain


@njit(nogil=True, cache=True)
def places(codes: np.ndarray, found: np.ndarray) -> None:
    """Codes (X, Y, Z) -> where the elements are, (3, N) float64."""
    X, Y, Z = codes.shape
    n = 0
    for x in range(X):
        for y in range(Y):
            for z in range(Z):
                if codes[x, y, z] != 0 and codes[x, y, z] != 255:
                    found[0, n], found[1, n], found[2, n] = x, y, z
                    n += 1


@njit(nogil=True, cache=True, fastmath=_LEAST)
def compare(left: np.ndarray, others: np.ndarray, spacing: np.ndarray, found: np.ndarray) -> None:
    """What `near` has left, all elements of the other boundary (3, M) -> the distances that are missing."""
    for i in range(len(left)):
        best = _INF
        for j in range(others.shape[1]):
            a, b, c = left[i, 0] - others[0, j], left[i, 1] - others[1, j], left[i, 2] - others[2, j]
            a, b, c = a * spacing[0], b * spacing[1], c * spacing[2]
            best = min(best, a * a + b * b + c * c)
        found[left[i, 3]] = np.sqrt(best)


@njit(nogil=True, cache=True)
def look_up(left: np.ndarray, square: np.ndarray, step: float, found: np.ndarray) -> None:
    """What `near` has left, what `squares` says of the other boundary -> the distances that are missing."""
    X = len(square)
    for i in range(len(left)):
        x, y, z = left[i, 0], left[i, 1], left[i, 2]
        best = square[x, y, z]
        for away in range(1, max(x, X - 1 - x) + 1):
            cost = (away * step) * (away * step)
            if cost >= best:
                break
            if x >= away:
                best = min(best, square[x - away, y, z] + cost)
            if x + away < X:
                best = min(best, square[x + away, y, z] + cost)
        found[left[i, 3]] = np.sqrt(best)
