"""logits, target -> statistics, and their gradient, on a CPU: the driver of the Numba kernel.

The voxels of each sample are cut into a fixed grid of chunks, whatever the number of threads. Every chunk writes its
sums to a slot of its own and the slots are added in order, so 1 and N threads give the same bits. The threads are
Python's, as many as torch.get_num_threads() says; the kernels release the GIL. Beside its inputs the pass holds the
slots, some rows of scratch per thread, and in the backward pass the gradient.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice.kernels import general
from softdice.kernels import plain as usual
from softdice.kernels.rows import CODES, clean_weights, jit, load, load_labels, outside, store
from softdice.reference import ACTIVATIONS, FIELDS, outcomes
from softdice.validation import probability_slack

BLOCK_ELEMENTS = 1 << 17  # classes times voxels of a block: half a megabyte of float32, which stays in L2
BLOCK_VOXELS = 512  # so that the rows of few classes stay in L1
CHUNKS = 64  # at most, per sample
CHUNK_VOXELS = 8192  # at least
ROWS = 12
ALONE_NUMEL = 1 << 18  # fewer elements than this are done before a second thread has woken up

_CODE = {
    torch.float32: "f4",
    torch.float64: "f8",
    torch.bfloat16: "bf",
    torch.float16: "f2",
    torch.uint8: "u1",
    torch.bool: "u1",
    torch.int8: "i1",
    torch.int16: "i2",
    torch.int32: "i4",
    torch.int64: "i8",
}


@jit
def _block_inputs(
    direct: Any, xraw: Any, xcode: Any, xo: Any, sC: Any, sV: Any, C: Any, xs: Any, block: Any,
    dense: Any, traw: Any, tcode: Any, to: Any, first: Any, top: Any, has_ignore: Any, ignore: Any,
    wraw: Any, wcode: Any, wo: Any, weighted: Any, n: Any, t: Any, w: Any, bad: Any,
) -> Any:  # fmt: skip
    """Labels, weights and, where they are not read in place, logits of one block -> scratch; is any voxel ignored?"""
    zero = np.uint64(0)
    for v in range(n):
        w[v] = w.dtype.type(1)
        t[v] = np.int32(0)
    if weighted:
        load(wraw, wcode, wo, np.uint64(1), n, w, zero)
        bad[2] += clean_weights(w, n)
    if not dense:
        bad[0] += load_labels(traw, tcode, to, n, first, top, has_ignore, ignore, t, w)
    if weighted:
        for v in range(n):
            t[v] = t[v] if w[v] > 0 else np.int32(-1)
    if not direct:
        for c in range(C):
            load(xraw, xcode, xo + c * sC, sV, n, xs, c * block)
    return weighted or has_ignore


@jit
def _forward(
    x: Any, xraw: Any, xcode: Any, direct: Any, sB: Any, sC: Any, sV: Any, C: Any, K: Any, V: Any,
    dense: Any, traw: Any, tcode: Any, first: Any, top: Any, has_ignore: Any, ignore: Any,
    wraw: Any, wcode: Any, weighted: Any, member: Any, union: Any, act: Any, flags: Any, gamma: Any, power: Any,
    smoothing: Any, share: Any, validate: Any, low: Any, high: Any,
    chunk: Any, chunks: Any, block: Any, slots: Any, bad: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    """Tasks [begin, end) of the grid (sample, chunk): their sums into slots (tasks, fields, K)."""
    zero = np.uint64(0)
    rows = np.empty((ROWS, block), x.dtype)
    e = np.empty(C * block, x.dtype)
    xs = np.empty(zero if direct else C * block, x.dtype)
    src = x if direct else xs
    w = np.empty(block, x.dtype)
    t = np.empty(block, np.int32)
    for task in range(begin, end):
        b = task // chunks
        start = (task - b * chunks) * chunk
        stop = min(start + chunk, V)
        sums = slots[task]
        for v0 in range(start, stop, block):
            n = min(block, stop - v0)
            xo = b * sB + v0 * sV
            to = b * C * V + v0 if dense else b * V + v0
            masked = _block_inputs(
                direct, xraw, xcode, xo, sC, sV, C, xs, block, dense, traw, tcode, to, first, top,
                has_ignore, ignore, wraw, wcode, b * V + v0, weighted, n, t, w, bad[task],
            )  # fmt: skip
            off, ld = (xo, sC) if direct else (zero, block)
            if act == 0 and validate:
                for c in range(C):
                    bad[task, 1] += outside(src, off + c * ld, n, low, high, w)
            if member is None:  # settled when compiling: the usual case does not wait for the rest
                usual.plain_sums(src, off, ld, C, n, flags, gamma, t, w, masked, e, block, rows, sums)
            else:
                bad[task, 3] += general.general_sums(
                    act, src, off, ld, C, K, n, flags, gamma, power, smoothing, share, t, w, masked,
                    dense, traw, tcode, to, V, member, union, validate, e, block, rows, sums,
                )  # fmt: skip
            if flags & (1 << usual.N):
                total = usual.weight_sum(w, n) if masked else float(n)
                for k in range(K):
                    sums[usual.N, k] += total


@jit
def _backward(
    x: Any, xraw: Any, xcode: Any, direct: Any, sB: Any, sC: Any, sV: Any, C: Any, K: Any, V: Any,
    dense: Any, traw: Any, tcode: Any, first: Any, top: Any, has_ignore: Any, ignore: Any,
    wraw: Any, wcode: Any, weighted: Any, member: Any, union: Any, act: Any, flags: Any, gamma: Any, power: Any,
    smoothing: Any, share: Any, coef: Any, g: Any, graw: Any,
    chunk: Any, chunks: Any, block: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    """Tasks [begin, end) of the grid: dL/dx from coef = dL/dstatistics (B, fields, K)."""
    zero = np.uint64(0)
    rows = np.empty((ROWS, block), x.dtype)
    h = np.empty(zero if member is None else C * block, x.dtype)
    xs = np.empty(zero if direct else C * block, x.dtype)
    gs = np.empty(zero if direct else C * block, x.dtype)
    src = x if direct else xs
    dst = g if direct else gs
    w = np.empty(block, x.dtype)
    t = np.empty(block, np.int32)
    unread = np.zeros(4, np.int64)
    for task in range(begin, end):
        b = task // chunks
        start = (task - b * chunks) * chunk
        stop = min(start + chunk, V)
        for v0 in range(start, stop, block):
            n = min(block, stop - v0)
            xo = b * sB + v0 * sV
            to = b * C * V + v0 if dense else b * V + v0
            masked = _block_inputs(
                direct, xraw, xcode, xo, sC, sV, C, xs, block, dense, traw, tcode, to, first, top,
                has_ignore, ignore, wraw, wcode, b * V + v0, weighted, n, t, w, unread,
            )  # fmt: skip
            off, ld = (xo, sC) if direct else (zero, block)
            if member is None:  # settled when compiling: the usual case does not wait for the rest
                usual.plain_gradient(src, off, ld, C, n, flags, gamma, t, w, masked, dst, off, ld, rows, coef[b])
            else:
                general.general_gradient(
                    act, src, off, ld, C, K, n, flags, gamma, power, smoothing, share, t, w, masked,
                    dense, traw, tcode, to, V, member, union, h, block, dst, off, ld, rows, coef[b],
                )  # fmt: skip
            if not direct:
                for c in range(C):
                    store(gs, c * block, n, graw, xcode, xo + c * sC, sV)


# --- from tensors to the kernel -----------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What the operators of `softdice.kernels.ops` pass on, in their order."""

    fields: list[str]
    activation: str
    ignore_index: int | None
    label_smoothing: float
    gamma: float
    power: float


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as flat bytes; no copy."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def _readable(input: Tensor) -> Tensor:
    """Itself where the kernel can read it in place: dense memory, channels first or last; else a contiguous copy."""
    _, C, V = input.shape
    if input.is_contiguous() or input.stride() == (C * V, 1, C):
        return input
    return input.contiguous()


class _Job(NamedTuple):
    """What both kernels are called with, and what the driver has to know of it."""

    arguments: tuple[Any, ...]
    grid: tuple[np.uint64, np.uint64, np.uint64]  # voxels per chunk, chunks per sample, voxels per block
    tasks: int
    columns: int  # classes or regions
    direct: bool  # logits are read in place
    usual: bool
    wide: np.dtype  # of the arithmetic


def _job(input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, s: Settings) -> _Job:
    """Tensors and settings -> the work to do."""
    u = np.uint64
    B, C, V = input.shape
    wide = np.dtype(np.float64 if input.dtype == torch.float64 else np.float32)
    in_place = input.stride(2) == 1 or V == 1
    direct = in_place and input.dtype in (torch.float32, torch.float64)
    xraw = _bytes(input)
    target = target.contiguous()
    dense = target.ndim == 3
    if weight is not None:
        weight = weight.contiguous()
        weight = weight if weight.dtype in _CODE else weight.float()
    K = C if regions is None else regions.shape[0]
    activation = ACTIVATIONS.index(s.activation)
    plain = activation == 1 and not dense and s.label_smoothing == 0 and regions is None and s.power == 1
    real = wide.type
    nothing = np.empty(0, np.uint8)
    block = min(BLOCK_VOXELS, max(64, BLOCK_ELEMENTS // C // 64 * 64))
    chunk = -(-max(CHUNK_VOXELS, -(-V // CHUNKS)) // block) * block
    chunks = max(1, -(-V // chunk))
    flags = sum(1 << FIELDS.index(name) for name in s.fields)
    arguments = (
        xraw.view(wide) if direct else np.empty(0, wide),
        xraw,
        CODES[_CODE[input.dtype]],
        direct,
        *(u(stride) for stride in input.stride()),
        u(C),
        u(K),
        u(V),
        dense,
        _bytes(target),
        CODES[_CODE[target.dtype]],
        np.int32(1 if C == 1 else 0),
        np.int32(max(C, 2)),
        s.ignore_index is not None,
        np.int32(_within_int32(s.ignore_index)),
        nothing if weight is None else _bytes(weight),
        0 if weight is None else CODES[_CODE[weight.dtype]],
        weight is not None,
        None if plain else _member(regions),
        regions is not None,
        activation,
        flags,
        real(s.gamma),
        real(s.power),
        real(s.label_smoothing),
        real(s.label_smoothing / outcomes(C, s.activation)),
    )
    return _Job(arguments, (u(chunk), u(chunks), u(block)), B * chunks, K, direct, plain, wide)


def _within_int32(label: int | None) -> int:
    return label if label is not None and -(2**31) < label < 2**31 else -(2**31)


def _member(regions: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.uint8) if regions is None else regions.contiguous().view(torch.uint8).numpy()


def statistics(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Settings, validate: bool
) -> tuple[Tensor, bool]:
    """input (B, C, V), target, weight -> sums (fields, B, K) in float64, and whether all values were in range."""
    input = _readable(input)
    job = _job(input, target, weight, regions, settings)
    slots = np.zeros((job.tasks, len(FIELDS), job.columns))
    bad = np.zeros((job.tasks, 4), np.int64)
    if input.numel():
        slack = probability_slack(input.dtype)
        limits = job.wide.type(-slack), job.wide.type(1 + slack)
        _share_out(_forward, (*job.arguments, validate, *limits, *job.grid, slots, bad), job.tasks, input.numel())
    sums = slots.reshape(input.shape[0], int(job.grid[1]), len(FIELDS), job.columns).sum(1)
    if job.usual:  # a hard label map: y is 0 or 1, so its square and its raw sum are its sum
        sums[:, usual.R] = sums[:, usual.LABELLED] = sums[:, usual.T]
    wanted = [FIELDS.index(name) for name in settings.fields]
    return torch.from_numpy(np.ascontiguousarray(sums[:, wanted].transpose(1, 0, 2))), not (validate and bad.any())


def gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Settings
) -> Tensor:
    """dL/dstatistics (fields, B, K), and what made them -> dL/dinput, laid out as it is read."""
    input = _readable(input)
    job = _job(input, target, weight, regions, settings)
    result = torch.empty_like(input)  # keeps dense strides, so the gradient is laid out as the input
    coef = np.zeros((input.shape[0], len(FIELDS), job.columns), job.wide)
    wanted = [FIELDS.index(name) for name in settings.fields]
    coef[:, wanted] = grad.detach().movedim(0, 1).numpy()
    graw = _bytes(result)
    if input.numel():
        g = graw.view(job.wide) if job.direct else np.empty(0, job.wide)
        _share_out(_backward, (*job.arguments, coef, g, graw, *job.grid), job.tasks, input.numel())
    return result


# --- threads ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Workers beside the calling thread; a forked process makes its own."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="softdice")


def _share_out(kernel: Callable[..., None], arguments: tuple[Any, ...], tasks: int, numel: int) -> None:
    """Run the kernel over all tasks, in consecutive shares, on as many threads as torch may use."""
    threads = 1 if numel < ALONE_NUMEL else min(torch.get_num_threads(), tasks)
    with _compile_notice(kernel):
        if threads == 1:
            kernel(*arguments, np.uint64(0), np.uint64(tasks))
            return
        if not kernel.signatures:  # type: ignore[attr-defined]  # compile once, not in every thread
            kernel(*arguments, np.uint64(0), np.uint64(0))
        shares = min(tasks, threads * (1 if numel < 1 << 20 else 4))
        bounds = [np.uint64(math.ceil(tasks * i / shares)) for i in range(shares + 1)]
        queue = iter(pairwise(bounds))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    share = next(queue, None)
                if share is None:
                    return
                kernel(*arguments, *share)

        others = [_pool(threads - 1, os.getpid()).submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


@contextmanager
def _compile_notice(kernel: Any) -> Iterator[None]:
    """Say what is going on when the first call compiles for longer than two seconds."""
    if kernel.signatures:
        yield
        return
    text = "softdice: compiling the CPU kernel for this machine (once; it is kept for the next process)"
    notice = threading.Timer(2.0, lambda: print(text, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()
