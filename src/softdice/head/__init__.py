"""features, target -> loss: the last 1x1 convolution and the loss together; the logits never exist."""

from softdice.head.module import FusedHead

__all__ = ["FusedHead"]
