"""Ranks on a CPU: errors of a class -> the steps of its Jaccard loss, by a sort in two class maps (Numba).

An error e >= 0 and its voxel make a key of 64 bits: SIZE less the 31 bits of e, so that the largest comes first, 32 of
the voxel's place, and whether it is in the class. All are different, so any sort gives the order of a stable one. They
are put into buckets by the leading bits of e; runs of buckets are sorted by numpy, in place and in cache, and then
walked through.

Between the passes a float32 holds the error of a voxel and a class, negative (-0.0 for no error) in the class; ranking
puts the step of the loss in its place, with the sign of the error's slope.

Legend. B sample, C class, V voxel, P pool: the batch, or each sample if `per_sample`. address, sB, sV: address of the
errors (B, V) float32 of one class, uint64, and their strides by sample and voxel, in elements. A task is one of CHUNKS
chunks, of `chunk` voxels, of a sample. "In the class": of a voxel whose true class it is.

In bodies, job and block are the records JOB and BLOCK of `softdice.backends.cpu.walk`; at_job, at_block their
addresses. A row is the address of n float32, the voxels of a block (t: int32 class numbers); strides are in bytes, from
class to class. bad: how many values of a block are out of range, int64.

    job.C, .low, .high                   classes, the range of a probability
    job.coefs                            (B, C) float32: dL/dcosts
    job.target, job.map                  PLANEs: of the target by class, of the steps (B, C, V) float32
    block.n, .sample                     voxels of the block, number of its sample
    block.w, .t, .r, .dot                rows: weight, class number, 1 / sum e of a softmax, sum of p g over the classes
    block.y, .spare, .zeros              rows: target of the class at work, scratch, zeros
    block.x, .x_stride, .g, .g_stride    C rows of logits (or probabilities), and of the result: errors or gradient
    block.e, .row_stride                 C rows of e = exp(x - max x) of a softmax, whose p is e r
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
from softdice.backends.cpu.walk import block_at, block_body, first_of, job_at, row_at
from softdice.parallel.threads import ALONE_NUMEL, for_each, share_out
from softdice.statistics import check, sliced
from softdice.statistics.request import Request

SIGN, SIZE = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
SHIFT, BUCKETS = np.int32(20), 1 << 11  # an octave of errors has 8 buckets
CHUNKS = 8  # of a sample, that are counted apart
RUN = 1 << 14  # keys that are sorted together, at least: 128 KiB
u = np.uint64


def ranks(request: Request) -> tuple[Tensor, Tensor]:
    """Return costs and numbers of voxels by class, (2, P, C), and the signed steps, (B, C, V), all float32.
    The cost of a class is the Lovasz extension of the Jaccard loss: the sum of error times step over the voxels, the
    largest error first. A step is the rise of the loss at a voxel; a signed step is dcost/dp, with a sigmoid dcost/dx.
    Raise ValueError, with `validate`, for a value out of range, or a target by class that is neither 0 nor 1."""
    input, s = request.input, request.settings
    B, _, V = input.shape
    if input.numel() >= 1 << 32:  # places have 32 bits
        return sliced.ranks(request)
    errors = gradient_like(input) if input.dtype == torch.float32 else torch.empty_like(input, dtype=torch.float32)
    walk_plan = planned(request, errors)
    in_range = run(_errors(s.activation, request.hard), walk_plan, input)
    if s.validate:
        (check.zeros_and_ones if in_range else check.values)(request)
    keys = np.empty(V if s.per_sample else B * V, np.uint64)
    return sliced.rank_classes(errors, request, partial(rank, keys=keys)), errors


def ranks_gradient(coef_BC: Tensor, steps: Tensor, request: Request) -> Tensor:
    """Return dL/dinput (B, C, V), in the input's dtype, for coef_BC = dL/dcosts and the steps that `ranks` returned.
    It lies in the memory of the steps where the dtype is the same: the steps are overwritten."""
    input = request.input
    # without a softmax the gradient is coef times the step, without a kernel; huge inputs go where `ranks` sent them
    if request.settings.activation != "softmax" or input.numel() >= 1 << 32:
        return sliced.ranks_gradient(coef_BC, steps, request)
    result = steps if input.dtype == steps.dtype else gradient_like(input)
    walk_plan = planned(request, result, in_place=False)
    coefs = coef_BC.float().contiguous().numpy()
    B, C, _ = input.shape
    walk_plan.put("map", *plane_of(steps, reader(torch.float32)))
    walk_plan.put("coefs", address(coefs), B * C)
    run(_gradient(), walk_plan, input)
    return result


def rank(errors: Tensor, keys: np.ndarray) -> tuple[float, int]:
    """Return the cost of a class and the number of its voxels, and replace its errors by the steps of the loss.
    errors: (B, V) float32, with the sign set in the class. keys: scratch, (B V) uint64. An element counts as 8 where
    threads are dealt out: to rank it takes longer than to sum it."""
    B, V = errors.shape
    sB, sV = map(u, errors.stride())
    chunk = -(-V // CHUNKS)
    tasks = B * CHUNKS
    counts = np.zeros((2, tasks, BUCKETS + 1), np.int32)  # of all, and of those in the class; last bucket: no error
    grid = u(errors.data_ptr()), sB, sV, u(V), u(chunk)
    share_out(_count, (*grid, counts), tasks, 8 * errors.numel())  # 1. errors by bucket; 2. keys into the buckets
    by_task, in_class = counts[0, :, :-1], counts[1].sum(0)
    sizes = by_task.sum(0)
    ends = sizes.cumsum()
    places = ends - sizes + by_task.cumsum(0) - by_task  # where a task's keys of a bucket begin
    share_out(_scatter, (*grid, places, keys), tasks, 8 * errors.numel())
    ending = np.searchsorted(ends, np.arange(RUN, ends[-1] + RUN, RUN))  # 3. runs: the bucket that ends each of them
    last = np.unique(ending.clip(max=BUCKETS - 1))
    bounds = np.concatenate(([0], ends[last]))  # run i is keys[bounds[i] : bounds[i + 1]]
    before = np.concatenate(([0], in_class.cumsum()[last]))  # voxels of the class in front of each run
    costs = np.zeros(len(last))
    arguments = u(errors.data_ptr()), keys, bounds, before, np.float64(in_class.sum()), costs
    _step(*arguments, u(0), u(0))  # on no run: compile it here, and not in every thread

    def sorted_walk(i: int) -> None:
        """Sort the keys of run i, and write its steps and its cost."""
        keys[bounds[i] : bounds[i + 1]].sort()
        _step(*arguments, u(i), u(i + 1))

    for_each(sorted_walk, range(len(last)), 1 if 8 * errors.numel() < ALONE_NUMEL else torch.get_num_threads())
    return float(costs.sum()), int(in_class.sum())


@kernel("count")
def _count(address, sB, sV, V, chunk, counts, begin, end):
    """Count the errors of tasks [begin, end) by bucket: counts, (2, tasks, BUCKETS + 1) int32 zeros, takes all errors
    in counts[0], those in the class in counts[1]. The last bucket is of errors of 0.
    An error is read by its bits as int32: the sign, then SIZE's 31 bits, which are in the order of the errors."""
    for task in range(begin, end):
        b = task // np.uint64(CHUNKS)
        start = (task - b * np.uint64(CHUNKS)) * chunk
        all_counts, in_class = counts[0, task], counts[1, task]
        for v in range(start, min(start + chunk, V)):
            word = read_label(address, b * sB + v * sV)
            size = np.int32(word & SIZE)
            bucket = np.uint64(np.int32(np.int32(SIZE - size) >> SHIFT)) if size != 0 else np.uint64(BUCKETS)
            all_counts[bucket] += 1
            in_class[bucket] += np.int32(word < 0)


@kernel("scatter")
def _scatter(address, sB, sV, V, chunk, places, keys, begin, end):
    """Put the keys of errors above 0, of tasks [begin, end), into their buckets; the step of the others is 0.
    places: (tasks, BUCKETS) int64, where in keys (uint64) the next key of a task's bucket goes; it is counted up."""
    for task in range(begin, end):
        b = task // np.uint64(CHUNKS)
        start = (task - b * np.uint64(CHUNKS)) * chunk
        place = places[task]
        for v in range(start, min(start + chunk, V)):
            offset = b * sB + v * sV
            word = bits(reread(address, offset))
            size = np.int32(word & SIZE)
            if size != 0:
                turned = np.uint64(np.int32(SIZE - size))
                bucket = turned >> np.uint64(SHIFT)
                one = np.uint64(1)
                key = (turned << np.uint64(33)) | (offset << one) | (one if word < 0 else np.uint64(0))
                keys[np.uint64(place[bucket])] = key
                place[bucket] += 1
            else:
                write(address, offset, ZERO)


@kernel("step")
def _step(address, keys, bounds, before, G, costs, begin, end):
    """Write the costs of runs [begin, end) of sorted keys, and each voxel's step in the place of its error.

    Run i is keys[bounds[i] : bounds[i + 1]]; before[i] voxels of the class come before it; the class has G (float64).
    The cost is the Lovasz extension of the Jaccard loss: the sum of error times step. With F voxels of the class and N
    others so far, the loss is 1 - (G - F) / (G + N). A voxel of the class raises it by 1 / (G + N), from
    1 - (G - F + 1) / (G + N); any other by (G - F) / ((G + N - 1) (G + N)), from 1 - (G - F) / (G + N - 1).
    address: of the class's errors; a key holds the place of its voxel in elements from there.
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
                step = (G - F) / (union * (union + 1.0)) if union > 0.0 else 1.0  # G = N = 0: from 0 to 1
                union += 1.0
                signed = step
            write(address, (key >> one) & np.uint64(0xFFFFFFFF), np.float32(signed))
            total += error * step
        costs[part] = total


@jit
def _signed_errors(x, e, r, t, y, w, c, n, softmax, hinge, labels, out):
    """Write the errors of class c to the row `out`, with the sign set in the class; 0 where a voxel does not count.
    x, e, y: rows of the class. A voxel is in it if t is c, with `labels`, else if y > 1/2. The error is 1 - p in the
    class, else p, where p is e r with `softmax`, else x; with `hinge`, relu(1 - x) or relu(1 + x). All three: bool."""
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
    """Return the address of the body that writes the signed errors of each class to its row of the result.
    An error is 1 - p in the class, else p; of logits of a "sigmoid" it is the hinge, relu(1 - x) or relu(1 + x).
    labels: whether the target is a label map; else it has a value for each class."""
    softmax, hinge, limited = activation == "softmax", activation == "sigmoid", activation == "none"

    @block_body((activation, labels))
    def errors(at_job, at_block):
        """Write the errors of a block; return bad, the number of probabilities out of range: 0 with an activation."""
        job, block = job_at(at_job), block_at(at_block)
        bad = np.int64(0)
        for c in range(job.C):
            x, out = block.x + c * block.x_stride, block.g + c * block.g_stride
            y = block.zeros if labels else row_at(job.target, c, block, block.y)
            if limited:
                bad += beyond(x, block.n, job.low, job.high)
            e = block.e + c * block.row_stride
            _signed_errors(x, e, block.r, block.t, y, block.w, c, block.n, softmax, hinge, labels, out)
        return bad

    return errors


@jit
def _scale_steps(g, e, most, n, coef):
    """Multiply the row g, the steps of a class, with coef = dL/dcost. Write the product also to the row `most` at the
    voxels where this class is the most probable one: e = exp(x - max x) is 1."""
    for v in range(n):
        step = reread(g, v) * coef
        write(g, v, step)
        write(most, v, step if read(e, v) == ONE else reread(most, v))


@jit
def _subtract_most(g, e, r, most, dot, n):
    """Subtract the row `most`, the most probable class's g, from the row g; add p = e r times the rest to dot."""
    for v in range(n):
        step = reread(g, v) - read(most, v)
        write(g, v, step)
        write(dot, v, reread(dot, v) + read(e, v) * read(r, v) * step)


@jit
def _softmax_slope(g, e, r, dot, n):
    """Replace the row g of a class by p (g - dot), with p = e r."""
    for v in range(n):
        write(g, v, read(e, v) * read(r, v) * (reread(g, v) - read(dot, v)))


@cache
def _gradient() -> np.uint64:
    """Return the address of the body that writes dL/dinput, p_c (g_c - sum_j p_j g_j) with g = dL/dcost times step.
    It subtracts the g of the most probable class from all g first. That changes no gradient, since sum p = 1, but where
    its p is nearly 1, g - p g would lose all digits."""

    @block_body("softmax")
    def gradient(at_job, at_block):
        """Write the gradient of a block to the rows at block.g, in three turns over the classes; return 0."""
        job, block = job_at(at_job), block_at(at_block)
        n, steps = block.n, job.map
        fill(block.dot, n, ZERO)
        for c in range(job.C):  # 1. g_c = dL/dcost times step, and the g of the most probable class in `spare`
            source = first_of(steps, block) + c * steps.per_class
            g, e = block.g + c * block.g_stride, block.e + c * block.row_stride
            call(steps.convert, (source, steps.step, n, g, u(1), u(0), u(0)))  # one row, so no strides of classes
            _scale_steps(g, e, block.spare, n, read(job.coefs, block.sample * job.C + c))
        for c in range(job.C):  # 2. g_c less that one, and dot = sum_c p_c g_c
            g, e = block.g + c * block.g_stride, block.e + c * block.row_stride
            _subtract_most(g, e, block.r, block.spare, block.dot, n)
        for c in range(job.C):  # 3. p_c (g_c - dot)
            _softmax_slope(block.g + c * block.g_stride, block.e + c * block.row_stride, block.r, block.dot, n)
        return 0

    return gradient
