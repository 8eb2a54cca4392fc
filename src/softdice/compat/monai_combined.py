"""MONAI's focal loss, and its Dice losses with a cross-entropy or a focal loss beside them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.compat.common import count, hard, one_by_one, per_class, sums
from softdice.compat.monai_base import Act, MonaiLoss, Weight, checked_weight
from softdice.compat.monai_dice import DiceLoss, GeneralizedDiceLoss
from softdice.statistics import OverlapStatistics

FOCAL = ("focal", "voxels")


class FocalLoss(MonaiLoss):
    """input, target -> mean focal loss over voxels and classes; a sigmoid, or with use_softmax a softmax, of logits.

    Args:
        as monai.losses.FocalLoss. reduction="none" gives a map of the voxels there and is refused here. With a sigmoid
        the target must be zeros and ones. An alpha with a sigmoid costs a mask per channel.

    Example:
        >>> loss = FocalLoss(to_onehot_y=True, gamma=0.0)
        >>> loss(torch.zeros(1, 2, 3), torch.tensor([[[0, 1, 1]]]))
        tensor(0.6931)

    Source: T.-Y. Lin et al., ICCV 2017; MONAI 1.6.1, monai/losses/focal_loss.py.
    """

    class_weight: Tensor | None

    @validation.public
    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: Weight = None,
        reduction: Any = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, to_onehot_y, False, False, None, reduction, ignore_index)
        no_map(self.reduction)
        self.gamma, self.use_softmax = gamma, use_softmax
        self.alpha = None if alpha is None else torch.as_tensor(alpha, dtype=torch.float32)
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        labels = self.labelled(input, target)
        target, weight, ignore_index = self.valid(target, labels)
        if self.use_softmax and not self.include_background and input.shape[1] > 1:
            if labels:  # the softmax is over the other classes only: class 0 is no channel any more
                keep = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
                weight, ignore_index = (None if ignore_index is None else keep), None
                target = target == torch.arange(input.shape[1], device=target.device).view(
                    1, -1, *[1] * (target.ndim - 2)
                )
            input, target = input[:, 1:], target[:, 1:]
        if not self.use_softmax:
            hard(target)
        if self.alpha is not None and not self.use_softmax:
            stats = self._balanced(input, target, weight, ignore_index)
        else:
            activation = "softmax" if self.use_softmax else "sigmoid"
            stats = sums(
                input,
                target,
                weight,
                fields=FOCAL,
                activation=activation,
                ignore_index=ignore_index,
                gamma=self.gamma,
            )
        return self.from_statistics(stats, count(input))

    def from_statistics(self, stats: OverlapStatistics, voxels: int) -> Tensor:
        """statistics (B, C), voxels of a sample -> loss."""
        if not self.use_softmax:
            stats = self.counted(stats)
        focal = stats.focal
        if self.use_softmax and self.alpha is not None:
            focal = focal * self._alpha_of_classes(focal)
        if self.class_weight is not None:
            if focal.shape[-1] == 1 and self.class_weight.ndim > 0:
                advice = "Pass one number."
                validation.fail("one weight for one channel", tuple(self.class_weight.shape), advice)
            focal = focal * checked_weight(self.class_weight, focal)
        valid = stats.voxels[:, :1]
        tiny = torch.finfo(torch.float32).eps
        if self.reduction == "sum":  # the mean over space, added over samples and classes
            return (focal / (voxels if self.ignore_index is None else valid.clamp_min(tiny))).sum()
        if self.ignore_index is None:
            return focal.sum() / (voxels * focal.numel())
        return focal.sum() / valid.sum().clamp_min(tiny)  # by voxels, not voxels times classes, as MONAI has it

    def _alpha_of_classes(self, focal: Tensor) -> Tensor:
        assert self.alpha is not None
        channels = focal.shape[-1]
        if self.alpha.ndim > 0:
            if self.alpha.shape[0] != channels:
                got = self.alpha.shape[0]
                validation.fail(f"{channels} values of alpha", got, "Give one per class.")
            return self.alpha.to(focal)
        if not self.include_background:
            warnings.warn("`include_background=False`, scalar `alpha` ignored when using softmax.", stacklevel=4)
            return torch.ones_like(focal[0])
        alpha = self.alpha.to(focal)
        return torch.cat([(1 - alpha).view(1), alpha.expand(channels - 1)])

    def _balanced(
        self, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None
    ) -> OverlapStatistics:
        """Focal sums with alpha for voxels in the class and 1 - alpha (1 for one alpha per class) for the others."""
        assert self.alpha is not None
        channels = input.shape[1]
        keep = weight if ignore_index is None else target != ignore_index
        scores, truth = one_by_one(input, target)
        alpha = self.alpha.to(scores)
        if alpha.ndim > 0:
            skipped = channels - alpha.shape[0]
            if skipped != (0 if self.include_background or channels == 1 else 1):
                got = alpha.shape[0]
                validation.fail("one alpha per class that counts", got, "Give one per class.")
            positive = torch.nn.functional.pad(alpha, (skipped, 0)).repeat(input.shape[0]).view(-1, 1, 1)
            balance = torch.where(truth > 0, positive, 1.0)
        else:
            balance = torch.where(truth > 0, alpha, 1 - alpha)
        if keep is not None:
            balance = balance * keep.flatten(1).repeat_interleave(channels, 0).unsqueeze(1)
        stats = per_class(
            sums(scores, truth, balance, fields=("focal",), activation="sigmoid", gamma=self.gamma), channels
        )
        voxels = torch.full_like(stats.focal, count(input))
        if keep is not None:
            voxels = keep.flatten(1).sum(1, keepdim=True).expand_as(stats.focal).to(stats.focal)
        return OverlapStatistics({"focal": stats.focal, "voxels": voxels})


class DiceCELoss(nn.Module):
    """input, target -> lambda_dice DiceLoss + lambda_ce cross-entropy (binary for a single channel).

    One pass with softmax=True (sigmoid=True for a single channel); another activation of the Dice term, label_smoothing
    or a weight of a single channel costs a second one.

    Args:
        as monai.losses.DiceCELoss.

    Example:
        >>> loss = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1269)

    Source: F. Isensee et al., "nnU-Net", Nature Methods 18, 2021; MONAI 1.6.1, monai/losses/dice.py.
    """

    weight: Tensor | None

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
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.reduction = getattr(reduction, "value", reduction)
        validation.choice("reduction", self.reduction, ("mean", "sum"))
        validation.number("lambda_dice", lambda_dice, 0)
        validation.number("lambda_ce", lambda_ce, 0)
        per = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.register_buffer("weight", per, persistent=False)
        dice_weight = per if per is None or include_background or per.ndim == 0 else per[1:]
        self.dice = DiceLoss(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            squared_pred,
            jaccard,
            self.reduction,
            smooth_nr,
            smooth_dr,
            batch,
            dice_weight,
        )
        self.lambda_dice, self.lambda_ce, self.label_smoothing = lambda_dice, lambda_ce, label_smoothing

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        fitting_channels(input, target)
        binary = input.shape[1] == 1
        activation = "sigmoid" if binary else "softmax"
        smoothing = 0.0 if binary else self.label_smoothing  # MONAI does not smooth the binary one
        fields = ("cross_entropy", "labelled", "voxels")
        shared = getattr(self.dice, activation) and smoothing == 0
        own = self.dice.statistics(input, target, (*self.dice.fields, *fields) if shared else self.dice.fields)
        entropy = own
        if not shared:
            entropy = sums(input, target, fields=fields, activation=activation, label_smoothing=smoothing)
        term = self._binary(entropy, input, target) if binary else self._entropy(entropy, input, target)
        return self.lambda_dice * self.dice.from_statistics(own, input.ndim) + self.lambda_ce * term

    def _entropy(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        weight = torch.ones_like(stats.labelled[0]) if self.weight is None else self.weight.to(stats.labelled)
        total = (weight * stats.cross_entropy).sum()
        if self.reduction == "sum":
            return total
        if target.shape == input.shape:  # torch divides by the voxels where the target is per class
            return total / (count(input) * input.shape[0])
        return total / (weight * stats.labelled).sum()

    def _binary(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        total = stats.cross_entropy.sum()
        if self.weight is not None:  # the positive part once more: the sum of y (-ln p), with y for a weight
            if self.weight.numel() != 1:
                got = tuple(self.weight.shape)
                validation.fail("one weight for one channel", got, "Pass one number.")
            sure = torch.ones_like(target, dtype=torch.bool)
            positive = sums(input, sure, target, fields=("cross_entropy",), activation="sigmoid")
            total = total + (self.weight.view(()) - 1) * positive.cross_entropy.sum()
        return total if self.reduction == "sum" else total / input.numel()


class DiceFocalLoss(nn.Module):
    """input, target -> lambda_dice DiceLoss + lambda_focal FocalLoss (of a sigmoid, whatever the Dice term has).

    One pass with sigmoid=True and no alpha, else two.

    Args:
        as monai.losses.DiceFocalLoss; reduction="none" would be a map of the voxels and is refused.

    Example:
        >>> loss = DiceFocalLoss(sigmoid=True, lambda_dice=0.0, gamma=0.0)
        >>> loss(torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 1]]]))
        tensor(0.6931)

    Source: W. Zhu et al., "AnatomyNet", Medical Physics 46, 2019; MONAI 1.6.1, monai/losses/dice.py.
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
        gamma: float = 2.0,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        validation.number("lambda_dice", lambda_dice, 0)
        validation.number("lambda_focal", lambda_focal, 0)
        self.dice = DiceLoss(
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
        )
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, alpha, weight, reduction)
        self.lambda_dice, self.lambda_focal = lambda_dice, lambda_focal

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        fitting_channels(input, target)
        return with_focal(self.dice, self.focal, self.lambda_dice, self.lambda_focal, input, target)


class GeneralizedDiceFocalLoss(nn.Module):
    """input, target -> lambda_gdl GeneralizedDiceLoss + lambda_focal FocalLoss (of a sigmoid).

    One pass with sigmoid=True, else two.

    Args:
        as monai.losses.GeneralizedDiceFocalLoss; reduction="none" would be a map of the voxels and is refused.

    Example:
        >>> loss = GeneralizedDiceFocalLoss(sigmoid=True, lambda_gdl=0.0, gamma=0.0)
        >>> loss(torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 1]]]))
        tensor(0.6931)
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
        gamma: float = 2.0,
        weight: Weight = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
    ) -> None:
        super().__init__()
        validation.number("lambda_gdl", lambda_gdl, 0)
        validation.number("lambda_focal", lambda_focal, 0)
        self.generalized_dice = GeneralizedDiceLoss(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            w_type,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
        )
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, None, weight, reduction)
        self.lambda_gdl, self.lambda_focal = lambda_gdl, lambda_focal

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input, target -> loss."""
        fitting_channels(input, target)
        return with_focal(self.generalized_dice, self.focal, self.lambda_gdl, self.lambda_focal, input, target)


def with_focal(
    dice: DiceLoss | GeneralizedDiceLoss, focal: FocalLoss, a: float, b: float, input: Tensor, target: Tensor
) -> Tensor:
    """a dice + b focal, from one pass where both see a sigmoid."""
    if not dice.sigmoid or focal.alpha is not None:
        return a * dice(input, target) + b * focal(input, target)
    hard(target)
    stats = dice.statistics(input, target, (*dice.fields, *FOCAL), gamma=focal.gamma)
    return a * dice.from_statistics(stats, input.ndim) + b * focal.from_statistics(stats, count(input))


def fitting_channels(input: Tensor, target: Tensor) -> None:
    """MONAI's combined losses want a channel dimension in the target, of 1 or as many as input has."""
    if input.ndim != target.ndim or target.shape[1] not in (1, input.shape[1]):
        expected = f"target of shape (B, 1, *S) or (B, {input.shape[1]}, *S)"
        advice = "Add the channel dimension with unsqueeze(1), or one channel per class."
        validation.fail(expected, tuple(target.shape), advice)


def no_map(reduction: str) -> None:
    """Refuse what no sum over voxels can give."""
    if reduction == "none":
        advice = "The pass never makes a map of the voxels."
        validation.fail("reduction 'mean' or 'sum'", "'none'", advice)
