"""Interpolation of low-resolution logits to the resolution of the target, chunk by chunk, and its adjoint.

It is a `LinearMap`. Interpolation goes axis by axis: along each axis an output is the weighted sum of two neighbouring
inputs (of one, for mode "nearest"). A `Table` holds their positions and weights. An image is treated as a volume with
one row in each plane: its rows take the place of planes, so that the code has one case.

A chunk is a run of whole output rows of some samples. On a CPU Numba interpolates it, elsewhere torch operators do.

Shape suffixes: B sample, C class, V voxel of the output; D, H, W planes, rows, columns of the output; d, h, w those of
the low resolution; R low rows of all planes; m samples, r output rows and n voxels of a chunk. `low` logits are those
of low resolution, and a low plane or low row is one of theirs; output rows are numbered through all planes.
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
"""Logits of a chunk on a CPU: enough that the cost of a call vanishes, few enough for the second-level cache."""

Table = tuple[Tensor, Tensor]
"""Interpolation along one axis, for each output: positions of its inputs (int64) and their weights, (2 or 1, outputs).
"""


@dataclass(frozen=True)
class Interpolation:
    """The interpolation of low logits (B, C, *s) to (B, C, V), where V counts the voxels of `size`. A `LinearMap`.

    low: the shape (B, C, *s). size: the spatial shape of the output, two or three numbers. mode: "bilinear",
    "trilinear" or "nearest". dtype: that of the output. device: of all tensors. chunk_mib: as in `Upsampled`.
    `inputs` of a method is a sequence of one tensor, the low logits.
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
        """The shape (B, C, V) of the output."""
        return self.low[0], self.low[1], torch.Size(self.size).numel()

    @cached_property
    def grid(self) -> Grid:
        """The size of a chunk: whole rows, so many that each low row it reads serves several of them."""
        B, C, V = self.shape
        width, rows = self.size[-1], 2 * -(-self.size[-2] // self.low[-2])  # rows: those that two low rows make
        most = max(CHUNK_ELEMENTS // C, rows * width)
        grid = Grid.of(B, C, V, self.dtype, self.device, self.chunk_mib, width, most)
        return grid._replace(voxels=max(grid.voxels // width * width, width))

    @cached_property
    def tables(self) -> tuple[Table, Table, Table]:
        """The tables of planes, rows and columns, in the memory of the CPU."""
        rank = len(self.size)
        axes = zip(self.low[2:], self.size, strict=True)
        tables = [_table(low, out, rank, self.mode, self.align_corners, self.dtype) for low, out in axes]
        if rank == 2:  # one row in each plane
            tables.insert(1, (torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=self.dtype)))
        return tables[0], tables[1], tables[2]

    @cached_property
    def device_tables(self) -> tuple[Table, Table, Table]:
        """The tables, on the device."""
        planes, rows, columns = ((index.to(self.device), weight.to(self.device)) for index, weight in self.tables)
        return planes, rows, columns

    @cached_property
    def compiled(self) -> Any:
        """The Numba module and its tables as arrays: planes, rows, columns, columns transposed; None for torch."""
        loops = compiled_loops("softdice.head.interpolation_kernel") if self.device.type == "cpu" else None
        if loops is None:
            return None
        tables = *self.tables, _transposed(self.tables[2], self.low[-1])
        return loops, [(index.numpy().astype("uint32"), weight.numpy()) for index, weight in tables]

    def rows(self, chunk: Chunk) -> tuple[int, int]:
        """Return (number of the first output row of a chunk, how many rows it has)."""
        voxels, W = chunk[1], self.size[-1]
        return voxels.start // W, (voxels.stop - voxels.start) // W

    def planes(self, chunk: Chunk) -> tuple[int, int]:
        """Return the range (first, end) of low planes that a chunk reads."""
        index, H = self.tables[0][0], self.tables[1][0].shape[1]
        first, count = self.rows(chunk)
        return int(index[0, first // H]), int(index[-1, (first + count - 1) // H]) + 1

    def logits(self, inputs: Sequence[Any], chunk: Chunk, memory: Tensor) -> Tensor:
        """Return the logits (m, C, n) of a chunk, from the low logits, `inputs[0]`; Numba writes them to `memory`."""
        low_mCdhw = _with_planes(inputs[0])[chunk[0]]
        (m, C), (first, count), W = low_mCdhw.shape[:2], self.rows(chunk), self.size[-1]
        start = 0
        if low_mCdhw.dtype != self.dtype:  # half precision: convert the planes that the chunk reads
            start, end = self.planes(chunk)
            low_mCdhw = low_mCdhw[:, :, start:end].to(self.dtype)
        if self.compiled is None:
            return self._logits_by_torch(low_mCdhw, start, first, count)
        out = memory[: m * C * count * W]
        loops, (planes, rows, columns, _) = self.compiled
        loops.interpolate(low_mCdhw.detach().numpy(), start, planes, rows, columns, first, out.numpy())
        return out.view(m, C, count * W)

    def _logits_by_torch(self, low_mCdhw: Tensor, start: int, first: int, count: int) -> Tensor:
        """Return the logits (m, C, n) of `count` output rows from row `first` on.

        low_mCdhw: in the dtype of the output; the low planes from `start` on, as far as these rows read them.
        """
        rows_mCRw = low_mCdhw.flatten(2, 3)
        sources = self._row_sources(start, first, count, low_mCdhw.shape[3])
        term, *terms = (rows_mCRw.index_select(2, index) * weight.unsqueeze(1) for index, weight in sources)
        out_mCrw = sum(terms, term)
        columns = zip(*self.device_tables[2], strict=True)
        term, *terms = (out_mCrw.index_select(3, index) * weight for index, weight in columns)
        return sum(terms, term).flatten(2)

    def _row_sources(self, start: int, first: int, count: int, h: int) -> Iterator[Table]:
        """Yield, for each of the (at most four) low rows that an output row is a sum of, its number and its weight.

        Both are tensors (r,), for the `count` output rows from row `first` on. Low rows are numbered through the low
        planes from `start` on, of h rows each.
        """
        planes, rows, _ = self.device_tables
        r, H = torch.arange(first, first + count, device=self.device), rows[0].shape[1]
        z, y = r.div(H, rounding_mode="floor"), r % H  # plane and row in it
        for plane, plane_weight in zip(*planes, strict=True):
            for row, row_weight in zip(*rows, strict=True):
                yield (plane[z] - start) * h + row[y], plane_weight[z] * row_weight[y]

    def adjoint(self, inputs: Sequence[Any], needed: Sequence[bool]) -> _Adjoint:
        """Return the adjoint for one backward pass."""
        return _Adjoint(self, inputs[0])

    def add_adjoint(self, grad_mCn: Tensor, chunk: Chunk, sums_mCdhw: Tensor, start: int) -> None:
        """Add dL/dlow of a chunk to `sums_mCdhw`, the sums for the low planes from `start` on.

        grad_mCn: dL/dlogits of the chunk.
        """
        first, count = self.rows(chunk)
        W = self.size[-1]
        if self.compiled is not None:
            loops, (planes, rows, _, columns_transposed) = self.compiled
            grad = grad_mCn.contiguous().view(-1).numpy()
            loops.add_adjoint(grad, planes, rows, columns_transposed, W, first, sums_mCdhw.numpy(), start)
            return
        grad_mCrW = grad_mCn.unflatten(2, (count, W))
        grad_mCrw = grad_mCrW.new_zeros((*grad_mCrW.shape[:3], sums_mCdhw.shape[4]))
        for index, weight in zip(*self.device_tables[2], strict=True):
            grad_mCrw.index_add_(3, index, grad_mCrW * weight)
        rows_mCRw = sums_mCdhw.flatten(2, 3)  # a view
        for index, weight in self._row_sources(start, first, count, sums_mCdhw.shape[3]):
            rows_mCRw.index_add_(2, index, grad_mCrw * weight.unsqueeze(1))

    def whole(self, low: Tensor) -> Tensor:
        """Return all logits, by `torch.nn.functional.interpolate`."""
        return _interpolated(low.to(self.dtype), self.size, self.mode, self.align_corners).flatten(2)


class _Adjoint:
    """The gradient dL/dlow. Consecutive chunks share low planes, so each lane sums them in a window of its own."""

    def __init__(self, interpolation: Interpolation, low: Tensor) -> None:
        self.interpolation = interpolation
        self.d_low = torch.zeros_like(low)

    def lane(self, chunks: list[Chunk]) -> _Window:
        """Return a window with room for the planes of any one of a lane's chunks."""
        d_BCdhw = _with_planes(self.d_low)
        most = max(end - start for start, end in map(self.interpolation.planes, chunks))
        samples = max(chunk[0].stop - chunk[0].start for chunk in chunks)
        shape = (samples, d_BCdhw.shape[1], most, *d_BCdhw.shape[3:])
        return _Window(d_BCdhw, d_BCdhw.new_zeros(shape, dtype=self.interpolation.dtype))

    def add(self, sums: _Window, chunk: Chunk, grad_mCn: Tensor) -> None:
        """Move the window of a lane to the planes of a chunk, and add the gradient of the chunk to it."""
        sums.move(chunk[0], *self.interpolation.planes(chunk))
        self.interpolation.add_adjoint(grad_mCn, chunk, sums.sums_mCdhw[: len(grad_mCn)], sums.first)

    def result(self, lanes: list[_Window]) -> tuple[Tensor | None, ...]:
        """Return dL/dlow, after adding what is left in the windows, in order: the bits do not depend on threads."""
        for window in lanes:
            window.flush(window.end, add=True)
        return (self.d_low,)


class _Window:
    """The gradients of the low planes first:end of `samples`, to which the chunks of a lane add; it moves on with them.

    A plane that later chunks do not reach is written to dL/dlow and leaves the window. The last planes of a lane may
    be the first of the next one, so they are added at the end, when all lanes are done.

    d_BCdhw: all dL/dlow. sums_mCdhw: room for the samples and planes of any chunk, all 0.
    """

    def __init__(self, d_BCdhw: Tensor, sums_mCdhw: Tensor) -> None:
        self.d_BCdhw, self.sums_mCdhw = d_BCdhw, sums_mCdhw
        self.samples, self.first, self.end = slice(0, 0), 0, 0

    def move(self, samples: slice, first: int, end: int) -> None:
        """Move on to the planes first:end of the samples, never back; write the planes that are left to dL/dlow."""
        overlap = max(self.end - first, 0) if samples == self.samples else 0  # planes that stay in the window
        self.flush(self.end - overlap)
        steps = self.end - overlap - self.first
        if overlap and steps:
            self.sums_mCdhw[:, :, :overlap] = self.sums_mCdhw[:, :, steps : steps + overlap].clone()
        self.sums_mCdhw[:, :, overlap : end - first] = 0
        self.samples, self.first, self.end = samples, first, end

    def flush(self, end: int, add: bool = False) -> None:
        """Write (or add) the sums of the window's planes before plane `end` to dL/dlow."""
        samples = self.samples.stop - self.samples.start
        d_mCdhw = self.d_BCdhw[self.samples, :, self.first : end]
        sums_mCdhw = self.sums_mCdhw[:samples, :, : end - self.first]
        d_mCdhw.add_(sums_mCdhw) if add else d_mCdhw.copy_(sums_mCdhw)


def _with_planes(low: Tensor) -> Tensor:
    """Return images (B, C, h, w) as volumes (B, C, h, 1, w), with one row in each plane; volumes as they are."""
    return low.unsqueeze(3) if low.ndim == 4 else low


def _interpolated(low: Tensor, size: Sequence[int], mode: str, align_corners: bool) -> Tensor:
    """Return what `torch.nn.functional.interpolate` does: the definition."""
    corners = None if mode == "nearest" else align_corners
    return nn.functional.interpolate(low, tuple(size), mode=mode, align_corners=corners)


@lru_cache(maxsize=64)
def _table(low: int, out: int, rank: int, mode: str, align_corners: bool, dtype: torch.dtype) -> Table:
    """Return the table of an axis with `low` inputs and `out` outputs, for interpolation in `rank` dimensions.

    Torch itself says where an output lies: interpolating the ramp 0, 1, 2... gives its position among the inputs.
    dtype: float32 or float64, of the output and of the weights. Returns index and weight, (neighbours, out) each, where
    nearest has one neighbour and linear two.
    """
    ramp_dtype = dtype if mode == "nearest" else torch.float64  # which input is nearest is rounded in the logits' dtype
    with torch.inference_mode(False), torch.no_grad():
        ramp = torch.arange(low, dtype=ramp_dtype, device="cpu").view(1, 1, low, *[1] * (rank - 1))
        position = _interpolated(ramp, (out, *[1] * (rank - 1)), mode, align_corners).view(-1)
        below = position.floor()
        if mode == "nearest":
            return below.long().unsqueeze(0), torch.ones(1, out, dtype=dtype, device="cpu")
        index = torch.stack([below, (below + 1).clamp(max=low - 1)]).long()
        weight = position - below
        return index, torch.stack([1 - weight, weight]).to(dtype)


def _transposed(table: Table, low: int) -> Table:
    """Return the table of the adjoint along an axis: for each of its `low` inputs, the outputs that read it.

    The outputs that read an input are consecutive. The table has rows for the largest number of them; where an input
    has fewer, the other weights are 0.
    """
    index, weight = table
    outputs = index.shape[1]
    is_read = weight > 0
    source, output = index[is_read], torch.arange(outputs).expand(len(index), -1)[is_read]  # pairs: output reads source
    first = torch.full((low,), outputs).scatter_reduce_(0, source, output, "amin")  # first output of each source
    rows = int((output - first[source]).max()) + 1
    first.clamp_(max=outputs - rows)  # so that all rows name outputs that exist
    row = output - first[source]
    weights = weight.new_zeros(rows, low).index_put_((row, source), weight[is_read], accumulate=True)
    return first + torch.arange(rows).unsqueeze(1), weights
