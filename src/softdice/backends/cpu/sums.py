"""The bodies of the sums: statistics of a block, and their gradient (Numba).

Legend. job, block: the records JOB and BLOCK of `softdice.backends.cpu.walk`; at_job, at_block: their addresses. c is a
class or region, n voxels; addresses are uint64, and a row is the address of n float32 (t: int32 class numbers). Strides
are in bytes, from class to class. bad: how many values of a block are out of range, int64. A voxel's own class is the
one of its label: with many classes a loop apart (own_loop) does it (`softdice.backends.cpu.loops`).

    job.C, job.K, job.unions            classes; classes or regions; 1 if there are regions
    job.slots, .slot_stride             (rows, tasks, K) float64, K numbers for each task in a row; numbers in a row
    job.coefs                           (rows, B, K) float32: dL/dstatistics
    job.region_row, ...                 addresses of the bodies of `softdice.backends.cpu.regions`
    block.n, .sample, .task             voxels of the block, number of its sample and of its task
    block.w, .t, .m, .dot, .zeros       rows: weight, class number, largest logit, sum of slopes over classes, zeros
    block.y, .u, .spare                 rows: target and map of the class at work, scratch
    block.x, .x_stride, .g, .g_stride   C rows of logits and of the gradient
    block.e, .slopes, .z, .row_stride   rows of scratch: C of exp(x - m) and a region's; K of slopes; K of regions' sums
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from softdice.backends.cpu import loops
from softdice.backends.cpu.arithmetic import ZERO
from softdice.backends.cpu.compiler import body, jit
from softdice.backends.cpu.intrinsics import add, call, read, read_label, reread, write
from softdice.backends.cpu.loops import Kind
from softdice.backends.cpu.softmax import fill, prefetch
from softdice.backends.cpu.walk import block_at, block_body, job_at, row_at

U = np.uint64


@jit
def _total_weight(w, n):
    """Return the sum of the weights of a block, the row w."""
    total = ZERO
    for v in range(n):
        total += read(w, v)
    return total


@jit
def _add_own(block):
    """Add the row block.spare, where `loops.own_slope` left w times slope, to the gradient of voxels' own classes."""
    for v in range(block.n):
        label = read_label(block.t, v)
        if label >= 0:
            g = block.g + U(label) * block.g_stride
            write(g, v, reread(g, v) + read(block.spare, v))


@cache
def _class_rows(values: bool, mapped: bool, softmax: bool) -> Any:
    """Return a compiled function that returns the rows of a class or region: x, e = exp(x - m), m, target and map.
    values: whether the target has a value for each class; regions always have. mapped: whether a map is read. softmax:
    whether there are exponentials. A row that no loop reads is block.zeros."""

    @body((values, mapped, softmax))
    def class_rows(at_job, at_block, job, block, c):
        """Return the five rows of class or region c; a region's are made first."""
        u = row_at(job.map, c, block, block.u) if mapped else block.zeros
        if values and job.unions != 0:
            call(job.region_row, (at_job, at_block, c))  # its z takes the place of x, with m = 0
            behind_classes = block.e + job.C * block.row_stride  # where `region_row` puts a region's exponentials
            return block.z + c * block.row_stride, behind_classes if softmax else block.e, block.zeros, block.y, u
        y = row_at(job.target, c, block, block.y) if values else block.zeros
        return block.x + c * block.x_stride, block.e + c * block.row_stride, block.m, y, u

    return class_rows


@cache
def forward(kind: Kind) -> np.uint64:
    """Return the address of the body that adds a block's sums to job.slots: a row for each statistic of `kind.summed`,
    and the sum of the weights in the first column of a last row."""
    own_loop, values, last = kind.target == "own", kind.target == "values", U(len(kind.summed))
    class_rows, class_sums = _class_rows(values, kind.mapped, kind.activation == "softmax"), loops.class_sums(kind)
    own_sums: Any = loops.own_sums(kind) if own_loop else None

    @block_body(kind)
    def sums(at_job, at_block):
        """Add the sums of a block; return bad, the number of targets and probabilities out of range."""
        job, block = job_at(at_job), block_at(at_block)
        bad, out = np.int64(0), job.slots + block.task * job.K * U(8)  # float64: 8 bytes
        if values and job.unions != 0:
            bad += call(job.region_check, (at_job, at_block))
        for c in range(job.K):
            x, e, m, y, u = class_rows(at_job, at_block, job, block, c)
            bad += class_sums(x, e, m, y, u, c, job, block, out)
        if own_loop:
            own_sums(job, block, out)
        weight = _total_weight(block.w, block.n) if job.weighted != 0 or job.ignoring != 0 else np.float32(block.n)
        add(out, last * job.slot_stride, weight)
        return bad

    return sums


@cache
def backward(kind: Kind) -> np.uint64:
    """Return the address of the body that writes dL/dx to the rows at block.g, from job.coefs, a row for each statistic
    of `kind.sloped`. The softmax has run; if `kind.fused`, it has written block.dot, too, less the own classes' part.
    kept: whether slopes are kept at block.slopes, since it is dear to compute them twice."""
    own_loop, values, softmax = kind.target == "own", kind.target == "values", kind.activation == "softmax"
    fused, kept = kind.fused, kind.kept
    class_rows = _class_rows(values, kind.mapped, softmax)
    class_slope, class_gradient = loops.class_slope(kind, kept), loops.class_gradient(kind)
    region_slope: Any = loops.class_slope(kind, kept=True) if values else None
    own_slope: Any = loops.own_slope(kind) if own_loop else None
    slopes_first, slopes_of_regions = softmax and not fused, values and not softmax

    @block_body(kind)
    def gradient(at_job, at_block):
        """Write the gradient of a block; return 0.
        A softmax needs block.dot, the sum over all classes, and a class in regions needs the slopes of all regions. In
        both cases a first turn makes the slopes, and a second turn the gradient."""
        job, block = job_at(at_job), block_at(at_block)
        coefs, unions = job.coefs + block.sample * job.K * U(4), values and job.unions != 0
        if slopes_first:  # 1. slopes, and their sum; a fused softmax has made the sum, and never has regions
            fill(block.dot, block.n, ZERO)
        if slopes_first or (slopes_of_regions and unions):
            for c in range(job.K):
                x, e, m, y, u = class_rows(at_job, at_block, job, block, c)
                if unions:
                    region_slope(x, e, m, y, u, c, job, block, coefs, block.slopes + c * block.row_stride)
                else:
                    class_slope(x, e, m, y, u, c, job, block, coefs, block.slopes + c * block.row_stride)
        if own_loop:
            own_slope(job, block, coefs)
        if unions:  # 2. the gradient
            call(job.region_gradient, (at_job, at_block))
            return 0
        for c in range(job.C):
            x, e, m, y, u = block.x + c * block.x_stride, block.e + c * block.row_stride, block.m, block.y, block.u
            if not kept:
                x, e, m, y, u = class_rows(at_job, at_block, job, block, c)
            g = block.g + c * block.g_stride
            prefetch(g + block.n * U(4), block.n)
            class_gradient(x, e, m, y, u, c, job, block, coefs, block.slopes + c * block.row_stride, g)
        if own_loop:
            _add_own(block)
        return 0

    return gradient
