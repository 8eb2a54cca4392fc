"""network, case -> class numbers of the whole image, and how well they fit: integer sums that add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softdice import indices
from softdice.statistics import OverlapStatistics

WINDOW_OVERLAP = 0.25
WINDOWS_AT_ONCE = 4


@torch.no_grad()
def label_image(network: nn.Module, image: Tensor, patch: Sequence[int]) -> Tensor:
    """image (channels, *S) on the network's device -> class numbers (*S), by MONAI's sliding window inference.

    Windows have the size of the training patches and overlap by a quarter; their logits are averaged with Gaussian
    weights.
    """
    from monai.inferers import sliding_window_inference

    logits: Any = sliding_window_inference(
        image[None], tuple(patch), WINDOWS_AT_ONCE, network, overlap=WINDOW_OVERLAP, mode="gaussian"
    )
    return logits[0].argmax(0)


def counts(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """class numbers, class numbers -> (3, C) int64: voxels in both, predicted, true.

    Example:
        >>> import torch
        >>> counts(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
        [[1, 1], [1, 2], [2, 1]]
    """
    pairs = torch.bincount(truth.flatten().long() * num_classes + prediction.flatten().long(), minlength=num_classes**2)
    table = pairs.view(num_classes, num_classes)
    return torch.stack([table.diagonal(), table.sum(0), table.sum(1)])


def dice_of(sums: Tensor) -> Tensor:
    """(..., 3, C) counts -> Dice coefficient (..., C) float64, nan for a class neither predicted nor true."""
    both, predicted, true = sums.double().unbind(-2)
    return indices.dice(OverlapStatistics({"intersection": both, "prediction": predicted, "target": true}), eps=0)


@dataclass(frozen=True)
class Scores:
    """Dice on the held-out cases.

    Attributes:
        names: of the cases.
        per_case: (cases, C), nan where a class is neither predicted nor true.
        mean: (C,) mean over the cases, those with nan left out.
        pooled: (C,) of the sums over all cases, as if they were one image.
        mean_dice: mean of `mean` over the classes but the first. What is called "mean Dice" everywhere.
    """

    names: list[str]
    per_case: np.ndarray
    mean: np.ndarray
    pooled: np.ndarray
    mean_dice: float


def scores(names: Sequence[str], sums: Tensor) -> Scores:
    """case names, (cases, 3, C) counts -> scores.

    Example:
        >>> import torch
        >>> both = torch.tensor([[[2, 1], [2, 2], [2, 2]], [[4, 0], [4, 0], [4, 0]]])
        >>> scored = scores(["a", "b"], both)
        >>> scored.mean.tolist(), scored.mean_dice
        ([1.0, 0.5], 0.5)
    """
    per_case = dice_of(sums).numpy()
    mean = np.array([mean_known(column) for column in per_case.T])
    return Scores(list(names), per_case, mean, dice_of(sums.sum(0)).numpy(), mean_known(mean[1:]))


def mean_known(values: np.ndarray) -> float:
    """numbers -> mean of those that are not nan, nan where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
