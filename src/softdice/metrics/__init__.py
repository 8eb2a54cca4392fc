"""Scores of label maps: counts of voxels and their formulas, surfaces, lesions, and the classes that stream."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from softdice import validation
from softdice.metrics.formulas import dice_score

STREAMING = ("DiceScore", "JaccardScore", "OverlapMetric", "PrecisionScore", "RecallScore", "VolumeDifference")
SURFACES = ("AverageSurfaceDistance", "CaseMetric", "HausdorffDistance", "SurfaceDice", "SurfaceMetric")
LESIONS = ("CentrelineDice", "LesionDice", "PanopticQuality")
DISTANCES = ("average_surface_distance", "hausdorff_distance", "surface_dice")
COMPONENTS = ("centreline_dice", "lesion_dice", "panoptic_quality")
HAS_TORCHMETRICS = find_spec("torchmetrics") is not None

__all__ = ["dice_score", *DISTANCES, *COMPONENTS]
__all__ += [*STREAMING, *SURFACES, *LESIONS] if HAS_TORCHMETRICS else ()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torchmetrics takes a second to import."""
    homes: dict[str, tuple[str, ...]] = {"distances": DISTANCES, "lesions": COMPONENTS}
    homes |= {"streaming": STREAMING, "surface_streaming": SURFACES, "lesion_streaming": LESIONS}
    home = next((home for home, names in homes.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'softdice.metrics' has no attribute {name!r}")
    if home.endswith("streaming"):
        validation.attribute_needs(f"softdice.metrics.{name}", "torchmetrics", "metrics")
    return getattr(import_module(f"softdice.metrics.{home}"), name)
