"""The definition of every kind of pass, in plain PyTorch.

This module is slow and clear on purpose. Every kernel must agree with it; it also serves where no kernel does: other
devices, double backward, function transforms, a target or weight that needs a gradient.

Shape suffixes: B sample, C class (or region), V voxel, P pool of samples.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from softdice.statistics.declared import STATISTICS
from softdice.statistics.request import Pass, Request, equals, outcomes, result_dtype, signed


def forward(request: Request) -> Tensor:
    """Return what a pass gives (`softdice.statistics.request.Pass`), on the autograd graph."""
    kind = request.settings.kind
    if kind == "sums":
        return statistics(request)
    if kind == "map":
        return cross_entropy(request)
    if kind == "ranks":
        costs, present = lovasz(request)
        return torch.stack([costs, present.to(costs.dtype)])
    return _mixed(request)


def statistics(request: Request) -> Tensor:
    """Return the sums over the voxels of each sample and class, (len(fields), B, C or R).

    The statistics are declared in `softdice.statistics.declared`; here each symbol of their terms is evaluated. Labels
    of a single class are 1 in the class; no weight is 1.
    """
    terms, weight_B1V, shape = _terms(request)
    return torch.stack([(terms[name] * weight_B1V).expand(shape).sum(-1) for name in request.settings.fields])


def cross_entropy(request: Request) -> Tensor:
    """Return the cross-entropy of each voxel, (B, V): the statistic of that name, summed over the classes."""
    terms, weight_B1V, _ = _terms(request)
    return (terms["cross_entropy"] * weight_B1V).sum(1)


def _terms(request: Request) -> tuple[dict[str, Any], Tensor, torch.Size]:
    """Return the terms of each voxel by statistic, without its weight; the weights; and the shape (B, C, V)."""
    input, target, weight, regions, voxel_map, settings = request
    wanted = [statistic for statistic in STATISTICS if statistic.name in settings.fields]
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV, weight_B1V = _weights(value_BCV, target, weight, settings.ignore_index)
    true_BCV = true_values(target, input.shape[1], value_BCV.dtype)
    if valid_BV is not None:  # a NaN at a voxel that does not count must not reach a sum
        value_BCV, true_BCV = (torch.where(valid_BV.unsqueeze(1), values, 0.0) for values in (value_BCV, true_BCV))
    if regions is not None:
        true_BCV = torch.stack([true_BCV.masked_fill(row, -torch.inf).amax(1) for row in ~regions.unsqueeze(-1)], dim=1)
    prob_BCV, minus_log_p_BCV, minus_log_q_BCV = probabilities(
        value_BCV, regions, settings.activation, any(statistic.names("a", "b") for statistic in wanted)
    )
    share = settings.label_smoothing / outcomes(input.shape[1], settings.activation)
    y = (1 - settings.label_smoothing) * true_BCV + share if settings.label_smoothing else true_BCV
    p, n = prob_BCV, 1 - y
    symbols = {"p": p, "y": y, "n": n, "t": true_BCV, "a": 0.0, "b": 0.0}
    if voxel_map is not None:
        map_BCV = voxel_map.to(p.dtype)
        symbols["m"] = map_BCV if valid_BV is None else torch.where(valid_BV.unsqueeze(1), map_BCV, 0.0)
    if minus_log_p_BCV is not None:
        symbols["a"] = torch.where(y == 0, 0.0, minus_log_p_BCV)
    if minus_log_q_BCV is not None:
        symbols["b"] = torch.where(n == 0, 0.0, minus_log_q_BCV)
    if any(statistic.names("q", "u", "v") for statistic in wanted):
        q = _sigmoid(-value_BCV) if settings.activation == "sigmoid" else (1 - p).clamp_min(0)
        symbols.update(q=q, u=_power(q, settings.gamma), v=_power(p, settings.gamma))
    if any(statistic.names("d") for statistic in wanted):
        symbols["d"] = (p - y) ** 2 if settings.power == 2 else _power((p - y).abs(), settings.power)
    return {statistic.name: statistic.value(**symbols) for statistic in wanted}, weight_B1V, y.shape


def lovasz(request: Request) -> tuple[Tensor, Tensor]:
    """Return the Lovasz extension of each class's Jaccard loss, and whether it has a voxel, (P, C) each.

        sum_i e_(i) (J_i - J_(i-1)),    J_i = 1 - (G - F_i) / (G + N_i)

    over the voxels of a pool in the order of their errors e, the largest first: of the first i, F_i are of the class
    and N_i are not, and G voxels are of the class altogether. Among equal errors the first goes first. A pool is the
    batch, or with `settings.per_sample` one sample. Weights and values of a target are 0 or 1.
    """
    error_PCV, true_PCV = errors(request)
    if not request.settings.per_sample:
        error_PCV, true_PCV = (values.transpose(0, 1).flatten(1).unsqueeze(0) for values in (error_PCV, true_PCV))
    order = error_PCV.detach().argsort(dim=-1, descending=True, stable=True)
    ranked, of_class = error_PCV.gather(-1, order), true_PCV.gather(-1, order).double()
    missing = of_class.sum(-1, keepdim=True) - of_class.cumsum(-1)
    jaccard = 1 - missing / (of_class.sum(-1, keepdim=True) + (1 - of_class).cumsum(-1))
    steps = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], -1)
    return (ranked * steps.to(ranked.dtype)).sum(-1), true_PCV.any(-1)


def errors(request: Request) -> tuple[Tensor, Tensor]:
    """Return abs(y - p), for a sigmoid the hinge max(0, 1 - (2 y - 1) x), and y, both (B, C, V).

    A voxel that does not count has the error 0, and is in no class: the last rank, which changes no other.
    """
    input, target, weight, _, _, settings = request
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV, _ = _weights(value_BCV, target, weight, settings.ignore_index)
    true_BCV = true_values(target, input.shape[1], value_BCV.dtype) > 0.5
    if valid_BV is not None:
        value_BCV, true_BCV = torch.where(valid_BV.unsqueeze(1), value_BCV, 0.0), true_BCV & valid_BV.unsqueeze(1)
    if settings.activation == "sigmoid":
        error_BCV = (1 + torch.where(true_BCV, -value_BCV, value_BCV)).relu()
    else:
        p, _, _ = probabilities(value_BCV, None, settings.activation, False)
        error_BCV = torch.where(true_BCV, 1 - p, p).relu()
    return (error_BCV if valid_BV is None else torch.where(valid_BV.unsqueeze(1), error_BCV, 0.0)), true_BCV


def _mixed(request: Request) -> Tensor:
    """Return the sums of the passes in which classes (confusion) or voxels (skeletons) meet others."""
    input, target, weight, _, _, settings = request
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV, weight_B1V = _weights(value_BCV, target, weight, settings.ignore_index)
    true_BCV = true_values(target, input.shape[1], value_BCV.dtype)
    if valid_BV is not None:
        value_BCV = torch.where(valid_BV.unsqueeze(1), value_BCV, 0.0)
    prob_BCV, _, _ = probabilities(value_BCV, None, settings.activation, False)
    if settings.kind == "confusion":
        return torch.stack([(row_B1V * prob_BCV).sum(-1) for row_B1V in (true_BCV * weight_B1V).split(1, 1)])
    if valid_BV is not None:
        prob_BCV, true_BCV = (torch.where(valid_BV.unsqueeze(1), x, 0.0) for x in (prob_BCV, true_BCV))
    return centreline(prob_BCV, true_BCV, weight_B1V, settings)


def centreline(prob_BCV: Tensor, true_BCV: Tensor, weight_B1V: Tensor, settings: Pass) -> Tensor:
    """Return the sums of soft skeletons, (4, B, C), for p and y that are 0 where a voxel does not count.

    Source: S. Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation",
    CVPR 2021, algorithm 2.
    """
    assert settings.shape is not None
    shape = (*prob_BCV.shape[:2], *settings.shape)
    of_prob, of_true = (soft_skeleton(x.reshape(shape), settings.iterations).flatten(2) for x in (prob_BCV, true_BCV))
    terms = of_prob * true_BCV, of_prob, of_true * prob_BCV, of_true
    return torch.stack([(weight_B1V * term).sum(-1) for term in terms])


def soft_skeleton(x: Tensor, iterations: int) -> Tensor:
    """Return the soft skeleton of values in [0, 1], (B, C, H, W) or (B, C, D, H, W): what each opening takes away."""
    rank = x.ndim - 2
    pool = torch.nn.functional.max_pool2d if rank == 2 else torch.nn.functional.max_pool3d
    windows = [tuple(3 if i == axis else 1 for i in range(rank)) for axis in range(rank)]
    skeleton = torch.zeros_like(x)
    for level in range(iterations + 1):
        least = [-pool(-x, window, 1, tuple(size // 2 for size in window)) for window in windows]
        eroded = reduce(torch.minimum, least)
        rest = (x - pool(eroded, 3, 1, 1)).relu()
        skeleton = rest if level == 0 else skeleton + (rest - skeleton * rest).relu()
        x = eroded
    return skeleton


def _weights(
    value_BCV: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None
) -> tuple[Tensor | None, Tensor]:
    """Return which voxels count (None: all of them), and the weight of each."""
    valid_BV = None if ignore_index is None else ~equals(target, ignore_index)
    if weight is not None:
        valid_BV = weight > 0 if valid_BV is None else valid_BV & (weight > 0)
    weight_BV = torch.ones_like(value_BCV[:, 0]) if valid_BV is None else valid_BV.to(value_BCV.dtype)
    if weight is not None:
        weight_BV = weight_BV * torch.where(weight > 0, weight, 0).to(value_BCV.dtype)
    return valid_BV, weight_BV.unsqueeze(1)


def probabilities(
    value_BCV: Tensor, regions: Tensor | None, activation: str, logs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return p of classes or regions; with `logs` also -ln p and, for a sigmoid, -ln(1 - p)."""
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
    most_B1V = value_BCV.detach().amax(1, keepdim=True)
    away_BCV = value_BCV - torch.where(most_B1V.isfinite(), most_B1V, 0.0)
    parts = [_logsumexp(away_BCV.masked_fill(row, -torch.inf)) for row in ~regions.unsqueeze(-1)]
    return prob_BCV, (_logsumexp(away_BCV).unsqueeze(1) - torch.stack(parts, dim=1)), None


def _sigmoid(value: Tensor) -> Tensor:
    """Return 1 / (1 + e^-x) from the smaller of p and 1 - p, so p (1 - p), its slope, is not 0 where p rounds to 1."""
    small = torch.where(value >= 0, -value, value).sigmoid()
    return torch.where(value >= 0, 1 - small, small)


def _logsumexp(value_BCV: Tensor) -> Tensor:
    """Return the logsumexp over classes, (B, V); -inf with a gradient of 0 where all classes are -inf (torch: nan)."""
    off_BV = value_BCV.detach().amax(1).isneginf()
    return torch.where(off_BV.unsqueeze(1), 0.0, value_BCV).logsumexp(1).masked_fill(off_BV, -torch.inf)


def true_values(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return y, (B, C, V), for labels or per-class values."""
    if target.ndim == 3:
        return target.to(dtype)
    first = 1 if num_classes == 1 else 0  # a single class is the mask of ones
    labels_C = torch.arange(first, first + num_classes, device=target.device).view(1, -1, 1)
    return (signed(target).unsqueeze(1) == labels_C).to(dtype)


def _power(base: Tensor, exponent: float) -> Tensor:
    """Return base^exponent for base >= 0 (rounding aside), with finite derivatives at 0."""
    if exponent in (0, 1, 2):
        return base**exponent
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** exponent
