"""input, target -> loss: the losses, each an index and a cost over the statistics of one pass."""

from softdice.losses.base import Loss, SumLoss
from softdice.losses.named import (
    DiceSemimetricLoss,
    ExponentialLogarithmicLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    JaccardMetricLoss,
    MCCLoss,
    NoiseRobustDiceLoss,
    SoftDiceLoss,
    SquaredDiceLoss,
    TverskyLoss,
)
from softdice.losses.overlap import LossSettings, OverlapLoss
from softdice.losses.supervision import DeepSupervision
from softdice.losses.voxelwise import CrossEntropyLoss, FocalLoss

__all__ = [
    "CrossEntropyLoss",
    "DeepSupervision",
    "DiceSemimetricLoss",
    "ExponentialLogarithmicLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "JaccardMetricLoss",
    "Loss",
    "LossSettings",
    "MCCLoss",
    "NoiseRobustDiceLoss",
    "OverlapLoss",
    "SoftDiceLoss",
    "SquaredDiceLoss",
    "SumLoss",
    "TverskyLoss",
]
