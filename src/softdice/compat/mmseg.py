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

    The number of classes is that of the head's channels, the label that is left out is the head's `ignore_index`.

    Args:
        losses: public names of losses, each with its settings beside the number of classes and `ignore_index`, and with
            `weight`, its factor in the sum. The activation is "softmax" unless given.
        loss_weight: factor of the whole.
        loss_name: under which the head reports it. MMSegmentation adds up what begins with "loss".

    Shapes: cls_score (B, C, H, W) logits; label (B, H, W); weight (B, H, W), what MMSegmentation's samplers make, a
    factor of each pixel -> ().

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
        super().__init__()
        public = {name: getattr(softdice, name) for name in softdice.__all__ if name.endswith("Loss")}
        for name in losses:
            validation.choice("a loss among losses", name, tuple(public))
        if not losses:
            validation.fail("losses by name", losses, 'Pass {"SoftDiceLoss": {}}, for example.')
        self.losses = {public[name]: dict(settings) for name, settings in losses.items()}
        self.loss_weight, self.loss_name = loss_weight, loss_name
        self.loss_by_head: dict[tuple[int, int | None, torch.device], Loss] = {}  # made at the first call

    @validation.public
    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None, ignore_index: int | None = 255
    ) -> Tensor:
        """cls_score, label -> loss."""
        validation.are_tensors(cls_score=cls_score, label=label)
        key = cls_score.shape[1], ignore_index, cls_score.device
        if key not in self.loss_by_head:
            self.loss_by_head[key] = self._sum(cls_score.shape[1], ignore_index).to(cls_score.device)
        weights = () if weight is None else (weight,)
        return self.loss_weight * self.loss_by_head[key](cls_score, label, *weights)

    def _sum(self, num_classes: int, ignore_index: int | None) -> Loss:
        """Return the sum of the losses of the configuration, for a number of classes and an ignore_index."""
        terms = []
        for loss, settings in self.losses.items():
            keywords = {"activation": "softmax", "ignore_index": ignore_index} | settings
            factor = keywords.pop("weight", 1.0)
            terms.append(factor * loss(num_classes, **keywords))
        return functools.reduce(operator.add, terms)
