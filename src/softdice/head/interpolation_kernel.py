"""Interpolation of the output rows of a chunk, and its adjoint, on the CPU (Numba).

Low: of the low resolution, the input of the interpolation. A table of an axis (z for planes, y for rows, x for columns)
is the pair (index, weight): an output is the sum of the inputs at the positions index, uint32, times weight, floats,
both (1 or 2, outputs). The adjoint, which is the gradient of the interpolation, needs the transposed table of x: it
says which outputs an input goes to, and has more rows.

Each low row that the chunk reads is stretched along the last axis once, to W columns. One, two or four stretched rows
then make one output row. The adjoint takes these steps backwards.

low and sums are (B, C, d, h, w), without the low planes before z0; out and grad are flat, (B, C, R, W), with R output
rows from row `first` on, numbered through all planes of H rows. All floats are of one dtype. A row is named by its
offset in a flat array, in elements; offsets are unsigned, which saves a check for negative indices. Arrays are
`borrowed`: without reference counts, which threads would contend for; `alive` keeps their owner until there.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from softdice.backends.cpu.compiler import jit, kernel
from softdice.backends.cpu.intrinsics import alive, borrowed, read, write

u = np.uint64
SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""Part of the on-disk cache key: editing this file invalidates its cached kernels."""


@jit
def stretch(row, i, index, weight, out, o):
    """Interpolate the row at offset i of `row` by the table (index, weight) to the row at offset o of `out`.

    out[o + j] = sum over k of weight[k, j] row[i + index[k, j]]
    """
    W = u(index.shape[1])
    for j in range(W):
        write(out, o + j, read(row, i + index[0, j]) * weight[0, j])
    for k in range(u(1), u(index.shape[0])):
        for j in range(W):
            write(out, o + j, out[o + j] + read(row, i + index[k, j]) * weight[k, j])


@jit
def low_box(z, y, first, count):
    """Return (z0, z1, y0, y1): low planes z0:z1 and rows y0:y1 that `count` output rows from row `first` on read."""
    index_z, index_y = z[0], y[0]
    H, last = index_y.shape[1], first + count - 1
    top, bottom = (first % H, last % H) if first // H == last // H else (0, H - 1)  # all rows, if in several planes
    return index_z[0, first // H], index_z[-1, last // H] + 1, index_y[0, top], index_y[-1, bottom] + 1


@jit
def row_sources(z, y, r, box, W, offsets, weights):
    """Write offsets and weights, (4,) each, of the stretched rows that output row r is the sum of; return their number.

    z, y: tables. box: (z0, z1, y0, y1), the low planes z0:z1 with the rows y0:y1, which are stretched, W columns each.
    """
    (index_z, weight_z), (index_y, weight_y) = z, y
    z0, _, y0, y1 = box
    H, count = index_y.shape[1], 0
    for i in range(index_z.shape[0]):
        for k in range(index_y.shape[0]):
            offsets[count] = u((index_z[i, r // H] - z0) * (y1 - y0) + index_y[k, r % H] - y0) * W
            weights[count] = weight_z[i, r // H] * weight_y[k, r % H]
            count += 1
    return count


@kernel(("interpolate", SOURCE))
def interpolate(low, z0, z, y, x, first, out):
    """Write the output rows from row `first` on, of every sample and class, to `out`, whose size says how many.

    out[r] = sum over k of weights[k] stretched[offsets[k]],    1, 2 or 4 rows"""
    low, z, y, x, out = borrowed((low, z, y, x, out))
    B, C, _, _, w = low.shape
    index, weight = x
    W = u(index.shape[1])
    R = out.size // max(B * C * index.shape[1], 1)
    box = low_box(z, y, first, R)  # (z0, z1, y0, y1): the low planes and rows that the output rows read
    height = box[3] - box[2]
    low_rows = (box[1] - box[0]) * height
    scratch = (
        np.empty(w, out.dtype), np.empty(low_rows * index.shape[1], out.dtype), np.zeros(4, np.uint64),
        np.zeros(4, out.dtype),
    )  # fmt: skip
    line, stretched, offsets, weights = borrowed(scratch)
    for bc in range(B * C):
        for i in range(low_rows):  # stretch the box
            for j in range(w):
                line[j] = low[bc // C, bc % C, box[0] + i // height - z0, box[2] + i % height, j]
            stretch(line, u(0), index, weight, stretched, u(i) * W)
        for r in range(R):  # and make each output row of one, two or four stretched rows
            sources = row_sources(z, y, first + r, box, W, offsets, weights)
            o, p, q, s, t = u(bc * R + r) * W, offsets[0], offsets[1], offsets[2], offsets[3]
            w_p, w_q, w_s, w_t = weights[0], weights[1], weights[2], weights[3]
            if sources == 1:
                for j in range(W):
                    out[o + j] = stretched[p + j]
            elif sources == 2:
                for j in range(W):
                    out[o + j] = w_p * stretched[p + j] + w_q * stretched[q + j]
            else:
                for j in range(W):
                    upper = w_p * stretched[p + j] + w_q * stretched[q + j]
                    out[o + j] = upper + w_s * stretched[s + j] + w_t * stretched[t + j]
    alive(scratch)


@kernel(("add_adjoint", SOURCE))
def add_adjoint(grad, z, y, x_transposed, width, first, sums, z0):
    """Add dL/dlow to `sums`, for grad = dL/d(output rows from row `first` on), of `width` columns.

    stretched[offsets[k]] += weights[k] grad[r],    then sums[row] += stretched[row] by the transposed table
    """
    grad, z, y, x_transposed, sums = borrowed((grad, z, y, x_transposed, sums))
    B, C, _, _, w = sums.shape
    index, weight = x_transposed
    R = grad.size // max(B * C * width, 1)
    W = u(width)
    box = low_box(z, y, first, R)  # (z0, z1, y0, y1): the low planes and rows that the output rows read
    height = box[3] - box[2]
    low_rows = (box[1] - box[0]) * height
    scratch = (
        np.empty(w, grad.dtype), np.empty(low_rows * width, grad.dtype), np.zeros(4, np.uint64),
        np.zeros(4, grad.dtype),
    )  # fmt: skip
    line, stretched, offsets, weights = borrowed(scratch)
    for bc in range(B * C):
        for j in range(u(stretched.size)):
            stretched[j] = 0
        for r in range(R):  # send each output row back to its 1, 2 or 4 stretched rows, in pairs p, q
            sources = row_sources(z, y, first + r, box, W, offsets, weights)
            o = u(bc * R + r) * W
            for k in range(0, sources, 2):
                p, q, w_p, w_q = offsets[k], offsets[k + 1] if sources > 1 else offsets[k], weights[k], weights[k + 1]
                if p == q:  # a single source (its w_q is 0), or one row twice, at the border: `write`s must not overlap
                    for j in range(W):
                        stretched[p + j] += (w_p + w_q) * grad[o + j]
                else:
                    for j in range(W):
                        write(stretched, p + j, stretched[p + j] + w_p * read(grad, o + j))
                        write(stretched, q + j, stretched[q + j] + w_q * read(grad, o + j))
        for i in range(low_rows):  # and shrink the box
            stretch(stretched, u(i) * W, index, weight, line, u(0))
            for j in range(w):
                sums[bc // C, bc % C, box[0] + i // height - z0, box[2] + i % height, j] += line[j]
    alive(scratch)
