"""Conversion of nnU-Net's compound losses, for the trainers.

`drop_in` makes the class of `softdice.compat.nnunet` of the same name, with nnU-Net's numbers; `native` makes from that
a sum of this package's own losses, with the same gradient.
"""

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
"""A drop-in loss that adds Dice and cross-entropy: of labels, or of regions."""


def drop_in(loss: Any) -> Compound:
    """Return the drop-in loss with the settings of nnU-Net's own DC_and_CE_loss or DC_and_BCE_loss.

    The terms of `loss` may be wrapped by torch.compile. Raise TypeError for any other loss, and for a subclass, which
    may compute something else.
    """
    name = type(loss).__name__
    if type(loss) is not nnunet.from_nnunet("training.loss.compound_losses", name) or name not in _ENTROPY_SETTINGS:
        advice = "Derive the trainer from nnUNetTrainer, or use the losses of softdice.compat.nnunet in _build_loss."
        validation.fail(f"a loss of nnU-Net's among {', '.join(_ENTROPY_SETTINGS)}", name, advice, TypeError)
    dc, ce = getattr(loss.dc, "_orig_mod", loss.dc), getattr(loss.ce, "_orig_mod", loss.ce)
    names = ("batch_dice", "do_bg", "smooth", "ddp", *(("clip_tp",) if hasattr(dc, "clip_tp") else ()))
    dice = {name: getattr(dc, name) for name in names}
    entropy = {name: getattr(ce, name) for name in _ENTROPY_SETTINGS[name]}
    shared: dict[str, Any] = {"weight_ce": loss.weight_ce, "weight_dice": loss.weight_dice, "dice_class": type(dc)}
    if name == "DC_and_CE_loss":
        return DC_and_CE_loss(dice, entropy, ignore_label=loss.ignore_label, **shared)
    if loss.use_ignore_label:
        entropy["reduction"] = "mean"  # nnU-Net's is "none"; ours needs no map
    return DC_and_BCE_loss(entropy, dice, use_ignore_label=loss.use_ignore_label, **shared)


_ENTROPY_SETTINGS = {
    "DC_and_CE_loss": ("weight", "ignore_index", "label_smoothing", "reduction"),
    "DC_and_BCE_loss": ("pos_weight", "reduction"),
}
"""For each of nnU-Net's compound losses, the settings of its cross-entropy that ours needs."""


def native(loss: Compound, num_classes: int, **dice_settings: Any) -> StatisticsLoss:
    """Return a sum of this package's own losses with the gradient of a drop-in loss, for `FusedHead` and `Upsampled`.

    Its value is that of `loss` plus weight_dice, since its Dice term is 1 - Dice where nnU-Net's is -Dice. With regions
    the caller passes a voxel_weight that is 0 at ignored voxels, as `OfTargets` does.

    Args:
        loss: the drop-in loss. num_classes: channels of the logits.
        dice_settings: keywords of the Dice term that replace its own, among cost, pooling, classes, absent and
            class_weight; value and gradient are then others.

    Raise ValueError for a loss with label_smoothing, pos_weight or clip_tp.
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
    settings: dict[str, Any] = {
        "cost": "one_minus",
        "pooling": "batch" if dc.batch_dice else "sample",
        "classes": None if dc.do_bg else range(1, num_classes),
    }
    dice = losses.SoftDiceLoss(num_classes, dc.smooth, **(settings | dice_settings), **shared)
    entropy = losses.CrossEntropyLoss(num_classes, class_weight=ce.weight, **shared)
    per_voxel = isinstance(loss, DC_and_BCE_loss) and loss.use_ignore_label  # nnU-Net then divides by voxels only
    both: Any = float(loss.weight_dice) * dice + float(loss.weight_ce) * (num_classes if per_voxel else 1) * entropy
    return both


class OfTargets(nn.Module):
    """A loss of this package (or a `FusedHead`) for targets as nnU-Net passes them, minus the constant `offset`.

    Args:
        like: the drop-in loss; it says whether the last channel of target marks ignored voxels.
        loss: the loss, called with output, target and a voxel_weight. offset: weight_dice gives the value of `like`.

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
        self.has_ignore_channel = isinstance(like, DC_and_BCE_loss) and like.use_ignore_label

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, 0-d, of logits (B, C, *S), or of features (B, K, *S) for a `FusedHead`.

        target: labels (B, 1, *S), or regions (B, C, *S); (B, C + 1, *S) if the last channel marks ignored voxels.
        """
        voxel_weight = None
        if self.has_ignore_channel:
            voxel_weight, target = target[:, -1:] == 0, target[:, :-1]
        return self.loss(output, target, voxel_weight) - self.offset
