"""input, target as other libraries take them -> statistics: what the three places share."""

from __future__ import annotations

import torch
from torch import Tensor

from softdice import validation
from softdice.settings import Pass
from softdice.statistics import OverlapStatistics, measure


def sums(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    fields: tuple[str, ...],
    activation: str = "none",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
    power: float = 1.0,
    probabilities: bool = False,
) -> OverlapStatistics:
    """input, target -> the statistics named, from one pass.

    Labels, per-class values and weights are checked always. Without an activation the libraries take any number for a
    probability, and so does this, unless `probabilities` asks for the check because a formula holds only in [0, 1].
    """
    settings = Pass(
        activation=activation,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        validate=activation != "none" or probabilities,
        gamma=gamma,
        power=power,
        fields=tuple(dict.fromkeys(fields)),
    )
    settings = validation.pass_settings(settings)
    if not settings.validate:
        flat = validation.tensors(input, target, weight, None, ignore_index, True)
        validation.values(*flat, "softmax", ignore_index)
    return measure(input, target, weight, settings)


def one_by_one(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """input (B, C, *S), labels or per-class values -> (B C, 1, V) and (B C, 1, V): every channel a sample of one class.

    So a weight may differ between the channels of a voxel, at the price of a mask per channel.

    Example:
        >>> one_by_one(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]))[1].int()
        tensor([[[1, 0, 0]],
        <BLANKLINE>
                [[0, 1, 1]]], dtype=torch.int32)
    """
    channels = input.flatten(2)
    if target.shape != input.shape:
        labels = target.reshape(input.shape[0], 1, -1)
        target = labels == torch.arange(input.shape[1], device=input.device).view(1, -1, 1)
    return channels.flatten(0, 1).unsqueeze(1), target.flatten(2).flatten(0, 1).unsqueeze(1)


def per_class(stats: OverlapStatistics, channels: int) -> OverlapStatistics:
    """statistics of `one_by_one`, (B C, 1) -> (B, C)."""
    return OverlapStatistics({name: getattr(stats, name).view(-1, channels) for name in stats.fields})


def hard(target: Tensor) -> None:
    """Refuse per-class values between 0 and 1 where the other library's formula for them is no sum over voxels."""
    if target.is_floating_point() and bool(((target != 0) & (target != 1)).any()):
        got = f"values such as {target[(target != 0) & (target != 1)][0].item():g}"
        validation.fail("a target of zeros and ones", got, "Round it, or use softdice.FocalLoss.")


def binary_mask(mask: Tensor) -> Tensor:
    """A mask of zeros and ones -> bool; an error for anything between."""
    wrong = (mask != 0) & (mask != 1)
    if bool(wrong.any()):
        advice = "Fractional masks enter the libraries' sums squared; pass voxel_weight to a softdice loss."
        validation.fail("a mask of zeros and ones", f"{mask[wrong][0].item():g}", advice)
    return mask != 0


def add_over_ranks(stats: OverlapStatistics) -> OverlapStatistics:
    """this rank's pooled statistics -> the sum over all ranks, differentiable; alone, the statistics as they are."""
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return stats if alone else stats.all_reduce("world")


def count(input: Tensor) -> int:
    """input (B, C, *S) -> voxels of one sample."""
    return input[0, 0].numel() if input.shape[0] else 0
