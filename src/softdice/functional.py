"""input, target -> loss: the losses as functions, for a call or two; in a training loop keep the module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from softdice import losses

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
    return losses.SoftDiceLoss(input.shape[1], eps, **settings)(input, target, voxel_weight)
