"""input, target as MONAI takes them -> what the pass takes: the options that all of its losses share.

Shape suffixes: B sample, C class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.compat.common import binary_mask
from softdice.statistics import OverlapStatistics

Act = Callable[[Tensor], Tensor]
Weight = Sequence[float] | float | Tensor | None


class MonaiLoss(nn.Module):
    """What MONAI's losses share: how input becomes probabilities, and target per-class values."""

    @validation.public
    def __init__(
        self,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: Act | None,
        reduction: Any,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if other_act is not None and not callable(other_act):
            validation.fail("other_act to be callable", repr(other_act), "Pass a function.", TypeError)
        chosen = [name for name, on in (("sigmoid", sigmoid), ("softmax", softmax), ("other_act", other_act)) if on]
        if len(chosen) > 1:
            advice = "Keep the one that turns input into probabilities."
            validation.fail("at most one of sigmoid, softmax, other_act", " and ".join(chosen), advice)
        self.reduction = getattr(reduction, "value", reduction)  # MONAI's LossReduction or its word
        validation.choice("reduction", self.reduction, ("mean", "sum", "none"))
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        self.sigmoid, self.softmax, self.other_act = sigmoid, softmax, other_act
        self.ignore_index = ignore_index

    def activated(self, input: Tensor) -> tuple[Tensor, str]:
        """input -> input for the pass, and the activation inside it."""
        if self.softmax and input.shape[1] == 1:
            self._ignored("softmax=True")
            return input, "none"
        if self.other_act is not None:
            return self.other_act(input), "none"
        return input, "softmax" if self.softmax else "sigmoid" if self.sigmoid else "none"

    def labelled(self, input: Tensor, target: Tensor) -> bool:
        """Whether target is a label map (B, 1, *S); an AssertionError, as in MONAI, where its shape does not fit."""
        channels = input.shape[1]
        labels = self.to_onehot_y and channels > 1
        if self.to_onehot_y and not labels:
            self._ignored("to_onehot_y=True")
        expected = (input.shape[0], 1, *input.shape[2:]) if labels else tuple(input.shape)
        if tuple(target.shape) != expected:
            advice = "Set to_onehot_y=True for a label map." if not labels else "With to_onehot_y it is a label map."
            got = tuple(target.shape)
            validation.fail(f"target of shape {expected}", got, advice, AssertionError)
        return labels

    def counted(self, stats: OverlapStatistics) -> OverlapStatistics:
        """statistics of all classes -> those that enter the loss."""
        channels = stats.voxels.shape[-1]
        if self.include_background:
            return stats
        if channels == 1:
            self._ignored("include_background=False")
            return stats
        return stats.select(range(1, channels))

    def valid(self, target: Tensor, labels: bool) -> tuple[Tensor, Tensor | None, int | None]:
        """target -> target, voxel weight and ignore_index for the pass: MONAI's rules of what is ignored."""
        if self.ignore_index is None or labels:
            return target, None, self.ignore_index
        if target.shape[1] == 1:
            keep = target != self.ignore_index
            return torch.where(keep, target, 0), keep, None
        if 0 <= self.ignore_index < target.shape[1]:
            ignored = target[:, self.ignore_index : self.ignore_index + 1]
            return target, ~binary_mask(ignored), None
        return target, target.sum(1, keepdim=True) > 0, None

    def reduced(self, cost: Tensor, ndim: int) -> Tensor:
        """cost (C,) or (B, C) -> loss; "none" keeps it broadcastable to the input's number of dimensions."""
        if self.reduction == "mean":
            return cost.mean()
        if self.reduction == "sum":
            return cost.sum()
        return cost.view(*cost.shape, *[1] * (ndim - 2))

    def _ignored(self, option: str) -> None:
        warnings.warn(f"single channel prediction, `{option}` ignored.", stacklevel=4)


def confusion(stats: OverlapStatistics, squared: bool, soft_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """statistics -> MONAI's tp, fp, fn: products, squares, or (for soft labels) norms."""
    if squared:
        tp, predicted, truth = stats.intersection, stats.prediction_squared, stats.target_squared
    elif soft_label:
        predicted, truth = stats.prediction, stats.target
        tp = (predicted + truth - stats.difference) / 2
    else:
        tp, predicted, truth = stats.intersection, stats.prediction, stats.target
    return tp, predicted - tp, truth - tp


def confusion_fields(squared: bool, soft_label: bool) -> tuple[str, ...]:
    """The statistics that `confusion` reads, and the voxels."""
    if squared:
        return ("intersection", "prediction_squared", "target_squared", "voxels")
    return ("prediction", "target", "difference" if soft_label else "intersection", "voxels")


def checked_weight(weight: Tensor, cost: Tensor) -> Tensor:
    """MONAI's weight, one number or one per class that counts -> (C,)."""
    if weight.ndim > 0 and weight.shape[0] != cost.shape[-1]:
        advice = "With include_background=False leave out the weight of class 0."
        validation.fail(f"{cost.shape[-1]} weights, one per class", weight.shape[0], advice)
    if bool((weight < 0).any()):
        validation.fail("weight >= 0", weight.tolist(), "Pass other weights.")
    return weight.to(cost).expand(cost.shape[-1])
