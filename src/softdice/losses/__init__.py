"""The losses. Most are an index and a cost over the statistics of one pass."""

from softdice.losses import centreline, confusion, mapped, named, ranked, voxelwise
from softdice.losses.base import Loss, MixedSumLoss, StatisticsLoss, SumLoss
from softdice.losses.centreline import *  # noqa: F403
from softdice.losses.confusion import *  # noqa: F403
from softdice.losses.mapped import *  # noqa: F403
from softdice.losses.named import *  # noqa: F403
from softdice.losses.overlap import OverlapLoss
from softdice.losses.ranked import *  # noqa: F403
from softdice.losses.settings import LossSettings
from softdice.losses.supervision import DeepSupervision
from softdice.losses.voxelwise import *  # noqa: F403

FAMILY: tuple[type[OverlapLoss], ...] = tuple(
    getattr(room, name) for room in (named, voxelwise) for name in room.__all__
)
"""The losses with an index of their own: each is public in `softdice` too, and a function in `softdice.functional`."""

MAPPED: tuple[type[OverlapLoss], ...] = tuple(getattr(mapped, name) for name in mapped.__all__ if name.endswith("Loss"))
"""The losses that read a map beside the target; public in the same way."""

BEYOND: tuple[type[Loss], ...] = tuple(
    getattr(room, name) for room in (centreline, confusion, ranked) for name in room.__all__
)
"""The losses that are not functions of the statistics; public in the same way."""

__all__ = [
    "BEYOND",
    "FAMILY",
    "MAPPED",
    "DeepSupervision",
    "Loss",
    "LossSettings",
    "MixedSumLoss",
    "OverlapLoss",
    "StatisticsLoss",
    "SumLoss",
]
__all__ += centreline.__all__
__all__ += confusion.__all__
__all__ += named.__all__
__all__ += ranked.__all__
__all__ += voxelwise.__all__
__all__ += mapped.__all__
