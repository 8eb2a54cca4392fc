"""MONAI's Dice, masked Dice, generalized Dice and Tversky losses from one pass over the voxels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from softdice import validation
from softdice.compat.common import binary_mask, sums
from softdice.compat.monai_base import Act, MonaiLoss, Weight, checked_weight, confusion, confusion_fields
from softdice.statistics import OverlapStatistics


class DiceLoss(MonaiLoss):
    """input, target -> 1 - (2 I + smooth_nr) / (P + T + smooth_dr), per sample and class, then reduced.

    Args:
        as monai.losses.DiceLoss. sigmoid and softmax run inside the pass; other_act is applied before it. With
        soft_label and no sigmoid or softmax, input must hold probabilities: it is checked.

    Shapes: input (B, C, *S); target (B, C, *S), or (B, 1, *S) labels with to_onehot_y.

    Example:
        >>> loss = DiceLoss(to_onehot_y=True, softmax=True)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1192)

    Source: F. Milletari et al., "V-Net", 3DV 2016; MONAI 1.6.1, monai/losses/dice.py.
    """

    class_weight: Tensor | None

    @validation.public
    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Act | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        self.squared_pred, self.jaccard, self.batch, self.soft_label = squared_pred, jaccard, batch, soft_label
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        self.fields = confusion_fields(squared_pred, soft_label)

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        return self.from_statistics(self.statistics(input, target, self.fields), input.ndim)

    def statistics(
        self, input: Tensor, target: Tensor, fields: tuple[str, ...], mask: Tensor | None = None, gamma: float = 2.0
    ) -> OverlapStatistics:
        """input, target -> the fields, (B, C), of one pass with this loss's activation."""
        input, activation = self.activated(input)
        labels = self.labelled(input, target)
        target, weight, ignore_index = self.valid(target, labels)
        return sums(
            input,
            target,
            weight if mask is None else mask,
            fields=fields,
            activation=activation,
            ignore_index=ignore_index,
            probabilities=self.soft_label and not self.squared_pred,
            gamma=gamma,
        )

    def from_statistics(self, stats: OverlapStatistics, ndim: int) -> Tensor:
        """statistics (B, C) of an input with ndim dimensions -> loss."""
        stats = self.counted(stats)
        tp, fp, fn = confusion(stats.pool() if self.batch else stats, self.squared_pred, self.soft_label)
        if not self.jaccard:
            fp, fn = fp / 2, fn / 2
        cost = 1 - (2 * tp + self.smooth_nr) / (2 * (tp + fp + fn) + self.smooth_dr)
        if self.class_weight is not None and cost.shape[-1] != 1:
            cost = cost * checked_weight(self.class_weight, cost)
        return self.reduced(cost, ndim)


class MaskedDiceLoss(DiceLoss):
    """input, target, mask -> DiceLoss of the voxels where mask is 1.

    MONAI multiplies the label map by the mask before one_hot, so with to_onehot_y every masked voxel counts as truth of
    class 0; that number is kept. `softdice.SoftDiceLoss(...)(input, target, voxel_weight=mask)` leaves them out.

    Args:
        as monai.losses.MaskedDiceLoss.

    Shapes: as DiceLoss; mask (B, 1, *S) or (1, 1, *S), zeros and ones.

    Example:
        >>> loss = MaskedDiceLoss(sigmoid=True)
        >>> loss(torch.zeros(1, 1, 4), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]))
        tensor(0.3333)
    """

    @validation.public
    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Act | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        soft_label: bool = False,
    ) -> None:
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            squared_pred,
            jaccard,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            weight,
            soft_label,
        )

    @validation.public
    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """input, target, mask -> loss."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return super().forward(input, target)
        if mask.shape[0] not in (1, input.shape[0]) or tuple(mask.shape[1:]) != (1, *input.shape[2:]):
            expected = f"mask of shape {(input.shape[0], 1, *input.shape[2:])}"
            validation.fail(expected, tuple(mask.shape), "Give one mask for the batch or one per sample.")
        keep = binary_mask(mask).expand(input.shape[0], 1, *input.shape[2:])
        stats = self.statistics(input, target, self.fields, keep)
        if self.to_onehot_y and input.shape[1] > 1:
            masked = (~keep).flatten(1).sum(1, keepdim=True)  # (B, 1): truth of class 0, by MONAI's order of steps
            extra = torch.nn.functional.pad(masked, (0, input.shape[1] - 1)).to(stats.voxels)
            truth = ("target", "target_squared", "difference")
            stats = OverlapStatistics({name: getattr(stats, name) + extra * (name in truth) for name in stats.fields})
        return self.from_statistics(stats, input.ndim)


class GeneralizedDiceLoss(MonaiLoss):
    """input, target -> 1 - (2 sum w I + smooth_nr) / (sum w (P + T) + smooth_dr), w = 1 / T^2, 1 / T or 1.

    An absent class takes the largest weight of the others. MONAI's smoothing is kept: added to sums that the weights
    have made small, it decides the loss of large volumes, and with no class present the loss is 0 whatever is
    predicted. `softdice.GeneralizedDiceLoss` normalises the weights instead.

    Args:
        as monai.losses.GeneralizedDiceLoss.

    Example:
        >>> loss = GeneralizedDiceLoss(to_onehot_y=True, softmax=True)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1192)

    Source: C. H. Sudre et al., DLMIA 2017; MONAI 1.6.1, monai/losses/dice.py.
    """

    @validation.public
    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Act | None = None,
        w_type: Any = "square",
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction)
        self.w_type = getattr(w_type, "value", w_type)
        validation.choice("w_type", self.w_type, ("square", "simple", "uniform"))
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)
        self.batch, self.soft_label = batch, soft_label
        self.fields = ("target", *confusion_fields(False, soft_label))

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        return self.from_statistics(self.statistics(input, target, self.fields), input.ndim)

    def statistics(
        self, input: Tensor, target: Tensor, fields: tuple[str, ...], gamma: float = 2.0
    ) -> OverlapStatistics:
        """input, target -> the fields, (B, C), of one pass with this loss's activation."""
        input, activation = self.activated(input)
        self.labelled(input, target)
        return sums(input, target, fields=fields, activation=activation, probabilities=self.soft_label, gamma=gamma)

    def from_statistics(self, stats: OverlapStatistics, ndim: int) -> Tensor:
        """statistics (B, C) of an input with ndim dimensions -> loss."""
        stats = self.counted(stats)
        stats = stats.pool() if self.batch else stats
        tp, fp, fn = confusion(stats, False, self.soft_label)
        weight = stats.target.detach() ** -{"square": 2.0, "simple": 1.0, "uniform": 0.0}[self.w_type]
        finite = torch.where(weight.isinf(), 0.0, weight)
        weight = torch.where(weight.isinf(), finite.amax(-1, keepdim=True), finite)
        numerator = 2 * (tp * weight).sum(-1, keepdim=True) + self.smooth_nr
        denominator = ((2 * tp + fp + fn) * weight).sum(-1, keepdim=True) + self.smooth_dr
        return self.reduced(1 - numerator / denominator, ndim)


class TverskyLoss(MonaiLoss):
    """input, target -> 1 - (I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr), per sample and class, then reduced.

    Args:
        as monai.losses.TverskyLoss; alpha prices false positives, beta false negatives.

    Example:
        >>> loss = TverskyLoss(to_onehot_y=True, softmax=True, alpha=0.3, beta=0.7)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1192)

    Source: S. S. M. Salehi et al., MLMI 2017; MONAI 1.6.1, monai/losses/tversky.py.
    """

    @validation.public
    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Act | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: Any = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index)
        self.alpha, self.beta, self.batch, self.soft_label = alpha, beta, batch, soft_label
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        input, activation = self.activated(input)
        target, weight, ignore_index = self.valid(target, self.labelled(input, target))
        stats = sums(
            input,
            target,
            weight,
            fields=confusion_fields(False, self.soft_label),
            activation=activation,
            ignore_index=ignore_index,
            probabilities=self.soft_label,
        )
        stats = self.counted(stats)
        tp, fp, fn = confusion(stats.pool() if self.batch else stats, False, self.soft_label)
        cost = 1 - (tp + self.smooth_nr) / (tp + self.alpha * fp + self.beta * fn + self.smooth_dr)
        return self.reduced(cost, 2)
