"""rows of small logits <-> rows of large ones, on the CPU: interpolation and its adjoint (Numba).

Per axis a table says between which two places (one for the nearest) each output lies, and how much of each it takes:
`index`, `share` (2 or 1, outputs). Along the last axis a low row is stretched once for all output rows of a chunk that
lie beside it; a sum of 1, 2 or 4 stretched rows is then one output row. The adjoint goes the same way back.

Arrays: low, sums (B, C, D, H, w) hold low rows from plane z0 and row y0 on; out, grad (B, C, rows, W).
"""

from __future__ import annotations

import numpy as np
from numba import njit

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
# not those that would lose a NaN or an infinity


@njit(**OPTIONS)
def reach(index_z: np.ndarray, index_y: np.ndarray, first: int, count: int) -> tuple[int, int, int, int]:
    """Output rows -> the low planes and rows that they lie beside, z0:z1 and y0:y1."""
    H, last = index_y.shape[1], first + count - 1
    z0, z1 = index_z[0, first // H], index_z[-1, last // H] + 1
    if first // H == last // H:
        return z0, z1, index_y[0, first % H], index_y[-1, last % H] + 1
    return z0, z1, index_y[0, 0], index_y[-1, H - 1] + 1


@njit(**OPTIONS)
def beside(z: tuple, y: tuple, r: int, box: tuple, rows: np.ndarray, shares: np.ndarray) -> int:
    """An output row -> the numbers of the stretched rows that it lies beside, and its shares of them; how many."""
    (index_z, share_z), (index_y, share_y) = z, y
    z0, _, y0, y1 = box
    H, count = index_y.shape[1], 0
    for i in range(index_z.shape[0]):
        for j in range(index_y.shape[0]):
            rows[count] = (index_z[i, r // H] - z0) * (y1 - y0) + index_y[j, r % H] - y0
            shares[count] = share_z[i, r // H] * share_y[j, r % H]
            count += 1
    return count


@njit(**OPTIONS)
def interpolate(low: np.ndarray, z0: int, y0: int, z: tuple, y: tuple, x: tuple, first: int, out: np.ndarray) -> None:
    """Output rows first, first + 1, ... of every sample and class, into out."""
    B, C, R, W = out.shape
    index, share = x
    box = reach(z[0], y[0], first, R)
    height = box[3] - box[2]
    wide = np.empty(((box[1] - box[0]) * height, W), out.dtype)
    rows, shares = np.zeros(4, np.int64), np.zeros(4, out.dtype)
    for b in range(B):
        for c in range(C):
            for i in range(wide.shape[0]):
                source, to = low[b, c, box[0] + i // height - z0, box[2] + i % height - y0], wide[i]
                if index.shape[0] == 1:
                    for j in range(W):
                        to[j] = source[index[0, j]]
                else:
                    for j in range(W):
                        to[j] = source[index[0, j]] * share[0, j] + source[index[1, j]] * share[1, j]
            for r in range(R):
                count = beside(z, y, first + r, box, rows, shares)
                to, p, q = out[b, c, r], wide[rows[0]], wide[rows[1]]
                if count == 1:
                    for j in range(W):
                        to[j] = p[j]
                elif count == 2:
                    for j in range(W):
                        to[j] = shares[0] * p[j] + shares[1] * q[j]
                else:
                    u, v = wide[rows[2]], wide[rows[3]]
                    for j in range(W):
                        to[j] = shares[0] * p[j] + shares[1] * q[j] + shares[2] * u[j] + shares[3] * v[j]


@njit(**OPTIONS)
def add_adjoint(grad: np.ndarray, z: tuple, y: tuple, x: tuple, first: int, sums: np.ndarray, z0: int, y0: int) -> None:
    """dL/d(output rows first, first + 1, ...) -> added to dL/d(low rows)."""
    B, C, R, W = grad.shape
    index, share = x
    box = reach(z[0], y[0], first, R)
    height = box[3] - box[2]
    wide = np.empty(((box[1] - box[0]) * height, W), grad.dtype)
    rows, shares = np.zeros(4, np.int64), np.zeros(4, grad.dtype)
    for b in range(B):
        for c in range(C):
            wide[:] = 0
            for r in range(R):
                source = grad[b, c, r]
                for k in range(beside(z, y, first + r, box, rows, shares)):
                    to, part = wide[rows[k]], shares[k]
                    for j in range(W):
                        to[j] += part * source[j]
            for i in range(wide.shape[0]):
                source, to = wide[i], sums[b, c, box[0] + i // height - z0, box[2] + i % height - y0]
                if index.shape[0] == 1:
                    for j in range(W):
                        to[index[0, j]] += source[j]
                else:
                    for j in range(W):
                        to[index[0, j]] += source[j] * share[0, j]
                        to[index[1, j]] += source[j] * share[1, j]
