"""The losses that are means over voxels, from the same pass as the overlap losses.

`SoftDiceLoss(...) + 0.5 * CrossEntropyLoss(...)` reads the logits once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from softdice import costs, indices, validation
from softdice.losses.overlap import OverlapLoss
from softdice.losses.settings import LossSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CrossEntropyLoss", "FocalLoss"]


class CrossEntropyLoss(OverlapLoss):
    """input, target -> mean cross-entropy over voxels, from the same pass as an overlap loss.

        softmax, none:  loss = sum_c w_c E_c / sum_c w_c T_c        sigmoid:  sum_c w_c E_c / sum_c w_c N

    With a label map it equals `torch.nn.CrossEntropyLoss(weight, ignore_index=..., label_smoothing=...)`; with a
    sigmoid and no weights `torch.nn.BCEWithLogitsLoss()`. (For soft targets and class weights torch divides by the
    number of voxels, this loss by their weight.)

    Args:
        num_classes: channels of `input`; a single one needs activation="sigmoid".
        settings: the keywords of `softdice.losses.LossSettings`, without `cost`. `pooling="sample"` takes the mean of
            each sample first; reduction="sum" adds the samples' means. `regions` must be a partition of the classes.

    Edge cases: no voxel that counts: 0, with a gradient of 0. A probability of 0 at the true class, with
    activation="none", costs about 87 (the logarithm of the smallest float32).

    Example:
        >>> import torch, softdice
        >>> loss = softdice.CrossEntropyLoss(2, activation="softmax")
        >>> logits, labels = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]])
        >>> torch.allclose(loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
        True

    Source: `softdice.indices.cross_entropy`.
    """

    def __init__(self, num_classes: int, **settings: Unpack[LossSettings]) -> None:
        index = partial(indices.cross_entropy, binary=_check_settings(num_classes, settings))
        settings["cost"] = costs.identity
        super().__init__(index, num_classes, **settings)


class FocalLoss(OverlapLoss):
    """input, target -> mean focal loss over voxels: a cross-entropy that easy voxels hardly enter.

        softmax, none:  loss = sum_c w_c F_c / sum_c w_c T_c        sigmoid:  sum_c w_c F_c / sum_c w_c N

    with F = sum y (1 - p)^gamma (-ln p), and for a sigmoid also (1 - y) p^gamma (-ln(1 - p)).

    Args:
        num_classes: channels of `input`; a single one needs activation="sigmoid".
        gamma: exponent >= 0; 0 is CrossEntropyLoss.
        settings: as for `CrossEntropyLoss`, without `cost`; `class_weight` is the paper's alpha per class.

    Example:
        >>> import torch, softdice
        >>> softdice.FocalLoss(2, gamma=2.0)(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.0866)

    Source: `softdice.indices.focal_entropy`.
    """

    def __init__(self, num_classes: int, gamma: float = 2.0, **settings: Unpack[LossSettings]) -> None:
        validation.number("gamma", gamma, 0)
        index = partial(indices.focal_entropy, binary=_check_settings(num_classes, settings))
        settings["cost"] = costs.identity
        super().__init__(index, num_classes, gamma=gamma, **settings)


def refuse_cost(settings: LossSettings, cost: str) -> None:
    """Raise ValueError if a user's settings have a cost, for a loss that has its own: `cost` in words or a formula."""
    if "cost" in settings:
        validation.fail(f"no cost, which is {cost} here", repr(settings["cost"]), "Leave it out.")


def _check_settings(num_classes: int, settings: LossSettings) -> bool:
    """Raise ValueError for settings that a mean over voxels cannot have; return whether the activation is a sigmoid.

    These are a `cost`, since the loss has its own, one class without a sigmoid, and regions in which a class is missing
    or stands twice.
    """
    refuse_cost(settings, "the entropy itself")
    binary = settings.get("activation") == "sigmoid"
    if num_classes == 1 and not binary:
        got = repr(settings.get("activation", "none"))
        validation.fail("activation='sigmoid' for a single class", got, "Pass logits, or two channels.")
    regions = settings["regions"] = validation.frozen_regions(settings.get("regions"))
    count = validation.num_classes(num_classes)
    numbers = [c for region in regions or () for c in validation.class_numbers("regions", region, count)]
    if regions and sorted(numbers) != list(range(count)):
        advice = "Add the loss of the classes in a call of its own: overlapping regions have no common entropy."
        validation.fail("regions that hold each class once", repr(regions), advice)
    return binary
