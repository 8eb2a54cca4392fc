"""The last layer of a network and the loss, computed together: logits of full size never exist."""

from softdice.head.module import FusedHead
from softdice.head.upsampled import Upsampled

__all__ = ["FusedHead", "Upsampled"]
