"""Rows of a region, a union of classes, that the loops take for a class; and the gradient back to the classes (Numba).

Bodies call these by address, so that only a pass with regions compiles them.

Legend. job, block: the records JOB and BLOCK of `softdice.backends.cpu.walk`; at_job, at_block: their addresses. c is a
class, n voxels; addresses are uint64, and a row is the address of n float32 (t: int32 class numbers, below 0 for no
class). Strides are in bytes, from class to class. bad: how many values of a block are out of range, int64.

    job.C, job.K                        classes, regions
    job.member, here also member        address of (K, C) bytes, 1 for the classes of a region; of one region's C bytes
    job.labels, .low, .high             whether the target is a label map (0 or 1), the range of a probability
    block.n, .w, .t                     voxels of the block; rows of weights and class numbers
    block.m, .r                         rows of a softmax: m = max x, r = 1 / sum e
    block.y, .spare                     rows: target of the region at work, scratch
    block.x, .x_stride, .g, .g_stride   C rows of logits (or probabilities) and of the gradient
    block.e, .z, .slopes, .row_stride   rows of scratch: C of e = exp(x - m), then one of the region at work; K of z, or
                                        p without a softmax; K of slopes: dL/dp, and p dL/dp with a softmax

For a softmax a region has p = sum of its classes' p, and -ln p = l - z with z = ln sum_c exp(x_c - m) over its classes,
a logsumexp of its own: the logarithm of a sum of p would end where p underflows. The gradient is
dL/dx_c = w sum_r (s_rc - p_c) slope_r, where a class of region r has the share s_rc = exp(x_c - m - z), and others 0.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache

import numpy as np
from numba import types

from softdice.backends.cpu.arithmetic import ONE, ZERO, exp, log, minus
from softdice.backends.cpu.compiler import ADDRESS, address_of, jit, kernel
from softdice.backends.cpu.intrinsics import element, read, read_label, reread, write
from softdice.backends.cpu.softmax import LOWEST, fill, scale
from softdice.backends.cpu.walk import block_at, block_body, job_at, row_at

U = np.uint64


@jit
def _holds(member, c):
    """Return whether class c belongs to a region, by its C bytes."""
    return element(np.uint8, member, c) != np.uint8(0)


@cache
def region_row(activation: str) -> np.uint64:
    """Return the address of a function (at_job, at_block, region) that makes the rows of a region, by its number.
    block.y: its target, the largest of its classes'. Row `region` of block.z: with a softmax z, else p, the sum of its
    classes' p. Row C of block.e, with a softmax: the sum of its classes' e. The walk has run the softmax."""

    @kernel(activation)
    def region_row(at_job, at_block, region):
        """Make the rows of a region; return 0."""
        job, block = job_at(at_job), block_at(at_block)
        member, z = job.member + region * job.C, block.z + region * block.row_stride
        _region_truth(job, block, member)
        if activation == "softmax":
            _region_exponentials(member, block.x, block.x_stride, job.C, block.n, block.m, block.e, block.row_stride, z)
        else:
            fill(z, block.n, ZERO)
            for c in range(job.C):
                if _holds(member, c):
                    _add(z, block.x + c * block.x_stride, block.n)
        return 0

    return address_of(region_row, types.int64(ADDRESS, ADDRESS, ADDRESS))


@jit
def _add(total, row, n):
    """Add a row to the row `total`."""
    for v in range(n):
        write(total, v, reread(total, v) + reread(row, v))


@jit
def _region_exponentials(member, x, x_stride, C, n, m, e, e_stride, z):
    """Write a region's row z, LOWEST where no class has a probability, and the sum of its rows of e behind all C of
    them. x, e: logits and exponentials of all classes, x_stride and e_stride from class to class."""
    total = e + C * e_stride
    fill(z, n, LOWEST)
    fill(total, n, ZERO)
    for c in range(C):  # z = max x_c
        if _holds(member, c):
            for v in range(n):
                value, most = reread(x + c * x_stride, v), reread(z, v)
                write(z, v, value if value > most else most)
    for c in range(C):  # total = sum exp(x_c - max)
        if _holds(member, c):
            for v in range(n):
                write(total, v, reread(total, v) + exp(minus(reread(x + c * x_stride, v), reread(z, v))))
    for v in range(n):  # z = ln total - (m - max)
        most = reread(z, v)
        write(z, v, minus(log(reread(total, v)), minus(reread(m, v), most)) if most > LOWEST else most)
    fill(total, n, ZERO)
    for c in range(C):
        if _holds(member, c):
            _add(total, e + c * e_stride, n)


@jit
def _region_truth(job, block, member):
    """Write the target of a region to block.y: with a label map 1 where the label is one of its classes, else the
    largest value of its classes. member: address of its C bytes."""
    fill(block.y, block.n, ZERO)
    if job.labels != 0:
        for v in range(block.n):
            label = read_label(block.t, v)
            if label >= 0:
                write(block.y, v, ONE if _holds(member, U(label)) else ZERO)
        return
    for c in range(job.C):
        if _holds(member, c):
            values = row_at(job.target, c, block, block.spare)
            for v in range(block.n):
                value, most = reread(values, v), reread(block.y, v)
                write(block.y, v, value if value > most or value != value else most)  # a NaN stays


@jit
def _add_shared(gradient, x, m, e, r, z, slope, n, softmax, inside):
    """Add to the row `gradient` of a class the row `slope` of a region, times the share that the class has in it.
    x, e: rows of the class; z: row of the region; softmax, inside: bool, inside if the class belongs to the region. The
    share is 1 inside, else 0; with a softmax it is exp(x - m - z) inside, else 0, less p = e r of the class."""
    for v in range(n):
        share = ONE if inside else ZERO
        if softmax:
            value = read(x, v)
            part = exp(minus(minus(value, read(m, v)), read(z, v))) if inside else ZERO
            share = (part if value > LOWEST else ZERO) - read(e, v) * read(r, v)
        write(gradient, v, reread(gradient, v) + share * read(slope, v))


@cache
def region_gradient(activation: str) -> np.uint64:
    """Return the address of a body that turns the slopes of the regions into the gradient of the classes.
    `region_row` has made the K rows at block.z, and a loop the K rows at block.slopes."""
    softmax = activation == "softmax"

    @block_body(activation)
    def region_gradient(at_job, at_block):
        """Write the gradient of a block to the rows at block.g; return 0."""
        job, block = job_at(at_job), block_at(at_block)
        for c in range(job.C):
            gradient = block.g + c * block.g_stride
            x, e = block.x + c * block.x_stride, block.e + c * block.row_stride
            fill(gradient, block.n, ZERO)
            for region in range(job.K):
                z, slope = block.z + region * block.row_stride, block.slopes + region * block.row_stride
                # a constant in each call lets LLVM drop the branch that is not taken
                if _holds(job.member + region * job.C, c):
                    _add_shared(gradient, x, block.m, e, block.r, z, slope, block.n, softmax, True)
                else:
                    _add_shared(gradient, x, block.m, e, block.r, z, slope, block.n, softmax, False)
            scale(gradient, block.w, block.n)
        return 0

    return region_gradient


@jit
def beyond(row, n, low, high):
    """Return bad: how many of the n values of a row lie outside [low, high], float32; a NaN does not."""
    bad = ZERO
    for v in range(n):
        value = reread(row, v)
        bad += ONE if (value < low) | (value > high) else ZERO
    return np.int64(bad)


@cache
def region_check() -> np.uint64:
    """Return the address of a body that counts the values out of range of all classes, in a region or not."""

    @block_body("classes")
    def region_check(at_job, at_block):
        """Return bad: the number of probabilities out of range and, unless the target is a label map, of targets."""
        job, block = job_at(at_job), block_at(at_block)
        bad = np.int64(0)
        for c in range(job.C):
            bad += beyond(block.x + c * block.x_stride, block.n, job.low, job.high)
            if job.labels == 0:
                bad += beyond(row_at(job.target, c, block, block.spare), block.n, ZERO, ONE)
        return bad

    return region_check
