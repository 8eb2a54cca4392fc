"""MONAI's overlap losses (monai.losses), their constructors and numbers, from one pass over the voxels.

Write `from softdice.compat.monai import DiceLoss` in the place of `from monai.losses import DiceLoss`. MONAI itself is
not imported. Each class has the arguments of the class of that name in MONAI 1.6.1; its docstring says what differs.

In a call input is (B, C, *S) and floating; target is a label map (B, 1, *S) with to_onehot_y, else (B, C, *S) values.
A call raises TypeError, ValueError or the class's `misfit` for tensors that do not fit; a constructor raises TypeError
or ValueError for arguments out of range. Some methods of a class look for options that only subclasses have.
Shape suffixes: B sample, C class, S space (any number of axes, *S in a shape).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from softdice import reductions, validation
from softdice.compat import common
from softdice.losses.supervision import at_resolution
from softdice.statistics import OverlapStatistics, check
from softdice.statistics.reference import power
from softdice.statistics.request import result_dtype

Weight = Sequence[float] | float | Tensor | None
"""A factor for each class that counts, or one for all of them."""
FOCAL = ("focal", "voxels")
"""The statistics that `FocalLoss.from_statistics` reads."""

# --- what all of them share


@common.declared
class _MonaiLoss(common.DropIn):
    """A loss of MONAI. It knows the kind of target, what the loss ignores, and whether the background, class 0, counts.

    Its buffer `class_weight`, where a subclass calls `hold_weight`, is the constructor's `weight`.
    """

    include_background: bool = True
    to_onehot_y: bool = False

    def __post_init__(self) -> None:
        self.reduction = getattr(self.reduction, "value", self.reduction)  # MONAI's LossReduction or its word
        validation.choice("reduction", self.reduction, ("mean", "sum", "none"))

    misfit: ClassVar[type[Exception]] = AssertionError
    """The error that MONAI raises where the shape of target does not fit."""

    def tensors(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return a user's input and target; without space, (B, C), as those of a single voxel, (B, C, 1).

        Raise TypeError unless they are tensors, ValueError for (B, C) if MONAI computes another number for it than for
        a voxel (`without_space`).
        """
        input, target = common.tensors(input, target)
        if input.ndim != 2:
            return input, target
        if not self.without_space():
            advice = "MONAI adds up samples and classes then. Add a dimension with unsqueeze(-1), or set batch=True."
            validation.fail("input of shape (B, C, *S)", tuple(input.shape), advice)
        return input.unsqueeze(-1), target.unsqueeze(-1)

    def without_space(self) -> bool:
        """Return whether MONAI's formula for an input (B, C), without space, equals the one for a single voxel."""
        return bool(getattr(self, "batch", False))

    def has_labels(self, input: Tensor, target: Tensor) -> bool:
        """Return whether target is a label map (B, 1, *S): with to_onehot_y and C > 1; else it is values (B, C, *S).

        Raise `misfit` if target has another shape. Warn of to_onehot_y with C = 1.
        """
        labels = self.to_onehot_y and input.shape[1] > 1
        if self.to_onehot_y and not labels:
            _warn_of("to_onehot_y=True")
        expected = (input.shape[0], 1, *input.shape[2:]) if labels else tuple(input.shape)
        if tuple(target.shape) != expected:
            advice = "Set to_onehot_y=True for a label map." if not labels else "With to_onehot_y it is a label map."
            validation.fail(f"target of shape {expected}", tuple(target.shape), advice, self.misfit)
        return labels

    def without_ignored(self, target: Tensor, labels: bool) -> tuple[Tensor, Tensor | None, int | None]:
        """Return (target, mask of the voxels that count, (B, 1, *S) bool or None for all, ignore_index of the pass).

        What MONAI ignores depends on the target. Labels (`labels` is true): the label ignore_index, which the pass
        leaves out. One channel of values: the value ignore_index, which becomes 0. Several channels: the voxels of the
        class ignore_index, or without such a class, the voxels of no class. Raise ValueError if values of that class
        are not 0 and 1.
        """
        ignore_index: int | None = getattr(self, "ignore_index", None)
        if ignore_index is None or labels:
            return target, None, ignore_index
        if target.shape[1] == 1:
            keep = common.unlike(target, ignore_index)
            return torch.where(keep, target, 0), keep, None
        if 0 <= ignore_index < target.shape[1]:
            return target, _hard_mask(target[:, ignore_index : ignore_index + 1]) == 0, None
        return target, target.sum(1, keepdim=True) > 0, None

    def without_background(self, stats: OverlapStatistics) -> OverlapStatistics:
        """Return the statistics of the classes that count, (B, C) or (B, C - 1): all, or all but class 0."""
        if self.include_background:
            return stats
        channels = getattr(stats, stats.fields[0]).shape[-1]
        if channels == 1:
            _warn_of("include_background=False")
            return stats
        return stats.select(range(1, channels))

    def weighted(self, cost: Tensor) -> Tensor:
        """Return a cost (..., C), where C classes count, times the buffer class_weight, one number or (C,).

        Raise ValueError for another number of weights.
        """
        weight: Any = self.class_weight
        if weight is None:
            return cost
        if weight.ndim > 0 and weight.shape[0] != cost.shape[-1]:
            advice = "With include_background=False leave out the weight of class 0."
            validation.fail(f"{cost.shape[-1]} weights, one per class", weight.shape[0], advice)
        return cost * weight.to(cost)

    def hold_weight(self, weight: Weight) -> None:
        """Keep the constructor's weight as the buffer class_weight; raise ValueError if a weight is below 0."""
        class_weight = self.hold("class_weight", weight)
        if class_weight is not None and not class_weight.is_meta and bool((class_weight < 0).any()):
            validation.fail("weight >= 0", class_weight.tolist(), "Pass other weights.")


def _warn_of(option: str) -> None:
    """Warn, as MONAI does, that an option has no effect on a single channel."""
    warnings.warn(f"single channel prediction, `{option}` ignored.", stacklevel=5)


def _hard_mask(mask: Tensor) -> Tensor:
    """Return a mask of any shape and dtype as it is; raise ValueError for a value other than 0 and 1."""
    advice = "Fractional masks enter MONAI's sums squared; pass voxel_weight to a softdice loss."
    return check.hard(mask, "mask", advice)


# --- overlap: Dice, generalized Dice, Tversky, MCC


@common.declared
class _OverlapLoss(_MonaiLoss):
    """A loss with an activation (sigmoid, softmax, other_act, or none of them), and its statistics from one pass."""

    sigmoid: bool = False
    softmax: bool = False
    other_act: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Raise TypeError if other_act cannot be called, ValueError if there are two activations."""
        super().__post_init__()
        if self.other_act is not None and not callable(self.other_act):
            validation.fail("other_act to be callable", repr(self.other_act), "Pass a function.", TypeError)
        chosen = [name for name in ("sigmoid", "softmax", "other_act") if getattr(self, name)]
        if len(chosen) > 1:
            advice = "Keep the one that turns input into probabilities."
            validation.fail("at most one of sigmoid, softmax, other_act", " and ".join(chosen), advice)

    def statistics(
        self, input: Tensor, target: Tensor, fields: Sequence[str], mask: Tensor | None = None, **settings: Any
    ) -> OverlapStatistics:
        """Return the statistics that `fields` names, (B, C), from one pass with this loss's activation.

        Check input and target, as a user passed them; raise TypeError, ValueError or `misfit` if they do not fit. mask:
        the voxels that count, (B, 1, *S) bool, instead of ignore_index. settings: of the pass, such as gamma.
        """
        input, target = self.tensors(input, target)
        settings["activation"] = "softmax" if self.softmax else "sigmoid" if self.sigmoid else "none"
        if self.softmax and input.shape[1] == 1:
            _warn_of("softmax=True")
            settings["activation"] = "none"
        elif self.other_act is not None:
            input = self.other_act(input)
        target, keep, settings["ignore_index"] = self.without_ignored(target, self.has_labels(input, target))
        settings["probabilities"] = self.extent_options()["soft"]  # its formula holds in [0, 1] alone
        return common.sums(input, target, keep if mask is None else mask, fields=fields, **settings)

    def extents(self, stats: OverlapStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """Return tp, tp + fp and tp + fn, shaped as the statistics, as squared_pred and soft_label define them."""
        return common.extents(stats, **self.extent_options())

    def extent_options(self) -> dict[str, bool]:
        """Return the keywords of `common.extents` that squared_pred and soft_label ask for: at most one is true."""
        squared = getattr(self, "squared_pred", False)
        return {"squared": squared, "soft": not squared and getattr(self, "soft_label", False)}


@common.declared
class _CostLoss(_OverlapLoss):
    """A loss that reduces a cost of each sample and class. A subclass defines `cost`."""

    broadcast = True
    """Whether the result of reduction="none" has axes of size 1 for space."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (B, C, *S), target (B, 1 or C, *S) -> loss, 0-d, or the costs for reduction="none"."""
        return self.from_statistics(self.statistics(input, target, self.reads), input.ndim)

    def from_statistics(self, stats: OverlapStatistics, ndim: int) -> Tensor:
        """Return the loss for the statistics of all classes, (B, C), of an input with ndim axes.

        It is 0-d; for reduction="none" the costs, (B, C) or (C,), with axes of 1 for space if `broadcast`.
        """
        stats = self.without_background(stats)
        cost = self.cost(stats.pool() if self.batch else stats)
        if self.reduction == "none":
            return cost.view(*cost.shape, *[1] * (ndim - 2)) if self.broadcast else cost
        return reductions.mean(cost) if self.reduction == "mean" else cost.sum()

    @abstractmethod
    def cost(self, stats: OverlapStatistics) -> Tensor:
        """Return the cost of each class, shaped as the statistics, or one cost for all classes, (..., 1).

        stats: (B, C), or (C,) with batch=True, of the classes that count, with the fields `reads`.
        """

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the statistics that `cost` reads."""
        return common.extent_fields(**self.extent_options())


@common.declared
class _DiceOptions(_OverlapLoss):
    """The options that MONAI's Dice losses share."""

    squared_pred: bool = False
    jaccard: bool = False
    reduction: Any = "mean"
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False


@common.declared
class DiceLoss(_CostLoss, _DiceOptions):
    """input, target -> 1 - (2 I + smooth_nr) / (P + T + smooth_dr), per sample and class, then reduced.

    sigmoid and softmax run inside the pass; other_act is applied before it. With soft_label and no sigmoid or softmax,
    input must hold probabilities: it is checked.

    Shapes: input (B, C, *S); target (B, C, *S), or (B, 1, *S) labels with to_onehot_y.

    Example:
        >>> loss = DiceLoss(to_onehot_y=True, softmax=True)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1192)

    Source: F. Milletari et al., "V-Net", 3DV 2016.
    """

    weight: Weight = None
    soft_label: bool = False
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hold_weight(self.weight)

    def cost(self, stats: OverlapStatistics) -> Tensor:
        """Return 1 - Dice (or Jaccard) of each class, times its weight where there are several classes."""
        alpha = 1.0 if self.jaccard else 0.5  # the factor of fp and of fn in `tversky`
        cost = 1 - common.tversky(*self.extents(stats), alpha, alpha, self.smooth_nr / 2, self.smooth_dr / 2)
        return cost if cost.shape[-1] == 1 else self.weighted(cost)


@common.declared
class MaskedDiceLoss(DiceLoss):
    """input, target, mask -> DiceLoss of the voxels where mask is 1.

    MONAI multiplies the label map by the mask before one_hot, so with to_onehot_y every masked voxel counts as truth of
    class 0; that number is kept. `softdice.SoftDiceLoss(...)(input, target, voxel_weight=mask)` leaves them out.

    Shapes: as DiceLoss; mask (B, 1, *S) or (1, 1, *S), zeros and ones.

    Example:
        >>> loss = MaskedDiceLoss(sigmoid=True)
        >>> loss(torch.zeros(1, 1, 4), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]))
        tensor(0.3333)
    """

    ignore_index: int | None = field(default=None, init=False)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """input (B, C, *S), target (B, 1 or C, *S), mask (B or 1, 1, *S), zeros and ones, or None -> loss, 0-d."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=3)
            return super().forward(input, target)
        _check_mask(mask, input)
        keep = (_hard_mask(mask) != 0).expand(input.shape[0], 1, *input.shape[2:])
        stats = self.statistics(input, target, self.reads, keep)
        if self.to_onehot_y and input.shape[1] > 1:  # MONAI counts masked voxels, with p = 0, as class 0
            masked_B1 = (~keep).flatten(1).sum(1, keepdim=True)
            masked_BC = nn.functional.pad(masked_B1, (0, input.shape[1] - 1)).to(getattr(stats, stats.fields[0]))
            of_target = ("target", "target_squared", "difference")
            sums = {name: getattr(stats, name) + masked_BC * (name in of_target) for name in stats.fields}
            stats = OverlapStatistics(sums)
        return self.from_statistics(stats, input.ndim)


@common.declared
class _GeneralizedDiceOptions(_OverlapLoss):
    """The options that MONAI's generalized Dice losses share."""

    w_type: Any = "square"
    reduction: Any = "mean"
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False

    def without_space(self) -> bool:
        """Return False: MONAI's formula for an input (B, C), without space, is another."""
        return False


@common.declared
class GeneralizedDiceLoss(_CostLoss, _GeneralizedDiceOptions):
    """input, target -> 1 - (2 sum w I + smooth_nr) / (sum w (P + T) + smooth_dr), w = 1 / T^2, 1 / T or 1.

    An absent class takes the largest weight of the others. MONAI's smoothing is kept: added to sums that the weights
    have made small, it decides the loss of large volumes, and with no class present the loss is 0 whatever is
    predicted. `softdice.GeneralizedDiceLoss` normalises the weights instead.

    Example:
        >>> loss = GeneralizedDiceLoss(to_onehot_y=True, softmax=True)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1192)

    Source: C. H. Sudre et al., DLMIA 2017.
    """

    soft_label: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.w_type = getattr(self.w_type, "value", self.w_type)
        validation.choice("w_type", self.w_type, ("square", "simple", "uniform"))

    def cost(self, stats: OverlapStatistics) -> Tensor:
        """Return one cost for all classes, (B, 1) or (1,): 1 - Dice of the sums weighted by w, as the class says."""
        weight = stats.target.detach() ** -{"square": 2.0, "simple": 1.0, "uniform": 0.0}[self.w_type]
        finite = torch.where(weight.isinf(), 0.0, weight)  # infinite for an absent class
        weight = torch.where(weight.isinf(), finite.amax(-1, keepdim=True), finite)
        tp, prediction, target = ((extent * weight).sum(-1, keepdim=True) for extent in self.extents(stats))
        return 1 - common.tversky(tp, prediction, target, 0.5, 0.5, self.smooth_nr / 2, self.smooth_dr / 2)


@common.declared
class TverskyLoss(_CostLoss):
    """input, target -> 1 - (I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr), per sample and class, then reduced.

    Example:
        >>> loss = TverskyLoss(to_onehot_y=True, softmax=True, alpha=0.3, beta=0.7)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1192)

    Source: S. S. M. Salehi et al., MLMI 2017.
    """

    alpha: float = 0.5
    beta: float = 0.5
    reduction: Any = "mean"
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    batch: bool = False
    soft_label: bool = False
    ignore_index: int | None = None

    broadcast = False

    def cost(self, stats: OverlapStatistics) -> Tensor:
        """Return 1 - Tversky index of each class."""
        return 1 - common.tversky(*self.extents(stats), self.alpha, self.beta, self.smooth_nr, self.smooth_dr)


@common.declared
class MCCLoss(_CostLoss):
    """input, target -> 1 - MCC, (I V - P T + smooth_nr) / sqrt(P T (V - P) (V - T) + smooth_dr), 0 if all is right.

    Example:
        >>> loss = MCCLoss(to_onehot_y=True, softmax=True)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.2384)

    Source: K. Abhishek, G. Hamarneh, "Matthews correlation coefficient loss", ISBI 2021.
    """

    reduction: Any = "mean"
    smooth_nr: float = 0.0
    smooth_dr: float = 1e-5
    batch: bool = False

    broadcast = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the statistics that `cost` reads."""
        return (*super().reads, "voxels")

    def cost(self, stats: OverlapStatistics) -> Tensor:
        """Return 1 - MCC of each class, and 0 where prediction and target are equal."""
        # float32 overflows in a product of four
        tp, prediction, target, voxels = (getattr(stats, name).double() for name in self.reads)
        covariance = tp * voxels - prediction * target + self.smooth_nr
        variances = prediction * target * (voxels - prediction) * (voxels - target) + self.smooth_dr
        all_right = (prediction == tp) & (target == tp)
        return torch.where(all_right, 0.0, 1 - covariance / variances.sqrt()).to(stats.prediction)


# --- focal


@common.declared
class FocalLoss(_MonaiLoss):
    """input, target -> mean focal loss over voxels and classes; a sigmoid, or with use_softmax a softmax, of logits.

    With a sigmoid the target must be zeros and ones.
    reduction="none" gives a map of the voxels and classes, (B, C, *S), by torch's operations: it costs some tensors of
    the size of input, in both passes, and takes fractional targets.

    Example:
        >>> loss = FocalLoss(to_onehot_y=True, gamma=0.0)
        >>> loss(torch.zeros(1, 2, 3), torch.tensor([[[0, 1, 1]]]))
        tensor(0.6931)

    Source: T.-Y. Lin et al., ICCV 2017.
    """

    gamma: float = 2.0
    alpha: float | Sequence[float] | Tensor | None = None
    weight: Weight = None
    reduction: Any = "mean"
    use_softmax: bool = False
    ignore_index: int | None = None
    misfit: ClassVar[type[Exception]] = ValueError

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hold_weight(self.weight)

    def without_space(self) -> bool:
        """Return whether MONAI's formula for an input (B, C), without space, equals the one for a single voxel."""
        return self.reduction != "sum"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (B, C, *S), target (B, 1 or C, *S) -> loss, 0-d, or its map (B, C, *S) for reduction="none"."""
        # 1. the target, and the voxels that count
        passed_input = input
        input, target = self.tensors(input, target)
        labels, one_map = self.has_labels(input, target), self.reduction == "none"
        target, keep, ignore_index = self.without_ignored(target, labels)
        if not (labels or self.use_softmax or one_map):
            check.hard(target)
        # 2. cut off a background that does not count: before a softmax or a map, or else from the statistics at the end
        C = input.shape[1]
        counted = C if self.include_background or C == 1 else C - 1  # number of classes that count
        drop_background = counted < C and (self.use_softmax or one_map)
        if labels and (drop_background or one_map):  # to values (B, C, *S), with a mask in the place of ignore_index
            keep = None if ignore_index is None else common.unlike(target, ignore_index)
            target, ignore_index = common.one_hot(target, C, ignore_index), None
        if drop_background:  # before the activation: MONAI's softmax is over the other classes
            input, target = input[:, 1:], target[:, 1:]
        if one_map:
            if counted == C and not self.include_background:
                _warn_of("include_background=False")
            loss_BCS = self.loss_map(input, target, keep)
            return loss_BCS.reshape(*loss_BCS.shape[:2], *passed_input.shape[2:])  # (B, C) gets no axis of space
        # 3. one pass: it weights with a sigmoid's alpha, `from_statistics` with a softmax's
        settings: dict[str, Any] = {"ignore_index": ignore_index, "gamma": self.gamma}
        if self.alpha is not None and not self.use_softmax:
            alpha = self._alpha(counted)
            if alpha.ndim == 0:
                settings.update(positive=alpha, negative=1 - alpha)
            else:  # with a number for each class, voxels outside of the class have the factor 1
                settings.update(positive=nn.functional.pad(alpha, (C - counted, 0)))
            stats = common.balanced(input, target, keep, field="focal", others=("voxels",), **settings)
        else:
            activation = "softmax" if self.use_softmax else "sigmoid"
            stats = common.sums(input, target, keep, fields=FOCAL, activation=activation, **settings)
        return self.from_statistics(stats if drop_background else self.without_background(stats))

    def loss_map(self, input: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
        """Return the loss of each voxel and class, (B, C, *S), by torch's operations, with 0 for an ignored voxel.

        input, target: logits and values in [0, 1] of the classes that count, (B, C, *S). keep: the voxels that count,
        (B, 1, *S) bool, or None for all.
        """
        x = input.to(result_dtype(input.dtype))
        y = target.to(x.dtype)
        if keep is not None:  # an ignored voxel costs 0, even if it holds nan
            x, y = torch.where(keep, x, 0.0), torch.where(keep, y, 0.0)
        if self.use_softmax:  # -y (1 - p)^gamma ln p
            log_p = x.log_softmax(1)
            focal = -power(1 - log_p.exp(), self.gamma) * log_p * y
        else:  # with q = 1 - p where y = 1, and p where y = 0:  q^gamma (-y ln p - (1 - y) ln(1 - p))
            q = (-x * (2 * y - 1)).sigmoid()
            focal = power(q, self.gamma) * (y * softplus(-x) + (1 - y) * softplus(x))
        if self.alpha is not None:
            alpha = self._alpha(x.shape[1]).to(x)
            if alpha.ndim > 0:  # with a softmax, too
                alpha = alpha.view(-1, *[1] * (x.ndim - 2))
                factor = alpha if self.use_softmax else torch.where(y == 1, alpha, 1.0)
            else:
                factor = y * alpha + (1 - y) * (1 - alpha)
            focal = focal * factor
        focal = focal if keep is None else focal * keep
        return self.weighted(focal.movedim(1, -1)).movedim(-1, 1)

    def from_statistics(self, stats: OverlapStatistics) -> Tensor:
        """Return the loss, 0-d, for statistics with the fields `FOCAL`, (B, C), of the classes that count."""
        focal, voxels = stats.focal, stats.voxels[:, :1]
        if self.alpha is not None and self.use_softmax:  # a sigmoid's is in the statistics
            focal = focal * self._alpha(focal.shape[-1]).to(focal)
        focal = self.weighted(focal)
        eps = torch.finfo(torch.float32).eps
        if self.reduction == "sum":  # the mean over space, added over samples and classes
            return (focal / voxels.clamp_min(eps)).sum()
        # With an ignore_index MONAI divides by voxels, not by voxels times classes.
        return focal.sum() / (voxels.sum().clamp_min(eps) * (focal.shape[-1] if self.ignore_index is None else 1))

    def weighted(self, cost: Tensor) -> Tensor:
        """Return a cost (..., C) times the buffer class_weight.

        Raise ValueError for a number of weights other than C, and for a list of weights if C is 1.
        """
        weight: Any = self.class_weight
        if weight is not None and cost.shape[-1] == 1 and weight.ndim > 0:
            validation.fail("one weight for one channel", tuple(weight.shape), "Pass one number.")
        return super().weighted(cost)

    def _alpha(self, channels: int) -> Tensor:
        """Return alpha, which is not None, as (channels,), or as a number, 0-d, with a sigmoid.

        With a softmax a number means 1 - alpha for class 0 and alpha for the others; it is ignored if class 0 does not
        count. channels: number of classes that count. Raise ValueError for a list of another length.
        """
        alpha = torch.as_tensor(self.alpha)
        if alpha.ndim > 0:
            if alpha.shape[0] != channels:
                got = alpha.shape[0]
                validation.fail(f"{channels} values of alpha, one per class that counts", got, "Give one per class.")
            return alpha
        if not self.use_softmax:
            return alpha
        if not self.include_background:
            warnings.warn("`include_background=False`, scalar `alpha` ignored when using softmax.", stacklevel=5)
            return torch.ones(channels)
        return torch.cat([(1 - alpha).view(1), alpha.expand(channels - 1)])


# --- sums of two losses


@common.declared
class DiceCELoss(_DiceOptions):
    """input, target -> lambda_dice DiceLoss + lambda_ce cross-entropy (binary for a single channel).

    One pass with softmax=True (sigmoid=True for a single channel); another activation of the Dice term, label_smoothing
    or a weight of a single channel costs a second one. Whatever stands in `dice`, `cross_entropy`,
    `binary_cross_entropy`, or a subclass's `ce` or `bce`, is called.

    Example:
        >>> loss = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(0.1269)

    Source: F. Isensee et al., "nnU-Net", Nature Methods 18, 2021.
    """

    weight: Weight = None
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Make the terms; the Dice term takes no weight of a background that does not count."""
        super().__post_init__()
        validation.choice("reduction", self.reduction, ("mean", "sum"))
        validation.number("lambda_dice", self.lambda_dice, 0)
        validation.number("lambda_ce", self.lambda_ce, 0)
        weight = None if self.weight is None else torch.as_tensor(self.weight, dtype=torch.float32)
        dice_weight = weight if weight is None or self.include_background or weight.ndim == 0 else weight[1:]
        self.dice = DiceLoss(**self.options(_DiceOptions), weight=dice_weight)
        entropy_options: dict[str, Any] = {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        self.cross_entropy = common.CrossEntropyLoss(weight, **entropy_options)
        self.binary_cross_entropy = common.BinaryCrossEntropyLoss(pos_weight=weight, reduction=self.reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), target (B, 1 or C, *S) -> loss, 0-d."""
        input, target = self.tensors(input, target)
        _check_channels(input, target)
        binary = input.shape[1] == 1
        method, module = (self.bce, self.binary_cross_entropy) if binary else (self.ce, self.cross_entropy)
        # dice, entropy: the terms that a pass may compute; None for those that have to be called
        dice, entropy = common.part(self.dice, DiceLoss), None
        if getattr(method, "__func__", None) in (DiceCELoss.ce, DiceCELoss.bce):  # a subclass has not overridden it
            entropy = common.part(module, common.CrossEntropyLoss, common.BinaryCrossEntropyLoss)
        same_activation = dice and (dice.sigmoid if binary else dice.softmax)
        if same_activation and entropy and entropy.shares(dice.ignore_index):
            stats = dice.statistics(input, target, (*dice.reads, *entropy.reads))
            value = entropy.from_statistics(stats, input, target)
            return self.lambda_dice * dice.from_statistics(stats, input.ndim) + self.lambda_ce * value
        input, target = common.flat_pair(input, target, dice, entropy)
        return self.lambda_dice * self.dice(input, target) + self.lambda_ce * method(input, target)

    def ce(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy, 0-d, of logits (B, C, *S), C > 1, and labels (B, 1, *S) or values (B, C, *S)."""
        if not common.part(self.cross_entropy, common.CrossEntropyLoss):  # a user's: convert for torch's
            labels = target.shape[1] == 1 and input.shape[1] != 1
            target = target[:, 0].long() if labels else target.to(input.dtype)
        return self.cross_entropy(input, target)

    def bce(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the binary cross-entropy, 0-d, of logits and values, (B, 1, *S) both."""
        ours = common.part(self.binary_cross_entropy, common.BinaryCrossEntropyLoss)
        return self.binary_cross_entropy(input, target if ours else target.to(input.dtype))


@common.declared
class DiceFocalLoss(_DiceOptions):
    """input, target -> lambda_dice DiceLoss + lambda_focal FocalLoss (of a sigmoid, whatever the Dice term has).

    One pass with sigmoid=True and no alpha, else two. Whatever stands in `dice` or `focal` is called.
    reduction="none" gives the map of `FocalLoss`, at its price, with the Dice term of its sample and class added.

    Example:
        >>> loss = DiceFocalLoss(sigmoid=True, lambda_dice=0.0, gamma=0.0)
        >>> loss(torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 1]]]))
        tensor(0.6931)

    Source: W. Zhu et al., "AnatomyNet", Medical Physics 46, 2019.
    """

    gamma: float = 2.0
    weight: Weight = None
    lambda_dice: float = 1.0
    lambda_focal: float = 1.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dice = DiceLoss(**self.options(_DiceOptions), weight=self.weight)
        self.focal = _focal_part(self, "lambda_dice", self.alpha)

    def without_space(self) -> bool:
        """Return whether MONAI's formula for an input (B, C), without space, equals the one for a single voxel."""
        return self.batch and self.reduction == "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), target (B, 1 or C, *S) -> loss, 0-d, or its map (B, C, *S) for reduction="none"."""
        return _with_focal(self, self.dice, (self.lambda_dice, self.lambda_focal), input, target)


@common.declared
class GeneralizedDiceFocalLoss(_GeneralizedDiceOptions):
    """input, target -> lambda_gdl GeneralizedDiceLoss + lambda_focal FocalLoss (of a sigmoid).

    One pass with sigmoid=True, else two. Whatever stands in `generalized_dice` or `focal` is called.
    reduction="none" gives the map of `FocalLoss`, at its price, with the generalized Dice term of its sample added.

    Example:
        >>> loss = GeneralizedDiceFocalLoss(sigmoid=True, lambda_gdl=0.0, gamma=0.0)
        >>> loss(torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 1]]]))
        tensor(0.6931)
    """

    gamma: float = 2.0
    weight: Weight = None
    lambda_gdl: float = 1.0
    lambda_focal: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.generalized_dice = GeneralizedDiceLoss(**self.options(_GeneralizedDiceOptions))
        self.focal = _focal_part(self, "lambda_gdl")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), target (B, 1 or C, *S) -> loss, 0-d, or its map (B, C, *S) for reduction="none"."""
        return _with_focal(self, self.generalized_dice, (self.lambda_gdl, self.lambda_focal), input, target)


def _focal_part(loss: Any, factor: str, alpha: float | None = None) -> FocalLoss:
    """Return the focal term of a compound loss, whose `__post_init__` calls this.

    factor: name of the attribute that weights the other term. Raise TypeError or ValueError unless this attribute and
    lambda_focal are numbers >= 0.
    """
    for name in (factor, "lambda_focal"):
        validation.number(name, getattr(loss, name), 0)
    names = ("gamma", "weight", "reduction")
    return FocalLoss(**loss.options(_MonaiLoss), **{name: getattr(loss, name) for name in names}, alpha=alpha)


def _with_focal(loss: Any, overlap: Any, factors: tuple[float, float], input: Tensor, target: Tensor) -> Tensor:
    """Return the weighted sum of two terms, `overlap` and `loss.focal`, from one pass where their settings agree.

    loss: the compound loss. overlap: its Dice term. Both terms may be a user's own modules. factors: of overlap, of
    focal. Check input and target, as a user passed them; raise TypeError or ValueError if they do not fit.
    """
    input, target = loss.tensors(input, target)
    _check_channels(input, target)
    dice = common.part(overlap, DiceLoss, GeneralizedDiceLoss)  # None: another module, which has to be called
    focal = common.part(loss.focal, FocalLoss)
    if dice and focal and _share_a_pass(dice, focal):
        if not (dice.to_onehot_y and input.shape[1] > 1):
            check.hard(target)
        stats = dice.statistics(input, target, (*dice.reads, *FOCAL), gamma=focal.gamma)
        focal_value = focal.from_statistics(focal.without_background(stats))
        return factors[0] * dice.from_statistics(stats, input.ndim) + factors[1] * focal_value
    if not focal or focal.reduction != "none":  # a map keeps the axes of space
        input, target = common.flat_pair(input, target, dice, focal)
    dense = target
    if loss.to_onehot_y and input.shape[1] > 1 and not (dice and focal):  # another's module takes it one-hot
        dense = common.one_hot(target, input.shape[1]).to(input.dtype)
    dice_value = overlap(input, target if dice else dense)
    return factors[0] * dice_value + factors[1] * loss.focal(input, target if focal else dense)


def _share_a_pass(dice: DiceLoss | GeneralizedDiceLoss, focal: FocalLoss) -> bool:
    """Return whether one pass with a sigmoid gives the statistics of both terms, two drop-in losses."""
    if not dice.sigmoid or focal.use_softmax or focal.alpha is not None or focal.reduction == "none":
        return False
    ignored = getattr(dice, "ignore_index", None)
    return (dice.to_onehot_y, ignored) == (focal.to_onehot_y, focal.ignore_index)


def _check_channels(input: Tensor, target: Tensor) -> None:
    """Raise ValueError unless target is (B, 1, *S) or (B, C, *S) for an input (B, C, *S), as MONAI's sums want it."""
    if input.ndim != target.ndim or target.shape[1] not in (1, input.shape[1]):
        expected = f"target of shape (B, 1, *S) or (B, {input.shape[1]}, *S)"
        advice = "Add the channel dimension with unsqueeze(1), or one channel per class."
        validation.fail(expected, tuple(target.shape), advice)


# --- around any loss


@common.declared
class DeepSupervisionLoss(common.DropIn):
    """outputs, target -> sum of weight times loss over the outputs, the target made smaller by the nearest voxel.

    Args:
        as monai.losses.DeepSupervisionLoss: loss, weight_mode "exp" (1, 1/2, 1/4... but 1/16 at least), "same" or
        "two" (1, 1/2, 1/2...), or weights. `softdice.DeepSupervision` divides by the sum of the weights.

    Example:
        >>> loss = DeepSupervisionLoss(DiceLoss(softmax=True, to_onehot_y=True))
        >>> loss([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], torch.ones(1, 1, 4, 4))
        tensor(1.0000)
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    weight_mode: str = "exp"
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        validation.choice("weight_mode", self.weight_mode, ("same", "exp", "two"))

    def get_weights(self, levels: int = 1) -> list[float]:
        """Return the factor of each of `levels` outputs, largest first: those of the user if there are enough."""
        if self.weights is not None and len(self.weights) >= levels:
            return list(self.weights[:levels])
        least = {"same": 1.0, "exp": 0.0625, "two": 0.5}[self.weight_mode]
        return [max(0.5**level, least) for level in range(levels)]

    def forward(self, input: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """outputs (B, C, *s), largest first, or a single one, with weight 1; target (B, 1 or C, *S) -> loss."""
        outputs = [input] if isinstance(input, Tensor) else input
        weights = [1.0] if isinstance(input, Tensor) else self.get_weights(len(input))
        total: Any = 0.0
        for weight, output in zip(weights, outputs, strict=True):
            total = total + weight * self.loss(output, at_resolution(target, output, labels=True))  # type: ignore[arg-type]
        return torch.as_tensor(total)


class MaskedLoss(common.DropIn):
    """input, target, mask -> loss(input * mask, target * mask), as MONAI has it.

    A masked voxel is then a logit of 0 with truth 0, and counts as such; `MaskedDiceLoss`, and `voxel_weight` of the
    package's own losses, leave it out.

    Args:
        loss: a loss, or the class of one with the arguments that follow.

    Raises:
        ValueError: something that cannot be called.

    Example:
        >>> loss = MaskedLoss(DiceLoss, sigmoid=True)
        >>> loss(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0]]]))
        tensor(0.5000)
    """

    @validation.public
    def __init__(self, loss: Callable[..., Any], *loss_args: Any, **loss_kwargs: Any) -> None:
        super().__init__()
        self.loss = loss(*loss_args, **loss_kwargs) if isinstance(loss, type) else loss
        if not callable(self.loss):
            validation.fail("loss to be callable", repr(loss), "Pass a loss, or the class of one and its arguments.")

    @validation.public
    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """input, target (B, C, *S), mask (B, 1, *S) or (1, 1, *S) of factors -> loss; without a mask, that of all."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=3)
            return torch.as_tensor(self.loss(input, target))
        _check_mask(mask, input)
        return torch.as_tensor(self.loss(input * mask, target * mask))


def _check_mask(mask: Tensor, input: Tensor) -> None:
    """Raise ValueError unless mask is (B, 1, *S) or (1, 1, *S) for an input (B, C, *S)."""
    if mask.shape[0] not in (1, input.shape[0]) or tuple(mask.shape[1:]) != (1, *input.shape[2:]):
        expected = f"mask of shape {(input.shape[0], 1, *input.shape[2:])}"
        validation.fail(expected, tuple(mask.shape), "Give one mask for the batch or one per sample.")


Dice = DiceLoss
dice_ce = DiceCELoss
dice_focal = DiceFocalLoss
generalized_dice = GeneralizedDiceLoss
generalized_dice_focal = GeneralizedDiceFocalLoss
