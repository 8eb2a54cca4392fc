"""The bodies of the sums: statistics of a block, and their gradient (Numba)."""

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
    total = ZERO
    for v in range(n):
        total += read(w, v)
    return total


@jit
def _add_own(k):
    """Add what the own class's slope has beyond the others'."""
    for v in range(k.n):
        label = read_label(k.t, v)
        if label >= 0:
            g = k.g + U(label) * k.gld
            write(g, v, reread(g, v) + read(k.spare, v))


@cache
def _class_rows(values: bool, mapped: bool, softmax: bool) -> Any:
    """Return a function that gives the addresses of a class's logits, exponentials, maxima, target and map."""

    @body((values, mapped, softmax))
    def class_rows(at_job, at_block, job, k, c):
        u = row_at(job.map, c, k, k.u) if mapped else k.zero
        if values and job.unions != 0:
            call(job.region_row, (at_job, at_block, c))
            return k.z + c * k.row, k.e + job.C * k.row if softmax else k.e, k.zero, k.y, u
        y = row_at(job.target, c, k, k.y) if values else k.zero
        return k.x + c * k.ld, k.e + c * k.row, k.m, y, u

    return class_rows


@cache
def forward(kind: Kind) -> np.uint64:
    """Return the body that adds the sums of a task into its slots (summed statistics and weights, tasks, K)."""
    apart, values, last = kind.target == "own", kind.target == "values", U(len(kind.summed))
    class_rows, class_sums = _class_rows(values, kind.mapped, kind.activation == "softmax"), loops.class_sums(kind)
    own_sums: Any = loops.own_sums(kind) if apart else None

    @block_body(kind)
    def sums(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        bad, out = np.int64(0), job.slots + k.task * job.K * U(8)
        if values and job.unions != 0:
            bad += call(job.region_check, (at_job, at_block))
        for c in range(job.K):
            x, e, m, y, u = class_rows(at_job, at_block, job, k, c)
            bad += class_sums(x, e, m, y, u, c, job, k, out)
        if apart:
            own_sums(job, k, out)
        weight = _total_weight(k.w, k.n) if job.weighted != 0 or job.ignoring != 0 else np.float32(k.n)
        add(out, last * job.slot_stride, weight)
        return bad

    return sums


@cache
def backward(kind: Kind) -> np.uint64:
    """Return the body that writes dL/dx, from coefs = dL/dstatistics (sloped statistics, B, K)."""
    apart, values, softmax = kind.target == "own", kind.target == "values", kind.activation == "softmax"
    fused, kept = kind.fused, kind.kept
    class_rows = _class_rows(values, kind.mapped, softmax)
    class_slope, class_gradient = loops.class_slope(kind, kept), loops.class_gradient(kind)
    region_slope: Any = loops.class_slope(kind, kept=True) if values else None
    own_slope: Any = loops.own_slope(kind) if apart else None
    slopes_first, slopes_of_regions = softmax and not fused, values and not softmax

    @block_body(kind)
    def gradient(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        coefs, unions = job.coefs + k.b * job.K * U(4), values and job.unions != 0
        if slopes_first:
            fill(k.dot, k.n, ZERO)
        if slopes_first or (slopes_of_regions and unions):
            for c in range(job.K):
                x, e, m, y, u = class_rows(at_job, at_block, job, k, c)
                if unions:
                    region_slope(x, e, m, y, u, c, job, k, coefs, k.h + c * k.row)
                else:
                    class_slope(x, e, m, y, u, c, job, k, coefs, k.h + c * k.row)
        if apart:
            own_slope(job, k, coefs)
        if unions:
            call(job.region_gradient, (at_job, at_block))
            return 0
        for c in range(job.C):
            x, e, m, y, u = k.x + c * k.ld, k.e + c * k.row, k.m, k.y, k.u
            if not kept:
                x, e, m, y, u = class_rows(at_job, at_block, job, k, c)
            g = k.g + c * k.gld
            prefetch(g + k.n * U(4), k.n)
            class_gradient(x, e, m, y, u, c, job, k, coefs, k.h + c * k.row, g)
        if apart:
            _add_own(k)
        return 0

    return gradient
