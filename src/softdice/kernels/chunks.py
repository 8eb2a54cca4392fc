"""input, target -> sums and their gradient in plain torch, piece by piece: the definition, in bounded memory.

It serves the passes that a device has no kernel for. A pass over single voxels holds a few times `ELEMENTS` numbers
beside the gradient; one over soft skeletons what autograd needs for one class of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softdice import reference, validation
from softdice.settings import CENTRELINE, Pass, Voxels

ELEMENTS, ELEMENTS_ON_DEVICE = (1 << 15) - 1, 1 << 22
"""Of the input, in one piece: on a CPU so few that torch gives them to one thread (the last bits of its exponentials
depend on where a thread begins), elsewhere what is worth a launch."""
ALL = slice(None)


def statistics(given: Voxels, settings: Pass) -> Tensor:
    """What `reference.statistics` takes -> what it returns, without a graph."""
    input = given.input
    sums = input.new_zeros((settings.rows(input.shape[1]), *input.shape[:2]), dtype=reference.result_dtype(input.dtype))
    if settings.fields == CENTRELINE:
        for b, c, prob, true, weight_V in _classes(given, log_sum(input, settings.activation), settings):
            sums[:, b, c] = reference.centreline(prob, true, weight_V, settings)[:, 0, 0]
        return sums
    for voxels in pieces(input):
        sums += reference.statistics(given.at(ALL, voxels), settings)
    return sums


def gradient(grad: Tensor, given: Voxels, settings: Pass) -> Tensor:
    """dL/dsums, and what `statistics` took -> dL/dinput."""
    input = given.input
    if settings.fields == CENTRELINE:
        result = torch.empty_like(input, dtype=reference.result_dtype(input.dtype))
        of_voxels = log_sum(input, settings.activation)
        for b, c, prob, true, weight_V in _classes(given, of_voxels, settings):
            with torch.enable_grad():
                prob = prob.requires_grad_()
                sums = reference.centreline(prob * (weight_V > 0), true, weight_V, settings)
            result[b, c] = torch.autograd.grad(sums, prob, grad[:, b, c].view(4, 1, 1))[0].flatten()
        through_activation(result, input, of_voxels, settings.activation)
        return result.to(input.dtype)
    result = torch.empty_like(input)
    for voxels in pieces(input):
        with torch.enable_grad():
            piece = input[..., voxels].detach().requires_grad_()
            sums = reference.statistics(given.at(ALL, voxels)._replace(input=piece), settings)
        result[..., voxels] = torch.autograd.grad(sums, piece, grad)[0]
    return result


def check(given: Voxels, settings: Pass) -> None:
    """`validation.values` of a piece after the other, where the settings ask for it."""
    for voxels in pieces(given.input) if settings.validate else ():
        validation.values(given.at(ALL, voxels), settings)


def log_sum(input: Tensor, activation: str) -> Tensor:
    """logits (B, C, V) -> ln sum_c exp x_c of a softmax, (B, V); else nothing, (0, 0)."""
    if activation != "softmax":
        return input.new_empty((0, 0), dtype=reference.result_dtype(input.dtype))
    result = torch.empty_like(input[:, 0], dtype=reference.result_dtype(input.dtype))
    for voxels in pieces(input):
        result[:, voxels] = input[..., voxels].to(result.dtype).logsumexp(1)
    return result


def through_activation(grad: Tensor, input: Tensor, sums: Tensor, activation: str) -> None:
    """dL/dp (B, C, V), 0 where a voxel does not count, input and its `log_sum` -> dL/dx, in the place of dL/dp."""
    for voxels in pieces(input) if activation != "none" else ():
        value, slope = input[..., voxels].to(grad.dtype), grad[..., voxels]
        if activation == "softmax":
            p = (value - sums[:, None, voxels]).exp_().nan_to_num_(0.0)  # torch's softmax is shared among threads
            slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)
        else:
            p = value.sigmoid().nan_to_num_(0.0)
            slope.mul_(p * (1 - p))


def _classes(given: Voxels, sums: Tensor, settings: Pass) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """-> sample, class, p, y and w, (1, 1, V), 0 where a voxel does not count."""
    input, target, weight, *_ = given
    B, C, V = input.shape
    first = 1 if C == 1 else 0
    for b in range(B):
        labels = reference.signed(target[b])
        weight_V = input.new_ones((1, 1, V), dtype=reference.result_dtype(input.dtype))
        if settings.ignore_index is not None:
            weight_V = weight_V.masked_fill(reference.equals(target[b], settings.ignore_index), 0)
        if weight is not None:
            weight_V = weight_V * torch.where(weight[b] > 0, weight[b], 0).to(weight_V.dtype)
        for c in range(C):
            value = input[b, c].to(weight_V.dtype).view(1, 1, -1)
            if settings.activation == "softmax":
                value = (value - sums[b]).exp()
            elif settings.activation == "sigmoid":
                value = value.sigmoid()
            true = (labels[c] if target.ndim == 3 else labels == c + first).to(value.dtype).view(1, 1, -1)
            value, true = (torch.where(weight_V > 0, x, 0.0) for x in (value, true))
            yield b, c, value.detach(), true, weight_V


def pieces(input: Tensor) -> Iterator[slice]:
    """input (B, C, V) -> ranges of voxels."""
    B, C, V = input.shape
    size = max(1, (ELEMENTS if input.device.type == "cpu" else ELEMENTS_ON_DEVICE) // max(1, B * C))
    return (slice(begin, begin + size) for begin in range(0, V, size))
