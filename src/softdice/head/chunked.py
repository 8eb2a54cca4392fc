"""features, weight, bias, target -> the sums of the pass over W f + b, chunk by chunk, with their gradients.

Forward: for each chunk of voxels, logits = W f + b, and its statistics are added up. Backward: each chunk's logits are
computed again, then g = dL/dlogits, df = W^T g, dW += g f^T, db += sum g. An overlap loss needs complete sums before
any gradient, so the logits are needed twice; computing them twice is cheaper than keeping them.

Shape suffixes: B sample, K feature, C class, V voxel; m samples and n voxels of a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdice import validation
from softdice.kernels import trial
from softdice.settings import Pass
from softdice.statistics import gradient, sum_voxels

LANES = 8
"""Shares of the chunks that may be computed side by side on a CPU; the budget is divided among them."""
ELEMENTS = 1 << 16
"""Logits that are worth a chunk of their own: below it the calls cost more than the arithmetic."""
ALIGN = 64
"""Voxels that a chunk is a multiple of, where it holds so many."""


Chunk = tuple[slice, slice]
"""Which samples, which voxels."""


class Grid(NamedTuple):
    """Samples and voxels of a chunk. It does not depend on the number of threads."""

    samples: int
    voxels: int

    @classmethod
    def of(cls, B: int, C: int, V: int, dtype: torch.dtype, device: torch.device, budget_mib: float) -> Grid:
        """Budget for logits and their gradients -> whole samples where one fits, else a part of one."""
        lanes = LANES if device.type == "cpu" else 1
        fit = int(budget_mib * 2**20) // (2 * lanes * dtype.itemsize * C)
        fit = min(fit, max(-(-B * V // lanes), -(-ELEMENTS // C)))  # something to do for every lane
        if fit >= V > 0:
            return cls(fit // V, V)
        return cls(1, max(1, fit // ALIGN * ALIGN if fit >= ALIGN else fit))

    def chunks(self, B: int, V: int) -> list[Chunk]:
        """(B, V) -> the chunks in order."""
        return [
            (slice(b, min(b + self.samples, B)), slice(v, min(v + self.voxels, V)))
            for b in range(0, max(B, 1), self.samples)
            for v in range(0, max(V, 1), self.voxels)
        ]


def _in_lanes(lane: Callable[[list[Chunk]], Any], chunks: list[Chunk], device: torch.device) -> list[Any]:
    """Chunks -> what `lane` returns for each of at most LANES consecutive shares of them, in order.

    On a CPU the lanes run side by side on as many threads as torch may use, each with a single-threaded product: the
    logits of a chunk stay in the cache of one core, no core waits for another, and the bits do not depend on the
    number of threads.
    """
    count = min(LANES, len(chunks)) if device.type == "cpu" else 1
    shares = [chunks[len(chunks) * i // count : len(chunks) * (i + 1) // count] for i in range(count)]

    def run(share: list[Chunk]) -> Any:
        with torch.no_grad(), _without_autocast(device):
            return lane(share)

    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [run(share) for share in shares]
    torch.set_num_threads(1)
    try:
        if count == 1:
            return [run(shares[0])]
        futures = [_pool(min(threads, LANES), os.getpid()).submit(run, share) for share in shares]
        wait(futures)
    finally:
        torch.set_num_threads(threads)
    return [future.result() for future in futures]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products as they are written; a device such as meta has no autocast to switch off."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A forked process makes its own."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="softdice-head")


def _memory(chunks: list[Chunk], features: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """Room for the logits of the largest of the chunks."""
    largest = max((samples.stop - samples.start) * (voxels.stop - voxels.start) for samples, voxels in chunks)
    return features.new_empty(largest * C, dtype=dtype)


class Parts(NamedTuple):
    """What belongs to the voxels beside the features, as `softdice.statistics.prepare` returns it."""

    target: Tensor
    weight: Tensor | None
    regions: Tensor | None

    def at(self, samples: slice, voxels: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of one chunk."""
        weight = None if self.weight is None else self.weight[samples, voxels]
        return self.target[samples, ..., voxels], weight, self.regions


def product_dtype(features: Tensor) -> torch.dtype:
    """The dtype that a convolution would compute in: autocast's where it is on."""
    device = features.device.type
    if (
        features.dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return features.dtype


def _product(weight_CK: Tensor, bias_C1: Tensor | None, chunk_mKn: Tensor, memory: Tensor) -> Tensor:
    """W f + b of one chunk, contiguous (m, C, n) in the memory given."""
    m, _, n = chunk_mKn.shape
    C = weight_CK.shape[0]
    logits_mCn = memory[: m * C * n].view(m, C, n)
    weight_mCK = weight_CK.expand(m, -1, -1)
    if bias_C1 is None:
        if m == 1:
            torch.mm(weight_CK, chunk_mKn[0], out=logits_mCn[0])
        else:
            torch.bmm(weight_mCK, chunk_mKn, out=logits_mCn)
    elif m == 1:
        torch.addmm(bias_C1, weight_CK, chunk_mKn[0], out=logits_mCn[0])
    else:
        torch.baddbmm(bias_C1.unsqueeze(0), weight_mCK, chunk_mKn, out=logits_mCn)
    return logits_mCn


def separate_sums(
    features: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, settings: Pass, dtype: torch.dtype
) -> Tensor:
    """features -> sums with the logits kept: differentiable as often as one likes."""
    with _without_autocast(features.device):
        logits = torch.einsum("ck,bkv->bcv", weight.to(dtype), features.to(dtype))
        if bias is not None:
            logits = logits + bias.to(dtype).view(1, -1, 1)
        return sum_voxels(logits, *parts, settings)


class ChunkedSums(torch.autograd.Function):
    """features (B, K, V), weight (C, K), bias (C,) -> sums (fields, B, C or R)."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        voxel_weight: Tensor | None,
        regions: Tensor | None,
        fixed: tuple[Pass, torch.dtype, Grid],
    ) -> Tensor:
        settings, dtype, grid = fixed
        ctx.save_for_backward(features, weight, bias, target, voxel_weight, regions)
        ctx.fixed = fixed
        parts = Parts(target, voxel_weight, regions)
        (B, _, V), C = features.shape, weight.shape[0]
        weight_CK, bias_C1 = _converted(weight, bias, dtype)
        samples, voxels = grid.chunks(B, V)[0]
        first = features.new_empty((), dtype=dtype).expand(samples.stop, C, voxels.stop)
        ctx.backend = trial.choose(first, target, voxel_weight, regions, settings)  # one for all chunks
        columns = C if regions is None else regions.shape[0]

        def lane(chunks: list[Chunk]) -> Tensor:
            memory = _memory(chunks, features, C, dtype)
            sums = features.new_zeros((len(settings.fields), B, columns), dtype=torch.float64)
            for samples, voxels in chunks:
                logits = _product(weight_CK, bias_C1, features[samples, :, voxels].to(dtype), memory)
                try:
                    sums[:, samples] += sum_voxels(logits, *parts.at(samples, voxels), settings, ctx.backend)
                except ValueError:  # the chunk knows only its own voxels: count them all
                    shape = logits.new_zeros(()).expand(B, C, V)
                    validation.values(shape, *parts[:2], settings.activation, settings.ignore_index)
                    raise
            return sums

        sums = sum(_in_lanes(lane, grid.chunks(B, V), features.device))
        return sums.to(torch.float64 if dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, *rest = ctx.saved_tensors
        settings, dtype, grid = ctx.fixed
        parts = Parts(*rest)
        if torch.is_grad_enabled():  # create_graph
            wanted = [
                value for value, needed in zip((features, weight, bias), ctx.needs_input_grad, strict=False) if needed
            ]
            sums = separate_sums(features, weight, bias, parts, settings, dtype)
            found = iter(torch.autograd.grad(sums, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), *[None] * 4
        (B, K, V), C = features.shape, weight.shape[0]
        to_features, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_features = torch.empty_like(features) if to_features else None
        weight_CK, bias_C1 = _converted(weight, bias, dtype)

        def lane(chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
            memory = _memory(chunks, features, C, dtype)
            d_weight = features.new_zeros((C, K), dtype=torch.float64)
            d_bias = features.new_zeros((C,), dtype=torch.float64)
            for samples, voxels in chunks:
                chunk = features[samples, :, voxels].to(dtype)
                logits = _product(weight_CK, bias_C1, chunk, memory)
                g = gradient(grad[:, samples], logits, *parts.at(samples, voxels), settings, ctx.backend)
                if d_features is not None:
                    _to_features(weight_CK, g, d_features[samples, :, voxels])
                if to_weight:
                    d_weight += g[0] @ chunk[0].T if len(g) == 1 else (g @ chunk.transpose(1, 2)).sum(0)
                if to_bias:
                    d_bias += g.sum((0, 2))
            return d_weight, d_bias

        d_weights, d_biases = zip(*_in_lanes(lane, grid.chunks(B, V), features.device), strict=True)
        return (
            d_features,
            sum(d_weights).to(weight.dtype) if to_weight else None,
            sum(d_biases).to(bias.dtype) if to_bias else None,
            *[None] * 4,
        )


def _converted(weight_CK: Tensor, bias_C: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight_CK.to(dtype), None if bias_C is None else bias_C.to(dtype).unsqueeze(1)


def _to_features(weight_CK: Tensor, grad_mCn: Tensor, out_mKn: Tensor) -> None:
    """df = W^T g of one chunk, into its place."""
    m = len(grad_mCn)
    if out_mKn.dtype != grad_mCn.dtype:  # autocast
        out_mKn.copy_(weight_CK.T @ grad_mCn)
    elif m == 1:
        torch.mm(weight_CK.T, grad_mCn[0], out=out_mKn[0])
    else:
        torch.bmm(weight_CK.T.expand(m, -1, -1), grad_mCn, out=out_mKn)
