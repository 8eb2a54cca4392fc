"""The bodies of the soft confusion matrix: the probabilities of the voxels of each label, and their gradient (Numba).

    sums[l, c] = sum of w p_c over the voxels of label l          dL/dx_c = w p_c (a[l, c] - sum_j p_j a[l, j])

with a = dL/dsums and l the voxel's label; without a softmax, dL/dp_c = w a[l, c].

Legend. job, block: the records JOB and BLOCK of `softdice.backends.cpu.walk`; at_job, at_block: their addresses. c is a
class, n voxels; addresses are uint64, and a row is the address of n float32 (t: int32 class numbers, below 0 for no
class). Strides are in bytes, from class to class. bad: how many values of a block are out of range, int64.

    job.C, job.K                        classes, both
    job.low, .high                      the range of a probability
    job.slots, .slot_stride             (labels, tasks, C) float64: the sums; numbers from label to label
    job.coefs, .coef_stride             (labels, B, C) float32: a; numbers from label to label
    block.n, .sample, .task             voxels of the block, number of its sample and of its task
    block.starts_task                   1 in the first block of a task, else 0
    block.w, .t, .r, .dot               rows: weight w, label t, 1 / sum e of a softmax, sum_j p_j a[l, j]
    block.spare, here step              row: a[l, c] of the class at work, at each voxel's label l
    block.x, .x_stride, .g, .g_stride   C rows of probabilities or logits, and of the gradient
    block.e, .row_stride                C rows of exp(x - max x) of a softmax
    block.slopes                        scratch for a table of a, (C, C + 1) float32: row c holds a[:, c], and a 0
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
    """Write a[l, c] of a class, at each voxel's label l, to step.
    table: address of the class's a[0, c] to a[C - 1, c], float32, and then a 0 for voxels of no class."""
    for v in range(n):
        label = read_label(t, v)
        write(step, v, read(table, U(label) if label >= 0 else C))


@jit
def _add_product(dot, e, r, step, n):
    """Add p_c a[l, c] to the row dot, the sum over the classes; e: the row of class c, p_c = e r; step: a[l, c]."""
    for v in range(n):
        write(dot, v, reread(dot, v) + read(e, v) * read(r, v) * read(step, v))


@jit
def _write_softmax_gradient(g, w, e, r, step, dot, n):
    """Write w p_c (a[l, c] - dot) to the row g of class c; e: the row of class c, p_c = e r; step: a[l, c]."""
    for v in range(n):
        write(g, v, read(w, v) * (read(e, v) * read(r, v) * (read(step, v) - read(dot, v))))


@jit
def _write_gradient(g, w, step, n):
    """Write w a[l, c] to the row g of class c; step: a[l, c]."""
    for v in range(n):
        write(g, v, read(w, v) * read(step, v))


@cache
def forward(activation: str) -> np.uint64:
    """Return the address of the body that adds a block's sums to the job's slots.
    activation: "softmax", or "none" for an input of probabilities."""
    softmax = activation == "softmax"

    @block_body(activation)
    def label_sums(at_job, at_block):
        """Add w p_c of each voxel of label l to sums[l, c] of the block's task.
        Return bad, the number of probabilities out of range: 0 with a softmax."""
        job, block = job_at(at_job), block_at(at_block)
        bad, out = np.int64(0), job.slots + block.task * job.K * U(8)  # float64: 8 bytes
        if not softmax:
            for c in range(job.C):
                bad += beyond(block.x + c * block.x_stride, block.n, job.low, job.high)
        p, p_stride = (block.e, block.row_stride) if softmax else (block.x, block.x_stride)  # p, or e = p / r
        for v in range(block.n):
            label = read_label(block.t, v)
            if label >= 0:
                scale = reread(block.w, v) * (reread(block.r, v) if softmax else ONE)
                for c in range(job.C):
                    add(out, U(label) * job.slot_stride + c, reread(p + c * p_stride, v) * scale)
        return bad

    return label_sums


@cache
def backward(activation: str) -> np.uint64:
    """Return the address of the body that writes dL/dx to the rows at block.g, from a at job.coefs.
    Row c of the table at block.slopes has the coefficients of class c by label, and a 0 for voxels of no class."""
    softmax = activation == "softmax"

    @block_body(activation)
    def label_gradient(at_job, at_block):
        """Write w p_c (a[l, c] - dot), dot = sum_j p_j a[l, j], to the row of each class; without a softmax w a[l, c].
        Return 0. step: the row of a[l, c] at each voxel's label l, for the class c at work."""
        job, block = job_at(at_job), block_at(at_block)
        C, n, step = job.C, block.n, block.spare
        columns = C + U(1)
        if block.starts_task != 0:  # 1. the table, which all blocks of the task read
            coefs = job.coefs + block.sample * job.K * U(4)
            for c in range(C):
                for label in range(C):
                    write(block.slopes, c * columns + label, read(coefs, label * job.coef_stride + c))
                write(block.slopes, c * columns + C, ZERO)
        if softmax:  # 2. dot
            fill(block.dot, n, ZERO)
            for c in range(C):
                _own_coefficients(block.slopes + c * columns * U(4), block.t, n, C, step)
                _add_product(block.dot, block.e + c * block.row_stride, block.r, step, n)
        for c in range(C):  # 3. the gradient
            _own_coefficients(block.slopes + c * columns * U(4), block.t, n, C, step)
            if softmax:
                e = block.e + c * block.row_stride
                _write_softmax_gradient(block.g + c * block.g_stride, block.w, e, block.r, step, block.dot, n)
            else:
                _write_gradient(block.g + c * block.g_stride, block.w, step, n)
        return 0

    return label_gradient
