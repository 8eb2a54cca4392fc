"""errors of a class -> the steps of its Jaccard loss at their ranks, on a CPU: a sort in two class maps (Numba).

An error e >= 0 and what a voxel is come together in 64 bits: those of e turned round, so that the largest comes first,
the voxel's place, and whether it is of the class. All are different, so any sort gives the order of a stable one. They
are put into buckets by the leading bits of e; each is sorted by numpy, in place and in cache, and then walked through.

Between the passes a float32 holds the error of a voxel and a class, negative (-0.0 for no error) in the class; a walk
puts the step of the loss in its place, with the sign of the error's slope.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.kernels.cpu.compiled import alive, bits, borrowed, kernel, memory
from softdice.kernels.cpu.driver import job_of, plane_of
from softdice.kernels.cpu.kernel import logits_of, row_of, span_of, store_rows, voxels_of
from softdice.kernels.cpu.loops import Kind, Rows, loops
from softdice.kernels.cpu.memory import gradient_like
from softdice.kernels.cpu.rows import beyond, load, store
from softdice.kernels.cpu.threads import ALONE_NUMEL, for_each, share_out
from softdice.settings import Pass, Voxels

SIGN, SIZE = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
SHIFT, BUCKETS = np.int32(20), 1 << 11  # an octave of errors has 8 buckets
CHUNKS = 8  # of a sample, that are counted apart
RUN = 1 << 14  # keys that are sorted together, at least: 128 KiB
u = np.uint64


def fits(input: Tensor) -> bool:
    """Whether errors are float32, and places have 32 bits."""
    return input.dtype != torch.float64 and input.numel() < 1 << 32


def errors(given: Voxels, settings: Pass) -> tuple[Tensor, bool]:
    """input (B, C, V), target, weight -> signed errors, and whether all values were in range."""
    input, (kind, job) = given.input, job_of(given, settings)
    single = input.dtype == torch.float32
    result = gradient_like(input) if single else torch.empty_like(input, dtype=torch.float32)
    bad = np.zeros(input.shape[0] * int(job.chunks), np.int64)
    if input.numel():
        share_out(_errors(kind), (job, plane_of(result, np.float32), bad), len(bad), input.numel())
    return result, not (settings.validate and any(bad.tolist()))


def rank(errors: Tensor, keys: np.ndarray) -> tuple[float, int]:
    """Signed errors of a class (B, V) -> its cost and its voxels; the steps are in their place.

    keys: uint64, as many as there are voxels.
    """
    B, V = errors.shape
    sB, sV = map(u, errors.stride())
    chunk = -(-V // CHUNKS)
    tasks = B * CHUNKS
    counts = np.zeros((2, tasks, BUCKETS + 1), np.int32)  # of all, and of those in the class; the last: no error
    grid = u(errors.data_ptr()), sB, sV, u(V), u(chunk)
    share_out(_count, (*grid, counts), tasks, 8 * errors.numel())
    all_of, in_class = counts[0, :, :-1], counts[1].sum(0)
    ends = all_of.sum(0).cumsum()
    places = ends - all_of.sum(0) + all_of.cumsum(0) - all_of
    share_out(_scatter, (*grid, places, keys), tasks, 8 * errors.numel())
    found = np.searchsorted(ends, np.arange(RUN, ends[-1] + RUN, RUN))  # the bucket that ends each run
    last = np.unique(found.clip(max=BUCKETS - 1))
    bounds = np.concatenate(([0], ends[last]))
    before = np.concatenate(([0], in_class.cumsum()[last]))
    costs = np.zeros(len(last))
    walk = u(errors.data_ptr()), keys, bounds, before, np.float64(in_class.sum()), costs
    _walk(*walk, u(0), u(0))  # it compiles once, not in every thread

    def sorted_walk(i: int) -> None:
        keys[bounds[i] : bounds[i + 1]].sort()
        _walk(*walk, u(i), u(i + 1))

    for_each(sorted_walk, range(len(last)), 1 if 8 * errors.numel() < ALONE_NUMEL else torch.get_num_threads())
    return float(costs.sum()), int(in_class.sum())


def gradient(coef: Tensor, steps: Tensor, given: Voxels, settings: Pass) -> Tensor:
    """dL/dcosts (B, C), signed steps of a softmax -> dL/dinput, in the memory of the steps if the dtype is theirs."""
    input, (kind, job) = given.input, job_of(given, settings)
    result = steps if input.dtype == steps.dtype else gradient_like(input)
    planes = plane_of(steps, np.float32), plane_of(result, np.float32)
    if input.numel():
        tasks = input.shape[0] * int(job.chunks)
        share_out(_gradient(kind), (job, coef.float().contiguous().numpy(), *planes), tasks, input.numel())
    return result


@cache
def _errors(kind: Kind) -> Any:
    """What a call needs -> the kernel of the errors."""
    R, do = np.float32, loops(kind)
    softmax, ZERO, ONE = do.softmax, R(0), R(1)
    SOFTMAX, SIGMOID, LABELS = kind.activation == "softmax", kind.activation == "sigmoid", kind.labels
    MASKED, RANGE = kind.masked, kind.activation == "none"

    @kernel(("errors", kind))
    def fill(job, result, bad, begin, end):
        """Tasks [begin, end) of the grid (sample, chunk): signed errors into result, values out of range."""
        job = borrowed(job)
        C, block, s, zero = job.C, job.block, job.scalars, np.uint64(0)
        scratch = (
            np.zeros((7, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty(C * block if SOFTMAX else zero, R),
            np.empty(zero if job.input.direct else C * block, R),
        )
        rows, t, w, e, xs = borrowed(scratch)
        r, y, out = rows[1], rows[3], rows[5]
        known = Rows(w, t, rows[0], r, rows[2], rows[4])
        x = memory(job.input.address, R) if job.input.direct else xs
        ys = memory(job.target.address, R) if not LABELS and job.target.direct else y
        unread = rows[:1]
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                wrong = np.int64(voxels_of(job, LABELS, b, v0, n, t, w))
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                if SOFTMAX:
                    softmax(x, xo, ld, C, n, known, e, block, unread)
                for c in range(C):
                    xc, yo = xo + c * ld, zero if LABELS else row_of(job.target, b, c, v0, n, y)
                    if RANGE:
                        wrong += beyond(x, xc, n, s.low, s.high, w)
                    for v in range(n):
                        true = t[v] == np.int32(c) if LABELS else ys[yo + v] > R(0.5)
                        p = e[c * block + v] * r[v] if SOFTMAX else x[xc + v]
                        far = ONE - p if true else (ONE + p if SIGMOID else p)
                        far = ZERO if far <= ZERO else far
                        if MASKED:
                            live = w[v] > ZERO
                            far, true = far if live else ZERO, true if live else False
                        # by its bits: arithmetic need not keep the sign of a zero
                        out[v] = bits(np.int32(bits(far) | (SIGN if true else np.int32(0))))
                    to = b * result.per_sample + c * result.per_class + v0 * result.per_voxel
                    store(out, zero, n, result.address, 0, to, result.per_voxel)
                bad[task] += wrong
        alive(scratch)

    return fill


@kernel("count")
def _count(address, sB, sV, V, chunk, counts, begin, end):
    """Tasks [begin, end) of (sample, chunk): how many errors are in each bucket, and of how many in the class."""
    raw = memory(address, np.int32)
    for task in range(begin, end):
        b = task // np.uint64(CHUNKS)
        start = (task - b * np.uint64(CHUNKS)) * chunk
        all_of, in_class = counts[0, task], counts[1, task]
        for v in range(start, min(start + chunk, V)):
            word = raw[b * sB + v * sV]
            size = np.int32(word & SIZE)
            bucket = np.uint64(np.int32(np.int32(SIZE - size) >> SHIFT)) if size != 0 else np.uint64(BUCKETS)
            all_of[bucket] += 1
            in_class[bucket] += np.int32(word < 0)


@kernel("scatter")
def _scatter(address, sB, sV, V, chunk, places, keys, begin, end):
    """Tasks [begin, end): the keys of all errors that are not 0 into their buckets."""
    raw = memory(address, np.int32)
    for task in range(begin, end):
        b = task // np.uint64(CHUNKS)
        start = (task - b * np.uint64(CHUNKS)) * chunk
        place = places[task]
        for v in range(start, min(start + chunk, V)):
            off = b * sB + v * sV
            word = raw[off]
            size = np.int32(word & SIZE)
            if size != 0:
                turned = np.uint64(np.int32(SIZE - size))
                bucket = turned >> np.uint64(SHIFT)
                one = np.uint64(1)
                key = (turned << np.uint64(33)) | (off << one) | (one if word < 0 else np.uint64(0))
                keys[np.uint64(place[bucket])] = key
                place[bucket] += 1
            else:
                raw[off] = np.int32(0)


@kernel("walk")
def _walk(address, keys, bounds, before, G, costs, begin, end):
    """Runs [begin, end) of sorted keys: the cost of each run; the step at each voxel in the place of its error.

    A voxel of the class raises the loss from 1 - (G - F + 1) / (G + N) to 1 - (G - F) / (G + N), by 1 / (G + N);
    any other from 1 - (G - F) / (G + N - 1) to 1 - (G - F) / (G + N).
    """
    steps, one = memory(address, np.float32), np.uint64(1)
    for run in range(begin, end):
        F = np.float64(before[run])
        union = G + np.float64(bounds[run]) - F  # G + N
        total = 0.0
        for i in range(np.uint64(bounds[run]), np.uint64(bounds[run + 1])):
            key = keys[i]
            error = np.float64(bits(np.int32(SIZE - np.int32(key >> np.uint64(33)))))
            if key & one:
                F += 1.0
                step = 1.0 / union
                signed = -step
            else:
                step = (G - F) / (union * (union + 1.0)) if union > 0.0 else 1.0
                union += 1.0
                signed = step
            steps[(key >> one) & np.uint64(0xFFFFFFFF)] = np.float32(signed)
            total += error * step
        costs[run] = total


@cache
def _gradient(kind: Kind) -> Any:
    """What a call needs -> the kernel of the gradient."""
    R, do = np.float32, loops(kind)
    softmax, LABELS = do.softmax, kind.labels

    @kernel(("rank gradient", kind))
    def combine(job, coefs, steps, result, begin, end):
        """Tasks [begin, end): with g = dL/dcost times step, p (g - sum_k p_k g_k) into result.

        The g of the most probable class is taken off first: where its p is nearly 1, g - p g would lose all digits.
        """
        job = borrowed(job)
        C, block, zero = job.C, job.block, np.uint64(0)
        scratch = (
            np.zeros((6, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty(C * block, R),
            np.empty(zero if job.input.direct else C * block, R),
            np.empty(C * block, R),
        )
        rows, t, w, e, xs, g = borrowed(scratch)
        r, dot, most, unread = rows[1], rows[5], rows[3], rows[:1]
        known = Rows(w, t, rows[0], r, rows[2], rows[4])
        x = memory(job.input.address, R) if job.input.direct else xs
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                voxels_of(job, LABELS, b, v0, n, t, w)
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                softmax(x, xo, ld, C, n, known, e, block, unread)
                for v in range(n):
                    dot[v] = R(0)
                for c in range(C):
                    off = b * steps.per_sample + c * steps.per_class + v0 * steps.per_voxel
                    load(steps.address, 0, off, steps.per_voxel, n, g, c * block)
                    k = R(coefs[b, c])
                    for v in range(n):
                        g[c * block + v] *= k
                        most[v] = g[c * block + v] if e[c * block + v] == R(1) else most[v]
                for c in range(C):
                    for v in range(n):
                        g[c * block + v] -= most[v]
                        dot[v] += e[c * block + v] * r[v] * g[c * block + v]
                for c in range(C):
                    for v in range(n):
                        g[c * block + v] = e[c * block + v] * r[v] * (g[c * block + v] - dot[v])
                store_rows(result, g, block, C, b, v0, n)
        alive(scratch)

    return combine
