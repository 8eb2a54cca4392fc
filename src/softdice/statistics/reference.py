"""The definition of every kind of pass, in plain PyTorch.

This module is slow and clear on purpose. Every kernel must agree with it; it also serves where no kernel does: other
devices, double backward, function transforms, a target or weight that needs a gradient. Requests come checked
(`softdice.statistics.check`), and nothing here raises.

Shape suffixes: B sample, C class (with regions: region), V voxel, P pool of samples, N voxel of a pool, 1 an axis of
length 1. Letters as in `declared`: p the probability, y the target after label smoothing. `Request.counted` says which
voxels count.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdice.statistics.declared import STATISTICS
from softdice.statistics.request import Pass, Request, outcomes, result_dtype, signed


def forward(request: Request) -> Tensor:
    """Return the result of the pass that the request asks for, on the autograd graph; the kind sets its shape."""
    kind = request.settings.kind
    if kind == "sums":
        return statistics(request)  # (len(fields), B, C)
    if kind == "map":
        return cross_entropy(request)  # (B, V)
    if kind == "ranks":
        cost_PC, present_PC = lovasz(request)
        return torch.stack([cost_PC, present_PC.to(cost_PC.dtype)])  # (2, P, C)
    return confusion(request) if kind == "confusion" else skeletons(request)  # (C, B, C) or (4, B, C)


class _Voxels(NamedTuple):
    """The tensors of a request in the dtype of results, with 0 where a voxel does not count."""

    value: Tensor  # (B, C, V), logits or probabilities
    true: Tensor  # (B, C, V), the target before label smoothing
    counted: Tensor | None  # (B, 1, V) bool, whether the voxel counts; None: all do
    weight: Tensor  # (B, 1, V), 1 without weights


def _voxels(request: Request) -> _Voxels:
    """Return the logits or probabilities and the target, 0 where a voxel does not count, with mask and weights."""
    input, target = request.input, request.target
    value_BCV = input.to(result_dtype(input.dtype))
    true_BCV = true_values(target, input.shape[1], value_BCV.dtype)
    counted_B1V, weight_B1V = weights(request)
    return _Voxels(_zeroed(value_BCV, counted_B1V), _zeroed(true_BCV, counted_B1V), counted_B1V, weight_B1V)


def weights(request: Request) -> tuple[Tensor | None, Tensor]:
    """Return (which voxels count, (B, 1, V) bool or None for all; their weights, (B, 1, V), 0 for the others)."""
    input, weight, counted_BV = request.input, request.weight, request.counted
    if counted_BV is None:
        return None, torch.ones_like(input[:, :1], dtype=result_dtype(input.dtype))
    weight_BV = counted_BV.to(result_dtype(input.dtype))
    if weight is not None:
        weight_BV = weight_BV * torch.where(weight > 0, weight, 0).to(weight_BV.dtype)
    return counted_BV.unsqueeze(1), weight_BV.unsqueeze(1)


def _zeroed(values_BCV: Tensor, counted_B1V: Tensor | None) -> Tensor:
    """Return the values with 0 where a voxel does not count, a mask as in `_Voxels`: a NaN there must reach no sum."""
    return values_BCV if counted_B1V is None else torch.where(counted_B1V, values_BCV, 0.0)


def statistics(request: Request) -> Tensor:
    """Return the sums over the voxels of each sample and class, (len(fields), B, C or R), in the order of `fields`."""
    terms, weight_B1V, shape = _terms(request)
    return torch.stack([(terms[name] * weight_B1V).expand(shape).sum(-1) for name in request.settings.fields])


def cross_entropy(request: Request) -> Tensor:
    """Return the cross-entropy of each voxel, (B, V): the statistic of that name, summed over the classes."""
    terms, weight_B1V, _ = _terms(request)
    return (terms["cross_entropy"] * weight_B1V).sum(1)


def _terms(request: Request) -> tuple[dict[str, Any], Tensor, torch.Size]:
    """Evaluate the terms of the wanted statistics at every voxel, such as "p * y" for the intersection.

    Return (terms, weights, shape): the terms by name of the statistic, not yet weighted, each (B, C, V) or what
    broadcasts to it (1 for `voxels`); the weights, (B, 1, V); and the shape (B, C, V), or (B, R, V) with regions.
    A symbol of a term is computed only if a wanted statistic names it.
    """
    regions, voxel_map, settings = request.regions, request.voxel_map, request.settings
    wanted = [statistic for statistic in STATISTICS if statistic.name in settings.fields]
    voxels = _voxels(request)
    value_BCV, true_BCV = voxels.value, voxels.true
    if regions is not None:  # the largest value of the classes in it: for labels their union
        outside_RC1 = ~regions.unsqueeze(-1)
        true_BCV = torch.stack([true_BCV.masked_fill(row_C1, -torch.inf).amax(1) for row_C1 in outside_RC1], dim=1)
    p, minus_log_p_BCV, minus_log_q_BCV = probabilities(
        value_BCV, regions, settings.activation, any(statistic.names("a", "b") for statistic in wanted)
    )
    share = settings.label_smoothing / outcomes(request.input.shape[1], settings.activation)
    y = (1 - settings.label_smoothing) * true_BCV + share if settings.label_smoothing else true_BCV
    n = 1 - y
    # further symbols: a = -ln p, b = -ln q, u = q^gamma, v = p^gamma with q = 1 - p; d = abs(p - y)^power; m the map
    symbols = {"p": p, "y": y, "n": n, "t": true_BCV, "a": 0.0, "b": 0.0}
    if voxel_map is not None:
        symbols["m"] = _zeroed(voxel_map.to(p.dtype), voxels.counted)
    if minus_log_p_BCV is not None:
        symbols["a"] = torch.where(y == 0, 0.0, minus_log_p_BCV)
    if minus_log_q_BCV is not None:
        symbols["b"] = torch.where(n == 0, 0.0, minus_log_q_BCV)
    if any(statistic.names("q", "u", "v") for statistic in wanted):
        q = _sigmoid(-value_BCV) if settings.activation == "sigmoid" else (1 - p).clamp_min(0)
        symbols.update(q=q, u=power(q, settings.gamma), v=power(p, settings.gamma))
    if any(statistic.names("d") for statistic in wanted):
        symbols["d"] = (p - y) ** 2 if settings.power == 2 else power((p - y).abs(), settings.power)
    return {statistic.name: statistic.value(**symbols) for statistic in wanted}, voxels.weight, y.shape


def lovasz(request: Request) -> tuple[Tensor, Tensor]:
    """Return the Lovasz extension of each class's Jaccard loss, and whether it has a voxel, (P, C) each.

        sum_i e_(i) (J_i - J_(i-1)),    J_i = 1 - (G - F_i) / (G + N_i)

    over the voxels of a pool in the order of their errors e, the largest first: of the first i, F_i are of the class
    and N_i are not, and G voxels are of the class altogether. Among equal errors the first goes first. A pool is the
    batch, or with `settings.per_sample` one sample. Weights and values of a target are 0 or 1.
    """
    error_PCN, true_PCN = errors(request)
    if not request.settings.per_sample:  # one pool of all voxels: (B, C, V) to (1, C, B V)
        error_PCN, true_PCN = (values.transpose(0, 1).flatten(1).unsqueeze(0) for values in (error_PCN, true_PCN))
    order_PCN = error_PCN.detach().argsort(dim=-1, descending=True, stable=True)
    ranked_PCN, of_class_PCN = error_PCN.gather(-1, order_PCN), true_PCN.gather(-1, order_PCN).double()
    total_PC1 = of_class_PCN.sum(-1, keepdim=True)
    missing_PCN = total_PC1 - of_class_PCN.cumsum(-1)
    jaccard_PCN = 1 - missing_PCN / (total_PC1 + (1 - of_class_PCN).cumsum(-1))
    step_PCN = torch.cat([jaccard_PCN[..., :1], jaccard_PCN[..., 1:] - jaccard_PCN[..., :-1]], -1)
    return (ranked_PCN * step_PCN.to(ranked_PCN.dtype)).sum(-1), true_PCN.any(-1)


def errors(request: Request) -> tuple[Tensor, Tensor]:
    """Return the error of each voxel and class, and whether the voxel is of the class (bool), (B, C, V) each.

        abs(y - p), for a sigmoid the hinge max(0, 1 - (2 y - 1) x) of the logit x

    Here y is 1 where the target is above 1/2, else 0, without smoothing. The Lovasz extension sorts these errors. A
    voxel that does not count has the error 0 and is in no class (`_voxels` made its target 0): so it ranks last, where
    it changes nothing.
    """
    voxels, activation = _voxels(request), request.settings.activation
    true_BCV = voxels.true > 0.5
    if activation == "sigmoid":
        error_BCV = (1 + torch.where(true_BCV, -voxels.value, voxels.value)).relu()
    else:
        p, _, _ = probabilities(voxels.value, None, activation, False)
        error_BCV = torch.where(true_BCV, 1 - p, p).relu()  # p may leave [0, 1] by rounding
    return _zeroed(error_BCV, voxels.counted), true_BCV


def confusion(request: Request) -> Tensor:
    """Return the soft confusion matrices, (C, B, C): for each label the sums of w p over the voxels that have it."""
    voxels = _voxels(request)
    prob_BCV, _, _ = probabilities(voxels.value, None, request.settings.activation, False)
    of_label = (voxels.true * voxels.weight).split(1, 1)  # C tensors (B, 1, V)
    return torch.stack([(weight_B1V * prob_BCV).sum(-1) for weight_B1V in of_label])


def skeletons(request: Request) -> Tensor:
    """Return the four sums of soft skeletons, (4, B, C), as `centreline` lists them."""
    voxels = _voxels(request)
    prob_BCV, _, _ = probabilities(voxels.value, None, request.settings.activation, False)
    return centreline(_zeroed(prob_BCV, voxels.counted), voxels.true, voxels.weight, request.settings)


def centreline(prob_BCV: Tensor, true_BCV: Tensor, weight_B1V: Tensor, settings: Pass) -> Tensor:
    """Return sum w S(p) y, sum w S(p), sum w S(y) p and sum w S(y), (4, B, C), with S the soft skeleton.

    p and y are 0 where a voxel does not count. The settings hold the shape *S of the volume and the erosions.

    Source: S. Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation",
    CVPR 2021, algorithm 2.
    """
    assert settings.shape is not None
    shape = (*prob_BCV.shape[:2], *settings.shape)
    of_prob, of_true = (soft_skeleton(x.reshape(shape), settings.iterations).flatten(2) for x in (prob_BCV, true_BCV))
    terms = of_prob * true_BCV, of_prob, of_true * prob_BCV, of_true
    return torch.stack([(weight_B1V * term).sum(-1) for term in terms])


def soft_skeleton(x: Tensor, iterations: int) -> Tensor:
    """Return the soft skeleton of values in [0, 1], (B, C, H, W) or (B, C, D, H, W): what each opening takes away.

        E_0 = x,    E_(k+1) = erosion of E_k,    d_k = relu(E_k - dilation of E_(k+1))
        S_0 = d_0,  S_k = S_(k-1) + relu(d_k - S_(k-1) d_k),    the skeleton is S_iterations

    with iterations >= 0, the number of erosions. An erosion takes the least of 3 voxels in a row along each axis, a
    dilation the largest of all 3 x 3 (x 3); windows end at the border.
    """
    rank = x.ndim - 2
    max_pool = torch.nn.functional.max_pool2d if rank == 2 else torch.nn.functional.max_pool3d
    windows = [tuple(3 if i == axis else 1 for i in range(rank)) for axis in range(rank)]
    skeleton = torch.zeros_like(x)
    for level in range(iterations + 1):
        minima = [-max_pool(-x, window, 1, tuple(size // 2 for size in window)) for window in windows]
        eroded = reduce(torch.minimum, minima)
        ridge = (x - max_pool(eroded, 3, 1, 1)).relu()
        skeleton = ridge if level == 0 else skeleton + (ridge - skeleton * ridge).relu()
        x = eroded
    return skeleton


def probabilities(
    value_BCV: Tensor, regions: Tensor | None, activation: str, logs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return p, -ln p and -ln(1 - p) of classes, (B, C, V), or regions, (B, R, V), without cancellation.

    value_BCV: logits, or probabilities for the activation "none". regions: (R, C) bool; None with a sigmoid. Without
    `logs` the logarithms are None, and -ln(1 - p) is computed for a sigmoid alone.
    """
    if activation == "sigmoid":
        logsigmoid = torch.nn.functional.logsigmoid
        prob_BCV = _sigmoid(value_BCV)
        return (prob_BCV, -logsigmoid(value_BCV), -logsigmoid(-value_BCV)) if logs else (prob_BCV, None, None)
    prob_BCV = value_BCV.softmax(1) if activation == "softmax" else value_BCV
    if regions is not None:
        prob_BCV = torch.einsum("rc,bcv->brv", regions.to(prob_BCV.dtype), prob_BCV)
    if not logs:
        return prob_BCV, None, None
    if activation == "none":
        return prob_BCV, -prob_BCV.clamp_min(torch.finfo(prob_BCV.dtype).tiny).log(), None
    if regions is None:
        return prob_BCV, -value_BCV.log_softmax(1), None
    # for a union the difference of two logsumexps: the logarithm of a sum of p would end where p underflows
    largest_B1V = value_BCV.detach().amax(1, keepdim=True)
    shifted_BCV = value_BCV - torch.where(largest_B1V.isfinite(), largest_B1V, 0.0)
    of_regions = [_logsumexp(shifted_BCV.masked_fill(outside_C1, -torch.inf)) for outside_C1 in ~regions.unsqueeze(-1)]
    return prob_BCV, (_logsumexp(shifted_BCV).unsqueeze(1) - torch.stack(of_regions, dim=1)), None


def _sigmoid(value: Tensor) -> Tensor:
    """Return p = 1 / (1 + e^-x), made from the smaller of p and 1 - p: its gradient is not 0 where p rounds to 1."""
    small = torch.where(value >= 0, -value, value).sigmoid()
    return torch.where(value >= 0, 1 - small, small)


def _logsumexp(value_BCV: Tensor) -> Tensor:
    """Return the logsumexp over classes, (B, V); -inf with a gradient of 0 where all classes are -inf (torch: nan)."""
    all_infinite_BV = value_BCV.detach().amax(1).isneginf()
    finite_BCV = torch.where(all_infinite_BV.unsqueeze(1), 0.0, value_BCV)
    return finite_BCV.logsumexp(1).masked_fill(all_infinite_BV, -torch.inf)


def true_values(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return the target as numbers, (B, C, V): labels (B, V) one-hot, per-class values (B, C, V) converted.

    A label outside [0, C), as ignore_index may be, is in no class. With C = 1 the class has the label 1.
    """
    if target.ndim == 3:
        return target.to(dtype)
    first = 1 if num_classes == 1 else 0
    labels_C = torch.arange(first, first + num_classes, device=target.device).view(1, -1, 1)
    return (signed(target).unsqueeze(1) == labels_C).to(dtype)


def power(base: Tensor, exponent: float) -> Tensor:
    """Return base^exponent for base >= 0 (rounding aside), with finite derivatives at 0."""
    if exponent in (0, 1, 2):
        return base**exponent
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** exponent
