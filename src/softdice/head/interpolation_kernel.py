"""rows of low logits <-> rows of large ones, on the CPU: interpolation and its adjoint (Numba).

Of each axis a table says which places an output takes from, and how much of each: `index`, `share` (places, outputs).
Along the last axis a low row is stretched once for all the output rows of a chunk that lie beside it; one, two or four
stretched rows then make one output row. The adjoint goes the same way back, with the transposed table of the last axis.

low and sums are (B, C, D, H, w), from plane z0 of the low planes on; out and grad are flat, (B, C, rows, W). A row is a
place in a flat array, and offsets are unsigned, as in `softdice.backends.cpu.convert`.
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
"""What is kept on disk is that of this text, too."""


@jit
def stretch(row, i, index, share, out, o):
    """out[o + j] = sum over k of share[k, j] row[i + index[k, j]]."""
    W = u(index.shape[1])
    for j in range(W):
        write(out, o + j, read(row, i + index[0, j]) * share[0, j])
    for k in range(u(1), u(index.shape[0])):
        for j in range(W):
            write(out, o + j, out[o + j] + read(row, i + index[k, j]) * share[k, j])


@jit
def reach(z, y, first, count):
    """Output rows -> the low planes and rows that they lie beside: z0, z1, y0, y1."""
    index_z, index_y = z[0], y[0]
    H, last = index_y.shape[1], first + count - 1
    a, b = (first % H, last % H) if first // H == last // H else (0, H - 1)
    return index_z[0, first // H], index_z[-1, last // H] + 1, index_y[0, a], index_y[-1, b] + 1


@jit
def beside(z, y, r, box, W, rows, shares):
    """An output row -> the stretched rows that it lies beside, into rows, and its shares of them; how many."""
    (index_z, share_z), (index_y, share_y) = z, y
    z0, _, y0, y1 = box
    H, count = index_y.shape[1], 0
    for i in range(index_z.shape[0]):
        for k in range(index_y.shape[0]):
            rows[count] = u((index_z[i, r // H] - z0) * (y1 - y0) + index_y[k, r % H] - y0) * W
            shares[count] = share_z[i, r // H] * share_y[k, r % H]
            count += 1
    return count


@kernel(("interpolate", SOURCE))
def interpolate(low, z0, z, y, x, first, out):
    """Output rows first, first + 1, ... of every sample and class, into out."""
    low, z, y, x, out = borrowed((low, z, y, x, out))
    B, C, _, _, w = low.shape
    index, share = x
    W = u(index.shape[1])
    R = out.size // max(B * C * index.shape[1], 1)
    box = reach(z, y, first, R)
    height = box[3] - box[2]
    count = (box[1] - box[0]) * height
    scratch = (
        np.empty(w, out.dtype), np.empty(count * index.shape[1], out.dtype), np.zeros(4, np.uint64),
        np.zeros(4, out.dtype),
    )  # fmt: skip
    line, wide, rows, shares = borrowed(scratch)
    for bc in range(B * C):
        for i in range(count):
            for j in range(w):
                line[j] = low[bc // C, bc % C, box[0] + i // height - z0, box[2] + i % height, j]
            stretch(line, u(0), index, share, wide, u(i) * W)
        for r in range(R):
            beside_it = beside(z, y, first + r, box, W, rows, shares)
            o, p, q, s, t = u(bc * R + r) * W, rows[0], rows[1], rows[2], rows[3]
            of_p, of_q, of_s, of_t = shares[0], shares[1], shares[2], shares[3]
            if beside_it == 1:
                for j in range(W):
                    out[o + j] = wide[p + j]
            elif beside_it == 2:
                for j in range(W):
                    out[o + j] = of_p * wide[p + j] + of_q * wide[q + j]
            else:
                for j in range(W):
                    out[o + j] = of_p * wide[p + j] + of_q * wide[q + j] + of_s * wide[s + j] + of_t * wide[t + j]
    alive(scratch)


@kernel(("add_adjoint", SOURCE))
def add_adjoint(grad, z, y, back, width, first, sums, z0):
    """dL/d(output rows first, first + 1, ...) -> added to dL/d(low rows). back: the transposed table of the columns."""
    grad, z, y, back, sums = borrowed((grad, z, y, back, sums))
    B, C, _, _, w = sums.shape
    index, share = back
    R = grad.size // max(B * C * width, 1)
    W = u(width)
    box = reach(z, y, first, R)
    height = box[3] - box[2]
    count = (box[1] - box[0]) * height
    scratch = (
        np.empty(w, grad.dtype), np.empty(count * width, grad.dtype), np.zeros(4, np.uint64), np.zeros(4, grad.dtype),
    )  # fmt: skip
    line, wide, rows, shares = borrowed(scratch)
    for bc in range(B * C):
        for j in range(u(wide.size)):
            wide[j] = 0
        for r in range(R):
            beside_it = beside(z, y, first + r, box, W, rows, shares)
            o = u(bc * R + r) * W
            for k in range(0, beside_it, 2):
                p, q, of_p, of_q = rows[k], rows[k + 1] if beside_it > 1 else rows[k], shares[k], shares[k + 1]
                if p == q:
                    for j in range(W):
                        wide[p + j] += (of_p + of_q) * grad[o + j]
                else:
                    for j in range(W):
                        write(wide, p + j, wide[p + j] + of_p * read(grad, o + j))
                        write(wide, q + j, wide[q + j] + of_q * read(grad, o + j))
        for i in range(count):
            stretch(wide, u(i) * W, index, share, line, u(0))
            for j in range(w):
                sums[bc // C, bc % C, box[0] + i // height - z0, box[2] + i % height, j] += line[j]
    alive(scratch)
