"""features or logits of low resolution, target -> loss: the last layer and the loss together, without full logits."""

from softdice.head.module import FusedHead
from softdice.head.upsampled import Upsampled

__all__ = ["FusedHead", "Upsampled"]
