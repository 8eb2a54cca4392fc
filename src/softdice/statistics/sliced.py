"""Every kind of pass by the definition, slice by slice of the voxels: bounded memory, no graph.

It serves where a device has no kernel, and for float64. Memory beside the gradient: for skeletons, what autograd keeps
for one class of one sample; for ranks, some maps of a class; for other kinds, a few times `ELEMENTS` numbers.

Requests come checked in shape and dtype. Shape suffixes: B sample, C class, V voxel, P pool (the batch, or with
`per_sample` a sample), N voxel of a pool, 1 an axis of length 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from softdice.internals import recording
from softdice.statistics import check, reference
from softdice.statistics.request import Request, result_dtype, result_shape, signed

ELEMENTS, ELEMENTS_ON_DEVICE = (1 << 15) - 1, 1 << 22
"""Most numbers of the input in one slice. On a CPU they are so few that torch gives them to one thread (the last bits
of its exponentials depend on where a thread begins), on other devices so many that a launch pays."""
ALL = slice(None)


def forward(request: Request) -> Tensor:
    """Return the result of a pass, (rows, B, C or R), or (B, V) for a map, without a graph; not for the kind "ranks".

    Raise ValueError, by `check.values`, if the request asks for validation and a value is out of range.
    """
    input, s = request.input, request.settings
    if s.validate:
        for voxels in slices(input):
            check.values(request.cut(ALL, voxels))
    result = input.new_zeros(result_shape(request), dtype=result_dtype(input.dtype))
    if s.kind == "skeletons":
        for b, c, prob_11V, true_11V, weight_11V in _classes(request, log_sum(input, s.activation)):
            result[:, b, c] = reference.centreline(prob_11V, true_11V, weight_11V, s)[:, 0, 0]
        return result
    for voxels in slices(input):
        part = reference.forward(request.cut(ALL, voxels))
        if s.kind == "map":
            result[:, voxels] = part
        else:
            result += part
    return result


def gradient(grad: Tensor, request: Request) -> Tensor:
    """Return dL/dinput, (B, C, V) in the dtype of input, for all kinds except map and ranks.

    grad: dL/d(result of `forward` for this request), shaped as that.
    """
    if request.settings.kind == "skeletons":
        return _skeleton_gradient(grad, request)
    result = torch.empty_like(request.input)
    for voxels in slices(request.input):
        with recording():
            part = request.cut(ALL, voxels)
            part = part._replace(input=part.input.detach().requires_grad_())
            sums = reference.forward(part)
        # statistics of the target alone have no graph
        result[..., voxels] = torch.autograd.grad(sums, part.input, grad)[0] if sums.requires_grad else 0
    return result


def _skeleton_gradient(grad_4BC: Tensor, request: Request) -> Tensor:
    """Return dL/dinput, (B, C, V) in its dtype, for skeletons: first dL/dp class by class, then dL/dx for all.

    grad_4BC: dL/d(the four sums), in the order of `reference.centreline`.
    """
    input, s = request.input, request.settings
    result_BCV = torch.empty_like(input, dtype=result_dtype(input.dtype))
    log_sum_BV = log_sum(input, s.activation)
    for b, c, prob_11V, true_11V, weight_11V in _classes(request, log_sum_BV):
        with recording():
            prob_11V = prob_11V.requires_grad_()
            # times the mask, so that a voxel that does not count gets a gradient of 0, although its neighbours read it
            sums_411 = reference.centreline(prob_11V * (weight_11V > 0), true_11V, weight_11V, s)
        result_BCV[b, c] = torch.autograd.grad(sums_411, prob_11V, grad_4BC[:, b, c].view(4, 1, 1))[0].flatten()
    through_activation(result_BCV, input, log_sum_BV, s.activation)
    return result_BCV.to(input.dtype)


def log_sum(input: Tensor, activation: str) -> Tensor:
    """Return ln sum_c exp x_c, (B, V) in the dtype of results, for a softmax of x (B, C, V), else an empty tensor."""
    if activation != "softmax":
        return input.new_empty((0, 0), dtype=result_dtype(input.dtype))
    result = torch.empty_like(input[:, 0], dtype=result_dtype(input.dtype))
    for voxels in slices(input):
        result[:, voxels] = input[..., voxels].to(result.dtype).logsumexp(1)
    return result


def through_activation(grad: Tensor, input: Tensor, log_sum_BV: Tensor, activation: str) -> None:
    """Turn dL/dp into dL/dx, in place, slice by slice.

        softmax:  dL/dx_c = p_c (dL/dp_c - sum_k p_k dL/dp_k)        sigmoid:  dL/dx = dL/dp p (1 - p)

    grad: dL/dp, (B, C, V) in the dtype of results; 0 where a voxel does not count, where the input x, (B, C, V), may be
    NaN. log_sum_BV: from `log_sum` for x. The activation "none" leaves grad as it is.
    """
    for voxels in slices(input) if activation != "none" else ():
        value, slope = input[..., voxels].to(grad.dtype), grad[..., voxels]
        if activation == "softmax":  # by hand: torch's softmax would use all threads, see `ELEMENTS`
            p = (value - log_sum_BV[:, None, voxels]).exp_().nan_to_num_(0.0)
            slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)
        else:
            p = value.sigmoid().nan_to_num_(0.0)
            slope.mul_(p * (1 - p))


def _classes(request: Request, log_sum_BV: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Yield b, c, and probability, target and weight of the voxels, (1, 1, V) each, for each class c of each sample b.

    They are detached, and 0 where a voxel does not count. log_sum_BV: ln sum_c exp x_c, from `log_sum`.
    """
    input, target, activation = request.input, request.target, request.settings.activation
    B, C, _ = input.shape
    first_label = 1 if C == 1 else 0
    for b in range(B):
        target_V = signed(target[b])  # (C, V) for per-class values
        _, weight_11V = reference.weights(request.cut(slice(b, b + 1), ALL))
        for c in range(C):
            prob_11V = input[b, c].to(weight_11V.dtype).view(1, 1, -1)
            if activation == "softmax":
                prob_11V = (prob_11V - log_sum_BV[b]).exp()
            elif activation == "sigmoid":
                prob_11V = prob_11V.sigmoid()
            true_V = target_V == c + first_label if request.hard else target_V[c]
            true_11V = true_V.to(prob_11V.dtype).view(1, 1, -1)
            prob_11V, true_11V = (torch.where(weight_11V > 0, x, 0.0) for x in (prob_11V, true_11V))
            yield b, c, prob_11V.detach(), true_11V, weight_11V


def slices(input: Tensor) -> Iterator[slice]:
    """Return ranges of voxels, as slices, that cut an input (B, C, V) into parts of at most `ELEMENTS` numbers."""
    B, C, V = input.shape
    size = max(1, (ELEMENTS if input.device.type == "cpu" else ELEMENTS_ON_DEVICE) // max(1, B * C))
    return (slice(begin, begin + size) for begin in range(0, V, size))


# --- ranks: errors are signed, negative (-0.0 too) at the voxels of the class. Ranking puts "steps" in their place: the
# derivative of the class's cost by p, or by x for a sigmoid, which the backward pass needs

_Rank = Callable[[Tensor], tuple[Tensor | float, Tensor | int]]
"""Ranks the signed errors of one class and pool, (1 or B, V), in place, and returns its cost and its voxels."""


def ranks(request: Request) -> tuple[Tensor, Tensor]:
    """Return cost and number of voxels of each class, (2, P, C), and d(cost)/d(error) of each voxel, (B, C, V).

    The latter, the "steps", are negative at the voxels of the class.

    Raise ValueError, by `check.values`, if the request asks for validation and a value is out of range.
    """
    input = request.input
    if request.settings.validate:
        check.values(request)
    errors_BCV = torch.empty_like(input, dtype=result_dtype(input.dtype))
    for b in range(len(input)):
        error_1CV, true_1CV = reference.errors(request.cut(slice(b, b + 1), ALL))
        errors_BCV[b] = torch.where(true_1CV, -error_1CV, error_1CV)[0]
    return rank_classes(errors_BCV, request, _rank), errors_BCV


def rank_classes(errors_BCV: Tensor, request: Request, rank: _Rank) -> Tensor:
    """Rank the errors of each pool and class by `rank`; return cost and number of voxels of each, (2, P, C).

    errors_BCV: negative at the voxels of the class; overwritten by the steps, d(cost)/d(error) with the same sign. All
    results are 0 for a class that `settings.classes` leaves out.
    """
    s, C = request.settings, request.input.shape[1]
    result = errors_BCV.new_zeros(result_shape(request))
    for c in range(C):
        for pool, part in enumerate(errors_BCV[:, c].split(1) if s.per_sample else [errors_BCV[:, c]]):
            if (s.classes is not None and c not in s.classes) or not part.numel():
                part.zero_()
            else:
                result[0, pool, c], result[1, pool, c] = rank(part)
    return result


def ranks_gradient(coef_BC: Tensor, steps: Tensor, request: Request) -> Tensor:
    """Return dL/dinput of costs by rank, (B, C, V) in its dtype.

    Args:
        coef_BC: dL/d(cost) of each class, for the pool that the sample is in.
        steps: (B, C, V), from `ranks` for the same request: d(cost)/d(error) of each voxel, negative at the voxels of
            the class. There the error falls as the input rises, so this is d(cost)/dinput unless a softmax lies
            between. May be overwritten and returned.
    """
    input = request.input
    if request.settings.activation != "softmax":
        return steps.mul_(coef_BC.unsqueeze(2)).to(input.dtype)
    result = steps if steps.dtype == input.dtype else torch.empty_like(input)
    for b in range(len(input)):
        with recording():
            part = request.cut(slice(b, b + 1), ALL)
            part = part._replace(input=part.input.detach().requires_grad_())
            error_1CV, _ = reference.errors(part)
        # abs: autograd's d(error)/dinput has the sign that the steps stand for
        slope_1CV = steps[b : b + 1].abs() * coef_BC[b].unsqueeze(1)
        result[b] = torch.autograd.grad(error_1CV, part.input, slope_1CV)[0][0]
    return result


def _rank(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Rank the errors of one class and pool, (1 or B, V), negative in the class; return cost and number of its voxels.

    Overwrite the errors by the steps, d(cost)/d(error) with the same sign.
    G voxels are of the class, F_i of them among the i largest errors. With J as in `reference.lovasz` and the union
    U_i = G + i - F_i, the step J_i - J_(i-1) is 1 / U_i for a voxel of the class, else (G - F_i) / (U_i (U_i - 1)).
    """
    error_N, order_N = errors.abs().flatten().sort(descending=True, stable=True)
    of_class_N = errors.signbit().flatten()[order_N]
    F_N = of_class_N.cumsum(0).double()
    G = F_N[-1]
    union_N = G + torch.arange(1, len(order_N) + 1, device=order_N.device) - F_N
    step_N = torch.where(of_class_N, 1 / union_N, (G - F_N) / (union_N * (union_N - 1).clamp_min(1)))
    step_N[:1].masked_fill_(G == 0, 1.0)  # an absent class costs its largest error
    cost = (error_N.double() * step_N).sum()
    signed_step_N = torch.where(of_class_N, -step_N, step_N).masked_fill_(error_N == 0, 0.0)
    errors.copy_(torch.empty_like(signed_step_N).scatter_(0, order_N, signed_step_N).view(errors.shape))
    return cost, G
