"""MONAI's overlap losses (monai.losses), their constructors and numbers, from one pass over the voxels.

`from softdice.compat.monai import DiceLoss` in the place of `from monai.losses import DiceLoss`. MONAI itself is not
imported.

Example:
    >>> import torch
    >>> from softdice.compat.monai import DiceCELoss
    >>> loss = DiceCELoss(to_onehot_y=True, softmax=True)
    >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0, 1]]]))
    tensor(0.2461)
"""

from __future__ import annotations

from softdice.compat.monai_combined import DiceCELoss, DiceFocalLoss, FocalLoss, GeneralizedDiceFocalLoss
from softdice.compat.monai_dice import DiceLoss, GeneralizedDiceLoss, MaskedDiceLoss, TverskyLoss

__all__ = [
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "MaskedDiceLoss",
    "TverskyLoss",
]
