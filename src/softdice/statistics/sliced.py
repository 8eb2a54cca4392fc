"""Every kind of pass by the definition, slice by slice of the voxels: bounded memory, no graph.

It serves what a device has no kernel for, and float64. A pass over single voxels holds a few times `ELEMENTS` numbers
beside the gradient; one over soft skeletons what autograd needs for a class of a sample; ranks some maps of a class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softdice.internals import recording
from softdice.statistics import check, reference
from softdice.statistics.request import Request, equals, result_dtype, result_shape, signed

ELEMENTS, ELEMENTS_ON_DEVICE = (1 << 15) - 1, 1 << 22
"""Numbers of the input in one slice: on a CPU so few that torch gives them to one thread (the last bits of its
exponentials depend on where a thread begins), elsewhere what is worth a launch."""
ALL = slice(None)


def forward(request: Request) -> Tensor:
    """Return what `reference.forward` does, without a graph."""
    input, s = request.input, request.settings
    if s.validate:
        for voxels in slices(input):
            check.values(request.cut(ALL, voxels))
    result = input.new_zeros(result_shape(request), dtype=result_dtype(input.dtype))
    if s.kind == "skeletons":
        for b, c, prob, true, weight_V in _classes(request, log_sum(input, s.activation)):
            result[:, b, c] = reference.centreline(prob, true, weight_V, s)[:, 0, 0]
        return result
    for voxels in slices(input):
        part = reference.forward(request.cut(ALL, voxels))
        if s.kind == "map":
            result[:, voxels] = part
        else:
            result += part
    return result


def gradient(grad: Tensor, request: Request) -> Tensor:
    """Return dL/dinput for dL/d(what `forward` returned); no map, whose gradient is that of the sums."""
    input, s = request.input, request.settings
    if s.kind == "skeletons":
        result = torch.empty_like(input, dtype=result_dtype(input.dtype))
        log_sum_BV = log_sum(input, s.activation)
        for b, c, prob, true, weight_V in _classes(request, log_sum_BV):
            with recording():
                prob = prob.requires_grad_()
                sums = reference.centreline(prob * (weight_V > 0), true, weight_V, s)
            result[b, c] = torch.autograd.grad(sums, prob, grad[:, b, c].view(4, 1, 1))[0].flatten()
        through_activation(result, input, log_sum_BV, s.activation)
        return result.to(input.dtype)
    result = torch.empty_like(input)
    for voxels in slices(input):
        with recording():
            part = request.cut(ALL, voxels)
            part = part._replace(input=part.input.detach().requires_grad_())
            sums = reference.forward(part)
        result[..., voxels] = torch.autograd.grad(sums, part.input, grad)[0] if sums.requires_grad else 0
    return result


def log_sum(input: Tensor, activation: str) -> Tensor:
    """Return ln sum_c exp x_c for a softmax, (B, V); else an empty tensor, (0, 0)."""
    if activation != "softmax":
        return input.new_empty((0, 0), dtype=result_dtype(input.dtype))
    result = torch.empty_like(input[:, 0], dtype=result_dtype(input.dtype))
    for voxels in slices(input):
        result[:, voxels] = input[..., voxels].to(result.dtype).logsumexp(1)
    return result


def through_activation(grad: Tensor, input: Tensor, log_sum_BV: Tensor, activation: str) -> None:
    """Turn dL/dp (B, C, V), 0 where a voxel does not count, into dL/dx in place."""
    for voxels in slices(input) if activation != "none" else ():
        value, slope = input[..., voxels].to(grad.dtype), grad[..., voxels]
        if activation == "softmax":
            p = (value - log_sum_BV[:, None, voxels]).exp_().nan_to_num_(0.0)  # torch's softmax uses all threads
            slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)
        else:
            p = value.sigmoid().nan_to_num_(0.0)
            slope.mul_(p * (1 - p))


def _classes(request: Request, log_sum_BV: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Yield sample, class, p, y and w, (1, 1, V), 0 where a voxel does not count."""
    input, target, weight, _, _, s = request
    B, C, V = input.shape
    first = 1 if C == 1 else 0
    for b in range(B):
        labels = signed(target[b])
        weight_V = input.new_ones((1, 1, V), dtype=result_dtype(input.dtype))
        if s.ignore_index is not None:
            weight_V = weight_V.masked_fill(equals(target[b], s.ignore_index), 0)
        if weight is not None:
            weight_V = weight_V * torch.where(weight[b] > 0, weight[b], 0).to(weight_V.dtype)
        for c in range(C):
            value = input[b, c].to(weight_V.dtype).view(1, 1, -1)
            if s.activation == "softmax":
                value = (value - log_sum_BV[b]).exp()
            elif s.activation == "sigmoid":
                value = value.sigmoid()
            true = (labels[c] if target.ndim == 3 else labels == c + first).to(value.dtype).view(1, 1, -1)
            value, true = (torch.where(weight_V > 0, x, 0.0) for x in (value, true))
            yield b, c, value.detach(), true, weight_V


def slices(input: Tensor) -> Iterator[slice]:
    """Yield ranges of voxels of an input (B, C, V)."""
    B, C, V = input.shape
    size = max(1, (ELEMENTS if input.device.type == "cpu" else ELEMENTS_ON_DEVICE) // max(1, B * C))
    return (slice(begin, begin + size) for begin in range(0, V, size))


# --- ranks


def ranks(request: Request) -> tuple[Tensor, Tensor]:
    """Return costs and voxels of each class, (2, P, C), and the steps of the loss, (B, C, V), for `ranks_gradient`."""
    input = request.input
    if request.settings.validate:
        check.values(request)
    steps = torch.empty_like(input, dtype=result_dtype(input.dtype))
    for b in range(len(input)):
        error, true = reference.errors(request.cut(slice(b, b + 1), ALL))
        steps[b] = torch.where(true, -error, error)[0]
    return rank_classes(steps, request, _rank), steps


def rank_classes(steps: Tensor, request: Request, rank: object) -> Tensor:
    """Rank the signed errors of every pool and class that is wanted; return costs and voxels, (2, P, C)."""
    s, C = request.settings, request.input.shape[1]
    result = steps.new_zeros(result_shape(request))
    for c in range(C):
        for pool, part in enumerate(steps[:, c].split(1) if s.per_sample else [steps[:, c]]):
            if (s.classes is not None and c not in s.classes) or not part.numel():
                part.zero_()
            else:
                result[0, pool, c], result[1, pool, c] = rank(part)  # type: ignore[operator]
    return result


def ranks_gradient(coef_BC: Tensor, steps: Tensor, request: Request) -> Tensor:
    """Return dL/dinput for dL/dcosts, using up the steps."""
    input = request.input
    if request.settings.activation != "softmax":
        return steps.mul_(coef_BC.unsqueeze(2)).to(input.dtype)
    result = steps if steps.dtype == input.dtype else torch.empty_like(input)
    for b in range(len(input)):
        with recording():
            part = request.cut(slice(b, b + 1), ALL)
            part = part._replace(input=part.input.detach().requires_grad_())
            error, _ = reference.errors(part)
        slope = steps[b : b + 1].abs() * coef_BC[b].unsqueeze(1)
        result[b] = torch.autograd.grad(error, part.input, slope)[0][0]
    return result


def _rank(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cost and the voxels of a class with signed errors (B, V), and put the steps in their place."""
    error, order = errors.abs().flatten().sort(descending=True, stable=True)
    of_class = errors.signbit().flatten()[order]
    F = of_class.cumsum(0).double()
    union = F[-1] + torch.arange(1, len(order) + 1, device=order.device) - F
    step = torch.where(of_class, 1 / union, (F[-1] - F) / (union * (union - 1).clamp_min(1)))
    step[:1].masked_fill_((F[-1] == 0), 1.0)
    cost = (error.double() * step).sum()
    signed_step = torch.where(of_class, -step, step).masked_fill_(error == 0, 0.0)
    errors.copy_(torch.empty_like(signed_step).scatter_(0, order, signed_step).view(errors.shape))
    return cost, F[-1]
