"""Trainers for nnU-Net >= 2.8: its training with this package's losses, found through `nnUNet_extTrainer`.

`softdice info --nnunet` prints the line to export. nnU-Net puts this directory first on sys.path and imports every file
in it, so this file is alone here and its name is nobody else's. A training that differs in something else, too, is a
class of yours with both parents:

    from softdice.compat.nnunet_trainers.softdice_nnunet_trainers import nnUNetTrainerSoftDice

    class nnUNetTrainerMine(nnUNetTrainerSoftDice, nnUNetTrainer_250epochs):
        pass

Shapes: B sample, C class, R region, K feature, *S space. A batch's target is labels (B, 1, *S), or regions (B, R, *S)
with a last channel for ignored voxels if there is an ignore label. With deep supervision target and output are lists of
such tensors, the largest first.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from softdice import FusedHead
from softdice.compat.nnunet_training import Compound, OfTargets, drop_in, native
from softdice.metrics.counting import class_counts

CHUNKS = 16
"""Number of pieces into which the features of a validation batch are cut, to make labels of them."""


class nnUNetTrainerSoftDice(nnUNetTrainer):  # noqa: N801 (nnU-Net's way)
    """nnUNetTrainer with its loss computed by one pass, and the same numbers: for labels, regions, an ignore label.

    Validation counts labels, without a one-hot tensor. Checkpoints name nnUNetTrainer as their trainer, since the
    network is the same: stock nnU-Net predicts with them. (Those of a subclass name the subclass.)
    """

    def _build_loss(self) -> nn.Module:
        """Return nnU-Net's loss, in which ours replaces the loss of each resolution.

        Raise TypeError if nnU-Net built a loss that this package does not have.
        """
        loss: Any = super()._build_loss()
        if not hasattr(loss, "weight_factors"):  # no deep supervision
            return self.resolution_loss(drop_in(loss))
        loss.loss = self.resolution_loss(drop_in(loss.loss))
        return loss

    def resolution_loss(self, loss: Compound) -> nn.Module:
        """Return the loss of one resolution, for the drop-in loss with nnU-Net's numbers; subclasses override this."""
        return loss

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what nnU-Net's own does for a batch: "loss", and "tp_hard", "fp_hard" and "fn_hard" (classes,) arrays.

        batch: "data", the images, and "target". The classes are those of the foreground, or the regions.
        """
        data, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        deep_supervision = isinstance(target, list)
        targets = [tensor.to(self.device, non_blocking=True) for tensor in (target if deep_supervision else [target])]
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            output = self.network(data)
            loss = self.loss(output, targets if deep_supervision else targets[0])
        prediction = self.prediction(output[0] if isinstance(output, (list, tuple)) else output)
        in_both, in_prediction, in_target = self.counts(prediction, targets[0]).cpu().numpy()
        counts = {"tp_hard": in_both, "fp_hard": in_prediction - in_both, "fn_hard": in_target - in_both}
        return {"loss": loss.detach().cpu().numpy(), **counts}

    def prediction(self, output: Tensor) -> Tensor:
        """Return labels (B, *S), or regions (B, R, *S) bool, for the logits (B, C, *S) that the network returns."""
        return output > 0 if self.label_manager.has_regions else output.argmax(1)

    def counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return voxels in both, in the prediction and in the target, (3, N) int64, of N foreground classes or regions.

        prediction: labels (B, *S), or regions (B, R, *S) bool. target: of a batch, of the same resolution. Ignored
        voxels are not counted.
        """
        ignore_label = self.label_manager.ignore_label
        target = target if target.dtype == torch.bool else target.short()  # the counts take no floats
        if not self.label_manager.has_regions:
            heads = self.label_manager.num_segmentation_heads
            return class_counts(prediction, target[:, 0], heads, ignore_index=ignore_label)[:, 1:]
        # each region is a map of the labels 0 and 1; 2 marks the voxels that the last channel ignores
        if ignore_label is not None:
            target = torch.where(target[:, -1:] != 0, 2, target[:, :-1].to(torch.uint8))
        regions = zip(prediction.unbind(1), target.unbind(1), strict=True)
        return torch.stack([class_counts(*masks, 2, ignore_index=2)[:, 1] for masks in regions], 1)

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint in the file `filename`; it names nnUNetTrainer, or the user's subclass.

        nnU-Net predicts with the trainer that a checkpoint names.
        """
        trainer_class = type(self)
        if trainer_class not in (nnUNetTrainerSoftDice, nnUNetTrainerSoftDiceLogDice, nnUNetTrainerSoftDiceFusedHead):
            super().save_checkpoint(filename)
            return
        self.__class__ = nnUNetTrainer  # nnU-Net writes the name of the class of self
        try:
            nnUNetTrainer.save_checkpoint(self, filename)
        finally:
            self.__class__ = trainer_class


class nnUNetTrainerSoftDiceLogDice(nnUNetTrainerSoftDice):  # noqa: N801
    """nnUNetTrainer with -ln Dice in the place of -Dice, beside the same cross-entropy, from one pass.

    A class that a patch (with batch Dice: a batch) does not have is left out of the Dice term, whose logarithm would be
    large whatever is predicted.
    """

    def resolution_loss(self, loss: Compound) -> nn.Module:
        """Return -ln Dice + cross-entropy for one resolution."""
        heads = self.label_manager.num_segmentation_heads
        return OfTargets(loss, native(loss, heads, cost="neg_log", absent="skip"), 0.0)


class nnUNetTrainerSoftDiceFusedHead(nnUNetTrainerSoftDice):  # noqa: N801
    """nnUNetTrainerSoftDice, whose last convolutions and losses are computed together: no logits exist in training.

    The network returns the features that enter the last convolution of each resolution, and `softdice.FusedHead` makes
    logits of a chunk of them at a time. Numbers and state dict are those of nnUNetTrainer. It pays for many classes.
    The network needs a decoder with `seg_layers`, as nnU-Net's U-Nets have.
    """

    def _build_loss(self) -> nn.Module:
        """Return the loss of features, and make the last convolutions of the network return their input.

        It has a part for each resolution of the deep supervision, the largest first; without it for the largest alone.
        """
        loss: Any = super()._build_loss()
        weights = [float(weight) for weight in getattr(loss, "weight_factors", (1.0,))]
        if self.is_ddp:  # DDP needs a gradient of every parameter, also of a layer of weight 0; nnU-Net does the same
            weights = [weight or 1e-6 for weight in weights]
        network: Any = getattr(self.network, "module", self.network)  # inside DDP, and then torch.compile
        decoder = getattr(network, "_orig_mod", network).decoder
        self.layers = [_skippable(layer) for layer in decoder.seg_layers]
        compound = getattr(loss, "loss", loss)
        heads = self.label_manager.num_segmentation_heads
        head_loss = native(compound, heads)
        largest_first = [FusedHead(layer, head_loss) for layer in reversed(decoder.seg_layers)][: len(weights)]
        parts: list[nn.Module] = [OfTargets(compound, head, compound.weight_dice) for head in largest_first]
        return _PerResolution(parts, weights)

    def prediction(self, output: Tensor) -> Tensor:
        """Return labels or regions for features (B, K, *S) of the largest resolution, whose logits come in pieces."""
        head = self.loss.parts[0].loss
        pieces = [nnUNetTrainerSoftDice.prediction(self, head.logits(piece)) for piece in output.chunk(CHUNKS, 2)]
        return torch.cat(pieces, 2 if self.label_manager.has_regions else 1)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Run nnU-Net's validation, which needs logits, with the last convolutions in place."""
        for layer in self.layers:
            layer.skipped = False
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            for layer in self.layers:
                layer.skipped = True


class _PerResolution(nn.Module):
    """The weighted sum of a loss for each resolution, largest first: `parts`, with their factors `weights`."""

    def __init__(self, parts: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), weights

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss, 0-d, for lists of outputs and targets, or for a tensor of each with a single resolution."""
        if isinstance(outputs, Tensor):
            outputs, targets = [outputs], [targets]
        resolutions = zip(self.weights, self.parts, outputs, targets, strict=True)
        return sum(weight * part(output, target) for weight, part, output, target in resolutions if weight != 0)


def _skippable(layer: Any) -> Any:
    """Change a convolution in place: it returns its input while its new attribute `skipped` is True. Return it.

    It stays the same object, so that optimizer, state dict and DDP see the same parameters.
    """

    class Skippable(type(layer)):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            return input if self.skipped else super().forward(input)

    layer.__class__, layer.skipped = Skippable, True
    return layer
