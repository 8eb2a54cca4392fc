"""label maps -> scores: formulas over counts, the counting, distances between surfaces, and the classes that stream."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from softdice import validation
from softdice.metrics.formulas import dice_score

STREAMING = ("DiceScore", "JaccardScore", "OverlapMetric", "PrecisionScore", "RecallScore", "VolumeDifference")
SURFACES = ("AverageSurfaceDistance", "HausdorffDistance", "SurfaceDice", "SurfaceMetric")
DISTANCES = ("average_surface_distance", "hausdorff_distance", "surface_dice")
HAS_TORCHMETRICS = find_spec("torchmetrics") is not None

__all__ = ["dice_score", *DISTANCES]
__all__ += [*STREAMING, *SURFACES] if HAS_TORCHMETRICS else ()


def __getattr__(name: str) -> Any:
    """What few need is imported when first asked for; torchmetrics takes a second to import."""
    homes = {"streaming": STREAMING, "surface_streaming": SURFACES, "distances": DISTANCES}
    home = next((home for home, names in homes.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'softdice.metrics' has no attribute {name!r}")
    if home != "distances":
        validation.attribute_needs(f"softdice.metrics.{name}", "torchmetrics", "metrics")
    return getattr(import_module(f"softdice.metrics.{home}"), name)
