"""How a Triton kernel is cut into programs: one table by classes and dtype, and nothing is tried out.

A program holds one tile [class bucket, voxels], or [1, voxels] for each class. The bucket is the number of classes
rounded up to a power of two; beyond WIDEST classes the kernels go over tiles of CLASSES classes. A program walks some
tiles of one sample, one after the other; a multiprocessor of the GPU runs several programs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

WIDEST = 128
CLASSES = 64
RUN = 64  # tiles that one program adds up at most: 64 numbers per lane of float32, 2^17 voxels per row
PER_PROCESSOR = 16  # programs per multiprocessor, a few of which are there at a time, where there is work for so many
TILES = 4  # of a program at least, so that its beginning and its end weigh little, where all multiprocessors have work
EACH = 24  # classes up to which each is a vector of voxels by itself
HELD = 384  # bytes of sums that a thread holds at most, for one voxel
FEW_SUMS = 4  # more sums than this take more registers: the tile shrinks


class Tile(NamedTuple):
    """Voxels of a tile, and the warps that share it; its rows, and how many such tiles a program holds at once."""

    voxels: int
    warps: int = 4
    rows: int = 1
    groups: int = 1

    @property
    def vector(self) -> int:
        """Neighbouring voxels that a thread reads at once: all its voxels, where it can hold all their classes, so that
        a softmax need not leave it. Elsewhere four: fewer threads hold the values of a voxel, in fewer registers."""
        share = self.voxels // (32 * self.warps)
        return share if share >= 2 or self.rows == 1 else min(self.voxels, 4)

    @property
    def constants(self) -> dict[str, int]:
        """The tile as constants that the kernels are compiled for, by name."""
        return {"BV": self.voxels, "VECTOR": self.vector, "KT": self.rows, "GROUPS": self.groups}


# Voxels that a thread holds all classes of, for logits of 2, 4 and 8 bytes; 0: too much for it. Not yet set by a clock.
_VECTORS = {1: (8, 8, 2), 2: (4, 4, 2), 4: (4, 4, 1), 8: (2, 2, 1), 16: (2, 2, 0), 21: (2, 1, 0), EACH: (1, 1, 0)}
# Eight or sixteen elements per thread, whose sums stay in registers: as many as the compiler manages without spilling
# one (tests/test_triton_compile.py). Not yet set by a clock.
_VOXELS = {
    # rows: voxels of a tile for logits of 2, 4 and 8 bytes
    2: (512, 1024, 256),
    4: (512, 512, 128),
    8: (128, 256, 64),
    16: (128, 128, 16),
    32: (64, 32, 16),
    64: (32, 32, 8),
    128: (16, 16, 8),
    2 * WIDEST: (16, 16, 8),  # and more
}
PADDED = {(rows, 2 << i): Tile(voxels, rows=rows) for rows, sizes in _VOXELS.items() for i, voxels in enumerate(sizes)}
"""(class bucket, bytes of a logit) -> tile, where classes do not stand by themselves."""
BY_CLASS = {
    (most, 2 << i): Tile(32 * vector, warps=1)
    for most, sizes in _VECTORS.items()
    for i, vector in enumerate(sizes)
    if vector
}
"""(most classes, bytes of a logit) -> tile of one class."""


def bucket(C: int) -> int:
    """Return the rows of a tile for C classes: the class bucket, or CLASSES beyond WIDEST."""
    return triton.next_power_of_2(C) if C <= WIDEST else CLASSES


def tile(C: int, regions: int, itemsize: int, sums: int = 0) -> Tile:
    """Return the tile for C classes, `regions` (0: none) and logits of `itemsize` bytes.
    sums: statistics that a program adds up, or in the backward pass coefficients that it holds; many make the tile
    smaller. Up to EACH classes, where BY_CLASS ends, each has a tile [1, voxels] if a thread can hold all sums in HELD
    bytes. Otherwise, and always with regions, one tile has a row for each class of the bucket, or for each region."""
    shrink = 1 if sums <= FEW_SUMS else 2 if sums <= 2 * FEW_SUMS else 4
    entry = next((entry for (most, size), entry in BY_CLASS.items() if most >= C and size == itemsize), None)
    if entry is not None and not regions and C * sums * max(itemsize, 4) <= HELD:
        return entry._replace(voxels=max(32 * entry.warps, entry.voxels // shrink), groups=C)
    rows = triton.next_power_of_2(regions) if regions else bucket(C)
    # 2 * WIDEST: the entry of all that is wider
    entry = PADDED[2 * WIDEST if C > WIDEST else max(bucket(C), rows, 2), itemsize]
    return entry._replace(voxels=max(4, entry.voxels // shrink), rows=rows)


def grid(B: int, V: int, voxels: int, wanted: int) -> tuple[int, int]:
    """Return (programs per sample, tiles that each of them walks) for B samples of V voxels in tiles of `voxels`.
    wanted: programs in all. Each walks at most RUN tiles, and at least TILES while wanted / TILES programs remain."""
    tiles, most = max(1, -(-V // voxels)), wanted // max(B, 1)
    fewer = min(most, max(-(-tiles // TILES), most // TILES))
    programs = min(tiles, max(fewer, -(-tiles // RUN), 1))
    return programs, -(-tiles // programs)


def wanted(device: torch.device) -> int:
    """Return how many programs keep a device busy; the interpreter counts as one multiprocessor."""
    cuda = device.type == "cuda"
    return PER_PROCESSOR * (torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the current device, on which Triton launches, is the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def readable(tensor: Tensor) -> Tensor:
    """Return bool as its bytes, all else as it is, without a copy."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
