"""(classes, dtype) -> how a Triton kernel is cut into programs: one table, and nothing is tried out unless asked for.

A program's tile is [class bucket, voxels]. The bucket is the number of classes rounded up to a power of two; beyond
WIDEST classes the kernels go over tiles of CLASSES classes. With SOFTDICE_AUTOTUNE=1 in the environment the first call
of each kind times the neighbours of the table's entry and keeps the fastest; two processes may then differ in the last
bits, because another tile adds in another order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

WIDEST = 128
CLASSES = 64
RUN = 64  # tiles that one program adds up at most: 64 numbers per lane of float32, 2^17 voxels per row
PER_PROCESSOR = 4  # programs per multiprocessor, where there is work for so many
FEW_SUMS = 4  # more sums than this take more registers: the tile shrinks


class Tile(NamedTuple):
    """Voxels of a tile, and the warps that share it."""

    voxels: int
    warps: int


FORWARD: dict[tuple[int, int], Tile] = {}
BACKWARD: dict[tuple[int, int], Tile] = {}
"""(class bucket, bytes of a logit) -> tile."""
for _bytes, _elements in ((2, 1), (4, 1), (8, 2)):
    for _bucket, _voxels, _warps in (
        (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (8, 256, 4), (16, 128, 4), (32, 64, 4), (64, 64, 8), (128, 32, 8),
    ):  # fmt: skip
        FORWARD[_bucket, _bytes] = Tile(_voxels // _elements, _warps)
        BACKWARD[_bucket, _bytes] = Tile(_voxels // _elements, _warps)


def bucket(C: int) -> int:
    """Classes -> rows of a tile."""
    return triton.next_power_of_2(C) if C <= WIDEST else CLASSES


def tile(table: dict[tuple[int, int], Tile], rows: int, itemsize: int, sums: int = 0) -> Tile:
    """Rows of a tile, bytes of a logit, sums that are kept in registers -> the entry of the table, shrunk for many."""
    found = table[rows, itemsize]
    shrink = 1 if sums <= FEW_SUMS else 2 if sums <= 2 * FEW_SUMS else 4
    return found._replace(voxels=max(16, found.voxels // shrink))


def grid(B: int, V: int, voxels: int, processors: int) -> tuple[int, int]:
    """Samples, voxels, voxels of a tile -> programs per sample, tiles that each of them walks."""
    tiles = max(1, -(-V // voxels))
    programs = min(tiles, max(PER_PROCESSOR * processors // max(B, 1), -(-tiles // RUN), 1))
    return programs, -(-tiles // programs)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 where the interpreter plays it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream: make it the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_tuned: dict[tuple[Any, ...], Tile] = {}


def tuned(key: tuple[Any, ...], entry: Tile, call: Callable[[Tile], object], device: torch.device) -> Tile:
    """The table's entry; with SOFTDICE_AUTOTUNE=1 the fastest of its neighbours, timed once for each key."""
    if os.environ.get("SOFTDICE_AUTOTUNE") != "1" or device.type != "cuda":
        return entry
    if key not in _tuned and not torch.cuda.is_current_stream_capturing():
        near = [
            Tile(voxels, warps)
            for voxels in (entry.voxels // 2, entry.voxels, entry.voxels * 2)
            for warps in (entry.warps // 2, entry.warps, entry.warps * 2)
            if voxels >= 16
        ]
        _tuned[key] = min(near, key=lambda option: triton.testing.do_bench(lambda: call(option)))
    return _tuned.get(key, entry)


def readable(tensor: Tensor) -> Tensor:
    """bool as its bytes; all else as it is. No copy."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
