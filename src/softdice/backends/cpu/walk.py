"""The walk over the voxels: tasks, blocks of a task, and what every body finds ready for a block (Numba).

The voxels of each sample are cut into a fixed grid of chunks; a task is one chunk. A chunk is walked in blocks that
stay in cache. For each block the walk reads weights, labels and logits, runs the softmax, calls a body by its address,
and writes the gradient where the tensor cannot be written in place. The body is all that differs between passes, so the
walk is compiled once; bodies are in `sums`, `confusion`, `voxel_map` and `ranks`.

Voxels that do not count have weight 0. In a block that holds one, values and map are copied and set to 0 there, so that
no NaN of theirs can reach a sum; logits, too, unless all of the block are moderate, and probabilities always. Elsewhere
rows are read in place.

Addresses and strides are in bytes; `row` is the size of a row of scratch. Records are passed by address.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numba import types

from softdice.backends.cpu.arithmetic import ONE, ZERO
from softdice.backends.cpu.compiler import ADDRESS, address_of, jit, kernel
from softdice.backends.cpu.convert import IGNORED
from softdice.backends.cpu.intrinsics import call, read, read_label, record_at, reread, set_element, write
from softdice.backends.cpu.softmax import fill

U = np.uint64
PAGE = U(2048)  # bytes, no more than a page of memory holds
AHEAD = U(2048)  # voxels whose gradient's pages are touched together
MODERATE = np.float32(1e38)


def _record(unsigned: str, signed: str = "", single: str = "", nested: str = "") -> np.dtype:
    fields: list[Any] = [(name, PLANE) for name in nested.split()]
    for names, kind in ((unsigned, np.uint64), (signed, np.int64), (single, np.float32)):
        fields += [(name, kind) for name in names.split()]
    return np.dtype(fields, align=True)


PLANE = _record("address convert direct per_sample per_class per_voxel step")
"""A tensor (B, C, V) or (B, V): the address of its first element; of the function that reads or writes a row of its
dtype; whether a row can be used in place (float32, neighbours side by side); its strides; elements between voxels."""

JOB = _record(
    nested="input target weight map result",
    unsigned=(
        "body softmax "  # addresses of functions; softmax is 0 where no exponentials are read
        "region_row region_gradient region_check "  # those of `regions`, 0 without regions
        "member "  # (K, C) bytes: which class belongs to which region
        "slots slot_stride "  # (rows, tasks, K) float64: sums of a task; numbers in a row of slots
        "bad "  # (tasks,) int64: how many values of a task are out of range
        "coefs coef_stride "  # (rows, B, K) float32: dL/dsums; numbers in a row of coefs
        "C K V "  # classes, classes or regions, voxels
        "chunk chunks block "  # voxels of a task, tasks of a sample, voxels of a block
        "at_x at_g at_h at_z "  # where scratch holds copied logits, gradients (C rows), slopes, regions' sums (K rows)
        "weighted labels writes unions logits"  # whether there are weights, a label map, rows to write, regions, logits
    ),
    signed="first top ignoring ignore logs",  # class 0, bound of labels, ignored label, whether ln sum e is read
    single=(
        "gamma power keep share "  # y = keep t + share
        "low high row_low row_high"  # the range of a probability, and of a row's: without bounds for sums of regions
    ),
)
"""What a kernel is called with."""

BLOCK = _record(
    "w t m r ls dot y u spare zero "  # rows of voxels: weight, class number (int32), maximum, 1 / sum e, ln sum e, the
    # sum of p dL/dp over the classes, a class's target and map, a row that the body may use, zeros
    "b task v0 n dead start "  # sample, task, first voxel, voxels, whether one does not count, whether a task begins
    "x ld e row g gld h z"  # logits and distance of the classes; exponentials (C rows, then a region's), `row` apart;
    # gradient and distance of its rows; slopes; regions' sums
)
"""Where a block is, and addresses of what the walk has made ready for it."""

ROWS = 10
HEAD = U(-(-BLOCK.itemsize // 64) * 64)  # bytes of scratch in front of the rows
job_at, block_at = record_at(JOB), record_at(BLOCK)


@jit
def clear(row, w, n):
    """Set a row to 0 where voxels do not count."""
    for v in range(n):
        write(row, v, reread(row, v) if read(w, v) > ZERO else ZERO)


@jit
def row_at(plane, c, k, row):
    """Return the address of a class's values in block k: in place, or copied to `row`."""
    source = plane.address + k.b * plane.per_sample + c * plane.per_class + k.v0 * plane.per_voxel
    if plane.direct != 0 and k.dead == 0:
        return source
    call(plane.convert, (source, plane.step, k.n, row, U(1), U(0), U(0)))
    if k.dead != 0:
        clear(row, k.w, k.n)
    return row


@jit
def _settle_weights(w, t, n, ignoring):
    """Set weights that are NaN, negative or of ignored voxels to 0; return how many were bad, and if any is 0."""
    bad, zeros = ZERO, ZERO
    for v in range(n):
        weight = reread(w, v)
        right = weight >= ZERO
        bad += ZERO if right else ONE
        dead = not right or (ignoring and read_label(t, v) == IGNORED)
        weight = ZERO if dead else weight
        zeros += ONE if weight == ZERO else ZERO
        write(w, v, weight)
    return np.int64(bad), zeros > ZERO


@jit
def _read_voxels(job, k):
    """Read weights and class numbers of a block, and set whether a voxel is dead; return how many are out of range."""
    bad, n, dead = np.int64(0), k.n, False
    weight, target = job.weight, job.target
    if job.weighted != 0:
        source = weight.address + k.b * weight.per_sample + k.v0 * weight.per_voxel
        call(weight.convert, (source, weight.step, n, k.w, U(1), U(0), U(0)))
    elif job.ignoring != 0:
        fill(k.w, n, ONE)
    if job.labels != 0:
        source = target.address + k.b * target.per_sample + k.v0 * target.per_voxel
        bad += call(
            target.convert, (source, target.step, n, k.t, job.first, job.top, job.ignoring, job.ignore)
        )  # fmt: skip
    if job.weighted != 0 or job.ignoring != 0:
        negative, dead = _settle_weights(k.w, k.t, n, job.ignoring != 0)
        bad += negative
    k.dead = U(1) if dead else U(0)
    return bad


@jit
def _all_moderate(x, ld, C, n):
    """Return whether every term of these logits is finite: none is NaN, and no difference of two overflows."""
    beyond = ZERO
    for c in range(C):
        for v in range(n):
            beyond += ZERO if abs(read(x + c * ld, v)) <= MODERATE else ONE
    return beyond == ZERO


@jit
def _read_logits(job, k, copies):
    """Set where the logits of a block are: in place, or copied and cleared. A weight of 0 clears moderate ones."""
    plane = job.input
    if plane.direct != 0:
        k.x, k.ld = plane.address + k.b * plane.per_sample + k.v0 * plane.per_voxel, plane.per_class
        if k.dead == 0 or (job.logits != 0 and _all_moderate(k.x, k.ld, job.C, k.n)):
            return
    source = plane.address + k.b * plane.per_sample + k.v0 * plane.per_voxel
    call(plane.convert, (source, plane.step, k.n, copies, job.C, plane.per_class, k.row))
    if k.dead != 0:
        for c in range(job.C):
            clear(copies + c * k.row, k.w, k.n)
    k.x, k.ld = copies, k.row


@jit
def _touch(g, gld, C, n):
    """Write to every page of a gradient: fresh memory is cheaper in its own order than row by row."""
    for c in range(C):
        for offset in range(U(0), n * U(4), PAGE):
            set_element(g + c * gld + offset, U(0), ZERO)


@jit
def _find_rows(job, k, copies, left):
    """Set where the body writes a row for each class: in place, or into scratch. left: voxels up to the task's end."""
    plane = job.result
    k.g, k.gld = copies, k.row
    if plane.direct != 0:
        k.g, k.gld = plane.address + k.b * plane.per_sample + k.v0 * plane.per_voxel, plane.per_class
        if k.start != 0 or k.v0 % AHEAD == 0:
            _touch(k.g, k.gld, job.C, min(max(AHEAD, k.n), left))


@jit
def _store_rows(job, k):
    """Write a row for each class where the tensor holds the voxels of a block."""
    plane = job.result
    target = plane.address + k.b * plane.per_sample + k.v0 * plane.per_voxel
    call(plane.convert, (target, plane.step, k.n, k.g, job.C, plane.per_class, k.row))


@kernel("walk")
def walk(at_job, scratch, begin, end):
    """Walk over the tasks [begin, end) of a job; scratch is memory of this thread."""
    job, k = job_at(at_job), block_at(scratch)
    base = scratch + HEAD
    row = k.row = job.block * U(4)
    k.w, k.t, k.m, k.r, k.ls = base, base + row, base + U(2) * row, base + U(3) * row, base + U(4) * row
    k.dot, k.y, k.u = base + U(5) * row, base + U(6) * row, base + U(7) * row
    k.spare, k.zero, k.e = base + U(8) * row, base + U(9) * row, base + U(10) * row
    k.h, k.z = base + job.at_h, base + job.at_z
    fill(k.w, job.block, ONE)
    fill(k.zero, job.block, ZERO)
    for task in range(begin, end):
        k.task, k.b = task, task // job.chunks
        start = (task - k.b * job.chunks) * job.chunk
        stop, bad = min(start + job.chunk, job.V), np.int64(0)
        for v0 in range(start, stop, job.block):
            k.v0, k.n, k.start = v0, min(job.block, stop - v0), U(1) if v0 == start else U(0)
            bad += _read_voxels(job, k)
            _read_logits(job, k, base + job.at_x)
            if job.writes != 0:
                _find_rows(job, k, base + job.at_g, stop - v0)
            if job.softmax != 0:
                coefs = job.coefs + k.b * job.K * U(4)
                call(job.softmax, (k.x, k.ld, job.C, k.n, k.m, k.r, k.ls, k.dot, k.e, row, coefs, job.logs))
            bad += call(job.body, (at_job, scratch))
            if job.writes != 0 and job.result.direct == 0:
                _store_rows(job, k)
        set_element(job.bad, task, bad)


BODY = types.int64(ADDRESS, ADDRESS)


def block_body(variant: Hashable) -> Callable[[Callable[..., Any]], np.uint64]:
    """Return a decorator: compile a body, called as (address of a JOB, of a BLOCK), and return its address.

    A body returns how many values it met that are out of range.
    """
    return lambda function: address_of(kernel(variant)(function), BODY)
