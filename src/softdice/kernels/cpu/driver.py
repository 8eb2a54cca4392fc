"""logits, target -> statistics, and their gradient, on a CPU: the driver of the Numba kernel.

The voxels of each sample are cut into a fixed grid of chunks, whatever the number of threads. Every chunk writes its
sums to a slot of its own and the slots are added in order, so 1 and N threads give the same bits. The kernels release
the GIL; `softdice.kernels.cpu.threads` runs them. Beside its inputs the pass holds the slots, some rows of scratch per
thread, and in the backward pass the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice.kernels.cpu import general
from softdice.kernels.cpu import plain as usual
from softdice.kernels.cpu.compiled import jit, kernel
from softdice.kernels.cpu.memory import gradient_like
from softdice.kernels.cpu.narrow import CLASSES, SUMS, narrow_gradient, narrow_sums
from softdice.kernels.cpu.rows import CODES, clean_weights, load, load_labels, outside, prefetch_bytes, store
from softdice.kernels.cpu.threads import share_out
from softdice.reference import outcomes
from softdice.settings import ACTIVATIONS, FIELDS, Pass
from softdice.validation import probability_slack

BLOCK_ELEMENTS = 1 << 17  # classes times voxels of a block: half a megabyte of float32, which stays in L2
BLOCK_VOXELS = 512  # so that the rows of few classes stay in L1
CHUNKS = 64  # at most, per sample
CHUNK_VOXELS = 8192  # at least
ROWS = 12
PAGE = np.uint64(512)  # elements, no more than a page of memory holds
AHEAD = np.uint64(2048)  # voxels whose gradient's pages are touched together

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
    dense: Any, traw: Any, tcode: Any, tsize: Any, to: Any, first: Any, top: Any, has_ignore: Any, ignore: Any,
    wraw: Any, wcode: Any, wo: Any, weighted: Any, n: Any, t: Any, w: Any, bad: Any,
) -> Any:  # fmt: skip
    """Labels, weights and, where they are not read in place, logits of one block -> scratch; is any voxel ignored?"""
    zero = np.uint64(0)
    if weighted:
        load(wraw, wcode, wo, np.uint64(1), n, w, zero)
        bad[2] += clean_weights(w, n)
    elif has_ignore:
        for v in range(n):
            w[v] = w.dtype.type(1)
    if not dense:
        if tsize > 0:
            prefetch_bytes(traw, (to + n) * tsize, n * tsize)
        bad[0] += load_labels(traw, tcode, to, n, first, top, has_ignore, ignore, t, w)
        if weighted:
            for v in range(n):
                t[v] = t[v] if w[v] > 0 else np.int32(-1)
    if not direct:
        for c in range(C):
            load(xraw, xcode, xo + c * sC, sV, n, xs, c * block)
    return weighted or has_ignore


@kernel
def _forward(
    x: Any, xraw: Any, xcode: Any, direct: Any, sB: Any, sC: Any, sV: Any, C: Any, K: Any, V: Any,
    dense: Any, traw: Any, tcode: Any, tsize: Any, first: Any, top: Any, has_ignore: Any, ignore: Any,
    wraw: Any, wcode: Any, weighted: Any, narrow: Any, third: Any, fourth: Any, logs: Any,
    member: Any, union: Any, act: Any, flags: Any, gamma: Any, power: Any,
    smoothing: Any, share: Any, validate: Any, low: Any, high: Any,
    chunk: Any, chunks: Any, block: Any, slots: Any, bad: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    """Tasks [begin, end) of the grid (sample, chunk): their sums into slots (tasks, fields, K)."""
    zero = np.uint64(0)
    rows = np.empty((ROWS, block), x.dtype)
    e = np.empty(C * block, x.dtype)
    xs = np.empty(zero if direct else C * block, x.dtype)
    src = x if direct else xs
    w = np.ones(block, x.dtype)
    t = np.zeros(block, np.int32)
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
                direct, xraw, xcode, xo, sC, sV, C, xs, block, dense, traw, tcode, tsize, to, first, top,
                has_ignore, ignore, wraw, wcode, b * V + v0, weighted, n, t, w, bad[task],
            )  # fmt: skip
            off, ld = (xo, sC) if direct else (zero, block)
            if act == 0 and validate:
                for c in range(C):
                    bad[task, 1] += outside(src, off + c * ld, n, low, high, w)
            if narrow is not None:  # settled when compiling: the usual case does not wait for the rest
                narrow_sums(src, off, ld, n, t, w, third, fourth, logs, sums)
            elif member is None:
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


@kernel
def _backward(
    x: Any, xraw: Any, xcode: Any, direct: Any, sB: Any, sC: Any, sV: Any, C: Any, K: Any, V: Any,
    dense: Any, traw: Any, tcode: Any, tsize: Any, first: Any, top: Any, has_ignore: Any, ignore: Any,
    wraw: Any, wcode: Any, weighted: Any, narrow: Any, third: Any, fourth: Any, logs: Any,
    member: Any, union: Any, act: Any, flags: Any, gamma: Any, power: Any,
    smoothing: Any, share: Any, coef: Any, g: Any, graw: Any,
    chunk: Any, chunks: Any, block: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    """Tasks [begin, end) of the grid: dL/dx from coef = dL/dstatistics (B, fields, K)."""
    zero = np.uint64(0)
    rows = np.empty((ROWS, block), x.dtype)
    h = np.empty(C * block, x.dtype)
    xs = np.empty(zero if direct else C * block, x.dtype)
    gs = np.empty(zero if direct else C * block, x.dtype)
    src = x if direct else xs
    dst = g if direct else gs
    w = np.ones(block, x.dtype)
    t = np.zeros(block, np.int32)
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
                direct, xraw, xcode, xo, sC, sV, C, xs, block, dense, traw, tcode, tsize, to, first, top,
                has_ignore, ignore, wraw, wcode, b * V + v0, weighted, n, t, w, unread,
            )  # fmt: skip
            off, ld = (xo, sC) if direct else (zero, block)
            if direct and (v0 - start) % AHEAD == 0:
                _touch(g, xo, sC, C, min(AHEAD, stop - v0))
            if narrow is not None:  # settled when compiling: the usual case does not wait for the rest
                narrow_gradient(src, off, ld, n, t, w, third, fourth, logs, dst, off, ld, coef[b])
            elif member is None:
                usual.plain_gradient(
                    src, off, ld, C, n, flags, gamma, t, w, masked, h, block, dst, off, ld, rows, coef[b]
                )
            else:
                general.general_gradient(
                    act, src, off, ld, C, K, n, flags, gamma, power, smoothing, share, t, w, masked,
                    dense, traw, tcode, to, V, member, union, h, block, dst, off, ld, rows, coef[b],
                )  # fmt: skip
            if not direct:
                for c in range(C):
                    store(gs, c * block, n, graw, xcode, xo + c * sC, sV)


@jit
def _touch(g: Any, off: Any, ld: Any, C: Any, n: Any) -> None:
    """Write to every page of the gradient of n voxels: fresh memory is cheaper in its own order than row by row."""
    for c in range(C):
        for v in range(np.uint64(0), n, PAGE):
            g[off + c * ld + v] = g.dtype.type(0)


# --- from tensors to the kernel -----------------------------------------------------------------------------------


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
    variant: tuple[Any, ...]  # what the kernels are compiled for


def _job(input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, s: Pass) -> _Job:
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
    narrow = plain and 2 <= C <= CLASSES and not flags & ~SUMS
    # True or None: the compiler leaves out what hangs on a None.
    variant = tuple((narrow and asked) or None for asked in (True, C > 2, C > 3, flags & (1 << usual.E) > 0))
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
        u(0 if narrow else target.element_size()),
        np.int32(1 if C == 1 else 0),
        np.uint32(max(C, 2)),
        s.ignore_index is not None,
        np.int32(_within_int32(s.ignore_index)),
        nothing if weight is None else _bytes(weight),
        0 if weight is None else CODES[_CODE[weight.dtype]],
        weight is not None,
        *variant,
        None if plain else _member(regions),
        regions is not None,
        activation,
        flags,
        real(s.gamma),
        real(s.power),
        real(s.label_smoothing),
        real(s.label_smoothing / outcomes(C, s.activation)),
    )
    return _Job(arguments, (u(chunk), u(chunks), u(block)), B * chunks, K, direct, plain, wide, (wide, plain, variant))


def _within_int32(label: int | None) -> int:
    return label if label is not None and -(2**31) < label < 2**31 else -(2**31)


def _member(regions: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.uint8) if regions is None else regions.contiguous().view(torch.uint8).numpy()


def statistics(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Pass
) -> tuple[Tensor, bool]:
    """input (B, C, V), target, weight -> sums (fields, B, K) in float64, and whether all values were in range."""
    input = _readable(input)
    job, check = _job(input, target, weight, regions, settings), settings.validate
    slots = np.zeros((job.tasks, len(FIELDS), job.columns))
    bad = np.zeros((job.tasks, 4), np.int64)
    if input.numel():
        slack = probability_slack(input.dtype)
        limits = job.wide.type(-slack), job.wide.type(1 + slack)
        share_out(
            _forward,
            job.variant,
            (*job.arguments, check, *limits, *job.grid, slots, bad),
            job.tasks,
            input.numel(),
        )
    sums = slots.reshape(input.shape[0], int(job.grid[1]), len(FIELDS), job.columns).sum(1)
    if job.usual:  # a hard label map: y is 0 or 1, so its square and its raw sum are its sum
        sums[:, usual.R] = sums[:, usual.LABELLED] = sums[:, usual.T]
    wanted = [FIELDS.index(name) for name in settings.fields]
    return torch.from_numpy(np.ascontiguousarray(sums[:, wanted].transpose(1, 0, 2))), not (
        settings.validate and bad.any()
    )


def gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Pass
) -> Tensor:
    """dL/dstatistics (fields, B, K), and what made them -> dL/dinput, laid out as it is read."""
    input = _readable(input)
    job = _job(input, target, weight, regions, settings)
    result = gradient_like(input)  # keeps dense strides, so the gradient is laid out as the input
    coef = np.zeros((input.shape[0], len(FIELDS), job.columns), job.wide)
    wanted = [FIELDS.index(name) for name in settings.fields]
    coef[:, wanted] = grad.detach().movedim(0, 1).numpy()
    graw = _bytes(result)
    if input.numel():
        g = graw.view(job.wide) if job.direct else np.empty(0, job.wide)
        share_out(_backward, job.variant, (*job.arguments, coef, g, graw, *job.grid), job.tasks, input.numel())
    return result
