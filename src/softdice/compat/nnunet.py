"""nnU-Net's losses (nnunetv2.training.loss), their constructors and numbers, from one pass over the voxels.

Write `from softdice.compat.nnunet import MemoryEfficientSoftDiceLoss, DC_and_CE_loss` in the place of nnU-Net's import.
Written after nnunetv2 2.8.1.

Shapes: B sample, C class, *S space. A `loss_mask` is (B, 1, *S), 0 where a voxel is left out; None counts all.
A call raises TypeError or ValueError for tensors that do not fit, a constructor for options that are not supported.
`dc` is the Dice term of a compound loss, `ce` its cross-entropy; a user may put another module in the place of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from softdice import reductions, validation
from softdice.compat import common
from softdice.losses.ranked import largest
from softdice.statistics import OverlapStatistics

Nonlinearity = Callable[[Tensor], Tensor]


def activation_of(apply_nonlin: Nonlinearity | None) -> str | None:
    """Return the activation of a pass that equals apply_nonlin; None if the caller has to apply it before the pass.

    Example:
        >>> activation_of(torch.sigmoid), activation_of(nn.Softmax(1)), activation_of(None), activation_of(torch.tanh)
        ('sigmoid', 'softmax', 'none', None)
    """
    if apply_nonlin is None:
        return "none"
    if type(apply_nonlin) is nn.Softmax:
        return "softmax" if apply_nonlin.dim == 1 else None
    if type(apply_nonlin) is nn.Sigmoid or apply_nonlin in (torch.sigmoid, nn.functional.sigmoid):
        return "sigmoid"
    return "softmax" if apply_nonlin is from_nnunet("utilities.helpers", "softmax_helper_dim1") else None


def from_nnunet(module: str, name: str) -> Any:
    """Return the object `name` of nnunetv2's `module`, to compare a user's with.

    If that module is not imported, the user cannot have the object: return a placeholder, which equals no other object.
    """
    return getattr(sys.modules.get(f"nnunetv2.{module}"), name, from_nnunet)


# --- Dice


@validation.public
def get_tp_fp_fn_tn(
    net_output: Tensor,
    gt: Tensor,
    axes: Sequence[int] | None = None,
    mask: Tensor | None = None,
    square: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """net_output, gt -> true positives, false positives, false negatives and true negatives of each class.

    For probabilities they are soft: sums of p y, p (1 - y), (1 - p) y and (1 - p) (1 - y). Gradients reach net_output.

    Args:
        axes: what is added up: all of space (None), or the batch and all of space.
        mask: (B, 1, *S), 0 = left out.
        square: nnU-Net's squares of the four products; only False, since sums of p and p y do not give them.

    Shapes: net_output (B, C, *S) probabilities; gt (B, *S), (B, 1, *S) labels or (B, C, *S) -> four times (B, C), or
    (C,) where axes has the batch.

    Example:
        >>> get_tp_fp_fn_tn(torch.tensor([[[0.75, 0.25], [0.25, 0.75]]]), torch.tensor([[0, 1]]))[1]
        tensor([[0.2500, 0.2500]])
    """
    x, y = common.tensors(net_output, gt)
    space = set(range(2, x.ndim))
    summed_axes = space if axes is None else {axis % x.ndim for axis in axes}
    if summed_axes not in (space, space | {0}):
        validation.fail("axes of all of space, with or without the batch", axes, "Use nnU-Net's for other sums.")
    if square:
        validation.fail("square=False", square, "Use nnU-Net's for the squares.")
    stats = common.sums(x, y, mask, fields=(*common.extent_fields(), "voxels"))
    stats = stats.pool() if 0 in summed_axes else stats
    tp, prediction, target = common.extents(stats)
    return tp, prediction - tp, target - tp, stats.voxels - prediction - target + tp


@common.declared
class SoftDiceLoss(common.DropIn):
    """x, y -> minus the mean Dice coefficient.

        loss = -mean_c (2 I_c + smooth) / max(P_c + T_c + smooth, 1e-8)

    Args:
        apply_nonlin: torch.sigmoid, nn.Sigmoid(), nn.Softmax(1) and nnU-Net's softmax_helper_dim1 run inside the pass;
            any other callable is applied before it.
        batch_dice: add over the batch (and, with ddp, over the ranks) before dividing.
        do_bg: whether class 0 enters the mean.
        smooth: added to numerator and denominator.
        ddp: with batch_dice, add over the ranks of the default process group, if there is one.
        clip_tp: lower bound of the intersection in numerator and denominator, or None.

    Shapes: x (B, C, *S); y (B, *S), (B, 1, *S) labels or (B, C, *S); loss_mask (B, 1, *S), 0 = left out.

    Example:
        >>> loss = SoftDiceLoss(nn.Softmax(1), smooth=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(-0.8808)

    Source: F. Isensee et al., "nnU-Net", Nature Methods 18, 2021.
    """

    apply_nonlin: Nonlinearity | None = None
    batch_dice: bool = False
    do_bg: bool = True
    smooth: float = 1.0
    ddp: bool = True
    clip_tp: float | None = None

    reads = common.extent_fields()

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """x (B, C, *S), y labels or values, loss_mask (B, 1, *S) or None -> minus the mean Dice coefficient, 0-d."""
        x, y = common.tensors(x, y)
        activation = activation_of(self.apply_nonlin)
        if activation is None and self.apply_nonlin is not None:  # the second is for type checkers: None gives "none"
            x, activation = self.apply_nonlin(x), "none"
        return self.from_statistics(common.sums(x, y, loss_mask, fields=self.reads, activation=activation or "none"))

    def from_statistics(self, stats: OverlapStatistics) -> Tensor:
        """Return minus the mean Dice coefficient, 0-d, for the statistics `reads`, (B, C); 0 for an empty batch."""
        if self.batch_dice:
            stats = stats.pool()
            stats = common.add_over_ranks(stats) if self.ddp else stats
        tp, prediction, target = common.extents(stats)
        if self.clip_tp is not None:  # raise tp to clip_tp; fp = prediction - tp and fn = target - tp stay the same
            increase = (self.clip_tp - tp).clamp_min(0)
            tp, prediction, target = tp + increase, prediction + increase, target + increase
        # with factors of 1/2 numerator and denominator are half of the formula's, and so is what is added
        dice = common.tversky(tp, prediction, target, 0.5, 0.5, self.smooth / 2, self.smooth / 2, least=0.5e-8)
        return -reductions.mean(dice if self.do_bg else dice[..., 1:])


@common.declared
class MemoryEfficientSoftDiceLoss(SoftDiceLoss):
    """x, y -> minus the mean Dice coefficient: SoftDiceLoss without clip_tp.

    nnU-Net keeps two classes for one formula because of memory; here neither needs memory beside the gradient.

    Example:
        >>> loss = MemoryEfficientSoftDiceLoss(nn.Softmax(1), do_bg=False, smooth=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(-0.8808)
    """

    clip_tp: float | None = field(default=None, init=False)


DICE = (SoftDiceLoss, MemoryEfficientSoftDiceLoss)


def _dice(dice_class: type[nn.Module], nonlin: Nonlinearity, keywords: dict[str, Any]) -> SoftDiceLoss:
    """Make the Dice loss of this module for `dice_class`, a class of `DICE` or nnU-Net's class of that name.

    nonlin: its apply_nonlin. keywords: its other arguments, as a user passed them. Raise ValueError for other classes.
    """
    for cls in DICE:
        if dice_class in (cls, from_nnunet("training.loss.dice", cls.__name__)):
            return cls(nonlin, **keywords)
    advice = "Set the attribute dc to a loss of your own, or add it to softdice.CrossEntropyLoss."
    expected = f"dice_class to be one of {', '.join(cls.__name__ for cls in DICE)}"
    raise ValueError(validation.message(expected, getattr(dice_class, "__name__", repr(dice_class)), advice))


# --- cross-entropy, and both


class RobustCrossEntropyLoss(common.CrossEntropyLoss):
    """input, target -> torch's cross-entropy, of labels with a channel dimension or without one, floats too.

    Shapes: input (B, C, *S) logits; target (B, 1, *S) or (B, *S) labels.

    Example:
        >>> loss = RobustCrossEntropyLoss()
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 1.0]]]))
        tensor(0.1269)
    """

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), labels (B, 1, *S) or (B, *S) -> loss, 0-d, or a map (B, *S) for reduction="none"."""
        return super().forward(*common.tensors(input, target))


class TopKLoss(RobustCrossEntropyLoss):
    """inp, target -> mean cross-entropy of the k percent of the voxels where it is largest, in the memory of a map.

    Args:
        weight, ignore_index, label_smoothing: of torch.nn.CrossEntropyLoss. A weight with label_smoothing costs some
            tensors of the size of inp.
        k: percent, rounded down; an ignored voxel counts as one that costs 0.

    Shapes: inp (B, C, *S) logits; target (B, 1, *S) or (B, *S) labels.

    Example:
        >>> loss = TopKLoss(k=50)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 1.0]]]))
        tensor(0.3133)
    """

    @validation.public
    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, k: float = 10, label_smoothing: float = 0
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        self.k = k

    @validation.public
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), labels (B, 1, *S) or (B, *S) -> loss, 0-d."""
        entropy = super().forward(input, target)
        k = int(entropy.numel() * self.k / 100)
        return largest(entropy.reshape(1, -1), k) / k


@common.declared
class DC_and_CE_loss(common.DropIn):  # noqa: N801 (nnU-Net's name)
    """net_output, target -> weight_dice (-Dice) + weight_ce cross-entropy, from one pass.

    Args:
        soft_dice_kwargs: keywords of SoftDiceLoss without apply_nonlin, which is the softmax.
        ce_kwargs: of torch.nn.CrossEntropyLoss: weight, ignore_index, label_smoothing, reduction "mean" or "sum".
        weight_ce, weight_dice: factors of the two terms.
        ignore_label: voxels with this label enter neither term; a batch of nothing else has a cross-entropy of 0.
        dice_class: SoftDiceLoss or MemoryEfficientSoftDiceLoss, nnU-Net's or ours.

    Shapes: net_output (B, C, *S) logits; target (B, 1, *S) labels.

    One pass serves both terms, unless label_smoothing or an ignore_index of the cross-entropy's own sets it apart.
    Whatever stands in `dc` or `ce` is called.

    Example:
        >>> loss = DC_and_CE_loss({"smooth": 0.0}, {})
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(-0.7539)
    """

    soft_dice_kwargs: dict[str, Any]
    ce_kwargs: dict[str, Any]
    weight_ce: float = 1
    weight_dice: float = 1
    ignore_label: int | None = None
    dice_class: type[nn.Module] = SoftDiceLoss

    def __post_init__(self) -> None:
        """Make both terms; ignore_label becomes the ignore_index of the cross-entropy.

        Its `guard` makes it 0, not nan, where every voxel is ignored. Raise ValueError for a dice_class or a keyword
        that is not supported.
        """
        keywords = _keywords("ce_kwargs", self.ce_kwargs, ("weight", "ignore_index", "label_smoothing", "reduction"))
        if self.ignore_label is not None:
            keywords["ignore_index"] = self.ignore_label
        self.ce = RobustCrossEntropyLoss(**keywords)
        self.ce.guard = self.ignore_label is not None
        self.dc = _dice(self.dice_class, nn.Softmax(1), self.soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), labels (B, 1, *S) -> loss, 0-d."""
        net_output, target = common.tensors(net_output, target)
        if target.ndim != net_output.ndim or target.shape[1] != 1:
            advice = "Give the label map a channel dimension of 1."
            validation.fail("target of shape (B, 1, *S)", tuple(target.shape), advice)
        dc, ce, ignored = common.part(self.dc, *DICE), common.part(self.ce, RobustCrossEntropyLoss), self.ignore_label
        # one pass, if it may compute both terms, and both have a softmax and leave out the same label
        both = dc and ce and self.weight_dice != 0 and self.weight_ce != 0
        if both and activation_of(dc.apply_nonlin) == "softmax" and ce.shares(ignored):
            settings: dict[str, Any] = {"activation": "softmax", "ignore_index": ignored}
            stats = common.sums(net_output, target, fields=(*dc.reads, *ce.reads), **settings)
            entropy = ce.from_statistics(stats, net_output, target)
            return self.weight_ce * entropy + self.weight_dice * dc.from_statistics(stats)
        keep = None if ignored is None else common.unlike(target, ignored)
        loss: Any = 0.0
        if self.weight_dice != 0:
            labels = target if keep is None else torch.where(keep, target, 0)  # ignore_label may be no class
            loss = self.weight_dice * self.dc(net_output, labels, loss_mask=keep)
        # a user's cross-entropy may be nan if every voxel is ignored: do not call it then
        if self.weight_ce != 0 and (ce or keep is None or bool(keep.any())):
            loss = loss + self.weight_ce * self.ce(net_output, target[:, 0])
        return torch.as_tensor(loss)


@common.declared
class DC_and_topk_loss(DC_and_CE_loss):  # noqa: N801 (nnU-Net's name)
    """net_output, target -> weight_dice (-Dice) + weight_ce cross-entropy of the k percent of the worst voxels.

    Args: as for `DC_and_CE_loss`, with ce_kwargs for `TopKLoss`. The two terms have passes of their own.

    Example:
        >>> loss = DC_and_topk_loss({"smooth": 0.0}, {"k": 50})
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(-0.7539)
    """

    dice_class: type[nn.Module] = field(default=SoftDiceLoss, init=False)

    def __post_init__(self) -> None:
        ignore = {} if self.ignore_label is None else {"ignore_index": self.ignore_label}
        self.ce = TopKLoss(**{**self.ce_kwargs, **ignore})
        self.dc = _dice(self.dice_class, nn.Softmax(1), self.soft_dice_kwargs)


@common.declared
class DC_and_BCE_loss(common.DropIn):  # noqa: N801 (nnU-Net's name)
    """net_output, target -> weight_dice (-Dice) + weight_ce binary cross-entropy, from one pass.

    Args:
        bce_kwargs: of torch.nn.BCEWithLogitsLoss: pos_weight (one number, or (C, 1, ...)), reduction "mean" or "sum".
            `weight` is not supported.
        soft_dice_kwargs: keywords of SoftDiceLoss without apply_nonlin, which is the sigmoid.
        weight_ce, weight_dice: factors of the two terms.
        use_ignore_label: the last channel of the target marks voxels that enter neither term.
        dice_class: SoftDiceLoss or MemoryEfficientSoftDiceLoss, nnU-Net's or ours.

    Shapes: net_output (B, C, *S) logits; target (B, C, *S), or (B, C + 1, *S) with use_ignore_label.

    With use_ignore_label nnU-Net divides the cross-entropy by voxels, not by voxels times classes; so does this.
    Whatever stands in `dc` or `ce` is called.

    Example:
        >>> loss = DC_and_BCE_loss({}, {"smooth": 0.0})
        >>> loss(torch.tensor([[[2.0, -2.0], [-2.0, 2.0]]]), torch.tensor([[[1, 0], [0, 1]]]))
        tensor(-0.7539)
    """

    bce_kwargs: dict[str, Any]
    soft_dice_kwargs: dict[str, Any]
    weight_ce: float = 1
    weight_dice: float = 1
    use_ignore_label: bool = False
    dice_class: type[nn.Module] = MemoryEfficientSoftDiceLoss

    def __post_init__(self) -> None:
        """Make both terms; raise ValueError for a dice_class or keyword that is not supported, or a pos_weight that is
        neither one number nor one per class."""
        keywords = _keywords("bce_kwargs", self.bce_kwargs, ("pos_weight", "reduction"))
        weight = keywords.get("pos_weight")
        if weight is not None and weight.numel() > 1 and weight.numel() != weight.shape[0]:
            advice = "Pass one number, or one per class as (C, 1, ..., 1)."
            validation.fail("pos_weight per class", tuple(weight.shape), advice)
        if self.use_ignore_label:
            keywords["reduction"] = "sum"  # nnU-Net makes a map and adds it up
        self.ce = common.BinaryCrossEntropyLoss(**keywords)
        self.dc = _dice(self.dice_class, torch.sigmoid, self.soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), zeros and ones (B, C, *S), or (B, C + 1, *S) with use_ignore_label -> loss, 0-d."""
        net_output, target = common.tensors(net_output, target)
        mask = None
        if self.use_ignore_label:
            mask, target = target[:, -1:] == 0, target[:, :-1]
        if target.shape != net_output.shape:
            advice = "Give one channel of target per channel of net_output."
            validation.fail(f"target of shape {tuple(net_output.shape)}", tuple(target.shape), advice)
        dc, ce = common.part(self.dc, *DICE), common.part(self.ce, common.BinaryCrossEntropyLoss)
        if dc and ce and ce.weight is None and activation_of(dc.apply_nonlin) == "sigmoid":
            stats = ce.statistics(net_output, target, mask, dc.reads)
            dice = dc.from_statistics(stats)
            entropy = ce.from_statistics(stats, net_output, target)
        else:
            dice = self.dc(net_output, target, loss_mask=mask)
            if ce and ce.weight is None:
                entropy = ce.from_statistics(ce.statistics(net_output, target, mask), net_output, target)
            else:  # a user's, which with a mask has to return a map, as in nnU-Net
                entropy = self.ce(net_output, target.to(net_output.dtype))
                entropy = entropy if mask is None else (entropy * mask).sum()
        if mask is not None:
            entropy = entropy / mask.sum().clamp_min(1e-8)
        return self.weight_ce * entropy + self.weight_dice * dice


def _keywords(argument: str, keywords: dict[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Return the keywords of a cross-entropy, as a user passed them, with weights as float32 tensors.

    argument: the constructor's argument that they are the value of, for the message. allowed: their possible names.
    Raise ValueError for another name, or a reduction other than "mean" and "sum".
    """
    for name in keywords:
        if name not in allowed:
            validation.fail(f"{argument} among {', '.join(allowed)}", name, "Leave it out, or keep nnU-Net's own loss.")
    validation.choice("reduction", keywords.get("reduction", "mean"), ("mean", "sum"))
    weights = {name: value for name, value in keywords.items() if name.endswith("weight") and value is not None}
    return {**keywords, **{name: torch.as_tensor(value, dtype=torch.float32) for name, value in weights.items()}}


# --- deep supervision


class DeepSupervisionWrapper(nn.Module):
    """outputs, targets -> sum of weight times loss over the resolutions, one output and one target for each.

    Args:
        loss: any loss of as many tensors as there are lists.
        weight_factors: one per resolution, or None for 1; a resolution of weight 0 is not computed.

    `softdice.DeepSupervision` divides by the sum of the weights, and makes the targets smaller itself.

    Example:
        >>> loss = DeepSupervisionWrapper(DC_and_CE_loss({}, {}), (1.0, 0.5))
        >>> loss([torch.zeros(1, 2, 4), torch.zeros(1, 2, 2)], [torch.ones(1, 1, 4), torch.ones(1, 1, 2)])
        tensor(0.2034)
    """

    @validation.public
    def __init__(self, loss: Callable[..., Tensor], weight_factors: Sequence[float] | None = None) -> None:
        super().__init__()
        if weight_factors is not None and not any(weight_factors):
            validation.fail("weight_factors that are not all 0", weight_factors, "Pass one per output.", AssertionError)
        self.loss, self.weight_factors = loss, None if weight_factors is None else tuple(weight_factors)

    @validation.public
    def forward(self, *args: Sequence[Tensor]) -> Tensor:
        """outputs, targets, each a list with a tensor for each resolution -> loss; more lists go to the loss, too."""
        for tensors in args:
            if not isinstance(tensors, (list, tuple)):
                advice = "Pass one output and one target for each resolution."
                validation.fail("lists of tensors", type(tensors).__name__, advice, AssertionError)
        weights = self.weight_factors or (1.0,) * len(args[0])
        return sum(factor * self.loss(*tensors) for factor, *tensors in zip(weights, *args, strict=False) if factor)
