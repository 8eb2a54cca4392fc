"""Memory for a gradient whose pages the system need not make anew at every step.

The system hands out fresh memory page by page, at the first write, and for a large gradient that takes longer than the
arithmetic. So when a gradient is freed, its memory is offered back to the system (MADV_FREE: the system takes the pages
when it runs short, and not before) and kept for the next gradient. One piece at most is kept, the largest; between a
step's end and the next gradient it counts as resident, though the system may have it. `forget()` lets it go;
SOFTDICE_REUSE_GRADIENT=0 in the environment keeps nothing.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 25
"""Bytes. From this size on glibc maps fresh memory every time; below it, its heap reuses memory by itself."""

_ABLE = all(hasattr(mmap, name) for name in ("MADV_FREE", "MAP_PRIVATE", "MAP_ANONYMOUS"))
_idle: list[mmap.mmap] = []  # one at most; list.pop and slice assignment are atomic, so no lock is held in a finalizer


def gradient_like(input: Tensor) -> Tensor:
    """input -> uninitialised memory of its shape, strides (where dense) and dtype, as `torch.empty_like` gives it."""
    size = input.numel() * input.element_size()
    if not _ABLE or size < SMALLEST or os.environ.get("SOFTDICE_REUSE_GRADIENT") == "0":
        return torch.empty_like(input)
    piece = _take(size)
    owner = np.frombuffer(piece, np.uint8, size)
    weakref.finalize(owner, _give_back, piece).atexit = False
    strides = torch.empty_like(input, device="meta").stride()
    storage = torch.from_numpy(owner).untyped_storage()  # holds the owner until the last tensor on it is gone
    return torch.empty(0, dtype=input.dtype).set_(storage, 0, input.shape, strides)


def forget() -> None:
    """() -> nothing: what is kept goes back to the system."""
    _idle.clear()


def _take(size: int) -> mmap.mmap:
    try:
        piece = _idle.pop()
    except IndexError:
        piece = None
    if piece is not None and len(piece) >= size:
        return piece
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _give_back(piece: Any) -> None:
    if _idle and len(_idle[0]) >= len(piece):
        return
    piece.madvise(mmap.MADV_FREE)
    _idle[:] = [piece]
