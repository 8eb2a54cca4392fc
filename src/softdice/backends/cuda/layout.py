"""How tensors lie in memory, as far as machine code depends on it. No Triton is needed here.

A kernel gets its strides in units: the largest power of two, up to WIDEST, that divides the strides of a tensor, those
of 1 aside. So the compiler knows what divides an address and reads as many bytes at once as it can, and a smaller batch
or another size with the same unit takes the same machine code.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from torch import Tensor

from softdice.statistics.request import Request

WIDEST = 16
"""Numbers that are read at once at most: 16 bytes of uint8."""


class Strides(NamedTuple):
    """Strides by sample, class and voxel, divided by a unit, and that unit for each of them.
    The unit is 0 for classes or voxels that are neighbours, with stride 1."""

    steps: tuple[int, ...]
    units: tuple[int, ...]


def strides(tensor: Tensor | None) -> Strides:
    """Return the strides of a tensor (B, C, V) or (B, V), whose stride by class is 0, in units; 0 for None.
    A stride of 1 by class or voxel has the unit 0, which tells kernels that these lie side by side. A single sample has
    no stride to the next one: it gets the stride of a batch without gaps."""
    if tensor is None:
        return Strides((0, 0, 0), (1, 1, 1))
    steps = list(tensor.stride())
    if len(tensor) == 1:
        steps[0] = max(step * size for step, size in zip(steps[1:], tensor.shape[1:], strict=True))
    if len(steps) == 2:
        steps.insert(1, 0)
    near = [axis > 0 and step == 1 for axis, step in enumerate(steps)]
    unit = gcd(WIDEST, *(step for step, beside in zip(steps, near, strict=True) if not beside))
    units = tuple(0 if beside else unit for beside in near)
    return Strides(tuple(step // (each or 1) for step, each in zip(steps, units, strict=True)), units)


def aligned(tensor: Tensor) -> bool:
    """Return whether Triton takes a tensor's address for a multiple of 16 bytes."""
    return tensor.data_ptr() % 16 == 0


def layout(request: Request) -> tuple[object, ...]:
    """Return all of a request's memory layout that machine code depends on: of V and of each tensor the unit, which
    strides are 1, and whether the address is a multiple of 16 bytes."""
    V = request.input.shape[2]
    tensors = (request.input, request.target, request.weight, request.voxel_map)
    return gcd(WIDEST, V), *((strides(each).units, each is None or aligned(each)) for each in tensors)


def laid_out(values: Tensor, like: Tensor) -> Tensor:
    """Return a copy of `values` with the memory layout of `like`, as `layout` sees it: order of axes, unit, alignment.
    values: of the axes and dtype of `like`, and any size. Axes are laid out from the smallest stride of `like` to the
    largest; behind a gap in its memory the copy has gaps, too."""
    unit = max(strides(like).units)
    steps, step, without_gaps, expected = [0] * like.ndim, 1, True, 1
    for axis in sorted(range(like.ndim), key=lambda axis: (like.stride(axis), like.shape[axis])):
        if like.shape[axis] > 1:
            without_gaps = without_gaps and like.stride(axis) == expected
            expected = like.stride(axis) * like.shape[axis]
        if not without_gaps:  # rounded up to an odd number of units, 3 at least: no larger unit divides it, nor is it 1
            step = max(-(-step // unit) | 1, 3) * unit
        steps[axis] = step
        step *= values.shape[axis]
    memory = values.new_empty(step + 1)[0 if aligned(like) else 1 :]
    return memory.as_strided(values.shape, steps, memory.storage_offset()).copy_(values)
