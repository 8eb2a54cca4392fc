"""input, target -> statistics: the definition, in plain PyTorch.

This module is slow and clear on purpose. Every kernel must agree with it; it also serves where no kernel does: other
devices, double backward, function transforms, a target or weight that needs a gradient.

Shape suffixes: B sample, C class (or region), V voxel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from softdice.settings import CENTRELINE, CONFUSION, Pass, Voxels
from softdice.terms import STATISTICS


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the input -> dtype of its statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """device -> a context in which products have the dtype of their factors; some, such as meta, have no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def outcomes(num_classes: int, activation: str) -> int:
    """classes, activation -> K, the outcomes that label smoothing spreads its share over.

    Classes that exclude each other are C outcomes; a class decided by itself (a sigmoid, a single mask) has two.
    """
    return 2 if activation == "sigmoid" or num_classes == 1 else num_classes


def equals(labels: Tensor, value: int) -> Tensor:
    """labels, number -> where they are equal; a number that the dtype cannot hold equals none of them.

    torch would wrap it round: `torch.tensor([255], dtype=torch.uint8) == -1` is true.
    """
    limits = torch.iinfo(torch.uint8 if labels.dtype == torch.bool else labels.dtype)
    if limits.min <= value <= limits.max:
        return signed(labels) == (value if value < 2**63 else value - 2**64)
    return torch.zeros_like(labels, dtype=torch.bool)


def signed(labels: Tensor) -> Tensor:
    """labels -> the same in a dtype that torch can compare; those from 2^63 on become negative."""
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
    return labels.to(wider[labels.dtype]) if labels.dtype in wider else labels


def statistics(given: Voxels, settings: Pass) -> Tensor:
    """input, target -> the sums over the voxels of each sample and class, (len(fields), B, C).

    For the fields CONFUSION, (C, B, C): row l is sum_v w y_l p_c, the probabilities of the voxels of label l.

    The statistics are declared in `softdice.terms`; here each symbol of their terms is worked out.

    Args:
        given: the tensors; labels of C = 1 are 1 in the class, no weight is 1. With regions, C above reads R.
        settings: the statistics wanted, the activation, and the exponents; `settings.regions` is in `given.regions`.
    """
    if settings.fields in (CONFUSION, CENTRELINE):
        return _mixed(given, settings)
    terms, weight_B1V, shape = _terms(given, settings)
    return torch.stack([(terms[name] * weight_B1V).expand(shape).sum(-1) for name in settings.fields])


def cross_entropy(given: Voxels, settings: Pass) -> Tensor:
    """input, target -> the cross-entropy of each voxel, (B, V): the statistic of that name, summed over the classes."""
    terms, weight_B1V, _ = _terms(given, settings)
    return (terms["cross_entropy"] * weight_B1V).sum(1)


def _terms(given: Voxels, settings: Pass) -> tuple[dict[str, Any], Tensor, torch.Size]:
    """-> what each voxel adds to each statistic, but for its weight; the weights; and the shape, (B, C, V)."""
    input, target, weight, regions, voxel_map = given
    wanted = [statistic for statistic in STATISTICS if statistic.name in settings.fields]
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV, weight_B1V = _weights(value_BCV, target, weight, settings.ignore_index)
    true_BCV = _true_values(target, input.shape[1], value_BCV.dtype)
    if valid_BV is not None:  # a NaN at a voxel that does not count must not reach a sum
        value_BCV, true_BCV = (torch.where(valid_BV.unsqueeze(1), values, 0.0) for values in (value_BCV, true_BCV))
    if regions is not None:
        true_BCV = torch.stack([true_BCV.masked_fill(row, -torch.inf).amax(1) for row in ~regions.unsqueeze(-1)], dim=1)
    prob_BCV, minus_log_p_BCV, minus_log_q_BCV = _probabilities(
        value_BCV, regions, settings.activation, any(statistic.names("a", "b") for statistic in wanted)
    )
    share = settings.label_smoothing / outcomes(input.shape[1], settings.activation)
    y = (1 - settings.label_smoothing) * true_BCV + share if settings.label_smoothing else true_BCV
    p, n = prob_BCV, 1 - y
    symbols = {"p": p, "y": y, "n": n, "t": true_BCV, "a": 0.0, "b": 0.0}
    if voxel_map is not None:
        given_BCV = voxel_map.to(p.dtype)
        symbols["m"] = given_BCV if valid_BV is None else torch.where(valid_BV.unsqueeze(1), given_BCV, 0.0)
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


def lovasz(given: Voxels, settings: Pass, per_sample: bool) -> tuple[Tensor, Tensor]:
    """input, target -> the Lovasz extension of each class's Jaccard loss, and whether it has a voxel.

    Both are (C,), or (B, C) of each sample by itself.

        sum_i e_(i) (J_i - J_(i-1)),    J_i = 1 - (G - F_i) / (G + N_i)

    over the voxels in the order of their errors e, the largest first: of the first i, F_i are of the class and N_i are
    not, and G voxels are of the class altogether. Of equal errors the first goes first.

    Args: as for `statistics`; a weight is 0 or 1, and values of a target are.
    """
    error_BCV, true_BCV = errors(given, settings)
    if not per_sample:
        error_BCV, true_BCV = (values.transpose(0, 1).flatten(1) for values in (error_BCV, true_BCV))
    order = error_BCV.detach().argsort(dim=-1, descending=True, stable=True)
    ranked, of_class = error_BCV.gather(-1, order), true_BCV.gather(-1, order).double()
    missing = of_class.sum(-1, keepdim=True) - of_class.cumsum(-1)
    jaccard = 1 - missing / (of_class.sum(-1, keepdim=True) + (1 - of_class).cumsum(-1))
    steps = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], -1)
    return (ranked * steps.to(ranked.dtype)).sum(-1), true_BCV.any(-1)


def errors(given: Voxels, settings: Pass) -> tuple[Tensor, Tensor]:
    """input, target -> abs(y - p), for a sigmoid the hinge max(0, 1 - (2 y - 1) x), and y, both (B, C, V).

    A voxel that does not count has the error 0, and is in no class: the last rank, which changes no other.
    """
    input, target, weight, *_ = given
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV, _ = _weights(value_BCV, target, weight, settings.ignore_index)
    true_BCV = _true_values(target, input.shape[1], value_BCV.dtype) > 0.5
    if valid_BV is not None:
        value_BCV, true_BCV = torch.where(valid_BV.unsqueeze(1), value_BCV, 0.0), true_BCV & valid_BV.unsqueeze(1)
    if settings.activation == "sigmoid":
        error_BCV = (1 + torch.where(true_BCV, -value_BCV, value_BCV)).relu()
    else:
        p, _, _ = _probabilities(value_BCV, None, settings.activation, False)
        error_BCV = torch.where(true_BCV, 1 - p, p).relu()
    return (error_BCV if valid_BV is None else torch.where(valid_BV.unsqueeze(1), error_BCV, 0.0)), true_BCV


def _mixed(given: Voxels, settings: Pass) -> Tensor:
    """`statistics` of the passes in which classes, or voxels, meet others."""
    input, target, weight, *_ = given
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV, weight_B1V = _weights(value_BCV, target, weight, settings.ignore_index)
    true_BCV = _true_values(target, input.shape[1], value_BCV.dtype)
    if valid_BV is not None:
        value_BCV = torch.where(valid_BV.unsqueeze(1), value_BCV, 0.0)
    prob_BCV, _, _ = _probabilities(value_BCV, None, settings.activation, False)
    if settings.fields == CONFUSION:
        return torch.stack([(row_B1V * prob_BCV).sum(-1) for row_B1V in (true_BCV * weight_B1V).split(1, 1)])
    if valid_BV is not None:
        prob_BCV, true_BCV = (torch.where(valid_BV.unsqueeze(1), x, 0.0) for x in (prob_BCV, true_BCV))
    return centreline(prob_BCV, true_BCV, weight_B1V, settings)


def centreline(prob_BCV: Tensor, true_BCV: Tensor, weight_B1V: Tensor, settings: Pass) -> Tensor:
    """p and y, 0 where a voxel does not count -> the sums CENTRELINE, (4, B, C).

    Source: S. Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation",
    CVPR 2021, algorithm 2.
    """
    assert settings.shape is not None
    shape = (*prob_BCV.shape[:2], *settings.shape)
    of_prob, of_true = (soft_skeleton(x.reshape(shape), settings.iterations).flatten(2) for x in (prob_BCV, true_BCV))
    terms = of_prob * true_BCV, of_prob, of_true * prob_BCV, of_true
    return torch.stack([(weight_B1V * term).sum(-1) for term in terms])


def soft_skeleton(x: Tensor, iterations: int) -> Tensor:
    """values in [0, 1], (B, C, H, W) or (B, C, D, H, W) -> their soft skeleton: what each opening takes away."""
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
    """-> which voxels count (None: all of them), and the weight of each."""
    valid_BV = None if ignore_index is None else ~equals(target, ignore_index)
    if weight is not None:
        valid_BV = weight > 0 if valid_BV is None else valid_BV & (weight > 0)
    weight_BV = torch.ones_like(value_BCV[:, 0]) if valid_BV is None else valid_BV.to(value_BCV.dtype)
    if weight is not None:
        weight_BV = weight_BV * torch.where(weight > 0, weight, 0).to(value_BCV.dtype)
    return valid_BV, weight_BV.unsqueeze(1)


def _probabilities(
    value_BCV: Tensor, regions: Tensor | None, activation: str, logs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logits or probabilities -> p of classes or regions; where asked for -ln p and (sigmoid) -ln(1 - p)."""
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
    # of a union the difference of two logsumexps: the logarithm of a sum of p would end where p underflows
    most_B1V = value_BCV.detach().amax(1, keepdim=True)
    away_BCV = value_BCV - torch.where(most_B1V.isfinite(), most_B1V, 0.0)
    parts = [_logsumexp(away_BCV.masked_fill(row, -torch.inf)) for row in ~regions.unsqueeze(-1)]
    return prob_BCV, (_logsumexp(away_BCV).unsqueeze(1) - torch.stack(parts, dim=1)), None


def _sigmoid(value: Tensor) -> Tensor:
    """x -> 1 / (1 + e^-x), from the smaller of p and 1 - p: so p (1 - p), its slope, is not 0 where p rounds to 1."""
    small = torch.where(value >= 0, -value, value).sigmoid()
    return torch.where(value >= 0, 1 - small, small)


def _logsumexp(value_BCV: Tensor) -> Tensor:
    """(B, C, V) -> (B, V); -inf with a gradient of 0 where all of a voxel is -inf, for which torch has nan."""
    off_BV = value_BCV.detach().amax(1).isneginf()
    return torch.where(off_BV.unsqueeze(1), 0.0, value_BCV).logsumexp(1).masked_fill(off_BV, -torch.inf)


def _true_values(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """labels or per-class values -> y, (B, C, V)."""
    if target.ndim == 3:
        return target.to(dtype)
    first = 1 if num_classes == 1 else 0  # a single class is the mask of ones
    labels_C = torch.arange(first, first + num_classes, device=target.device).view(1, -1, 1)
    return (signed(target).unsqueeze(1) == labels_C).to(dtype)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for base >= 0 (rounding aside), with finite derivatives at 0."""
    if exponent in (0, 1, 2):
        return base**exponent
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** exponent
