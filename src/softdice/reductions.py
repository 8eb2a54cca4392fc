"""Reductions of the cost of each class to a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from softdice.statistics.request import moved

POOLINGS = ("batch", "sample")
ABSENT = ("count", "skip")
REDUCTIONS = ("mean", "sum", "none")


def mean(values: Tensor) -> Tensor:
    """values -> their mean; 0 where there are no values (an empty batch), for which torch returns nan.

    Example:
        >>> mean(torch.tensor([1.0, 3.0])), mean(torch.zeros(0, 3))
        (tensor(2.), tensor(0.))
    """
    return values.mean() if values.numel() else values.sum()


def reduce(
    cost: Tensor, *, class_weight: Tensor | None = None, present: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """cost per class -> loss.

        mean = sum_c w_c cost_c / sum_c w_c        sum = sum_c w_c cost_c        none = w_c cost_c

    Args:
        cost: (C,) or (B, C).
        class_weight: (C,), >= 0, or None for 1 each.
        present: bool, shape of cost; False leaves a class out of numerator and denominator. None keeps all.
        reduction: "mean", "sum" or "none".

    Returns:
        A 0-d tensor, or the shape of cost for "none", where a class that is left out is nan (`nanmean` skips it).

    Edge cases: if every class is left out, mean and sum are 0 with a gradient of 0.

    Example:
        >>> reduce(torch.tensor([1.0, 3.0]), class_weight=torch.tensor([3.0, 1.0]))
        tensor(1.5000)
        >>> reduce(torch.tensor([1.0, 3.0]), present=torch.tensor([True, False]))
        tensor(1.)
    """
    if class_weight is None and present is None:
        return cost if reduction == "none" else (cost.sum() if reduction == "sum" else mean(cost))
    weight = torch.ones_like(cost) if class_weight is None else moved(class_weight, cost).expand_as(cost)
    if reduction == "none":
        return weight * cost if present is None else torch.where(present, weight * cost, torch.nan)
    if present is not None:
        weight, cost = weight * present, torch.where(present, cost, 0.0)
    total = (weight * cost).sum()
    if reduction == "sum":
        return total
    amount = weight.sum()
    return total / torch.where(amount > 0, amount, 1.0)
