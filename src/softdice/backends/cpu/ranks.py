"""Ranks on a CPU: errors of a class -> the steps of its Jaccard loss, by a sort in two class maps (Numba).

An error e >= 0 and what a voxel is come together in 64 bits: those of e turned round, so that the largest comes first,
the voxel's place, and whether it is of the class. All are different, so any sort gives the order of a stable one. They
are put into buckets by the leading bits of e; each is sorted by numpy, in place and in cache, and then walked through.

Between the passes a float32 holds the error of a voxel and a class, negative (-0.0 for no error) in the class; ranking
puts the step of the loss in its place, with the sign of the error's slope.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from softdice.backends.cpu.arithmetic import ONE, ZERO
from softdice.backends.cpu.compiler import jit, kernel
from softdice.backends.cpu.convert import reader
from softdice.backends.cpu.driver import address, plane_of, planned, run
from softdice.backends.cpu.gradient_memory import gradient_like
from softdice.backends.cpu.intrinsics import bits, call, read, read_label, reread, write
from softdice.backends.cpu.regions import beyond
from softdice.backends.cpu.softmax import fill
from softdice.backends.cpu.walk import block_at, block_body, job_at, row_at
from softdice.parallel.threads import ALONE_NUMEL, for_each, share_out
from softdice.statistics import check, sliced
from softdice.statistics.request import Request

SIGN, SIZE = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
SHIFT, BUCKETS = np.int32(20), 1 << 11  # an octave of errors has 8 buckets
CHUNKS = 8  # of a sample, that are counted apart
RUN = 1 << 14  # keys that are sorted together, at least: 128 KiB
u = np.uint64


def ranks(request: Request) -> tuple[Tensor, Tensor]:
    """Return costs and voxels of each class, (2, P, C), and the signed steps of the loss, (B, C, V)."""
    input, s = request.input, request.settings
    B, _, V = input.shape
    if input.numel() >= 1 << 32:  # places have 32 bits
        return sliced.ranks(request)
    errors = gradient_like(input) if input.dtype == torch.float32 else torch.empty_like(input, dtype=torch.float32)
    made = planned(request, errors)
    in_range = run(_errors(s.activation, request.hard), made, input)
    if s.validate:
        (check.zeros_and_ones if in_range else check.values)(request)
    keys = np.empty(V if s.per_sample else B * V, np.uint64)
    return sliced.rank_classes(errors, request, partial(rank, keys=keys)), errors


def ranks_gradient(coef_BC: Tensor, steps: Tensor, request: Request) -> Tensor:
    """Return dL/dinput for dL/dcosts, in the memory of the steps if the dtype is theirs."""
    input = request.input
    if request.settings.activation != "softmax" or input.numel() >= 1 << 32:
        return sliced.ranks_gradient(coef_BC, steps, request)
    result = steps if input.dtype == steps.dtype else gradient_like(input)
    made = planned(request, result, in_place=False)
    coefs = coef_BC.float().contiguous().numpy()
    B, C, _ = input.shape
    made.put("map", *plane_of(steps, reader(torch.float32)))
    made.put("coefs", address(coefs), B * C)
    run(_gradient(), made, input)
    return result


def rank(errors: Tensor, keys: np.ndarray) -> tuple[float, int]:
    """Return the cost and the voxels of a class with signed errors (B, V), and put the steps in their place.

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
    ending = np.searchsorted(ends, np.arange(RUN, ends[-1] + RUN, RUN))  # the bucket that ends each run
    last = np.unique(ending.clip(max=BUCKETS - 1))
    bounds = np.concatenate(([0], ends[last]))
    before = np.concatenate(([0], in_class.cumsum()[last]))
    costs = np.zeros(len(last))
    arguments = u(errors.data_ptr()), keys, bounds, before, np.float64(in_class.sum()), costs
    _step(*arguments, u(0), u(0))  # it compiles once, not in every thread

    def sorted_walk(i: int) -> None:
        keys[bounds[i] : bounds[i + 1]].sort()
        _step(*arguments, u(i), u(i + 1))

    for_each(sorted_walk, range(len(last)), 1 if 8 * errors.numel() < ALONE_NUMEL else torch.get_num_threads())
    return float(costs.sum()), int(in_class.sum())


@kernel("count")
def _count(address, sB, sV, V, chunk, counts, begin, end):
    """Count, for tasks [begin, end) of (sample, chunk), the errors of each bucket, and those in the class."""
    for task in range(begin, end):
        b = task // np.uint64(CHUNKS)
        start = (task - b * np.uint64(CHUNKS)) * chunk
        all_of, in_class = counts[0, task], counts[1, task]
        for v in range(start, min(start + chunk, V)):
            word = read_label(address, b * sB + v * sV)
            size = np.int32(word & SIZE)
            bucket = np.uint64(np.int32(np.int32(SIZE - size) >> SHIFT)) if size != 0 else np.uint64(BUCKETS)
            all_of[bucket] += 1
            in_class[bucket] += np.int32(word < 0)


@kernel("scatter")
def _scatter(address, sB, sV, V, chunk, places, keys, begin, end):
    """Put the keys of all errors that are not 0 into their buckets."""
    for task in range(begin, end):
        b = task // np.uint64(CHUNKS)
        start = (task - b * np.uint64(CHUNKS)) * chunk
        place = places[task]
        for v in range(start, min(start + chunk, V)):
            off = b * sB + v * sV
            word = bits(reread(address, off))
            size = np.int32(word & SIZE)
            if size != 0:
                turned = np.uint64(np.int32(SIZE - size))
                bucket = turned >> np.uint64(SHIFT)
                one = np.uint64(1)
                key = (turned << np.uint64(33)) | (off << one) | (one if word < 0 else np.uint64(0))
                keys[np.uint64(place[bucket])] = key
                place[bucket] += 1
            else:
                write(address, off, ZERO)


@kernel("step")
def _step(address, keys, bounds, before, G, costs, begin, end):
    """Write the cost of each run [begin, end) of sorted keys, and the step at each voxel in the place of its error.

    A voxel of the class raises the loss from 1 - (G - F + 1) / (G + N) to 1 - (G - F) / (G + N), by 1 / (G + N);
    any other from 1 - (G - F) / (G + N - 1) to 1 - (G - F) / (G + N).
    """
    one = np.uint64(1)
    for part in range(begin, end):
        F = np.float64(before[part])
        union = G + np.float64(bounds[part]) - F  # G + N
        total = 0.0
        for i in range(np.uint64(bounds[part]), np.uint64(bounds[part + 1])):
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
            write(address, (key >> one) & np.uint64(0xFFFFFFFF), np.float32(signed))
            total += error * step
        costs[part] = total


@jit
def _signed_errors(x, e, r, t, y, w, c, n, softmax, hinge, labels, out):
    """Write a class's errors, with the sign set in the class; 0 where a voxel does not count."""
    for v in range(n):
        true = read_label(t, v) == np.int32(c) if labels else read(y, v) > np.float32(0.5)
        p = read(e, v) * read(r, v) if softmax else read(x, v)
        far = ONE - p if true else (ONE + p if hinge else p)
        far = ZERO if far <= ZERO else far
        live = read(w, v) > ZERO
        far, true = far if live else ZERO, true if live else False
        # by its bits: arithmetic need not keep the sign of a zero
        write(out, v, bits(np.int32(bits(far) | (SIGN if true else np.int32(0)))))


@cache
def _errors(activation: str, labels: bool) -> np.uint64:
    """Return the body that writes signed errors, the job's result."""
    softmax, hinge, limited = activation == "softmax", activation == "sigmoid", activation == "none"

    @block_body((activation, labels))
    def errors(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        bad = np.int64(0)
        for c in range(job.C):
            x, out = k.x + c * k.ld, k.g + c * k.gld
            y = k.zero if labels else row_at(job.target, c, k, k.y)
            if limited:
                bad += beyond(x, k.n, job.low, job.high)
            _signed_errors(x, k.e + c * k.row, k.r, k.t, y, k.w, c, k.n, softmax, hinge, labels, out)
        return bad

    return errors


@jit
def _scale_steps(g, e, most, n, coef):
    """Multiply steps with dL/dcost; keep those of the most probable class, whose e is 1, in `most`."""
    for v in range(n):
        step = reread(g, v) * coef
        write(g, v, step)
        write(most, v, step if read(e, v) == ONE else reread(most, v))


@jit
def _subtract_most(g, e, r, most, dot, n):
    for v in range(n):
        step = reread(g, v) - read(most, v)
        write(g, v, step)
        write(dot, v, reread(dot, v) + read(e, v) * read(r, v) * step)


@jit
def _softmax_slope(g, e, r, dot, n):
    for v in range(n):
        write(g, v, read(e, v) * read(r, v) * (reread(g, v) - read(dot, v)))


@cache
def _gradient() -> np.uint64:
    """Return the body that writes p (g - sum_k p_k g_k), with g = dL/dcost times step.

    The g of the most probable class is subtracted first: where its p is nearly 1, g - p g would lose all digits.
    """

    @block_body("softmax")
    def gradient(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        n, steps = k.n, job.map
        fill(k.dot, n, ZERO)
        for c in range(job.C):
            source = steps.address + k.b * steps.per_sample + c * steps.per_class + k.v0 * steps.per_voxel
            call(steps.convert, (source, steps.step, n, k.g + c * k.gld, u(1), u(0), u(0)))
            _scale_steps(k.g + c * k.gld, k.e + c * k.row, k.spare, n, read(job.coefs, k.b * job.C + c))
        for c in range(job.C):
            _subtract_most(k.g + c * k.gld, k.e + c * k.row, k.r, k.spare, k.dot, n)
        for c in range(job.C):
            _softmax_slope(k.g + c * k.gld, k.e + c * k.row, k.r, k.dot, n)
        return 0

    return gradient
