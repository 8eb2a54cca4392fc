"""The walk over the voxels: tasks, blocks of a task, and what every body finds ready for a block (Numba).

The voxels of each sample are cut into a fixed grid of chunks; a task is one chunk. A chunk is walked in blocks that
stay in cache. For each block the walk reads weights, labels and logits, runs the softmax, calls a body by its address,
and writes the gradient where the tensor cannot be written in place. The body is all that differs between passes, so the
walk is compiled once; bodies are in `sums`, `confusion`, `voxel_map` and `ranks`.

Voxels that do not count have weight 0. In a block that holds one, values and map are copied and set to 0 there, so that
no NaN of theirs can reach a sum. So are probabilities, and logits unless all of the block are moderate. Elsewhere rows
are read in place.

Legend, for the bodies, too. B sample, C class, K class or region, V voxel. job, block, plane: the records JOB, BLOCK
and PLANE, explained below; at_job, at_block: addresses. Arguments are uint64: an address, a count or an index of
voxels (n, v) or classes (C, c), or a stride, which is in bytes, and from class to class where no other is named. A row
is the address of n float32 side by side (t: int32), one for each voxel of a block. bad: how many values of a block are
out of range, int64. Scratch is the memory of a thread: the record BLOCK, then rows.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numba import types

from softdice.backends.cpu.arithmetic import ONE, ZERO
from softdice.backends.cpu.compiler import ADDRESS, address_of, each, jit, kernel
from softdice.backends.cpu.convert import IGNORED
from softdice.backends.cpu.intrinsics import call, read, read_label, record_at, reread, set_element, write
from softdice.backends.cpu.softmax import fill

U = np.uint64
PAGE = U(2048)  # bytes, no more than a page of memory holds
AHEAD = U(2048)  # voxels whose gradient's pages are touched together
MODERATE = np.float32(1e38)  # the difference of two such logits is a finite float32


def _record(unsigned: str, signed: str = "", single: str = "", nested: str = "") -> np.dtype:
    """Return a record of uint64, int64, float32 and PLANE fields, whose names stand in the texts."""
    fields: list[Any] = [(name, PLANE) for name in nested.split()]
    for names, kind in ((unsigned, np.uint64), (signed, np.int64), (single, np.float32)):
        fields += [(name, kind) for name in names.split()]
    return np.dtype(fields, align=True)


PLANE = _record("address convert direct per_sample per_class per_voxel step")
"""A tensor (B, C, V) or (B, V): the address of its first element; the address of the function of `convert` that reads
or writes rows of its dtype; whether a row can be used in place (float32, neighbours side by side); its strides in
bytes; and step, the stride from voxel to voxel in elements."""

JOB = _record(
    nested="input target weight map result",
    unsigned=(
        "body softmax "  # addresses of functions: of the body; of the softmax, 0 where no exponentials are read
        "region_row region_gradient region_check "  # those of `regions`, 0 without regions
        "member "  # (K, C) bytes: which class belongs to which region
        "slots slot_stride "  # (rows, tasks, K) float64: sums of a task, a row for each statistic; numbers in a row
        "bad "  # (tasks,) int64: how many values of a task are out of range
        "coefs coef_stride "  # (rows, B, K) float32: dL/dsums; numbers in a row
        "C K V "  # classes, classes or regions, voxels
        "chunk_voxels chunks block_voxels "  # voxels of a task, tasks of a sample, voxels of a block
        "x_offset g_offset "  # bytes of scratch in front of the copied logits and the gradients, C rows each,
        "slopes_offset z_offset "  # and in front of the slopes and the regions' sums, K rows each
        "weighted labels writes unions logits"  # 0 or 1: weights, a label map, rows to write, regions, input of logits
    ),
    # the label of class 0; the bound that labels are below; whether a label is ignored (0 or 1), and which; whether ln
    # sum e is read (0 or 1)
    signed="first top ignoring ignore logs",
    single=(
        "gamma power keep share "  # the exponents; y = keep t + share
        "low high row_low row_high"  # bounds of a class's p; those that loops check: infinite for regions, sums of p
    ),
)
"""What a kernel is called with: one pass."""

BLOCK = _record(
    "w t m r ls dot "  # rows: weight, class number (int32), m = max x, 1 / sum e, ln sum e, sum of p dL/dp over classes
    "y u spare zeros "  # rows: target and map of the class at work, a row that the body may use, zeros
    "sample task first_voxel n "  # number of the sample, of the task, of the first voxel; how many voxels
    "masked starts_task "  # 0 or 1: whether a voxel does not count; whether this is the first block of its task
    "x x_stride g g_stride "  # logits (or probabilities) and gradient, C rows each, in the tensor or in scratch
    "e slopes z row_stride"  # C rows of e = exp(x - m), then a region's; K rows each of slopes and of regions' sums;
    # the bytes from one of these rows to the next
)
"""Where a block is, and addresses of what the walk has made ready for it."""

ROWS = 10  # those of a BLOCK from w to zeros
HEAD = U(-(-BLOCK.itemsize // 64) * 64)  # bytes of scratch in front of the rows; whole cache lines
job_at, block_at = record_at(JOB), record_at(BLOCK)


@jit
def clear(row, w, n):
    """Set a row to 0 at the voxels that do not count, whose weight in the row w is 0; a NaN there goes away, too."""
    for v in range(n):
        write(row, v, reread(row, v) if read(w, v) > ZERO else ZERO)


@each
def first_of(plane, block):
    """Return the address of the block's first voxel, in class 0, in a tensor, the PLANE `plane`."""
    return plane.address + block.sample * plane.per_sample + block.first_voxel * plane.per_voxel


@jit
def row_at(plane, c, block, row):
    """Return the address of the block's values of class c in a tensor, the PLANE `plane`: where they lie, or `row`, a
    row of scratch, to which they are copied. In the copy, voxels that do not count are 0."""
    source = first_of(plane, block) + c * plane.per_class
    if plane.direct != 0 and block.masked == 0:
        return source
    call(plane.convert, (source, plane.step, block.n, row, U(1), U(0), U(0)))  # one row, so no strides of classes
    if block.masked != 0:
        clear(row, block.w, block.n)
    return row


@jit
def _settle_weights(w, t, n, ignoring):
    """Set weights in the row w that are NaN, negative or of ignored voxels to 0.
    t: row of class numbers, read with `ignoring` (bool), where IGNORED stands for an ignored voxel. Return bad, the
    number of NaN and negative weights, and whether any weight is 0."""
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
def _read_voxels(job, block):
    """Read weights into block.w and class numbers into block.t; set block.masked if a voxel does not count.
    Return bad, the number of weights and labels out of range."""
    bad, n, masked = np.int64(0), block.n, False
    weight, target = job.weight, job.target
    if job.weighted != 0:
        call(weight.convert, (first_of(weight, block), weight.step, n, block.w, U(1), U(0), U(0)))
    elif job.ignoring != 0:
        fill(block.w, n, ONE)
    if job.labels != 0:
        labels = first_of(target, block)
        bad += call(target.convert, (labels, target.step, n, block.t, job.first, job.top, job.ignoring, job.ignore))
    if job.weighted != 0 or job.ignoring != 0:
        negative, masked = _settle_weights(block.w, block.t, n, job.ignoring != 0)
        bad += negative
    block.masked = U(1) if masked else U(0)
    return bad


@jit
def _all_moderate(x, x_stride, C, n):
    """Return whether no logit of a block, C rows from x on, is NaN and no difference of two overflows float32."""
    beyond = ZERO
    for c in range(C):
        for v in range(n):
            beyond += ZERO if abs(read(x + c * x_stride, v)) <= MODERATE else ONE
    return beyond == ZERO


@jit
def _read_logits(job, block, copies):
    """Set block.x and block.x_stride to where the logits are: in the tensor, or in C rows of scratch from `copies` on,
    to which they are copied and cleared where voxels do not count. Moderate logits need no copy: at
    voxels that do not count they give finite numbers, and these times the weight 0 are 0."""
    plane = job.input
    if plane.direct != 0:
        block.x, block.x_stride = first_of(plane, block), plane.per_class
        if block.masked == 0 or (job.logits != 0 and _all_moderate(block.x, block.x_stride, job.C, block.n)):
            return
    call(plane.convert, (first_of(plane, block), plane.step, block.n, copies, job.C, plane.per_class, block.row_stride))
    if block.masked != 0:
        for c in range(job.C):
            clear(copies + c * block.row_stride, block.w, block.n)
    block.x, block.x_stride = copies, block.row_stride


@jit
def _touch(g, g_stride, C, n):
    """Write a 0 to every page of memory of C rows of a gradient, n voxels each, from g on.
    The system makes fresh pages faster in the order of memory than in that of the blocks. n U(4): bytes of float32."""
    for c in range(C):
        for offset in range(U(0), n * U(4), PAGE):
            set_element(g + c * g_stride + offset, U(0), ZERO)


@jit
def _find_rows(job, block, copies, left):
    """Set block.g and block.g_stride to where the body writes a row for each class: in the tensor, or in C rows of
    scratch from `copies` on. In the tensor, `_touch` the pages of the next AHEAD voxels each time that many are done.
    left: voxels from here to the task's end; pages beyond belong to another thread."""
    plane = job.result
    block.g, block.g_stride = copies, block.row_stride
    if plane.direct != 0:
        block.g, block.g_stride = first_of(plane, block), plane.per_class
        if block.starts_task != 0 or block.first_voxel % AHEAD == 0:
            _touch(block.g, block.g_stride, job.C, min(max(AHEAD, block.n), left))


@jit
def _store_rows(job, block):
    """Copy the C rows at block.g to the tensor of the result, in its dtype, at the voxels of the block."""
    plane = job.result
    target = first_of(plane, block)
    call(plane.convert, (target, plane.step, block.n, block.g, job.C, plane.per_class, block.row_stride))


@kernel("walk")
def walk(at_job, scratch, begin, end):
    """Walk over the tasks [begin, end) of the job at at_job: prepare each block, call the body, and write job.bad.
    scratch: address of this thread's memory, of as many bytes as `driver.plan` said, which also prepared the job."""
    job, block = job_at(at_job), block_at(scratch)
    base = scratch + HEAD  # from here on the rows of a BLOCK, w to zeros, then those of e, and the rest by offset
    row = block.row_stride = job.block_voxels * U(4)
    block.w, block.t, block.m, block.r = base, base + row, base + U(2) * row, base + U(3) * row
    block.ls, block.dot, block.y, block.u = base + U(4) * row, base + U(5) * row, base + U(6) * row, base + U(7) * row
    block.spare, block.zeros, block.e = base + U(8) * row, base + U(9) * row, base + U(ROWS) * row
    block.slopes, block.z = base + job.slopes_offset, base + job.z_offset
    fill(block.w, job.block_voxels, ONE)
    fill(block.zeros, job.block_voxels, ZERO)
    for task in range(begin, end):
        block.task, block.sample = task, task // job.chunks
        start = (task - block.sample * job.chunks) * job.chunk_voxels
        stop, bad = min(start + job.chunk_voxels, job.V), np.int64(0)
        for v0 in range(start, stop, job.block_voxels):
            block.first_voxel, block.n = v0, min(job.block_voxels, stop - v0)
            block.starts_task = U(1) if v0 == start else U(0)
            bad += _read_voxels(job, block)
            _read_logits(job, block, base + job.x_offset)
            if job.writes != 0:
                _find_rows(job, block, base + job.g_offset, stop - v0)
            if job.softmax != 0:
                coefs = job.coefs + block.sample * job.K * U(4)  # dL/d(sum w p) of the sample, which `Kind.fused` reads
                x, m, r, ls, dot, e = block.x, block.m, block.r, block.ls, block.dot, block.e
                call(job.softmax, (x, block.x_stride, job.C, block.n, m, r, ls, dot, e, row, coefs, job.logs))
            bad += call(job.body, (at_job, scratch))
            if job.writes != 0 and job.result.direct == 0:
                _store_rows(job, block)
        set_element(job.bad, task, bad)


BODY = types.int64(ADDRESS, ADDRESS)


def block_body(variant: Hashable) -> Callable[[Callable[..., Any]], np.uint64]:
    """Return a decorator that compiles a body, a function (at_job, at_block) that returns bad, and returns its address.
    variant: what its factory was called with, which tells the body from others of the same name."""
    return lambda function: address_of(kernel(variant)(function), BODY)
