"""tasks (sample, chunk of voxels) -> their sums, their gradient: block by block, class by class (Numba).

Blocks are so small that what is worked out per voxel, and the exponentials of all classes, stay in cache.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from softdice.kernels.cpu.compiled import alive, borrowed, jit, kernel, memory
from softdice.kernels.cpu.loops import Kind, Rows, loops
from softdice.kernels.cpu.regions import unions
from softdice.kernels.cpu.rows import beyond, clean_weights, load, load_labels, prefetch, store

PAGE = np.uint64(512)  # elements, no more than a page of memory holds
AHEAD = np.uint64(2048)  # voxels whose gradient's pages are touched together


class Plane(NamedTuple):
    """A tensor (B, C, V) as the kernels see it."""

    address: np.uint64  # of its first element
    code: int  # how to read its bytes
    direct: bool  # whether a row can be read in place, as numbers of the arithmetic's type
    per_sample: np.uint64
    per_class: np.uint64
    per_voxel: np.uint64


class Scalars(NamedTuple):
    """Exponents, y' = keep y + share, and the range of probabilities."""

    gamma: Any
    power: Any
    keep: Any
    share: Any
    low: Any
    high: Any


class Job(NamedTuple):
    """What both kernels are called with."""

    input: Plane
    target: Plane
    weight: Plane
    map: Plane
    member: np.ndarray  # (K, C), which class belongs to which region
    scalars: Scalars
    C: np.uint64
    K: np.uint64
    V: np.uint64
    weighted: bool
    first: np.int32  # the label of class 0
    top: np.int64  # labels are below it
    has_ignore: bool
    ignore: np.int64
    chunk: np.uint64  # voxels of a task
    chunks: np.uint64  # tasks of a sample
    block: np.uint64  # voxels of a block


@jit
def voxels_of(job, labels, b, v0, n, t, w):
    """Weights and class numbers of a block; returns how many of both are out of range."""
    source, bad = job.weight, np.int32(0)
    if job.weighted:
        load(
            source.address,
            source.code,
            b * source.per_sample + v0 * source.per_voxel,
            source.per_voxel,
            n,
            w,
            np.uint64(0),
        )
        bad += clean_weights(w, n)
    elif job.has_ignore:
        for v in range(n):
            w[v] = w.dtype.type(1)
    if labels:
        source = job.target
        off = b * source.per_sample + v0 * source.per_voxel
        bad += load_labels(
            source.address,
            source.code,
            off,
            source.per_voxel,
            n,
            job.first,
            job.top,
            job.has_ignore,
            job.ignore,
            t,
            w,
        )
    return bad


@jit
def row_of(plane, b, c, v0, n, scratch):
    """A row of a class, where it cannot be read in place, into scratch -> its offset."""
    off = b * plane.per_sample + c * plane.per_class + v0 * plane.per_voxel
    if plane.direct:
        return off
    load(plane.address, plane.code, off, plane.per_voxel, n, scratch, np.uint64(0))
    return np.uint64(0)


@jit
def logits_of(plane, b, C, v0, n, scratch, block):
    """The rows of all classes, where they cannot be read in place, into scratch -> offset, and distance of the rows."""
    off = b * plane.per_sample + v0 * plane.per_voxel
    if plane.direct:
        return off, plane.per_class
    for c in range(C):
        load(
            plane.address,
            plane.code,
            off + c * plane.per_class,
            plane.per_voxel,
            n,
            scratch,
            c * block,
        )
    return np.uint64(0), block


@jit
def span_of(job, task):
    """A task -> its sample, and the voxels from and up to which it goes."""
    b = task // job.chunks
    start = (task - b * job.chunks) * job.chunk
    return b, start, min(start + job.chunk, job.V)


@jit
def store_rows(plane, rows, block, C, b, v0, n):
    """Rows of scratch, one for each class -> what stands in the tensor at n voxels of a sample."""
    for c in range(C):
        off = b * plane.per_sample + c * plane.per_class + v0 * plane.per_voxel
        store(rows, c * block, n, plane.address, plane.code, off, plane.per_voxel)


@jit
def touch(g, off, ld, C, n):
    """Write to every page of the gradient of n voxels: fresh memory is cheaper in its own order than row by row."""
    for c in range(C):
        for v in range(np.uint64(0), n, PAGE):
            g[off + c * ld + v] = g.dtype.type(0)


@cache
def forward(kind: Kind) -> Any:
    """What a call needs -> the kernel of the sums."""
    R = np.float64 if kind.double else np.float32
    do, region = loops(kind), unions(kind.activation == "softmax", kind.labels, R)
    class_sums, softmax, own_sums, region_row, region_truth = (
        do.sums,
        do.softmax,
        do.own_sums,
        region.row,
        region.truth,
    )
    SOFTMAX, LABELS, OWN, UNION = kind.activation == "softmax", kind.labels, kind.target == "own", kind.union
    VALUES, MAPPED = not kind.labels and not kind.union, kind.mapped

    @kernel(("forward", kind))
    def sums(job, slots, bad, begin, end):
        """Tasks [begin, end) of the grid (sample, chunk): sums into slots (fields, tasks, K), values out of range."""
        job, slots, bad = borrowed(job), borrowed(slots), borrowed(bad)
        C, K, block, s, zero = job.C, job.K, job.block, job.scalars, np.uint64(0)
        scratch = (
            np.zeros((7, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty((C + np.uint64(UNION)) * block if SOFTMAX else zero, R),
            np.empty(zero if job.input.direct else C * block, R),
        )
        rows, t, w, e, xs = borrowed(scratch)
        m, r, ls, y, nought, z, u = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6]
        known, of_union = Rows(w, t, m, r, ls, nought), Rows(w, t, nought, r, ls, nought)
        x = memory(job.input.address, R) if job.input.direct else xs
        ys = memory(job.target.address, R) if not LABELS and job.target.direct else y
        us = memory(job.map.address, R) if MAPPED and job.map.direct else u
        unread = rows[:1]
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            out = slots[:, task]
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                wrong = np.int64(voxels_of(job, LABELS, b, v0, n, t, w))
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                if SOFTMAX:
                    softmax(x, xo, ld, C, n, known, e, block, unread)
                for c in range(C if UNION else zero):  # the values of all classes, in a region or not
                    if not SOFTMAX:
                        wrong += beyond(x, xo + c * ld, n, s.low, s.high, w)
                    if not LABELS:
                        yo = row_of(job.target, b, c, v0, n, y)
                        wrong += beyond(ys, yo, n, R(0), R(1), w)
                for k in range(K):
                    uo = row_of(job.map, b, k, v0, n, u) if MAPPED else zero
                    if UNION:
                        region_truth(job.target, job.member, C, b, v0, k, n, t, z, y)
                        region_row(job.member, x, xo, ld, C, k, n, known, e, block, z, zero)
                        class_sums(z, zero, e, C * block, of_union, k, y, zero, us, uo, n, s, out)
                    else:
                        yo = row_of(job.target, b, k, v0, n, y) if VALUES else zero
                        wrong += class_sums(x, xo + k * ld, e, k * block, known, k, ys, yo, us, uo, n, s, out)
                bad[task] += wrong
                if OWN:
                    own_sums(x, xo, ld, e, block, known, n, s, out)
        alive(scratch)

    return sums


@cache
def backward(kind: Kind) -> Any:
    """What a call needs -> the kernel of the gradient."""
    R = np.float64 if kind.double else np.float32
    do, region = loops(kind), unions(kind.activation == "softmax", kind.labels, R)
    softmax, class_slope, class_gradient, own_slope = do.softmax, do.slope, do.gradient, do.own_slope
    region_row, region_truth, region_gradient = region.row, region.truth, region.gradient
    SOFTMAX, LABELS, OWN, UNION = kind.activation == "softmax", kind.labels, kind.target == "own", kind.union
    VALUES, MAPPED = not kind.labels and not kind.union, kind.mapped
    FUSED, KEPT = kind.fused, kind.kept

    @kernel(("backward", kind))
    def gradient(job, coefs, result, begin, end):
        """Tasks [begin, end) of the grid: dL/dx into result, from coefs = dL/dstatistics (fields, B, K)."""
        job, coefs = borrowed(job), borrowed(coefs)
        C, K, block, s, zero = job.C, job.K, job.block, job.scalars, np.uint64(0)
        scratch = (
            np.zeros((8, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty((C + np.uint64(UNION)) * block if SOFTMAX else zero, R),
            np.empty(K * block if KEPT else zero, R),
            np.empty(K * block if UNION else zero, R),
            np.empty(zero if job.input.direct else C * block, R),
            np.empty(zero if result.direct else C * block, R),
        )
        rows, t, w, e, h, z, xs, gs = borrowed(scratch)
        m, r, ls, y, nought, dot, own, u = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
        known, of_union = Rows(w, t, m, r, ls, dot), Rows(w, t, nought, r, ls, dot)
        x = memory(job.input.address, R) if job.input.direct else xs
        g = memory(result.address, R) if result.direct else gs
        ys = memory(job.target.address, R) if VALUES and job.target.direct else y
        us = memory(job.map.address, R) if MAPPED and job.map.direct else u
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            coef = coefs[:, b]
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                voxels_of(job, LABELS, b, v0, n, t, w)
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                go, gld = (b * result.per_sample + v0, result.per_class) if result.direct else (zero, block)
                if result.direct and (v0 - start) % AHEAD == 0:
                    touch(g, go, gld, C, min(AHEAD, stop - v0))
                if SOFTMAX:
                    for v in range(n):
                        dot[v] = R(0)
                    softmax(x, xo, ld, C, n, known, e, block, coef)
                if (SOFTMAX and not FUSED) or UNION:
                    for k in range(K):
                        ho = k * block if KEPT else zero
                        uo = row_of(job.map, b, k, v0, n, u) if MAPPED else zero
                        if UNION:
                            region_truth(job.target, job.member, C, b, v0, k, n, t, own, y)
                            region_row(job.member, x, xo, ld, C, k, n, known, e, block, z, ho)
                            class_slope(z, ho, e, C * block, of_union, k, y, zero, us, uo, n, s, coef, h, ho)
                        else:
                            yo = row_of(job.target, b, k, v0, n, y) if VALUES else zero
                            class_slope(x, xo + k * ld, e, k * block, known, k, ys, yo, us, uo, n, s, coef, h, ho)
                if OWN:
                    own_slope(x, xo, ld, e, block, known, n, s, coef, own)
                if UNION:
                    region_gradient(job.member, x, xo, ld, C, K, n, known, e, block, z, h, g, go, gld)
                else:
                    for k in range(C):
                        yo = row_of(job.target, b, k, v0, n, y) if VALUES else zero
                        uo = row_of(job.map, b, k, v0, n, u) if MAPPED else zero
                        prefetch(g, go + k * gld + n, n)
                        class_gradient(
                            x, xo + k * ld, e, k * block, known, k, ys, yo, us, uo, n, s, coef, h, k * block,
                            g, go + k * gld,
                        )  # fmt: skip
                if OWN:
                    for v in range(n):
                        if t[v] >= 0:
                            g[go + np.uint64(t[v]) * gld + v] += own[v]
                if not result.direct:
                    store_rows(result, gs, block, C, b, v0, n)
        alive(scratch)

    return gradient
