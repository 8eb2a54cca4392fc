"""Rows of a region, a union of classes, that the loops take for a class; and the gradient back to the classes (Numba).

Bodies call these by address, so that only a pass with regions compiles them.

For a softmax a region has p = sum of its classes' p, and -ln p = l - z with z = ln sum_c exp(x_c - m) over its classes,
a logsumexp of its own: the logarithm of a sum of p would end where p underflows. A class has the share
exp(x_c - m - z) of the slope of each region that it belongs to.
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
from softdice.backends.cpu.softmax import LOWEST, fill
from softdice.backends.cpu.walk import block_at, block_body, job_at, row_at

U = np.uint64


@jit
def _holds(member, c):
    return element(np.uint8, member, c) != np.uint8(0)


@cache
def region_row(activation: str) -> np.uint64:
    """Return the address of a function (job, block, region) that makes a region's rows.

    Softmax: the sum of its exponentials into the row behind those of the C classes, z into its row of `k.z`; else p
    there. Its target, the largest of its classes', goes into `k.y`.
    """

    @kernel(activation)
    def region_row(at_job, at_block, region):
        job, k = job_at(at_job), block_at(at_block)
        member, z = job.member + region * job.C, k.z + region * k.row
        _region_truth(job, k, member)
        if activation == "softmax":
            _region_exponentials(member, k.x, k.ld, job.C, k.n, k.m, k.e, k.row, z)
        else:
            fill(z, k.n, ZERO)
            for c in range(job.C):
                if _holds(member, c):
                    _add(z, k.x + c * k.ld, k.n)
        return 0

    return address_of(region_row, types.int64(ADDRESS, ADDRESS, ADDRESS))


@jit
def _add(total, row, n):
    for v in range(n):
        write(total, v, reread(total, v) + reread(row, v))


@jit
def _region_exponentials(member, x, ld, C, n, m, e, row, z):
    total = e + C * row
    fill(z, n, LOWEST)
    fill(total, n, ZERO)
    for c in range(C):
        if _holds(member, c):
            for v in range(n):
                value, most = reread(x + c * ld, v), reread(z, v)
                write(z, v, value if value > most else most)
    for c in range(C):
        if _holds(member, c):
            for v in range(n):
                write(total, v, reread(total, v) + exp(minus(reread(x + c * ld, v), reread(z, v))))
    for v in range(n):
        most = reread(z, v)
        write(z, v, minus(log(reread(total, v)), minus(reread(m, v), most)) if most > LOWEST else most)
    fill(total, n, ZERO)
    for c in range(C):
        if _holds(member, c):
            _add(total, e + c * row, n)


@jit
def _region_truth(job, k, member):
    fill(k.y, k.n, ZERO)
    if job.labels != 0:
        for v in range(k.n):
            label = read_label(k.t, v)
            if label >= 0:
                write(k.y, v, ONE if _holds(member, U(label)) else ZERO)
        return
    for c in range(job.C):
        if _holds(member, c):
            values = row_at(job.target, c, k, k.spare)
            for v in range(k.n):
                value, most = reread(values, v), reread(k.y, v)
                write(k.y, v, value if value > most or value != value else most)


@jit
def _add_shared(to, x, m, e, r, z, h, n, softmax, inside):
    """Add the slope h of a region, times the share of a class in it."""
    for v in range(n):
        share = ONE if inside else ZERO
        if softmax:
            value = read(x, v)
            part = exp(minus(minus(value, read(m, v)), read(z, v))) if inside else ZERO
            share = (part if value > LOWEST else ZERO) - read(e, v) * read(r, v)
        write(to, v, reread(to, v) + share * read(h, v))


@jit
def _multiply(to, w, n):
    for v in range(n):
        write(to, v, reread(to, v) * read(w, v))


@cache
def region_gradient(activation: str) -> np.uint64:
    """Return the address of a body that brings the regions' slopes h to the gradient of every class."""
    softmax = activation == "softmax"

    @block_body(activation)
    def region_gradient(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        for c in range(job.C):
            to = k.g + c * k.gld
            fill(to, k.n, ZERO)
            for region in range(job.K):
                x, e, z, h = k.x + c * k.ld, k.e + c * k.row, k.z + region * k.row, k.h + region * k.row
                if _holds(job.member + region * job.C, c):
                    _add_shared(to, x, k.m, e, k.r, z, h, k.n, softmax, True)
                else:
                    _add_shared(to, x, k.m, e, k.r, z, h, k.n, softmax, False)
            _multiply(to, k.w, k.n)
        return 0

    return region_gradient


@jit
def beyond(row, n, low, high):
    """Return how many values of a row lie outside [low, high]."""
    bad = ZERO
    for v in range(n):
        value = reread(row, v)
        bad += ONE if (value < low) | (value > high) else ZERO
    return np.int64(bad)


@cache
def region_check() -> np.uint64:
    """Return the address of a body that counts what is out of range among all classes, in a region or not."""

    @block_body("classes")
    def region_check(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        bad = np.int64(0)
        for c in range(job.C):
            bad += beyond(k.x + c * k.ld, k.n, job.low, job.high)
            if job.labels == 0:
                bad += beyond(row_at(job.target, c, k, k.spare), k.n, ZERO, ONE)
        return bad

    return region_check
