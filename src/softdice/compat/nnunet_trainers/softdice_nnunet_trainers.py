"""Trainers for nnU-Net >= 2.8: its training with this package's losses, found through `nnUNet_extTrainer`.

`softdice info --nnunet` prints the line to export. nnU-Net puts this directory first on sys.path and imports every file
in it, so this file is alone here and its name is nobody else's. A training that differs in something else, too, is a
class of yours with both parents:

    from softdice.compat.nnunet_trainers.softdice_nnunet_trainers import nnUNetTrainerSoftDice

    class nnUNetTrainerMine(nnUNetTrainerSoftDice, nnUNetTrainer_250epochs):
        pass
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from softdice import FusedHead
from softdice.compat.nnunet_training import Compound, OfTargets, native, taken_over
from softdice.metrics.counting import class_counts

CHUNKS = 16
"""Into how many pieces the features of a validation batch are cut, where labels are made of them."""


class nnUNetTrainerSoftDice(nnUNetTrainer):  # noqa: N801 (nnU-Net's way)
    """nnUNetTrainer, its loss from one pass over the voxels, with its numbers: labels, regions, an ignore label.

    Validation counts labels, without a one-hot tensor. Checkpoints bear the name of nnU-Net's own trainer, since the
    network is its own: stock nnU-Net predicts with them. (Those of a subclass bear the name of the subclass.)
    """

    def _build_loss(self) -> nn.Module:
        loss: Any = super()._build_loss()
        if not hasattr(loss, "weight_factors"):  # nnU-Net's wrapper of deep supervision
            return self.resolution_loss(taken_over(loss))
        loss.loss = self.resolution_loss(taken_over(loss.loss))
        return loss

    def resolution_loss(self, loss: Compound) -> nn.Module:
        """The loss that nnU-Net has chosen, as ours -> the one of each resolution."""
        return loss

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch -> its loss, and true positives, false positives and false negatives of each class or region."""
        data, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        several = isinstance(target, list)
        target = [each.to(self.device, non_blocking=True) for each in (target if several else [target])]
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            output = self.network(data)
            loss = self.loss(output, target if several else target[0])
        found = self.predicted(output[0] if isinstance(output, (list, tuple)) else output)
        both, predicted, truth = self.counts(found, target[0]).cpu().numpy()
        counts = {"tp_hard": both, "fp_hard": predicted - both, "fn_hard": truth - both}
        return {"loss": loss.detach().cpu().numpy(), **counts}

    def predicted(self, output: Tensor) -> Tensor:
        """What the network returns (B, C, *S) -> labels (B, *S), or regions (B, R, *S) bool."""
        return output > 0 if self.label_manager.has_regions else output.argmax(1)

    def counts(self, predicted: Tensor, target: Tensor) -> Tensor:
        """What `predicted` returns, target -> (3, classes but the background, or regions), as of `class_counts`."""
        ignored, target = self.label_manager.ignore_label, target if target.dtype == torch.bool else target.short()
        if not self.label_manager.has_regions:
            heads = self.label_manager.num_segmentation_heads
            return class_counts(predicted, target[:, 0], heads, ignore_index=ignored)[:, 1:]
        if ignored is not None:  # the last channel says which voxels
            target = torch.where(target[:, -1:] != 0, 2, target[:, :-1].to(torch.uint8))
        regions = zip(predicted.unbind(1), target.unbind(1), strict=True)
        return torch.stack([class_counts(*each, 2, ignore_index=2)[:, 1] for each in regions], 1)

    def save_checkpoint(self, filename: str) -> None:
        """The checkpoint of nnU-Net, which names the trainer that can predict with it."""
        own = type(self)
        if own not in (nnUNetTrainerSoftDice, nnUNetTrainerSoftDiceLogDice, nnUNetTrainerSoftDiceFusedHead):
            super().save_checkpoint(filename)
            return
        self.__class__ = nnUNetTrainer  # nnU-Net writes the name of the class of self
        try:
            self.save_checkpoint(filename)
        finally:
            self.__class__ = own


class nnUNetTrainerSoftDiceLogDice(nnUNetTrainerSoftDice):  # noqa: N801
    """nnUNetTrainer with -ln Dice in the place of -Dice, beside the same cross-entropy, from one pass.

    A class that a patch (with batch Dice: a batch) does not have is left out of the Dice term, whose logarithm would be
    large whatever is predicted.
    """

    def resolution_loss(self, loss: Compound) -> nn.Module:
        """-ln Dice + cross-entropy of one resolution."""
        heads = self.label_manager.num_segmentation_heads
        return OfTargets(loss, native(loss, heads, cost="neg_log", absent="skip"), 0.0)


class nnUNetTrainerSoftDiceFusedHead(nnUNetTrainerSoftDice):  # noqa: N801
    """nnUNetTrainerSoftDice, whose last convolutions and losses are computed together: no logits exist in training.

    The network hands on the features that enter the last convolution of each resolution, and `softdice.FusedHead`
    makes logits of a chunk of them at a time. Numbers and state dict are those of nnUNetTrainer. Worth it for many
    classes. The network needs a decoder with `seg_layers`, as nnU-Net's U-Nets have.
    """

    def _build_loss(self) -> nn.Module:
        loss: Any = super()._build_loss()
        weights = [float(weight) for weight in getattr(loss, "weight_factors", (1.0,))]
        if self.is_ddp:  # every parameter has to take part, as in nnU-Net
            weights = [weight or 1e-6 for weight in weights]
        network: Any = getattr(self.network, "module", self.network)
        decoder = getattr(network, "_orig_mod", network).decoder
        self.layers = [_handing_on(layer) for layer in decoder.seg_layers]
        of_resolution = getattr(loss, "loss", loss)
        heads = self.label_manager.num_segmentation_heads
        ours = native(of_resolution, heads)
        largest_first = [FusedHead(layer, ours) for layer in reversed(decoder.seg_layers)][: len(weights)]
        offset = of_resolution.weight_dice
        parts: list[nn.Module] = [OfTargets(of_resolution, head, offset) for head in largest_first]
        return _PerResolution(parts, weights)

    def predicted(self, output: Tensor) -> Tensor:
        """Features of the largest resolution -> labels or regions, a piece of the logits at a time."""
        head = self.loss.parts[0].loss
        pieces = [nnUNetTrainerSoftDice.predicted(self, head.logits(piece)) for piece in output.chunk(CHUNKS, 2)]
        return torch.cat(pieces, 2 if self.label_manager.has_regions else 1)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, which needs logits."""
        for layer in self.layers:
            layer.hands_on = False
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            for layer in self.layers:
                layer.hands_on = True


class _PerResolution(nn.Module):
    """outputs and targets, largest first (or the only ones) -> the weighted sum of a loss for each."""

    def __init__(self, parts: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), weights

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            outputs, targets = [outputs], [targets]
        each = zip(self.weights, self.parts, outputs, targets, strict=True)
        return sum(weight * part(output, target) for weight, part, output, target in each if weight != 0)


def _handing_on(layer: Any) -> Any:
    """A convolution -> the same, but that it returns what it is given while `hands_on` is set."""

    class HandingOn(type(layer)):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            return input if self.hands_on else super().forward(input)

    layer.__class__, layer.hands_on = HandingOn, True
    return layer
