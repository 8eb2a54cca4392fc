"""The losses of single masks, with which DETR, Mask2Former and SAM train their masks and match them to targets.

Each mask is a sample of one class, so its loss is a function of the same statistics. The public place of these
functions is `softdice.functional`. Shapes: N masks, M targets, *S space (or the sampled points of a mask), V voxels of
a mask (all of *S in one axis). `input` is logits, float16, bfloat16, float32 or float64.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from softdice import costs, indices, validation
from softdice.statistics import check
from softdice.statistics.api import OverlapStatistics, measure
from softdice.statistics.reference import power
from softdice.statistics.request import Pass, result_dtype, without_autocast

__all__ = ["mask_dice_loss", "mask_focal_loss", "pairwise_mask_dice_loss", "pairwise_mask_focal_loss"]

_Reduction = Literal["mean", "none"]


@validation.public
def mask_dice_loss(
    input: Tensor,
    target: Tensor,
    num_masks: float | Tensor | None = None,
    *,
    eps: float = 1.0,
    reduction: _Reduction = "mean",
) -> Tensor:
    """logits of N masks, N masks -> sum of 1 - Dice over the masks / num_masks.

        loss = sum_n (1 - (2 I_n + eps) / (P_n + T_n + eps)) / num_masks

    Args:
        input: (N, *S) logits, float16, bfloat16, float32 or float64: one mask each, not a batch of channels.
        target: (N, *S) masks of zeros and ones, of any dtype, or values in [0, 1].
        num_masks: divisor of the sum, >= 1; the value of a tensor of one element is not checked. None: N.
        eps: smoothing, >= 0, in voxels.
        reduction: "none" gives the loss of each mask, (N,), for example to keep the best of several proposals (SAM).

    Returns:
        A 0-d tensor (or (N,)), float64 for float64 input, else float32, also under autocast. One pass, no copy of
        the masks.

    Raises:
        TypeError, ValueError: shapes that differ, a target outside [0, 1], num_masks below 1 or with "none".

    Edge cases: an empty mask that is not predicted costs 0; no mask at all costs 0, with a gradient.

    Example:
        >>> import torch, softdice
        >>> logits, masks = torch.tensor([[2.0, -2.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 0]])
        >>> softdice.functional.mask_dice_loss(logits, masks, num_masks=2)
        tensor(0.2897)
        >>> softdice.functional.mask_dice_loss(logits, masks, reduction="none")
        tensor([0.0795, 0.5000])

    Source: N. Carion et al., "End-to-end object detection with transformers", ECCV 2020, appendix (DICE/F-1 loss).
    """
    validation.number("eps", eps, 0)
    stats = _statistics(input, target, ("intersection", "prediction", "target"))
    return _reduced(costs.one_minus(indices.dice(stats, eps=eps)), num_masks, reduction)


@validation.public
def mask_focal_loss(
    input: Tensor,
    target: Tensor,
    num_masks: float | Tensor | None = None,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: _Reduction = "mean",
) -> Tensor:
    """logits of N masks, N masks -> sum over the masks of the mean focal loss of their voxels / num_masks.

        loss = sum_n mean_v (alpha y (1 - p)^gamma (-ln p) + (1 - alpha) (1 - y) p^gamma (-ln(1 - p))) / num_masks

    Args:
        input: (N, *S) logits, float16, bfloat16, float32 or float64: one mask each, not a batch of channels.
        target: (N, *S) masks y of zeros and ones, of any dtype; with alpha=None and gamma=0 values in [0, 1], too.
        num_masks: divisor of the sum, >= 1; the value of a tensor of one element is not checked. None: N.
        alpha: price of a voxel of the mask, in [0, 1], against 1 - alpha of one outside; None prices both 1.
        gamma: exponent, >= 0. With alpha=None and gamma=0 it is Mask2Former's binary cross-entropy.
        reduction: "mean" is the sum over the masks / num_masks, "none" the loss of each mask, (N,).

    Returns:
        A 0-d tensor (or (N,)), float64 for float64 input, else float32, also under autocast.

    Raises:
        TypeError, ValueError: shapes that differ, num_masks below 1 or with "none", alpha or gamma out of range, a
            target outside [0, 1]; one between 0 and 1 unless alpha=None and gamma=0, since the focal loss of a fraction
            is another formula.

    Edge cases: no mask at all costs 0, with a gradient.

    Example:
        >>> import torch, softdice
        >>> logits, masks = torch.tensor([[2.0, -2.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 0]])
        >>> softdice.functional.mask_focal_loss(logits, masks, num_masks=2)
        tensor(0.0654)

    Source: T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 5.
    """
    positive, negative = _prices(alpha)
    hard = alpha is not None or gamma != 0
    stats = _statistics(input, target, ("positive_focal", "negative_focal"), gamma, hard)
    voxels = max(input.shape[1:].numel(), 1)
    focal = (positive * stats.positive_focal + negative * stats.negative_focal) / voxels
    return _reduced(focal, num_masks, reduction)


@validation.public
def pairwise_mask_dice_loss(input: Tensor, target: Tensor, *, eps: float = 1.0) -> Tensor:
    """logits of N masks, M masks -> 1 - Dice of every pair, (N, M): a matcher's cost.

    Args:
        input: (N, *S) logits. target: (M, *S) masks, of any dtype, or values in [0, 1].
        eps: smoothing, >= 0, in voxels.

    Returns:
        (N, M), float64 for float64 input, else float32: inside autocast, too, where a product of half precision would
        overflow at 65 504 voxels. Differentiable. Memory: the probabilities and a float copy of target.

    Raises:
        TypeError, ValueError: masks of another size than the logits, a target outside [0, 1], eps below 0.

    Edge cases: an empty mask that is not predicted costs 0; no prediction or no mask gives an empty matrix.

    Example:
        >>> import torch, softdice
        >>> logits, masks = torch.tensor([[2.0, -2.0], [-2.0, 2.0]]), torch.tensor([[1, 0], [0, 1], [1, 1]])
        >>> softdice.functional.pairwise_mask_dice_loss(logits, masks)
        tensor([[0.0795, 0.5872, 0.2500],
                [0.5872, 0.0795, 0.2500]])

    Source: B. Cheng et al., "Per-pixel classification is not all you need for semantic segmentation", NeurIPS 2021.
    """
    validation.number("eps", eps, 0)
    logit_NV, target_MV = _flat_pair(input, target)
    with without_autocast(input.device):
        prob_NV = logit_NV.sigmoid()
        overlap_NM = prob_NV @ target_MV.T
    sums = {
        "intersection": overlap_NM,
        "prediction": prob_NV.sum(1, keepdim=True).expand_as(overlap_NM),
        "target": target_MV.sum(1).expand_as(overlap_NM),
    }
    return costs.one_minus(indices.dice(OverlapStatistics(sums), eps=eps))


@validation.public
def pairwise_mask_focal_loss(
    input: Tensor, target: Tensor, *, alpha: float | None = 0.25, gamma: float = 2.0
) -> Tensor:
    """logits of N masks, M masks -> mean focal loss of the voxels of every pair, (N, M): a matcher's other cost.

        loss[n, m] = mean_v (alpha y_m (1 - p_n)^gamma (-ln p_n) + (1 - alpha) (1 - y_m) p_n^gamma (-ln(1 - p_n)))

    Args:
        input: (N, *S) logits. target: (M, *S) masks y, of any dtype, or values in [0, 1].
        alpha: price of a voxel of the mask, in [0, 1], against 1 - alpha of one outside; None prices both 1.
        gamma: exponent, >= 0. With alpha=None and gamma=0 it is Mask2Former's binary cross-entropy.

    Returns:
        (N, M), float64 for float64 input, else float32, inside autocast, too. Differentiable.

    Raises:
        TypeError, ValueError: masks of another size than the logits, a target outside [0, 1], alpha or gamma out of
            range.

    Edge cases: masks without a voxel cost 0.

    Example:
        >>> import torch, softdice
        >>> logits, masks = torch.tensor([[2.0, -2.0]]), torch.tensor([[1, 0], [0, 1]])
        >>> softdice.functional.pairwise_mask_focal_loss(logits, masks, alpha=None, gamma=0.0)
        tensor([[0.1269, 2.1269]])

    Source: as of `pairwise_mask_dice_loss` and `mask_focal_loss`.
    """
    positive, negative = _prices(alpha)
    validation.number("gamma", gamma, 0)
    logit_NV, target_MV = _flat_pair(input, target)
    with without_autocast(input.device):
        inside_NV = positive * power(logit_NV.neg().sigmoid(), gamma) * softplus(-logit_NV)
        outside_NV = negative * power(logit_NV.sigmoid(), gamma) * softplus(logit_NV)
        return (inside_NV @ target_MV.T + outside_NV @ (1 - target_MV).T) / max(target_MV.shape[1], 1)


def _statistics(
    input: Tensor, target: Tensor, fields: tuple[str, ...], gamma: float = 2.0, hard: bool = False
) -> OverlapStatistics:
    """Check a user's logits and masks, both (N, *S), and return their statistics, (N, 1).

    A mask is a sample of one class. fields: names of statistics. gamma: exponent of the focal statistics. hard: refuse
    fractions. Raise what `_check_masks` raises, and ValueError for a target outside [0, 1].
    """
    validation.are_tensors(input=input, target=target)
    _check_masks(input, target, "(N, *S)", input.shape)
    if hard:
        _check_zeros_and_ones(target)
    settings = check.pass_settings(Pass("sigmoid", fields=fields, gamma=gamma))
    shape = (len(input), 1, input.shape[1:].numel())
    try:
        return measure(input.reshape(shape), target.reshape(shape), None, settings)
    except ValueError:
        if not target.is_floating_point():
            _check_zeros_and_ones(target)  # the pass speaks of label maps, and advises what fits those
        raise


def _flat_pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check a user's logits (N, *S) and masks (M, *S); return them as (N, V) and (M, V), float64 or float32.

    The dtype is float64 for float64 logits. Raise TypeError unless both are tensors, what `_check_masks` raises, and
    ValueError for floating masks with a value outside [0, 1], or other masks with a value that is not 0 or 1.
    """
    validation.are_tensors(input=input, target=target)
    _check_masks(input, target, "(M, *S)", (len(target), *input.shape[1:]))
    if target.is_floating_point():
        check.check((target < 0) | (target > 1), None, target, check.target_error)
    else:
        _check_zeros_and_ones(target)
    dtype = result_dtype(input.dtype)
    logit_NV, target_MV = (x.reshape(len(x), input.shape[1:].numel()).to(dtype) for x in (input, target))
    return logit_NV, target_MV


def _check_masks(input: Tensor, target: Tensor, letters: str, target_shape: tuple[int, ...]) -> None:
    """Raise TypeError unless input is floating; ValueError unless it is (N, *S) and target has the shape target_shape.

    Raise ValueError, too, if the two are on different devices. letters: target_shape in letters, for the message.
    """
    if input.dtype not in check.INPUT_DTYPES:
        advice = "Pass logits first, masks second."
        validation.fail("input of dtype float16, bfloat16, float32 or float64", input.dtype, advice, TypeError)
    if input.ndim < 2 or tuple(target.shape) != tuple(target_shape):
        advice = "Give one mask per row, of the same size in both: flatten(0, 1) joins batch and masks."
        expected = f"input of shape (N, *S), target {letters} with the same S"
        validation.fail(expected, f"{tuple(input.shape)} and {tuple(target.shape)}", advice)
    validation.same_device(input.device, "input", target=target)


def _check_zeros_and_ones(target: Tensor) -> None:
    """Raise ValueError if masks, a tensor of any shape and dtype, have values other than 0 and 1."""
    check.hard(target, "target", "Round it; fractional masks fit Dice, and alpha=None with gamma=0.")


def _prices(alpha: float | None) -> tuple[float, float]:
    """Return the prices of a voxel inside the mask and outside: alpha and 1 - alpha, or 1 and 1 for None.

    Raise TypeError or ValueError for an alpha outside [0, 1].
    """
    if alpha is None:
        return 1.0, 1.0
    validation.number("alpha", alpha, 0, 1)
    return alpha, 1 - alpha


def _reduced(cost: Tensor, num_masks: float | Tensor | None, reduction: str) -> Tensor:
    """Return the cost (N, 1) of N masks as (N,) for the reduction "none", or for "mean" its sum / num_masks, 0-d.

    num_masks: a user's number >= 1 or tensor of one element; None for N. Raise TypeError or ValueError for anything
    else, and ValueError for a num_masks with "none".
    """
    validation.choice("reduction", reduction, ("mean", "none"))
    if reduction == "none":
        if num_masks is not None:
            validation.fail("no num_masks with reduction='none'", num_masks, "Leave it out, or divide the sum by it.")
        return cost[:, 0]
    if num_masks is None:
        num_masks = max(len(cost), 1)
    elif not isinstance(num_masks, Tensor):
        validation.number("num_masks", num_masks, 1)
    elif num_masks.numel() != 1:
        validation.fail("num_masks of one element", tuple(num_masks.shape), "Add the counts of the batch up.")
    return cost.sum() / (num_masks.reshape(()) if isinstance(num_masks, Tensor) else num_masks)
