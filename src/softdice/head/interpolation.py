"""logits of low resolution -> logits of the target's, chunk by chunk, and the adjoint: a `LinearMap`.

Interpolation is linear and goes axis by axis: an output lies between two low places (beside one for mode "nearest"), of
which it takes certain shares. Two dimensions are three with an H of 1: (D, H) are then the rows and nothing, and the
last axis is the width.

Chunks are runs of whole output rows. On a CPU Numba interpolates them, elsewhere torch operators do.

Shape suffixes: B sample, C class, D, H, W output planes, rows, columns; d, h, w low ones; m samples, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from softdice.backends.route import compiled_loops
from softdice.head.chunked import Chunk, Grid

CHUNK_ELEMENTS = 3 << 17
"""Logits of a chunk on a CPU: the calls weigh little beside them, and they stay in the second-level cache."""

Table = tuple[Tensor, Tensor]
"""index (2 or 1, outputs) int64 and share (2 or 1, outputs): between which low places an output lies."""


@dataclass(frozen=True)
class Interpolation:
    """The map of low logits (B, C, *s) to (B, C, V), V voxels of `size`. A `LinearMap`.

    low: (B, C, *s). size: the spatial shape of the output, two or three numbers. dtype: that of the output.
    """

    low: torch.Size
    size: tuple[int, ...]
    mode: str
    align_corners: bool
    dtype: torch.dtype
    device: torch.device
    chunk_mib: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, C, V)."""
        return self.low[0], self.low[1], torch.Size(self.size).numel()

    @cached_property
    def grid(self) -> Grid:
        """Whole rows, and so many of them that a low row is stretched for several."""
        B, C, V = self.shape
        width, rows = self.size[-1], 2 * -(-self.size[-2] // self.low[-2])
        most = max(CHUNK_ELEMENTS // C, rows * width)
        grid = Grid.of(B, C, V, self.dtype, self.device, self.chunk_mib, width, most)
        return grid._replace(voxels=max(grid.voxels // width * width, width))

    @cached_property
    def tables(self) -> tuple[Table, Table, Table]:
        """Those of planes, rows and columns, in the memory of the CPU."""
        rank = len(self.size)
        made = [
            _table(low, out, rank, self.mode, self.align_corners, self.dtype)
            for low, out in zip(self.low[2:], self.size, strict=True)
        ]
        if rank == 2:
            made.insert(1, (torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=self.dtype)))
        return made[0], made[1], made[2]

    @cached_property
    def moved(self) -> tuple[Table, Table, Table]:
        """The tables, on the device."""
        planes, rows, columns = ((index.to(self.device), share.to(self.device)) for index, share in self.tables)
        return planes, rows, columns

    @cached_property
    def compiled(self) -> Any:
        """The loops, and the tables as they take them: planes, rows, columns; columns transposed, for the adjoint."""
        loops = compiled_loops("softdice.head.interpolation_kernel") if self.device.type == "cpu" else None
        if loops is None:
            return None
        tables = *self.tables, _transposed(self.tables[2], self.low[-1])
        return loops, [(index.numpy().astype("uint32"), share.numpy()) for index, share in tables]

    def rows(self, chunk: Chunk) -> tuple[int, int]:
        """A chunk -> its first output row, and how many it has."""
        voxels, W = chunk[1], self.size[-1]
        return voxels.start // W, (voxels.stop - voxels.start) // W

    def planes(self, chunk: Chunk) -> tuple[int, int]:
        """A chunk -> the low planes, first and end, that it lies beside."""
        index, H = self.tables[0][0], self.tables[1][0].shape[1]
        first, count = self.rows(chunk)
        return int(index[0, first // H]), int(index[-1, (first + count - 1) // H]) + 1

    def logits(self, inputs: Sequence[Any], chunk: Chunk, memory: Tensor) -> Tensor:
        """The logits of one chunk."""
        low_BCdhw = _five(inputs[0])[chunk[0]]
        (m, C), (first, count), W = low_BCdhw.shape[:2], self.rows(chunk), self.size[-1]
        start = 0
        if low_BCdhw.dtype != self.dtype:  # half precision
            start, end = self.planes(chunk)
            low_BCdhw = low_BCdhw[:, :, start:end].to(self.dtype)
        if self.compiled is None:
            return self._gathered(low_BCdhw, start, first, count)
        out_mCn = memory[: m * C * count * W]
        loops, (planes, rows, columns, _) = self.compiled
        loops.interpolate(low_BCdhw.detach().numpy(), start, planes, rows, columns, first, out_mCn.numpy())
        return out_mCn.view(m, C, count * W)

    def _gathered(self, low_mCdhw: Tensor, start: int, first: int, count: int) -> Tensor:
        """The same by torch operators."""
        rows_mCRw = low_mCdhw.flatten(2, 3)
        beside = self._beside(start, first, count, low_mCdhw.shape[3])
        part, *parts = (rows_mCRw.index_select(2, index) * share.unsqueeze(1) for index, share in beside)
        narrow = sum(parts, part)
        part, *parts = (narrow.index_select(3, index) * share for index, share in zip(*self.moved[2], strict=True))
        return sum(parts, part).flatten(2)

    def _beside(self, start: int, first: int, count: int, h: int) -> Iterator[Table]:
        """Output rows -> numbers of the low rows, counted from plane `start` on, and the shares of each."""
        planes, rows, _ = self.moved
        r, H = torch.arange(first, first + count, device=self.device), rows[0].shape[1]
        z, y = r.div(H, rounding_mode="floor"), r % H
        for plane, part in zip(*planes, strict=True):
            for row, share in zip(*rows, strict=True):
                yield (plane[z] - start) * h + row[y], part[z] * share[y]

    def adjoint(self, inputs: Sequence[Any], needed: Sequence[bool]) -> _Adjoint:
        """For one backward pass."""
        return _Adjoint(self, inputs[0])

    def added(self, grad_mCn: Tensor, chunk: Chunk, sums_mCdhw: Tensor, start: int) -> None:
        """dL/dlogits of one chunk -> added to that of the low planes from `start` on."""
        first, count = self.rows(chunk)
        W = self.size[-1]
        if self.compiled is not None:
            loops, (planes, rows, _, back) = self.compiled
            grad = grad_mCn.contiguous().view(-1).numpy()
            loops.add_adjoint(grad, planes, rows, back, W, first, sums_mCdhw.numpy(), start)
            return
        grad_mCrW = grad_mCn.unflatten(2, (count, W))
        narrow = grad_mCrW.new_zeros((*grad_mCrW.shape[:3], sums_mCdhw.shape[4]))
        for index, share in zip(*self.moved[2], strict=True):
            narrow.index_add_(3, index, grad_mCrW * share)
        rows_mCRw = sums_mCdhw.flatten(2, 3)  # a view
        for index, share in self._beside(start, first, count, sums_mCdhw.shape[3]):
            rows_mCRw.index_add_(2, index, narrow * share.unsqueeze(1))

    def whole(self, low: Tensor) -> Tensor:
        """All logits, by `torch.nn.functional.interpolate`."""
        return _interpolated(low.to(self.dtype), self.size, self.mode, self.align_corners).flatten(2)


class _Adjoint:
    """dL/dlow. Chunks that follow one another share low planes, so each lane adds them up in a window of its own."""

    def __init__(self, made: Interpolation, low: Tensor) -> None:
        self.made = made
        self.d_low = torch.zeros_like(low)

    def lane(self, chunks: list[Chunk]) -> _Window:
        """A window that holds the planes beside any of the chunks."""
        d_BCdhw = _five(self.d_low)
        most = max(end - start for start, end in map(self.made.planes, chunks))
        samples = max(chunk[0].stop - chunk[0].start for chunk in chunks)
        shape = (samples, d_BCdhw.shape[1], most, *d_BCdhw.shape[3:])
        return _Window(d_BCdhw, d_BCdhw.new_zeros(shape, dtype=self.made.dtype))

    def add(self, kept: _Window, chunk: Chunk, grad_mCn: Tensor) -> None:
        """The gradient of a chunk, into the window."""
        kept.move(chunk[0], *self.made.planes(chunk))
        self.made.added(grad_mCn, chunk, kept.sums_mCdhw[: len(grad_mCn)], kept.first)

    def result(self, lanes: list[_Window]) -> tuple[Tensor | None, ...]:
        """dL/dlow, with what lies beside chunks of two lanes added: in order, so the bits do not depend on threads."""
        for window in lanes:
            window.place(window.end, add=True)
        return (self.d_low,)


class _Window:
    """The low planes that the chunks of a lane are adding to; those that no later one of them reaches leave it."""

    def __init__(self, d_BCdhw: Tensor, sums_mCdhw: Tensor) -> None:
        self.d_BCdhw, self.sums_mCdhw = d_BCdhw, sums_mCdhw
        self.samples, self.first, self.end = slice(0, 0), 0, 0

    def move(self, samples: slice, first: int, end: int) -> None:
        """On to the planes first:end of the samples; what leaves the window goes to its place."""
        kept = max(self.end - first, 0) if samples == self.samples else 0
        self.place(self.end - kept)
        left = self.end - kept - self.first
        if kept and left:
            self.sums_mCdhw[:, :, :kept] = self.sums_mCdhw[:, :, left : left + kept].clone()
        self.sums_mCdhw[:, :, kept : end - first] = 0
        self.samples, self.first, self.end = samples, first, end

    def place(self, end: int, add: bool = False) -> None:
        """The sums of planes first:end, to where they belong."""
        samples = self.samples.stop - self.samples.start
        target = self.d_BCdhw[self.samples, :, self.first : end]
        sums = self.sums_mCdhw[:samples, :, : end - self.first]
        target.add_(sums) if add else target.copy_(sums)


def _five(low: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h, 1, w); three dimensions as they are."""
    return low.unsqueeze(3) if low.ndim == 4 else low


def _interpolated(low: Tensor, size: Sequence[int], mode: str, align_corners: bool) -> Tensor:
    """The definition."""
    corners = None if mode == "nearest" else align_corners
    return nn.functional.interpolate(low, tuple(size), mode=mode, align_corners=corners)


@lru_cache(maxsize=64)
def _table(low: int, out: int, rank: int, mode: str, align_corners: bool, dtype: torch.dtype) -> Table:
    """Low places and outputs along an axis -> the table; those of the last sizes are kept.

    Torch itself says where an output lies: it interpolates 0, 1, 2...
    """
    exact = dtype if mode == "nearest" else torch.float64  # the nearest is a matter of rounding, in the logits' dtype
    with torch.inference_mode(False), torch.no_grad():
        places = torch.arange(low, dtype=exact, device="cpu").view(1, 1, low, *[1] * (rank - 1))
        position = _interpolated(places, (out, *[1] * (rank - 1)), mode, align_corners).view(-1)
        below = position.floor()
        if mode == "nearest":
            return below.long().unsqueeze(0), torch.ones(1, out, dtype=dtype, device="cpu")
        index = torch.stack([below, (below + 1).clamp(max=low - 1)]).long()
        share = position - below
        return index, torch.stack([1 - share, share]).to(dtype)


def _transposed(table: Table, low: int) -> Table:
    """Which outputs a low place gives to, and how much: consecutive ones, as many for each place, some of them 0."""
    index, share = table
    gives = share > 0
    place, output = index[gives], torch.arange(index.shape[1]).expand(len(index), -1)[gives]
    first = torch.full((low,), index.shape[1]).scatter_reduce_(0, place, output, "amin")
    most = int((output - first[place]).max()) + 1
    first.clamp_(max=index.shape[1] - most)
    back = share.new_zeros(most, low).index_put_((output - first[place], place), share[gives], accumulate=True)
    return first + torch.arange(most).unsqueeze(1), back
