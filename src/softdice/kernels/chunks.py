"""input, target -> sums and their gradient in plain torch, piece by piece: the definition, in bounded memory.

It serves the passes that a device has no kernel for. Beside the gradient it holds a few times `ELEMENTS` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softdice import reference, validation
from softdice.settings import Pass

ELEMENTS = 1 << 20
"""Of the input, in one piece."""


def statistics(input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Pass) -> Tensor:
    """What `reference.statistics` takes -> what it returns, without a graph; ranges are checked as settings say."""
    sums = input.new_zeros((settings.rows(input.shape[1]), *input.shape[:2]), dtype=reference.result_dtype(input.dtype))
    for voxels in _pieces(input):
        piece = input[..., voxels], target[..., voxels], None if weight is None else weight[..., voxels]
        if settings.validate:
            validation.values(*piece, settings.activation, settings.ignore_index)
        sums += reference.statistics(*piece, regions, settings)
    return sums


def gradient(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Pass
) -> Tensor:
    """dL/dsums, and what `statistics` took -> dL/dinput."""
    result = torch.empty_like(input)
    for voxels in _pieces(input):
        with torch.enable_grad():
            piece = input[..., voxels].detach().requires_grad_()
            part = None if weight is None else weight[..., voxels]
            sums = reference.statistics(piece, target[..., voxels], part, regions, settings)
        result[..., voxels] = torch.autograd.grad(sums, piece, grad)[0]
    return result


def _pieces(input: Tensor) -> Iterator[slice]:
    B, C, V = input.shape
    size = max(1, ELEMENTS // max(1, B * C))
    return (slice(begin, begin + size) for begin in range(0, V, size))
