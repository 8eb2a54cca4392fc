"""Memory for a gradient whose pages the system need not make anew at every step.

The system hands out fresh memory page by page, at the first write, and for a large gradient that takes longer than the
arithmetic. So when a gradient is freed, its memory is offered back to the system (MADV_FREE: the system takes the pages
when it runs short, and not before) and kept for the next gradient. Pages are large where the system has them, which
makes the offer a matter of microseconds. Two pieces at most are kept (a loss of two passes has two gradients at once),
the largest; between a step's end and the next gradient they count as resident, though the system may have them.
`forget()` lets them go; SOFTDICE_REUSE_GRADIENT=0 in the environment keeps nothing.
"""

from __future__ import annotations

import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 23
"""Bytes. From 32 MiB on glibc maps fresh memory every time; from here on it may, after what other code has freed."""

_ABLE = all(hasattr(mmap, name) for name in ("MADV_FREE", "MAP_PRIVATE", "MAP_ANONYMOUS"))
PIECES = 2
_idle: list[mmap.mmap] = []  # append, remove and clear are atomic, so no lock is held in a finalizer


def gradient_like(input: Tensor) -> Tensor:
    """Return an uninitialised tensor of the input's shape, dtype and strides (where dense), as `torch.empty_like` does.
    From SMALLEST bytes on, its memory is a kept piece where there is one, and is kept when the tensor is freed; not so
    where Python's mmap lacks a flag that this takes (`_ABLE`)."""
    size = input.numel() * input.element_size()
    if not _ABLE or size < SMALLEST or os.environ.get("SOFTDICE_REUSE_GRADIENT") == "0":
        return torch.empty_like(input)
    piece = _take(size)
    owner = np.frombuffer(piece, np.uint8, size)
    weakref.finalize(owner, _give_back, piece).atexit = False  # at exit all memory goes
    strides = torch.empty_like(input, device="meta").stride()
    storage = torch.from_numpy(owner).untyped_storage()  # holds the owner until the last tensor on it is gone
    return torch.empty(0, dtype=input.dtype).set_(storage, 0, input.shape, strides)


def forget() -> None:
    """Give the kept memory back to the system."""
    _idle.clear()


def _take(size: int) -> mmap.mmap:
    """Return the smallest idle piece of at least `size` bytes, taken out of `_idle`; else a fresh piece."""
    for piece in sorted(_idle, key=len):
        if len(piece) >= size and _removed(piece):
            return piece
    fresh = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # where there are no large pages
        fresh.madvise(mmap.MADV_HUGEPAGE)
    return fresh


def _give_back(piece: Any) -> None:
    """Offer a piece's memory to the system, and put the piece into `_idle`, which keeps the PIECES largest."""
    piece.madvise(mmap.MADV_FREE)
    _idle.append(piece)
    for smallest in sorted(_idle, key=len)[:-PIECES]:
        _removed(smallest)


def _removed(piece: Any) -> bool:
    """Take a piece out of `_idle`; return False if another thread has taken it before."""
    try:
        _idle.remove(piece)
    except ValueError:
        return False
    return True
