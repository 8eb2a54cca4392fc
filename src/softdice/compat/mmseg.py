"""The losses of this package in the registry of MMSegmentation, under the name "SoftdiceLoss".

`custom_imports = dict(imports=["softdice.compat.mmseg"])` in a configuration registers it. Written after mmseg 1.2.2.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

import softdice
from softdice import validation
from softdice.losses import Loss


@MODELS.register_module()
class SoftdiceLoss(nn.Module):
    """cls_score, label -> a loss of this package, or a sum of several from one pass, for a decode head.

    The head decides the number of classes, by its channels, and the label to leave out, by its `ignore_index`.

    Args:
        losses: public names of losses, each with its settings (without the number of classes and `ignore_index`) and
            with `weight`, its factor in the sum. The default activation is "softmax".
        loss_weight: factor of the sum.
        loss_name: name under which the head reports the loss. MMSegmentation adds up all that begin with "loss".

    Shapes: cls_score (B, C, H, W) logits; label (B, H, W); weight (B, H, W), a factor of each pixel, from a sampler of
    MMSegmentation's. The loss is a 0-d tensor.

    Example:
        >>> losses = {"SoftDiceLoss": {"cost": "one_minus"}, "CrossEntropyLoss": {"weight": 0.5}}
        >>> loss = MODELS.build({"type": "SoftdiceLoss", "losses": losses})
        >>> loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]))
        tensor(1.0132)
    """

    @validation.public
    def __init__(
        self,
        losses: Mapping[str, Mapping[str, Any]],
        loss_weight: float = 1.0,
        loss_name: str = "loss_softdice",
    ) -> None:
        """Raise ValueError if a loss is unknown or there is none. The first call makes the losses."""
        super().__init__()
        public = {name: getattr(softdice, name) for name in softdice.__all__ if name.endswith("Loss")}
        for name in losses:
            validation.choice("a loss among losses", name, tuple(public))
        if not losses:
            validation.fail("losses by name", losses, 'Pass {"SoftDiceLoss": {}}, for example.')
        self.losses = {public[name]: dict(settings) for name, settings in losses.items()}
        self.loss_weight, self.loss_name = loss_weight, loss_name
        self.loss_by_head: dict[tuple[int, int | None, torch.device], Loss] = {}  # by channels, ignore_index, device

    @validation.public
    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int | None = 255
    ) -> Tensor:
        """cls_score (B, C, H, W), label (B, H, W), weight (B, H, W) or None -> loss, 0-d.

        ignore_index: of the head. Raise what the losses and their constructors raise.
        """
        validation.are_tensors(cls_score=cls_score, label=label)
        key = cls_score.shape[1], ignore_index, cls_score.device
        if key not in self.loss_by_head:
            self.loss_by_head[key] = self._sum(cls_score.shape[1], ignore_index).to(cls_score.device)
        return self.loss_weight * self.loss_by_head[key](cls_score, label, weight)

    def _sum(self, num_classes: int, ignore_index: int | None) -> Loss:
        """Return the weighted sum of the losses of the configuration; their constructors raise for wrong settings."""
        terms = []
        for loss, settings in self.losses.items():
            keywords = {"activation": "softmax", "ignore_index": ignore_index} | settings
            factor = keywords.pop("weight", 1.0)
            terms.append(factor * loss(num_classes, **keywords))
        return functools.reduce(operator.add, terms)
