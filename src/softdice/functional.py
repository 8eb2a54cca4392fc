"""input, target -> loss: the losses as functions, for a call or two; in a training loop keep the module.

Every function takes what the class of the same name takes, and reads the number of classes off input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from softdice import losses, validation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from softdice.losses import LossSettings


@validation.public
def soft_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.SoftDiceLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.soft_dice_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.1269)
    """
    return losses.SoftDiceLoss(_channels(input), eps, **settings)(input, target, voxel_weight)


@validation.public
def jaccard_loss(
    input: Tensor,
    target: Tensor,
    *,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.JaccardLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.jaccard_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.2130)
    """
    return losses.JaccardLoss(_channels(input), eps, **settings)(input, target, voxel_weight)


@validation.public
def tversky_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.TverskyLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.tversky_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.1192)
    """
    return losses.TverskyLoss(_channels(input), alpha, beta, eps, **settings)(input, target, voxel_weight)


@validation.public
def focal_tversky_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.FocalTverskyLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.focal_tversky_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.2029)
    """
    return losses.FocalTverskyLoss(_channels(input), alpha, beta, gamma, eps, **settings)(input, target, voxel_weight)


@validation.public
def generalized_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    weighting: Literal["square", "simple", "uniform"] = "square",
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.GeneralizedDiceLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.generalized_dice_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.1192)
    """
    return losses.GeneralizedDiceLoss(_channels(input), weighting, eps, **settings)(input, target, voxel_weight)


@validation.public
def mcc_loss(
    input: Tensor,
    target: Tensor,
    *,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.MCCLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.mcc_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.2384)
    """
    return losses.MCCLoss(_channels(input), eps, **settings)(input, target, voxel_weight)


@validation.public
def squared_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.SquaredDiceLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.squared_dice_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.0159)
    """
    return losses.SquaredDiceLoss(_channels(input), eps, **settings)(input, target, voxel_weight)


@validation.public
def dice_semimetric_loss(
    input: Tensor,
    target: Tensor,
    *,
    form: Literal["sum", "product"] = "sum",
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.DiceSemimetricLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.dice_semimetric_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.1192)
    """
    return losses.DiceSemimetricLoss(_channels(input), form, eps, **settings)(input, target, voxel_weight)


@validation.public
def jaccard_metric_loss(
    input: Tensor,
    target: Tensor,
    *,
    form: Literal["sum", "product"] = "sum",
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.JaccardMetricLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.jaccard_metric_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.2130)
    """
    return losses.JaccardMetricLoss(_channels(input), form, eps, **settings)(input, target, voxel_weight)


@validation.public
def noise_robust_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    power: float = 1.5,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.NoiseRobustDiceLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.noise_robust_dice_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.0460)
    """
    return losses.NoiseRobustDiceLoss(_channels(input), power, eps, **settings)(input, target, voxel_weight)


@validation.public
def exponential_logarithmic_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 0.3,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.ExponentialLogarithmicLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.exponential_logarithmic_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.5384)
    """
    return losses.ExponentialLogarithmicLoss(_channels(input), gamma, eps, **settings)(input, target, voxel_weight)


@validation.public
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    *,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.CrossEntropyLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.cross_entropy_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.1269)
    """
    return losses.CrossEntropyLoss(_channels(input), **settings)(input, target, voxel_weight)


@validation.public
def focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.FocalLoss` returns.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.focal_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.0018)
    """
    return losses.FocalLoss(_channels(input), gamma, **settings)(input, target, voxel_weight)


def _channels(input: Tensor) -> int:
    """input (B, C, *S) -> C."""
    if not isinstance(input, Tensor):
        advice = "Wrap input in torch.as_tensor."
        validation.fail("input to be a Tensor", type(input).__name__, advice, TypeError)
    if input.ndim < 3:
        advice = "Add the missing dimension with unsqueeze."
        validation.fail("input of shape (B, C, *S)", tuple(input.shape), advice)
    return input.shape[1]
