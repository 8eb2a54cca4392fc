"""nnU-Net's compound losses -> ours, and those of this package with their numbers: what the trainers are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softdice import losses, validation
from softdice.compat import nnunet
from softdice.compat.nnunet import DC_and_BCE_loss, DC_and_CE_loss
from softdice.head import FusedHead
from softdice.losses.base import StatisticsLoss
from softdice.parallel import groups

TRAINERS = Path(__file__).with_name("nnunet_trainers")
"""The directory that nnU-Net searches for trainers, once it stands in nnUNet_extTrainer."""

Compound = DC_and_CE_loss | DC_and_BCE_loss


def taken_over(loss: Any) -> Compound:
    """nnU-Net's DC_and_CE_loss or DC_and_BCE_loss -> ours with its settings; an error for any other loss."""
    name = type(loss).__name__
    if type(loss) is not nnunet.theirs("training.loss.compound_losses", name) or name not in _ENTROPY:
        advice = "Derive the trainer from nnUNetTrainer, or use the losses of softdice.compat.nnunet in _build_loss."
        validation.fail(f"a loss of nnU-Net's among {', '.join(_ENTROPY)}", name, advice, TypeError)
    dc, ce = getattr(loss.dc, "_orig_mod", loss.dc), getattr(loss.ce, "_orig_mod", loss.ce)
    names = ("batch_dice", "do_bg", "smooth", "ddp", *(("clip_tp",) if hasattr(dc, "clip_tp") else ()))
    dice = {name: getattr(dc, name) for name in names}
    entropy = {name: getattr(ce, name) for name in _ENTROPY[name]}
    shared: dict[str, Any] = {"weight_ce": loss.weight_ce, "weight_dice": loss.weight_dice, "dice_class": type(dc)}
    if name == "DC_and_CE_loss":
        return DC_and_CE_loss(dice, entropy, ignore_label=loss.ignore_label, **shared)
    if loss.use_ignore_label:
        entropy["reduction"] = "mean"
    return DC_and_BCE_loss(entropy, dice, use_ignore_label=loss.use_ignore_label, **shared)


_ENTROPY = {
    "DC_and_CE_loss": ("weight", "ignore_index", "label_smoothing", "reduction"),
    "DC_and_BCE_loss": ("pos_weight", "reduction"),
}
"""Their compound losses -> what of their cross-entropies is taken over."""


def native(loss: Compound, num_classes: int, **of_dice: Any) -> StatisticsLoss:
    """One of the two compound losses -> a sum of this package's with weight_dice more than its number.

    That is what `softdice.FusedHead` and `softdice.Upsampled` take. `of_dice` are settings of the Dice term in the
    place of its own (cost, absent...). Ignored voxels of regions are a voxel_weight: see `OfTargets`.

    Example:
        >>> import torch
        >>> loss, logits = DC_and_CE_loss({"batch_dice": True}, {}), torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> native(loss, 2)(logits, torch.tensor([[[0, 1]]])) - loss(logits, torch.tensor([[[0, 1]]]))
        tensor(1.)
    """
    dc, ce = loss.dc, loss.ce
    if getattr(ce, "label_smoothing", 0) or getattr(ce, "pos_weight", None) is not None or dc.clip_tp is not None:
        got = "one with label_smoothing, pos_weight or clip_tp"
        validation.fail("a loss of plain Dice and cross-entropy", got, "Leave it out, or train with the drop-in loss.")
    regions = isinstance(loss, DC_and_BCE_loss)
    shared: dict[str, Any] = {
        "activation": "sigmoid" if regions else "softmax",
        "ignore_index": None if isinstance(loss, DC_and_BCE_loss) else loss.ignore_label,
        "group": "world" if dc.ddp and dc.batch_dice and groups.has_ranks() else None,
    }
    own: dict[str, Any] = {
        "cost": "one_minus",
        "pooling": "batch" if dc.batch_dice else "sample",
        "classes": None if dc.do_bg else range(1, num_classes),
    }
    dice = losses.SoftDiceLoss(num_classes, dc.smooth, **{**own, **of_dice}, **shared)
    entropy = losses.CrossEntropyLoss(num_classes, class_weight=ce.weight, **shared)
    per_voxel = isinstance(loss, DC_and_BCE_loss) and loss.use_ignore_label  # nnU-Net then divides by voxels alone
    both: Any = float(loss.weight_dice) * dice + float(loss.weight_ce) * (num_classes if per_voxel else 1) * entropy
    return both


class OfTargets(nn.Module):
    """output, target as nnU-Net hands it over -> a loss of this package (or a `FusedHead`) minus a number.

    Args:
        like: the compound loss that says whether the last channel of target marks ignored voxels.
        loss: what is called with output, target and a voxel_weight. offset: what is taken away from it.

    Example:
        >>> import torch
        >>> like = DC_and_BCE_loss({}, {}, use_ignore_label=True)
        >>> loss, target = OfTargets(like, native(like, 1), 1.0), torch.tensor([[[1, 0], [0, 0]]])
        >>> loss(torch.tensor([[[2.0, -2.0]]]), target) - like(torch.tensor([[[2.0, -2.0]]]), target)
        tensor(0.)
    """

    def __init__(self, like: Compound, loss: StatisticsLoss | FusedHead, offset: float) -> None:
        super().__init__()
        self.loss, self.offset = loss, offset
        self.marked = isinstance(like, DC_and_BCE_loss) and like.use_ignore_label

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output (B, C, *S) (of a `FusedHead` features), target -> loss."""
        counted = None
        if self.marked:
            counted, target = target[:, -1:] == 0, target[:, :-1]
        return self.loss(output, target, counted) - self.offset
