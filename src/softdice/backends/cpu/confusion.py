"""The bodies of the soft confusion matrix: the probabilities of the voxels of each label, and their gradient (Numba).

    sums[l, c] = sum of w p_c over the voxels of label l          dL/dx_c = w p_c (k[l, c] - sum_j p_j k[l, j])

with k = dL/dsums and l the voxel's own label; without a softmax, dL/dp_c = w k[l, c]. Slots and coefficients have a row
for each label.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache

import numpy as np

from softdice.backends.cpu.arithmetic import ONE, ZERO
from softdice.backends.cpu.compiler import jit
from softdice.backends.cpu.intrinsics import add, read, read_label, reread, write
from softdice.backends.cpu.regions import beyond
from softdice.backends.cpu.softmax import fill
from softdice.backends.cpu.walk import block_at, block_body, job_at

U = np.uint64


@jit
def _own_coefficients(table, t, n, C, step):
    """Gather a class's coefficient at each voxel's own label into step; 0 for voxels without one."""
    for v in range(n):
        label = read_label(t, v)
        write(step, v, read(table, U(label) if label >= 0 else C))


@jit
def _add_product(dot, e, r, step, n):
    for v in range(n):
        write(dot, v, reread(dot, v) + read(e, v) * read(r, v) * read(step, v))


@jit
def _write_softmax_gradient(g, w, e, r, step, dot, n):
    for v in range(n):
        write(g, v, read(w, v) * (read(e, v) * read(r, v) * (read(step, v) - read(dot, v))))


@jit
def _write_gradient(g, w, step, n):
    for v in range(n):
        write(g, v, read(w, v) * read(step, v))


@cache
def forward(activation: str) -> np.uint64:
    """Return the body that adds the sums of a task into its slots (C, tasks, C)."""
    softmax = activation == "softmax"

    @block_body(activation)
    def label_sums(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        bad, out = np.int64(0), job.slots + k.task * job.K * U(8)
        if not softmax:
            for c in range(job.C):
                bad += beyond(k.x + c * k.ld, k.n, job.low, job.high)
        p, distance = (k.e, k.row) if softmax else (k.x, k.ld)
        for v in range(k.n):
            label = read_label(k.t, v)
            if label >= 0:
                scale = reread(k.w, v) * (reread(k.r, v) if softmax else ONE)
                for c in range(job.C):
                    add(out, U(label) * job.slot_stride + c, reread(p + c * distance, v) * scale)
        return bad

    return label_sums


@cache
def backward(activation: str) -> np.uint64:
    """Return the body that writes dL/dx, from coefs = dL/dsums (C, B, C)."""
    softmax = activation == "softmax"

    @block_body(activation)
    def label_gradient(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        C, n, step = job.C, k.n, k.spare
        columns = C + U(1)  # of the table at k.h: for each class its coefficients by label, and 0 for no label
        if k.start != 0:
            coefs = job.coefs + k.b * job.K * U(4)
            for c in range(C):
                for label in range(C):
                    write(k.h, c * columns + label, read(coefs, label * job.coef_stride + c))
                write(k.h, c * columns + C, ZERO)
        if softmax:
            fill(k.dot, n, ZERO)
            for c in range(C):
                _own_coefficients(k.h + c * columns * U(4), k.t, n, C, step)
                _add_product(k.dot, k.e + c * k.row, k.r, step, n)
        for c in range(C):
            _own_coefficients(k.h + c * columns * U(4), k.t, n, C, step)
            if softmax:
                _write_softmax_gradient(k.g + c * k.gld, k.w, k.e + c * k.row, k.r, step, k.dot, n)
            else:
                _write_gradient(k.g + c * k.gld, k.w, step, n)
        return 0

    return label_gradient
