"""nnU-Net's losses (nnunetv2.training.loss), their constructors and numbers, from one pass over the voxels.

`from softdice.compat.nnunet import MemoryEfficientSoftDiceLoss, DC_and_CE_loss` in the place of the same names there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.compat.common import add_over_ranks, one_by_one, per_class, sums
from softdice.statistics import OverlapStatistics

Nonlinearity = Callable[[Tensor], Tensor]
FIELDS = ("intersection", "prediction", "target")


def activation_of(apply_nonlin: Nonlinearity | None) -> str | None:
    """apply_nonlin -> the activation of the pass that equals it, or None: then it is applied before the pass.

    Example:
        >>> activation_of(torch.sigmoid), activation_of(nn.Softmax(1)), activation_of(None), activation_of(torch.tanh)
        ('sigmoid', 'softmax', 'none', None)
    """
    if apply_nonlin is None:
        return "none"
    if apply_nonlin in (torch.sigmoid, torch.nn.functional.sigmoid) or isinstance(apply_nonlin, nn.Sigmoid):
        return "sigmoid"
    if getattr(apply_nonlin, "__name__", "") == "softmax_helper_dim1":
        return "softmax"
    if isinstance(apply_nonlin, nn.Softmax) and apply_nonlin.dim == 1:
        return "softmax"
    return None


class SoftDiceLoss(nn.Module):
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

    Source: F. Isensee et al., "nnU-Net", Nature Methods 18, 2021; nnunetv2 2.8.1, training/loss/dice.py.
    """

    @validation.public
    def __init__(
        self,
        apply_nonlin: Nonlinearity | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
    ) -> None:
        super().__init__()
        self.apply_nonlin, self.batch_dice, self.do_bg = apply_nonlin, batch_dice, do_bg
        self.smooth, self.ddp, self.clip_tp = smooth, ddp, clip_tp

    @validation.public
    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """x, y -> minus the mean Dice coefficient."""
        activation = activation_of(self.apply_nonlin)
        if activation is None and self.apply_nonlin is not None:
            x, activation = self.apply_nonlin(x), "none"
        return self.from_statistics(sums(x, y, loss_mask, fields=FIELDS, activation=activation or "none"))

    def from_statistics(self, stats: OverlapStatistics) -> Tensor:
        """statistics (B, C) -> minus the mean Dice coefficient."""
        if self.batch_dice:
            stats = stats.pool()
            stats = add_over_ranks(stats) if self.ddp else stats
        overlap = stats.intersection
        apart = stats.prediction + stats.target - 2 * overlap
        if self.clip_tp is not None:
            overlap = overlap.clamp_min(self.clip_tp)
        dice = (2 * overlap + self.smooth) / (2 * overlap + apart + self.smooth).clamp_min(1e-8)
        return -(dice if self.do_bg else dice[..., 1:]).mean()


class MemoryEfficientSoftDiceLoss(SoftDiceLoss):
    """x, y -> minus the mean Dice coefficient: SoftDiceLoss without clip_tp.

    nnU-Net keeps two classes for one formula because of memory; here both need none beside the gradient.

    Example:
        >>> loss = MemoryEfficientSoftDiceLoss(nn.Softmax(1), do_bg=False, smooth=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(-0.8808)
    """

    @validation.public
    def __init__(
        self,
        apply_nonlin: Nonlinearity | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
    ) -> None:
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp)


class DC_and_CE_loss(nn.Module):  # noqa: N801 (nnU-Net's name)
    """net_output, target -> weight_dice (-Dice) + weight_ce cross-entropy, from one pass.

    Args:
        soft_dice_kwargs: keywords of SoftDiceLoss without apply_nonlin, which is the softmax.
        ce_kwargs: of torch.nn.CrossEntropyLoss: weight, ignore_index, label_smoothing, reduction "mean" or "sum".
        weight_ce, weight_dice: factors of the two terms.
        ignore_label: voxels with this label enter neither term; a batch of nothing else has a cross-entropy of 0.
        dice_class: SoftDiceLoss or MemoryEfficientSoftDiceLoss, nnU-Net's or ours.

    Shapes: net_output (B, C, *S) logits; target (B, 1, *S) labels.

    One pass serves both terms, unless label_smoothing or an ignore_index of the cross-entropy's own sets it apart.

    Example:
        >>> loss = DC_and_CE_loss({"smooth": 0.0}, {})
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
        tensor(-0.7539)
    """

    @validation.public
    def __init__(
        self,
        soft_dice_kwargs: dict[str, Any],
        ce_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: type[nn.Module] = SoftDiceLoss,
    ) -> None:
        super().__init__()
        self.weight_ce, self.weight_dice, self.ignore_label = weight_ce, weight_dice, ignore_label
        self.dc = _dice(dice_class, nn.Softmax(1), soft_dice_kwargs)
        chosen = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
        _known("ce_kwargs", ce_kwargs, chosen)
        chosen.update(ce_kwargs)
        if ignore_label is not None:
            chosen["ignore_index"] = ignore_label
        validation.choice("reduction", chosen["reduction"], ("mean", "sum"))
        weight: Any = chosen["weight"]
        weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        self.register_buffer("ce_weight", weight, persistent=False)
        self.ce_reduction = chosen["reduction"]
        self.ce_ignore: Any = chosen["ignore_index"]
        self.label_smoothing: Any = chosen["label_smoothing"]

    ce_weight: Tensor | None

    @validation.public
    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """net_output, target -> loss."""
        if target.ndim != net_output.ndim or target.shape[1] != 1:
            advice = "Give the label map a channel dimension of 1."
            validation.fail("target of shape (B, 1, *S)", tuple(target.shape), advice)
        entropy = ("cross_entropy", "labelled")
        # An ignore_index of -100 that no label has concerns nobody: the check of the labels would refuse one.
        apart = self.label_smoothing != 0 or self.ce_ignore not in (self.ignore_label, -100)
        both = self.weight_ce != 0 and not apart
        stats = sums(
            net_output,
            target,
            fields=(*FIELDS, *entropy) if both else FIELDS,
            activation="softmax",
            ignore_index=self.ignore_label,
        )
        loss = self.weight_dice * self.dc.from_statistics(stats) if self.weight_dice != 0 else 0.0
        if self.weight_ce != 0:
            if apart:
                stats = sums(
                    net_output,
                    target,
                    fields=entropy,
                    activation="softmax",
                    ignore_index=self.ce_ignore,
                    label_smoothing=self.label_smoothing,
                )
            loss = loss + self.weight_ce * self._entropy(stats.pool())
        return torch.as_tensor(loss)

    def _entropy(self, stats: OverlapStatistics) -> Tensor:
        weight = torch.ones_like(stats.labelled) if self.ce_weight is None else self.ce_weight.to(stats.labelled)
        total = (weight * stats.cross_entropy).sum()
        if self.ce_reduction == "sum":
            return total
        amount = (weight * stats.labelled).sum()
        if self.ignore_label is None:
            return total / amount
        return total / torch.where(stats.labelled.sum() > 0, amount, 1.0)


class DC_and_BCE_loss(nn.Module):  # noqa: N801 (nnU-Net's name)
    """net_output, target -> weight_dice (-Dice) + weight_ce binary cross-entropy, from one pass.

    Args:
        bce_kwargs: of torch.nn.BCEWithLogitsLoss: pos_weight (one number, or (C, 1, ...)), reduction "mean" or "sum".
            A pos_weight costs a second pass; `weight` cannot be had.
        soft_dice_kwargs: keywords of SoftDiceLoss without apply_nonlin, which is the sigmoid.
        weight_ce, weight_dice: factors of the two terms.
        use_ignore_label: the last channel of the target marks voxels that enter neither term.
        dice_class: SoftDiceLoss or MemoryEfficientSoftDiceLoss, nnU-Net's or ours.

    Shapes: net_output (B, C, *S) logits; target (B, C, *S), or (B, C + 1, *S) with use_ignore_label.

    With use_ignore_label nnU-Net divides the cross-entropy by voxels, not by voxels times classes; so does this.

    Example:
        >>> loss = DC_and_BCE_loss({}, {"smooth": 0.0})
        >>> loss(torch.tensor([[[2.0, -2.0], [-2.0, 2.0]]]), torch.tensor([[[1, 0], [0, 1]]]))
        tensor(-0.7539)
    """

    @validation.public
    def __init__(
        self,
        bce_kwargs: dict[str, Any],
        soft_dice_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: type[nn.Module] = MemoryEfficientSoftDiceLoss,
    ) -> None:
        super().__init__()
        self.weight_ce, self.weight_dice, self.use_ignore_label = weight_ce, weight_dice, use_ignore_label
        self.dc = _dice(dice_class, torch.sigmoid, soft_dice_kwargs)
        _known("bce_kwargs", bce_kwargs, {"pos_weight": None, "reduction": "mean"})
        self.reduction = bce_kwargs.get("reduction", "mean")
        validation.choice("reduction", self.reduction, ("mean", "sum"))
        pos_weight = bce_kwargs.get("pos_weight")
        pos_weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=torch.float32)
        if pos_weight is not None and pos_weight.numel() > 1 and pos_weight.numel() != pos_weight.shape[0]:
            advice = "Pass one number, or one per class as (C, 1, ..., 1)."
            validation.fail("pos_weight per class", tuple(pos_weight.shape), advice)
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    pos_weight: Tensor | None

    @validation.public
    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """net_output, target -> loss."""
        mask = None
        if self.use_ignore_label:
            mask, target = target[:, -1:] == 0, target[:, :-1]
        if target.shape != net_output.shape:
            advice = "Give one channel of target per channel of net_output."
            validation.fail(f"target of shape {tuple(net_output.shape)}", tuple(target.shape), advice)
        fields = (*FIELDS, "cross_entropy", "voxels")
        stats = sums(net_output, target, mask, fields=fields, activation="sigmoid")
        entropy = stats.cross_entropy
        if self.pos_weight is not None:
            entropy = entropy + self._excess(net_output, target, mask)
        total = entropy.sum()
        if self.use_ignore_label:
            total = total / stats.voxels[:, 0].sum().clamp_min(1e-8)
        elif self.reduction == "mean":
            total = total / net_output.numel()
        return self.weight_ce * total + self.weight_dice * self.dc.from_statistics(stats)

    def _excess(self, net_output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """What (pos_weight - 1) of the positive part adds, (B, C): the sum of y (-ln p) with y for a weight."""
        assert self.pos_weight is not None
        channels = net_output.shape[1]
        if self.pos_weight.numel() > 1 and self.pos_weight.shape != (channels, *[1] * (net_output.ndim - 2)):
            advice = "BCEWithLogitsLoss broadcasts it against (C, *S): give it as many dimensions."
            expected = f"pos_weight of shape {(channels, *[1] * (net_output.ndim - 2))}"
            validation.fail(expected, tuple(self.pos_weight.shape), advice)
        scores, weight = one_by_one(net_output, target if mask is None else target * mask)
        positive = sums(
            scores,
            torch.ones_like(weight, dtype=torch.bool),
            weight,
            fields=("cross_entropy",),
            activation="sigmoid",
        )
        return (self.pos_weight.flatten().to(net_output.device) - 1) * per_class(positive, channels).cross_entropy


def _dice(dice_class: type[nn.Module], nonlin: Nonlinearity, keywords: dict[str, Any]) -> SoftDiceLoss:
    """nnU-Net's class or ours, by name -> ours."""
    ours = {"SoftDiceLoss": SoftDiceLoss, "MemoryEfficientSoftDiceLoss": MemoryEfficientSoftDiceLoss}
    name = getattr(dice_class, "__name__", repr(dice_class))
    if name not in ours:
        advice = "Add a softdice loss of your own to softdice.CrossEntropyLoss instead."
        validation.fail(f"dice_class to be one of {', '.join(ours)}", name, advice)
    return ours[name](apply_nonlin=nonlin, **keywords)


def _known(what: str, given: dict[str, Any], allowed: dict[str, Any]) -> None:
    for name in given:
        if name not in allowed:
            advice = f"The pass has {', '.join(allowed)}."
            validation.fail(f"{what} among {', '.join(allowed)}", name, advice)
