"""tasks (sample, chunk of voxels) -> the probabilities of the voxels of each label, and their gradient (Numba).

    sums[l, c] = sum of w p_c over the voxels of label l          dL/dx_c = w p_c (k[l, c] - sum_j p_j k[l, j])

with k = dL/dsums and l the voxel's own label; without a softmax, dL/dp_c = w k[l, c]. The kernels are called as those
of `softdice.kernels.cpu.kernel` are, and their slots and coefficients have a row for each label.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from softdice.kernels.cpu.compiled import alive, borrowed, each, jit, kernel, memory
from softdice.kernels.cpu.kernel import AHEAD, logits_of, span_of, store_rows, touch, voxels_of
from softdice.kernels.cpu.loops import Kind, Rows, softmax_loops
from softdice.kernels.cpu.rows import beyond


@cache
def _loops(kind: Kind) -> tuple[Any, Any, Any]:
    """-> the softmax, the sums and the gradient of a block."""
    R = np.float64 if kind.double else np.float32
    ZERO, ONE, SOFTMAX, MASKED = R(0), R(1), kind.activation == "softmax", kind.masked

    @each
    def live(w, v):
        return not MASKED or w[v] > ZERO

    @jit
    def sums(x, xo, ld, C, n, rows, e, block, total):
        """sum of w p_c by label, added to total (C, C) in float64: as many additions as there are probabilities."""
        t, w, r = rows.t, rows.w, rows.r
        for v in range(n):
            if t[v] >= 0 and live(w, v):
                label = np.uint64(t[v])
                scale = (w[v] if MASKED else ONE) * (r[v] if SOFTMAX else ONE)
                for c in range(C):
                    p = e[c * block + v] if SOFTMAX else x[xo + c * ld + v]
                    total[label, c] += np.float64(p * scale)

    @jit
    def gradient(C, n, rows, e, block, k, g, go, gld):
        """k (C, C + 1), by class and then by label, 0 for voxels of none."""
        t, w, r, dot = rows.t, rows.w, rows.r, rows.dot
        for v in range(n):
            t[v] = t[v] if t[v] >= 0 else np.int32(C)
            dot[v] = ZERO
        for c in range(C if SOFTMAX else np.uint64(0)):
            for v in range(n):
                dot[v] += e[c * block + v] * r[v] * k[c, np.uint64(t[v])]
        for c in range(C):
            for v in range(n):
                step = k[c, np.uint64(t[v])]
                if SOFTMAX:
                    step = e[c * block + v] * r[v] * (step - dot[v])
                g[go + c * gld + v] = (w[v] * step if live(w, v) else ZERO) if MASKED else step

    return softmax_loops(MASKED, False, None, R), sums, gradient


@cache
def forward(kind: Kind) -> Any:
    """What a call needs -> the kernel of the sums."""
    R = np.float64 if kind.double else np.float32
    softmax, block_sums, _ = _loops(kind)
    SOFTMAX = kind.activation == "softmax"

    @kernel(("confusion forward", kind))
    def sums(job, slots, bad, begin, end):
        """Tasks [begin, end) of the grid (sample, chunk): sums into slots (C, tasks, C), values out of range."""
        job, slots, bad = borrowed(job), borrowed(slots), borrowed(bad)
        C, block, s, zero = job.C, job.block, job.scalars, np.uint64(0)
        scratch = (
            np.zeros((5, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty(C * block if SOFTMAX else zero, R),
            np.empty(zero if job.input.direct else C * block, R),
            np.empty((C, C), np.float64),
        )
        values, t, w, e, xs, total = borrowed(scratch)
        rows = Rows(w, t, values[0], values[1], values[2], values[3])
        x = memory(job.input.address, R) if job.input.direct else xs
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            total[:] = 0
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                bad[task] += np.int64(voxels_of(job, True, b, v0, n, t, w))
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                if SOFTMAX:
                    softmax(x, xo, ld, C, n, rows, e, block, values)
                else:
                    for c in range(C):
                        bad[task] += np.int64(beyond(x, xo + c * ld, n, s.low, s.high, w))
                block_sums(x, xo, ld, C, n, rows, e, block, total)
            for c in range(C):
                slots[c, task] = total[c]
        alive(scratch)

    return sums


@cache
def backward(kind: Kind) -> Any:
    """What a call needs -> the kernel of the gradient."""
    R = np.float64 if kind.double else np.float32
    softmax, _, block_gradient = _loops(kind)
    SOFTMAX = kind.activation == "softmax"

    @kernel(("confusion backward", kind))
    def gradient(job, coefs, result, begin, end):
        """Tasks [begin, end) of the grid: dL/dx into result, from coefs = dL/dsums (C, B, C)."""
        job, coefs = borrowed(job), borrowed(coefs)
        C, block, zero = job.C, job.block, np.uint64(0)
        scratch = (
            np.zeros((5, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty(C * block if SOFTMAX else zero, R),
            np.empty(zero if job.input.direct else C * block, R),
            np.empty(zero if result.direct else C * block, R),
            np.zeros((C, C + np.uint64(1)), R),
        )
        values, t, w, e, xs, gs, k = borrowed(scratch)
        rows = Rows(w, t, values[0], values[1], values[2], values[3])
        x = memory(job.input.address, R) if job.input.direct else xs
        g = memory(result.address, R) if result.direct else gs
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            for label in range(C):
                for c in range(C):
                    k[c, label] = coefs[label, b, c]
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                voxels_of(job, True, b, v0, n, t, w)
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                go, gld = (b * result.per_sample + v0, result.per_class) if result.direct else (zero, block)
                if result.direct and (v0 - start) % AHEAD == 0:
                    touch(g, go, gld, C, min(AHEAD, stop - v0))
                if SOFTMAX:
                    softmax(x, xo, ld, C, n, rows, e, block, values)
                block_gradient(C, n, rows, e, block, k, g, go, gld)
                if not result.direct:
                    store_rows(result, gs, block, C, b, v0, n)
        alive(scratch)

    return gradient
