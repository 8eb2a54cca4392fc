"""label maps -> scores: formulas over counts, the counting, and the torchmetrics classes that stream."""

from typing import Any

from softdice import validation
from softdice.metrics.distances import average_surface_distance, hausdorff_distance, surface_dice
from softdice.metrics.formulas import dice_score

STREAMING = ("DiceScore", "JaccardScore", "OverlapMetric", "PrecisionScore", "RecallScore", "VolumeDifference")

__all__ = ["average_surface_distance", "dice_score", "hausdorff_distance", "surface_dice", *STREAMING]


def __getattr__(name: str) -> Any:
    """The streaming classes are imported when first asked for: torchmetrics takes a second to import."""
    if name not in STREAMING:
        raise AttributeError(f"module 'softdice.metrics' has no attribute {name!r}")
    validation.package("softdice.metrics", "torchmetrics", "metrics")
    from softdice.metrics import streaming

    return getattr(streaming, name)
