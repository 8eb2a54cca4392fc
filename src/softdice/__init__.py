"""The Dice coefficient and its family as losses and scores for PyTorch, one fused pass over the voxels.

logits, target --(fused pass)--> statistics --pool--> --index--> score --cost--> cost per class --reduce--> loss
"""

from softdice import costs, functional, indices, reductions
from softdice.kernels.registry import use_backend
from softdice.losses import (
    CrossEntropyLoss,
    DiceSemimetricLoss,
    ExponentialLogarithmicLoss,
    FocalLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    JaccardMetricLoss,
    MCCLoss,
    NoiseRobustDiceLoss,
    OverlapLoss,
    SoftDiceLoss,
    SquaredDiceLoss,
    TverskyLoss,
)
from softdice.reproducibility import SystemConfig, setup_system
from softdice.statistics import OverlapStatistics, overlap_statistics
from softdice.supervision import DeepSupervision
from softdice.version import __version__

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
    "MCCLoss",
    "NoiseRobustDiceLoss",
    "OverlapLoss",
    "OverlapStatistics",
    "SoftDiceLoss",
    "SquaredDiceLoss",
    "SystemConfig",
    "TverskyLoss",
    "__version__",
    "costs",
    "functional",
    "indices",
    "overlap_statistics",
    "reductions",
    "setup_system",
    "use_backend",
]
