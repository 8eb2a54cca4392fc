"""Class numbers of a whole image, and how well they fit.

In shapes *S are the spatial axes of an image, C are the classes.
"""

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


def default_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def logits_of(network: nn.Module, image: Tensor, patch: Sequence[int]) -> Tensor:
    """Return logits (C, *S) of a whole image, by MONAI's sliding window inference.

    Windows overlap by a quarter; their logits are averaged with Gaussian weights.

    Args:
        network: takes (B, channels, *patch), in mode eval, on the device of the image.
        image: (channels, *S) float32, scaled; *S may be smaller than the patch.
        patch: size of a window along each axis, as in training.
    """
    from monai.inferers import sliding_window_inference

    logits: Any = sliding_window_inference(
        image[None], tuple(patch), WINDOWS_AT_ONCE, network, overlap=WINDOW_OVERLAP, mode="gaussian"
    )
    return logits[0]


def case_logits(network: nn.Module, case: Case, patch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits (C, *S) of a case and its true class numbers (*S) uint8, both on a device."""
    return logits_of(network, torch.from_numpy(case.image).to(device), patch), torch.from_numpy(case.label).to(device)


def count(labels: Tensor, true: Tensor, cases: Cases) -> Tensor:
    """Return counts (3, C) int64 of class numbers (*S), predicted and true: voxels in both, predicted, true.

    Voxels that `cases` ignore are left out.
    """
    return class_counts(labels, true, len(cases.values), ignore_index=cases.ignore_index)


def tabulated(cases: Cases, numbers: Sequence[int], counts: Tensor) -> Table:
    """Return the table of the N cases with these numbers; `counts` (N, 3, C): voxels in both, predicted, true.

    Dice is nan where a case lacks a class and it is not predicted; means over the cases leave nan out.
    """
    return Table(tuple(range(len(cases.values))), counts.cpu().numpy(), [cases.names[number] for number in numbers])


def mean_dice(dice: np.ndarray) -> float:
    """Return the mean of Dice (C,) over the classes but the background, nan left out: "mean Dice" everywhere."""
    return float(mean(dice[1:]))
