"""input, target -> loss: the losses as functions, for a call or two; in a training loop keep the module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from softdice import losses, validation

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from softdice.losses import LossSettings


def soft_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    eps: float = 1e-5,
    voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.SoftDiceLoss` returns, with the number of classes read off input.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> softdice.functional.soft_dice_loss(logits, torch.tensor([[0, 1]]), activation="softmax")
        tensor(0.1269)
    """
    return losses.SoftDiceLoss(_channels("soft_dice_loss", input), eps, **settings)(input, target, voxel_weight)


def _channels(caller: str, input: Tensor) -> int:
    """input (B, C, *S) -> C."""
    if not isinstance(input, Tensor):
        advice = "Wrap input in torch.as_tensor."
        validation.fail(caller, "input to be a Tensor", type(input).__name__, advice, TypeError)
    if input.ndim < 3:
        advice = "Add the missing dimension with unsqueeze."
        validation.fail(caller, "input of shape (B, C, *S)", tuple(input.shape), advice)
    return input.shape[1]
