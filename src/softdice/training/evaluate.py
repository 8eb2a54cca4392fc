"""Class numbers of a whole image, and how well they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def case_logits(network: nn.Module, case: Case, patch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits (C, *S) of a case and its true class numbers (*S), both on a device."""
    return logits_of(network, torch.from_numpy(case.image).to(device), patch), torch.from_numpy(case.label).to(device)


def count(labels: Tensor, true: Tensor, cases: Cases) -> Tensor:
    """Return (3, C) int64 of a case: voxels in both, predicted, true."""
    return class_counts(labels, true, len(cases.values), ignore_index=cases.ignore_index)


def tabulated(cases: Cases, numbers: Sequence[int], counts: Tensor) -> Table:
    """Return the table of (cases, 3, C) counts. Its mean over the cases leaves those with nan out."""
    return Table(tuple(range(len(cases.values))), counts.cpu().numpy(), [cases.names[number] for number in numbers])


def mean_dice(dice: np.ndarray) -> float:
    """Return the mean over the classes but the first, nan left out: what is called "mean Dice" everywhere."""
    return float(mean(dice[1:]))
