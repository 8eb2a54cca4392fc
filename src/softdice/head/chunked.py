"""Statistics of logits that never exist as a whole, and their gradients: the logits are made chunk by chunk.

Forward: make the logits of each chunk of voxels and add up its statistics. Backward: make them again, take
g = dL/dlogits, and send g through the adjoint of the layer that made them. An overlap loss has no gradient before its
sums are complete, so the logits are needed twice; making them twice is cheaper than keeping them.

The layer is a `LinearMap`: the last convolution (`softdice.head.product`) or an interpolation
(`softdice.head.interpolation`). A chunk is some samples and some of their voxels. On a CPU the chunks are dealt to at
most `LANES` lanes: runs of consecutive chunks, each worked on by one thread.

Shape suffixes: B sample, C class, R region, V voxel; m samples and n voxels of a chunk. `inputs` are the tensors from
which a layer makes logits: features (B, K, V), weight (C, K) and bias (C,) or None for a product, logits of low
resolution for an interpolation. An outline is one number, expanded to the shape of all logits: it stands for them in
checks. `counted` is (C,) bool, the classes that enter the mean of the loss, or None for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.backends import op, route
from softdice.losses.base import StatisticsLoss
from softdice.statistics import OverlapStatistics, check
from softdice.statistics.request import TENSORS, Pass, Request, without_autocast

LANES = 8
"""Largest number of lanes on a CPU; they share the budget of memory."""
ELEMENTS = 1 << 16
"""Smallest number of logits in a chunk: with fewer, the calls cost more than the arithmetic."""
ALIGN = 64
"""The number of voxels of a chunk is a multiple of this, if the chunk is that large."""


Chunk = tuple[slice, slice]
"""The samples and the voxels of a chunk, each with start and stop."""


class Grid(NamedTuple):
    """The size of a chunk, in samples and voxels. It does not depend on the number of threads."""

    samples: int
    voxels: int

    @classmethod
    def of(
        cls, B: int, C: int, V: int, dtype: torch.dtype, device: torch.device, budget_mib: float,
        align: int = ALIGN, most: int | None = None,
    ) -> Grid:  # fmt: skip
        """Return the size of the chunks into which logits (B, C, V) are cut: whole samples, or part of one.

        Args:
            budget_mib: MiB for the logits of all chunks under way and their gradients. A chunk has one voxel at least.
            align: the number of voxels is a multiple of this, if the budget holds that many.
            most: largest number of voxels in a chunk on a CPU, beyond which it would only be slower; None for no bound.
        """
        on_cpu = device.type == "cpu"
        lanes = LANES if on_cpu else 1
        bytes_per_voxel = 2 * dtype.itemsize * C  # its logits and their gradient
        in_budget = int(budget_mib * 2**20) // (lanes * bytes_per_voxel)
        per_lane, worth_a_call = -(-B * V // lanes), -(-ELEMENTS // C)  # rounded up
        voxels = min(in_budget, max(per_lane, worth_a_call))
        if most is not None and on_cpu:
            voxels = min(voxels, most)
        if voxels >= V > 0:
            return cls(voxels // V, V)
        return cls(1, max(1, voxels // align * align if voxels >= align else voxels))

    def chunks(self, B: int, V: int) -> list[Chunk]:
        """Return the chunks of B samples of V voxels, in order; for an empty batch one empty chunk."""
        return [
            (slice(b, min(b + self.samples, B)), slice(v, min(v + self.voxels, V)))
            for b in range(0, max(B, 1), self.samples)
            for v in range(0, max(V, 1), self.voxels)
        ]


class Adjoint(Protocol):
    """The way back through a `LinearMap`: takes dL/dlogits chunk by chunk, returns the gradients of its inputs.

    Gradients to which several chunks contribute are summed in each lane apart, and the lanes' sums are added in order.
    """

    def lane(self, chunks: list[Chunk]) -> Any:
        """Return the empty sums of a lane that will work on these chunks."""

    def add(self, sums: Any, chunk: Chunk, grad_mCn: Tensor) -> None:
        """Add the contribution of a chunk, for which dL/dlogits is `grad_mCn`, to the sums of its lane."""

    def result(self, lanes: list[Any]) -> tuple[Tensor | None, ...]:
        """Return the gradient of each input, None where it needs none, from the sums of all lanes in order."""


class LinearMap(Protocol):
    """The layer that makes the logits: linear, and cheap to apply to a few voxels at a time."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (B, C, V) of all logits."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""

    @property
    def grid(self) -> Grid:
        """The size of a chunk."""

    def logits(self, inputs: Sequence[Any], chunk: Chunk, memory: Tensor) -> Tensor:
        """Return the logits (m, C, n) of a chunk, contiguous, in `memory` where that serves."""

    def adjoint(self, inputs: Sequence[Any], needed: Sequence[bool]) -> Adjoint:
        """Return the adjoint for one backward pass; `needed` says which inputs need a gradient."""

    def whole(self, *inputs: Any) -> Tensor:
        """Return all logits (B, C, V), differentiable any number of times."""


def check_loss(loss: object, *others: type[nn.Module]) -> None:
    """Raise TypeError unless loss is a function of the statistics, or an object of one of the other classes."""
    if not isinstance(loss, (StatisticsLoss, *others)):
        expected = "loss to be a loss of softdice that is a function of the statistics, or a sum of such"
        validation.fail(expected, type(loss).__name__, "Use softdice.OverlapLoss for an index of your own.", TypeError)


def loss_value(
    loss: StatisticsLoss, layer: LinearMap, request: Request, counted: Tensor | None, *inputs: Tensor | None
) -> Tensor:
    """Return the loss of the logits that the layer makes from the inputs, with the sums of all ranks of its group.

    Args:
        request: from `check.request`, with an outline as its input. Its values are checked here, chunk by chunk.
        counted: as in `StatisticsLoss.from_statistics`. inputs: of the layer, on the autograd graph.

    Raise ValueError for a label, weight or per-class value out of range, RuntimeError for a rank that does not come.
    """
    stats = _statistics(layer, request, inputs)
    if loss.group is not None:
        stats = stats.pool().all_reduce(loss.group)
    return loss.from_statistics(stats, counted)


def _statistics(layer: LinearMap, request: Request, inputs: Sequence[Any]) -> OverlapStatistics:
    """Return the statistics, (B, C or R), of the logits that the layer makes from the inputs, its tensors.
    request: its input is an outline. If its target, weights or map need a gradient, make all logits at once."""
    if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in request[1:TENSORS]):
        sums = _sums_of_whole(layer, request, inputs)
    else:
        # a compiler cannot trace what runs on threads
        run = torch.compiler.disable(_ChunkedSums.apply) if torch.compiler.is_compiling() else _ChunkedSums.apply
        sums = run(layer, request.settings, *request[1:TENSORS], *inputs)
    return OverlapStatistics.unstack(request.settings.fields, sums)


def _sums_of_whole(layer: LinearMap, request: Request, inputs: Sequence[Any]) -> Tensor:
    """Return the sums, (fields, B, C or R), by way of all logits at once, differentiable any number of times."""
    with without_autocast(request.target.device):
        request = request._replace(input=layer.whole(*inputs))
        return op.run(request, route.choose(request))


def _in_lanes(work: Callable[[list[Chunk]], Any], layer: LinearMap, device: torch.device) -> list[Any]:
    """Call `work` with the list of chunks of each lane; return its results in the order of the lanes.

    On a CPU the lanes run on as many threads as torch may use, each with single-threaded arithmetic: the logits of a
    chunk stay in the cache of one core, no core waits for another, and the bits do not depend on the number of threads.
    An error of `work` is raised once all lanes have ended.
    """
    B, _, V = layer.shape
    chunks = layer.grid.chunks(B, V)
    count = min(LANES, len(chunks)) if device.type == "cpu" else 1
    lanes = [chunks[len(chunks) * i // count : len(chunks) * (i + 1) // count] for i in range(count)]

    def run(lane: list[Chunk]) -> Any:
        with torch.no_grad(), without_autocast(device):
            return work(lane)

    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [run(lane) for lane in lanes]
    torch.set_num_threads(1)
    try:
        if count == 1:
            return [run(lanes[0])]
        # the process id: after a fork the pool's threads are gone
        futures = [_pool(min(threads, LANES), os.getpid()).submit(run, lane) for lane in lanes]
        wait(futures)
    finally:
        torch.set_num_threads(threads)
    return [future.result() for future in futures]


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the pool of that many threads; for another process id a new one, since threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="softdice-head")


def _memory(chunks: list[Chunk], layer: LinearMap, device: torch.device) -> Tensor:
    """Return uninitialised memory, flat, for the logits of the largest of the chunks, in the dtype of the layer."""
    largest = max((samples.stop - samples.start) * (voxels.stop - voxels.start) for samples, voxels in chunks)
    return torch.empty(largest * layer.shape[1], dtype=layer.dtype, device=device)


BESIDE = TENSORS - 1
"""Number of tensors of a request without its input: target, weight, regions, voxel_map."""


class _ChunkedSums(torch.autograd.Function):
    """The sums, (fields, B, C or R), as a function of the tensors of a request and of the inputs of a layer.

    `tensors` are those of the request without its input (`BESIDE`), then the layer's inputs, each a Tensor or None.
    """

    @staticmethod
    def forward(ctx: Any, layer: LinearMap, settings: Pass, *tensors: Any) -> Tensor:
        """Return the sums, float32, or float64 for such logits; raise ValueError for a value that is out of range."""
        ctx.save_for_backward(*tensors)
        ctx.fixed = layer, settings
        request, inputs = _request_and_inputs(layer, tensors, settings)
        B, _, V = layer.shape
        device = request.target.device
        backend = ctx.backend = route.choose(request.cut(*layer.grid.chunks(B, V)[0]))  # one for all chunks

        def work(chunks: list[Chunk]) -> Tensor:
            """Return the sums of a lane's chunks, float64."""
            memory = _memory(chunks, layer, device)
            sums = torch.zeros((len(settings.fields), B, request.columns), dtype=torch.float64, device=device)
            for chunk in chunks:
                logits = layer.logits(inputs, chunk, memory)
                try:
                    sums[:, chunk[0]] += op.run(request.cut(*chunk)._replace(input=logits), backend)
                except ValueError:  # a chunk counts only its own wrong voxels: raise with the number of all
                    check.values(request)
                    raise
            return sums

        sums = sum(_in_lanes(work, layer, device))
        return sums.to(torch.float64 if layer.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return one gradient for each argument of `forward`: None, except for the layer's inputs.

        grad: dL/dsums, (fields, B, C or R).
        """
        layer, settings = ctx.fixed
        no_gradients = [None] * (2 + BESIDE)  # for layer, settings and the tensors of the request
        request, inputs = _request_and_inputs(layer, ctx.saved_tensors, settings)
        needed = ctx.needs_input_grad[len(no_gradients) :]
        if torch.is_grad_enabled():  # create_graph: a second derivative needs all logits
            sums = _sums_of_whole(layer, request, inputs)
            differentiable = [value for value, needs in zip(inputs, needed, strict=True) if needs]
            gradients = iter(torch.autograd.grad(sums, differentiable, grad, create_graph=True))
            return *no_gradients, *(next(gradients) if needs else None for needs in needed)
        adjoint = layer.adjoint(inputs, needed)

        def work(chunks: list[Chunk]) -> Any:
            """Return the gradients of shared inputs (weight, bias, low planes) summed over a lane's chunks."""
            memory, sums = _memory(chunks, layer, request.target.device), adjoint.lane(chunks)
            for chunk in chunks:
                chunk_request = request.cut(*chunk)._replace(input=layer.logits(inputs, chunk, memory))
                # no variable holds the gradient, so that its memory is free before the next one is made
                adjoint.add(sums, chunk, op.gradient(grad[:, chunk[0]], chunk_request, ctx.backend))
            return sums

        return *no_gradients, *adjoint.result(_in_lanes(work, layer, request.target.device))


def _request_and_inputs(layer: LinearMap, tensors: Sequence[Any], settings: Pass) -> tuple[Request, Sequence[Any]]:
    """Split the tensors of `_ChunkedSums` into a request, with an outline as its input, and the layer's inputs."""
    outline = torch.zeros((), dtype=layer.dtype, device=tensors[0].device).expand(layer.shape)
    return Request._make([outline, *tensors[:BESIDE], settings]), tensors[BESIDE:]
