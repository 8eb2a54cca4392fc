"""Numba loops that find the boxes of labels, the elements of boundaries, and the distances between two boundaries.

Distances are exact, and most are cheap: two segmentations that are worth comparing agree on most of their boundaries.
`near` searches the places around an element, the nearest first, and stops at the first element of the other boundary.
Elements without one within some hundred places remain. They are compared with all elements of the other boundary
(`compare`), or, if they are many, looked up in a distance transform of the whole box (`squares`, `look_up`). For the
transform, two scans along the last axis give the distance to the next element; along the axis before it, each row takes
the minimum over the rows around it, outwards until these are too far away to change anything, in vector instructions;
along the first axis the same is done, for the remaining elements only.

X, Y, Z are axes; a 2-D image has X = 1. An element is a place of a boundary: a boundary voxel, or a piece of a surface
between eight voxels (as in marching cubes), whose code says which of them are in the mask. `codes`, `boundary` and
`other` are (X, Y, Z) uint8 codes of `surfaces.elements`: no element where 0 or 255. `spacing` is the size of a voxel
along each axis, (3,) float64, and distances are float64 in its unit. Each loop writes into the last of its arguments.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64
"""Labels that are compared at once."""

_INF = np.inf
_NO_NAN = {"nnan", "nsz", "reassoc"}  # without these flags a maximum is no vector instruction


@njit(nogil=True, cache=True)
def find_boxes(labels: np.ndarray, boxes: np.ndarray) -> None:
    """Widen the bounding box of each label to hold all voxels that have it.

    Args:
        labels: (X, Y, Z) uint8 or int64, of any strides.
        boxes: (C + 1, 6) int64, the lowest and then the highest index of each label along each axis; the last row takes
            labels outside [0, C). The row of a label that does not occur stays as it is.
    """
    C = boxes.shape[0] - 1
    X, Y, Z = labels.shape
    for x in range(X):
        for y in range(Y):
            row = labels[x, y]
            z = 0
            while z < Z:
                label, end = row[z], z + 1  # a run of one label, as long as it goes: first block by block
                while end + BLOCK <= Z:
                    different = row[end] ^ label
                    for k in range(1, BLOCK):
                        different |= row[end + k] ^ label
                    if different != 0:
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
    """Mark the voxels of a mask that share a face with a voxel outside; return how many there are.

    The mask (X + 2, Y + 2, Z + 2) of 0 and 1 has a margin; codes (X, Y, Z) become 1 at boundary voxels, else 0.
    """
    X, Y, Z = codes.shape
    count = 0
    for x in range(X):
        for y in range(Y):
            row, code = mask[x + 1, y + 1], codes[x, y]
            low, high = mask[x, y + 1], mask[x + 2, y + 1]
            left, right = mask[x + 1, y], mask[x + 1, y + 2]
            number = 0
            for z in range(Z):
                # code = m(x, y, z) and not the product of m over the six neighbours by a face
                inside = row[z] & row[z + 2] & low[z + 1] & high[z + 1] & left[z + 1] & right[z + 1]
                code[z] = row[z + 1] & (inside ^ np.uint8(1))
                number += code[z]
            count += number
    return count


@njit(nogil=True, cache=True)
def surface_elements(mask: np.ndarray, codes: np.ndarray) -> int:
    """Write the code of every 2 x 2 x 2 voxels of a mask to codes (X, Y, Z); return how many are elements.
    The mask (X + 1, Y + 1, Z + 1) is uint8 of 0 and 1; a voxel of the eight is a bit of the code."""
    X, Y, Z = codes.shape
    count = 0
    for x in range(X):
        for y in range(Y):
            a, b, c, d = mask[x, y], mask[x, y + 1], mask[x + 1, y], mask[x + 1, y + 1]
            code = codes[x, y]
            number = 0
            for z in range(Z):
                # code = sum over i, j, k in {0, 1} of m(x + i, y + j, z + k) 2^(7 - 4 i - 2 j - k)
                high_bits = a[z] << 7 | a[z + 1] << 6 | b[z] << 5 | b[z + 1] << 4
                bits = np.uint8(high_bits | c[z] << 3 | c[z + 1] << 2 | d[z] << 1 | d[z + 1])
                code[z] = bits
                number += (bits != 0) & (bits != 255)
            count += number
    return count


@njit(nogil=True, cache=True, fastmath=_NO_NAN)
def squares(codes: np.ndarray, spacing: np.ndarray, square: np.ndarray) -> None:
    """Write the squared distance of each place to the nearest element with the same x to `square`, (X, Y, Z) float64.

    It is inf where no element has that x.
    """
    X, Y, Z = codes.shape
    square_along_z = np.empty((Y, Z))
    has_element = np.empty(Y, np.bool_)  # whether row y of the current x has one
    step_y, step_z = spacing[1], spacing[2]
    for x in range(X):
        for y in range(Y):
            code, row = codes[x, y], square_along_z[y]
            has_element[y] = False
            # 1. row[z] = min over elements e of this row of ((z - e) step_z)^2: from the left, then from the right
            away = -1  # steps from the last element, -1 before the first
            for z in range(Z):
                if code[z] != 0 and code[z] != 255:
                    away, has_element[y] = 0, True
                elif away >= 0:
                    away += 1
                row[z] = away * step_z if away >= 0 else _INF
            if has_element[y]:
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
                best[z] = square_along_z[y, z]
                furthest = max(furthest, best[z])
            # 2. best[z] = min over all rows y' of square_along_z[y', z] + ((y - y') step_y)^2
            for away in range(1, max(y, Y - 1 - y) + 1):
                cost = (away * step_y) * (away * step_y)
                if cost >= furthest:  # rows further away are no nearer to any place of this row
                    break
                for side in range(2):
                    other = y - away if side == 0 else y + away
                    if other < 0 or other >= Y or not has_element[other]:
                        continue
                    row = square_along_z[other]
                    furthest = 0.0
                    for z in range(Z):
                        candidate = row[z] + cost
                        least = candidate if candidate < best[z] else best[z]
                        best[z] = least
                        furthest = max(furthest, least)


@njit(nogil=True, cache=True)
def near(
    boundary: np.ndarray,
    other: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
    distances: np.ndarray,
    codes: np.ndarray,
    remaining: np.ndarray,
) -> int:
    """Search the nearest element of the other boundary around each of the N elements of a boundary, as far as `steps`
    go; return how many elements remain, for which there is none.

    Args:
        steps: (K, 3) int64, from an element to the places that are searched. lengths: (K,) of the steps, ascending.
        distances: (N,), to the other boundary; -1 for an element that remains. codes: (N,) uint8, of each element.
        remaining: (N, 4) int64; its first rows get x, y, z and the position in (N,) of each element that remains.
    """
    X, Y, Z = boundary.shape
    n, remain = 0, 0
    for x in range(X):
        for y in range(Y):
            for z in range(Z):
                code = boundary[x, y, z]
                if code == 0 or code == 255:
                    continue
                codes[n] = code
                distance = -1.0
                for k in range(len(lengths)):
                    a, b, c = x + steps[k, 0], y + steps[k, 1], z + steps[k, 2]
                    if 0 <= a < X and 0 <= b < Y and 0 <= c < Z and other[a, b, c] != 0 and other[a, b, c] != 255:
                        distance = lengths[k]
                        break
                distances[n] = distance
                if distance < 0:
                    row = remaining[remain]
                    row[0], row[1], row[2], row[3] = x, y, z, n
                    remain += 1
                n += 1
    return remain


@njit(nogil=True, cache=True)
def places(codes: np.ndarray, positions: np.ndarray) -> None:
    """Write x, y and z of the N elements of a boundary into positions (3, N) float64, in the order of `near`."""
    X, Y, Z = codes.shape
    n = 0
    for x in range(X):
        for y in range(Y):
            for z in range(Z):
                if codes[x, y, z] != 0 and codes[x, y, z] != 255:
                    positions[0, n], positions[1, n], positions[2, n] = x, y, z
                    n += 1


@njit(nogil=True, cache=True, fastmath=_NO_NAN)
def compare(remaining: np.ndarray, others: np.ndarray, spacing: np.ndarray, distances: np.ndarray) -> None:
    """Write the distances of the elements that remain after `near`, by comparing each with all others.

    Args:
        remaining: the rows (R, 4) int64 that `near` wrote. others: (3, M) float64, `places` of the other boundary.
        distances: (N,), from `near`: -1 for these elements.
    """
    for i in range(len(remaining)):
        best = _INF
        x, y, z = remaining[i, 0], remaining[i, 1], remaining[i, 2]
        for j in range(others.shape[1]):
            # d^2 = sum over the axes of ((e - e') spacing)^2
            a, b, c = x - others[0, j], y - others[1, j], z - others[2, j]
            a, b, c = a * spacing[0], b * spacing[1], c * spacing[2]
            best = min(best, a * a + b * b + c * c)
        distances[remaining[i, 3]] = np.sqrt(best)


@njit(nogil=True, cache=True)
def look_up(remaining: np.ndarray, square: np.ndarray, step: float, distances: np.ndarray) -> None:
    """Write the distances of the elements that remain after `near`, by the distance transform of the other boundary.

    Args:
        remaining: the rows (R, 4) int64 that `near` wrote. square: (X, Y, Z), what `squares` wrote.
        step: size of a voxel along X. distances: (N,), from `near`: -1 for these elements.
    """
    X = len(square)
    for i in range(len(remaining)):
        x, y, z = remaining[i, 0], remaining[i, 1], remaining[i, 2]
        best = square[x, y, z]  # d^2 = min over all x' of square(x', y, z) + ((x - x') step)^2
        for away in range(1, max(x, X - 1 - x) + 1):
            cost = (away * step) * (away * step)
            if cost >= best:
                break
            if x >= away:
                best = min(best, square[x - away, y, z] + cost)
            if x + away < X:
                best = min(best, square[x + away, y, z] + cost)
        distances[remaining[i, 3]] = np.sqrt(best)
