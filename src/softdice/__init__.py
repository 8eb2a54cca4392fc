"""The Dice coefficient and its family as losses and scores for PyTorch, one fused pass over the voxels.

logits, target --(fused pass)--> statistics --pool--> --index--> score --cost--> cost per class --reduce--> loss
"""

from typing import Any

import softdice.interrupt as _interrupt  # noqa: F401 - first: the imports below take seconds
import softdice.validation as _validation
from softdice import costs, functional, indices, losses, metrics, reductions
from softdice.backends.route import use_backend
from softdice.decisions import dice_confidence, dice_threshold
from softdice.head import FusedHead, Upsampled
from softdice.losses import DeepSupervision, OverlapLoss
from softdice.losses.centreline import *  # noqa: F403
from softdice.losses.confusion import *  # noqa: F403
from softdice.losses.mapped import *  # noqa: F403
from softdice.losses.named import *  # noqa: F403
from softdice.losses.ranked import *  # noqa: F403
from softdice.losses.voxelwise import *  # noqa: F403
from softdice.metrics.formulas import dice_score
from softdice.reproducibility import SystemConfig, setup_system
from softdice.statistics import OverlapStatistics, overlap_statistics, soft_confusion, voxel_cross_entropy
from softdice.version import __version__

# They need torchmetrics; `import *` brings them where it is installed.
_METRICS = ("DiceScore", "JaccardScore", "PrecisionScore", "RecallScore", "VolumeDifference")

__all__ = [
    "DeepSupervision",
    "FusedHead",
    "OverlapLoss",
    "OverlapStatistics",
    "SystemConfig",
    "Upsampled",
    "__version__",
    "costs",
    "dice_confidence",
    "dice_score",
    "dice_threshold",
    "functional",
    "indices",
    "overlap_statistics",
    "reductions",
    "setup_system",
    "soft_confusion",
    "use_backend",
    "voxel_cross_entropy",
]
__all__ += _METRICS if metrics.HAS_TORCHMETRICS else ()
__all__ += losses.centreline.__all__
__all__ += losses.confusion.__all__
__all__ += losses.named.__all__  # the losses, each listed where it is defined
__all__ += losses.ranked.__all__
__all__ += losses.voxelwise.__all__
__all__ += losses.mapped.__all__
__all__.sort()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Return a metric, imported at its first use, since torchmetrics is slow; raise AttributeError for other names."""
    if name not in _METRICS:
        raise AttributeError(f"module 'softdice' has no attribute {name!r}")
    _validation.attribute_needs(f"softdice.{name}", "torchmetrics", "metrics")
    return getattr(metrics, name)
