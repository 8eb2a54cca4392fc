"""input, target -> statistics: the definition, in plain PyTorch.

This module is slow and clear on purpose. Every kernel must agree with it; it also serves where no kernel does: other
devices, double backward, function transforms, a target or weight that needs a gradient.

Shape suffixes: B sample, C class (or region), V voxel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdice.settings import Pass


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the input -> dtype of its statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outcomes(num_classes: int, activation: str) -> int:
    """classes, activation -> K, the outcomes that label smoothing spreads its share over.

    Classes that exclude each other are C outcomes; a class decided by itself (a sigmoid, a single mask) has two.
    """
    return 2 if activation == "sigmoid" or num_classes == 1 else num_classes


def equals(labels: Tensor, value: int) -> Tensor:
    """labels, number -> where they are equal; a number that the dtype cannot hold equals none of them.

    torch would wrap it round: `torch.tensor([255], dtype=torch.uint8) == -1` is true.
    """
    if labels.dtype == torch.bool or torch.iinfo(labels.dtype).min <= value <= torch.iinfo(labels.dtype).max:
        return labels == value
    return torch.zeros_like(labels, dtype=torch.bool)


def statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    settings: Pass,
) -> Tensor:
    """input, target -> the sums over the voxels of each sample and class, (len(fields), B, C).

    With p the probability, y the target, w the weight of a voxel (0 where ignored) and y' = (1 - e) y + e / K:

        ======================  =================================================================
        intersection            sum w p y'
        prediction              sum w p
        target                  sum w y'
        prediction_squared      sum w p^2
        target_squared          sum w y'^2
        difference              sum w abs(p - y')^power
        cross_entropy           sum w y' (-ln p);                 sigmoid: + w (1 - y') (-ln(1 - p))
        focal                   sum w y' (1 - p)^gamma (-ln p);   sigmoid: + w (1 - y') p^gamma (-ln(1 - p))
        voxels                  sum w
        labelled                sum w y (before label smoothing: what decides whether a class is absent)
        ======================  =================================================================

    Args:
        input: (B, C, V), floating.
        target: (B, V) integer labels (for C = 1: 1 is in the class), or (B, C, V) values in [0, 1].
        weight: (B, V), >= 0, or None for 1.
        regions: (R, C) bool, the classes of which each region is the union, or None. With it, C above reads R.
        settings: the statistics wanted, the activation, and the exponents; `settings.regions` is in `regions`.
    """
    activation, gamma, power = settings.activation, settings.gamma, settings.power
    label_smoothing = settings.label_smoothing
    prob_BCV, log_p_BCV, log_q_BCV, valid_BV = _probabilities(input, target, weight, activation, settings.ignore_index)
    true_BCV = _true_values(target, input.shape[1], prob_BCV.dtype)
    if weight is not None:  # nor a NaN in the target there
        true_BCV = torch.where(valid_BV.unsqueeze(1), true_BCV, 0.0)
    if regions is not None:
        outside_RC1 = ~regions.unsqueeze(-1)
        true_BCV = torch.stack([true_BCV.masked_fill(row, -torch.inf).amax(1) for row in outside_RC1], dim=1)
        log_p_BCV = torch.stack([log_p_BCV.masked_fill(row, -torch.inf).logsumexp(1) for row in outside_RC1], dim=1)
        prob_BCV = torch.einsum("rc,bcv->brv", regions.to(prob_BCV.dtype), prob_BCV)

    weight_B1V = valid_BV.to(prob_BCV.dtype).unsqueeze(1)
    if weight is not None:
        weight_B1V = weight_B1V * weight.to(prob_BCV.dtype).unsqueeze(1)
    share = label_smoothing / outcomes(input.shape[1], activation)
    labelled_BCV = true_BCV
    if activation == "softmax" and target.ndim == 2 and not label_smoothing:  # a logit of -inf: 0 ln 0 = 0
        log_p_BCV = log_p_BCV.masked_fill((true_BCV == 0) & log_p_BCV.isneginf(), 0.0)
    if label_smoothing:
        true_BCV = (1 - label_smoothing) * true_BCV + share

    def term(name: str) -> Tensor:
        if name == "intersection":
            return prob_BCV * true_BCV
        if name == "prediction":
            return prob_BCV
        if name == "target":
            return true_BCV
        if name == "prediction_squared":
            return prob_BCV * prob_BCV
        if name == "target_squared":
            return true_BCV * true_BCV
        if name == "difference":
            apart_BCV = prob_BCV - true_BCV
            if power == 2:
                return apart_BCV * apart_BCV
            return apart_BCV.abs() if power == 1 else _power(apart_BCV.abs(), power)
        if name == "voxels":
            return torch.ones_like(true_BCV)
        if name == "labelled":
            return labelled_BCV
        hard_p, hard_q = (
            (1.0, 1.0) if name == "cross_entropy" else (_power(1 - prob_BCV, gamma), _power(prob_BCV, gamma))
        )
        value_BCV = -true_BCV * hard_p * log_p_BCV
        return value_BCV if activation != "sigmoid" else value_BCV - (1 - true_BCV) * hard_q * log_q_BCV

    return torch.stack([(term(name) * weight_B1V).sum(-1) for name in settings.fields])


def _probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, activation: str, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input -> p, ln p, ln(1 - p) (for a sigmoid), and which voxels count; values at the others are never read."""
    value_BCV = input.to(result_dtype(input.dtype))
    valid_BV = torch.ones_like(value_BCV[:, 0], dtype=torch.bool)
    if ignore_index is not None:
        valid_BV = ~equals(target, ignore_index)
    if weight is not None:
        valid_BV = valid_BV & (weight > 0)
    if ignore_index is not None or weight is not None:  # a NaN at a voxel that does not count must not reach a sum
        value_BCV = torch.where(valid_BV.unsqueeze(1), value_BCV, 0.0)
    if activation == "softmax":
        log_p_BCV = value_BCV.log_softmax(1)
        return value_BCV.softmax(1), log_p_BCV, log_p_BCV, valid_BV
    if activation == "sigmoid":
        logsigmoid = torch.nn.functional.logsigmoid
        return value_BCV.sigmoid(), logsigmoid(value_BCV), logsigmoid(-value_BCV), valid_BV
    log_p_BCV = value_BCV.clamp_min(torch.finfo(value_BCV.dtype).tiny).log()
    return value_BCV, log_p_BCV, log_p_BCV, valid_BV


def _true_values(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """labels or per-class values -> y, (B, C, V)."""
    if target.ndim == 3:
        return target.to(dtype)
    first = 1 if num_classes == 1 else 0  # a single class is the mask of ones
    labels_C = torch.arange(first, first + num_classes, device=target.device).view(1, -1, 1)
    return (target.unsqueeze(1) == labels_C).to(dtype)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent with finite derivatives at 0."""
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** exponent if exponent else torch.ones_like(base)
