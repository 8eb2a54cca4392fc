"""Sums of a pass over logits that are made of small tensors, chunk by chunk, with their gradients.

Forward: the logits of each chunk of voxels are made and its statistics are added up. Backward: they are made again,
then g = dL/dlogits goes through the adjoint of what made them. An overlap loss needs complete sums before any gradient,
so the logits are needed twice; making them twice is cheaper than keeping them.

What makes them is a `LinearMap`: the last convolution (`softdice.head.product`) or an interpolation
(`softdice.head.interpolation`).

Shape suffixes: B sample, C class, V voxel; m samples and n voxels of a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softdice.backends import op, route
from softdice.statistics import OverlapStatistics, check
from softdice.statistics.request import TENSORS, Pass, Request, without_autocast

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
    def of(
        cls, B: int, C: int, V: int, dtype: torch.dtype, device: torch.device, budget_mib: float,
        align: int = ALIGN, most: int | None = None,
    ) -> Grid:  # fmt: skip
        """Budget for logits and their gradients -> whole samples where one fits, else a part of one.

        most: voxels beyond which a larger chunk gains nothing.
        """
        lanes = LANES if device.type == "cpu" else 1
        fit = int(budget_mib * 2**20) // (2 * lanes * dtype.itemsize * C)
        fit = min(fit, max(-(-B * V // lanes), -(-ELEMENTS // C)))  # something to do for every lane
        if most is not None and device.type == "cpu":
            fit = min(fit, most)
        if fit >= V > 0:
            return cls(fit // V, V)
        return cls(1, max(1, fit // align * align if fit >= align else fit))

    def chunks(self, B: int, V: int) -> list[Chunk]:
        """(B, V) -> the chunks in order."""
        return [
            (slice(b, min(b + self.samples, B)), slice(v, min(v + self.voxels, V)))
            for b in range(0, max(B, 1), self.samples)
            for v in range(0, max(V, 1), self.voxels)
        ]


class Adjoint(Protocol):
    """dL/dlogits, chunk by chunk -> gradients. What several lanes would write to is kept for each of them."""

    def lane(self, chunks: list[Chunk]) -> Any:
        """The chunks of a lane -> what it keeps for itself."""

    def add(self, kept: Any, chunk: Chunk, grad_mCn: Tensor) -> None:
        """dL/dlogits of the next chunk of a lane, added."""

    def result(self, lanes: list[Any]) -> tuple[Tensor | None, ...]:
        """What the lanes kept, in order -> a gradient for each of the inputs that needs one."""


class LinearMap(Protocol):
    """inputs -> logits, a map whose value at some voxels is cheap to find."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, C, V) of the logits."""

    @property
    def dtype(self) -> torch.dtype:
        """Their dtype."""

    @property
    def grid(self) -> Grid:
        """How their voxels are cut into chunks."""

    def logits(self, inputs: Sequence[Any], chunk: Chunk, memory: Tensor) -> Tensor:
        """The logits (m, C, n) of a chunk, contiguous; `memory` has room for them."""

    def adjoint(self, inputs: Sequence[Any], needed: Sequence[bool]) -> Adjoint:
        """For one backward pass, and the inputs that need a gradient."""

    def whole(self, *inputs: Any) -> Tensor:
        """All logits (B, C, V), differentiable as often as one likes."""


def statistics(made: LinearMap, request: Request, *inputs: Tensor | None) -> OverlapStatistics:
    """Return the statistics (B, C or R) of the logits that the map makes of the inputs.

    request: its input is an outline, one number with the logits' shape.

    The gradient of a target, of a weight or of a map takes the path on which all logits exist.
    """
    if any(isinstance(part, Tensor) and part.requires_grad for part in request[1:TENSORS]):
        sums = _separate(made, request, inputs)
    else:
        run = torch.compiler.disable(_ChunkedSums.apply) if torch.compiler.is_compiling() else _ChunkedSums.apply
        sums = run(made, request.settings, *request[1:TENSORS], *inputs)
    return OverlapStatistics.unstack(request.settings.fields, sums)


def _separate(made: LinearMap, request: Request, inputs: Sequence[Any]) -> Tensor:
    with without_autocast(request.target.device):
        request = request._replace(input=made.whole(*inputs))
        return op.run(request, route.choose(request))


def _in_lanes(lane: Callable[[list[Chunk]], Any], made: LinearMap, device: torch.device) -> list[Any]:
    """Return what `lane` gives for each of at most LANES consecutive shares of the chunks, in order.

    On a CPU the lanes run side by side on as many threads as torch may use, each with single-threaded arithmetic: the
    logits of a chunk stay in the cache of one core, no core waits for another, and the bits do not depend on the
    number of threads.
    """
    B, _, V = made.shape
    chunks = made.grid.chunks(B, V)
    count = min(LANES, len(chunks)) if device.type == "cpu" else 1
    shares = [chunks[len(chunks) * i // count : len(chunks) * (i + 1) // count] for i in range(count)]

    def run(share: list[Chunk]) -> Any:
        with torch.no_grad(), without_autocast(device):
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


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A forked process makes its own."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="softdice-head")


def _memory(chunks: list[Chunk], made: LinearMap, device: torch.device) -> Tensor:
    """Room for the logits of the largest of the chunks."""
    largest = max((samples.stop - samples.start) * (voxels.stop - voxels.start) for samples, voxels in chunks)
    return torch.empty(largest * made.shape[1], dtype=made.dtype, device=device)


BESIDE = TENSORS - 1
"""Tensors that belong to the voxels beside the logits."""


class _ChunkedSums(torch.autograd.Function):
    """what belongs to the voxels beside the logits, inputs of a map -> sums (fields, B, C or R)."""

    @staticmethod
    def forward(ctx: Any, made: LinearMap, settings: Pass, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.fixed = made, settings
        request, inputs = _outlined(made, tensors, settings)
        B, _, V = made.shape
        device = request.target.device
        backend = ctx.backend = route.choose(request.cut(*made.grid.chunks(B, V)[0]))  # one for all chunks

        def lane(chunks: list[Chunk]) -> Tensor:
            memory = _memory(chunks, made, device)
            sums = torch.zeros((len(settings.fields), B, request.columns), dtype=torch.float64, device=device)
            for chunk in chunks:
                logits = made.logits(inputs, chunk, memory)
                try:
                    sums[:, chunk[0]] += op.run(request.cut(*chunk)._replace(input=logits), backend)
                except ValueError:  # the chunk knows only its own voxels: count them all
                    check.values(request)
                    raise
            return sums

        sums = sum(_in_lanes(lane, made, device))
        return sums.to(torch.float64 if made.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (made, settings), nothing = ctx.fixed, [None] * (2 + BESIDE)
        request, inputs = _outlined(made, ctx.saved_tensors, settings)
        needed = ctx.needs_input_grad[len(nothing) :]
        if torch.is_grad_enabled():  # create_graph
            wanted = [value for value, needs in zip(inputs, needed, strict=True) if needs]
            sums = _separate(made, request, inputs)
            found = iter(torch.autograd.grad(sums, wanted, grad, create_graph=True))
            return *nothing, *(next(found) if needs else None for needs in needed)
        adjoint = made.adjoint(inputs, needed)

        def lane(chunks: list[Chunk]) -> Any:
            memory, kept = _memory(chunks, made, request.target.device), adjoint.lane(chunks)
            for chunk in chunks:
                part = request.cut(*chunk)._replace(input=made.logits(inputs, chunk, memory))
                # the gradient has no name here: it is gone before the next one is made
                adjoint.add(kept, chunk, op.gradient(grad[:, chunk[0]], part, ctx.backend))
            return kept

        return *nothing, *adjoint.result(_in_lanes(lane, made, request.target.device))


def _outlined(made: LinearMap, tensors: Sequence[Any], settings: Pass) -> tuple[Request, Sequence[Any]]:
    """Return the request, with one number that has the logits' shape in their place; and the map's inputs."""
    outline = torch.zeros((), dtype=made.dtype, device=tensors[0].device).expand(made.shape)
    return Request._make([outline, *tensors[:BESIDE], settings]), tensors[BESIDE:]
