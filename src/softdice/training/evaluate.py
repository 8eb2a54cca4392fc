"""Class numbers of a whole image, and how well they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softdice.decisions import dice_confidence
from softdice.evaluation.averages import mean
from softdice.evaluation.table import Table
from softdice.metrics.counting import class_counts
from softdice.training.cases import Case, Cases

WINDOW_OVERLAP = 0.25
WINDOWS_AT_ONCE = 4


@torch.no_grad()
def logits_of(network: nn.Module, image: Tensor, patch: Sequence[int]) -> Tensor:
    """Return logits (C, *S) of an image (channels, *S), by MONAI's sliding window inference.

    Windows have the size of the training patches and overlap by a quarter; their logits are averaged with Gaussian
    weights.
    """
    from monai.inferers import sliding_window_inference

    logits: Any = sliding_window_inference(
        image[None], tuple(patch), WINDOWS_AT_ONCE, network, overlap=WINDOW_OVERLAP, mode="gaussian"
    )
    return logits[0]


def label_image(
    network: nn.Module, image: Tensor, patch: Sequence[int], confidence: list[float] | None = None
) -> Tensor:
    """Return class numbers (*S) of an image (channels, *S); add how sure they are to `confidence`, class by class."""
    logits = logits_of(network, image, patch)
    labels = logits.argmax(0)
    if confidence is not None:
        confidence += dice_confidence(logits[None].float(), labels[None], activation="softmax")[0].tolist()
    return labels


def count(
    network: nn.Module, case: Case, patch: Sequence[int], cases: Cases, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (3, C) int64 of a case: voxels in both, predicted, true; and the class numbers that were predicted."""
    prediction = label_image(network, torch.from_numpy(case.image).to(device), patch)
    truth = torch.from_numpy(case.label).to(device)
    return class_counts(prediction, truth, len(cases.values), ignore_index=cases.ignore_index), prediction


def tabulated(cases: Cases, numbers: Sequence[int], counts: Tensor) -> Table:
    """Return the table of (cases, 3, C) counts. Its mean over the cases leaves those with nan out."""
    return Table(tuple(range(len(cases.values))), counts.cpu().numpy(), [cases.names[number] for number in numbers])


def mean_dice(dice: np.ndarray) -> float:
    """Return the mean over the classes but the first, nan left out: what is called "mean Dice" everywhere."""
    return float(mean(dice[1:]))
