# Written by tests/functional_stub.py from the classes of the losses.
# fmt: off
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from softdice.losses import LossSettings
from softdice.losses.masks import *  # noqa: F403

def dice_semimetric_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    form: Literal["sum", "product"] = "sum", eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.DiceSemimetricLoss` returns."""

def exponential_logarithmic_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    gamma: float = 0.3, eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.ExponentialLogarithmicLoss` returns."""

def focal_tversky_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.FocalTverskyLoss` returns."""

def generalized_dice_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    weighting: Literal["square", "simple", "uniform"] = "square", eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.GeneralizedDiceLoss` returns."""

def jaccard_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.JaccardLoss` returns."""

def jaccard_metric_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    form: Literal["sum", "product"] = "sum", eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.JaccardMetricLoss` returns."""

def mcc_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.MCCLoss` returns."""

def noise_robust_dice_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    power: float = 1.5, eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.NoiseRobustDiceLoss` returns."""

def soft_dice_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.SoftDiceLoss` returns."""

def squared_dice_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.SquaredDiceLoss` returns."""

def tversky_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    alpha: float = 0.3, beta: float = 0.7, eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.TverskyLoss` returns."""

def cross_entropy_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.CrossEntropyLoss` returns."""

def focal_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    gamma: float = 2.0, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.FocalLoss` returns."""

def boundary_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    voxel_map: Tensor, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.BoundaryLoss` returns."""

def skeleton_recall_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    voxel_map: Tensor, eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.SkeletonRecallLoss` returns."""

def cl_dice_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    iterations: int = 3, eps: float = 1.0, floor: float = 0.0001, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.ClDiceLoss` returns."""

def multi_class_mcc_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.MultiClassMCCLoss` returns."""

def wasserstein_dice_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    distance: Tensor | Sequence[Sequence[float]] | None = None,
    weighting: Literal["foreground", "volume"] = "foreground", eps: float = 1e-05, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.WassersteinDiceLoss` returns."""

def lovasz_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.LovaszLoss` returns."""

def ohem_cross_entropy_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    threshold: float = 0.7, min_kept: int = 100000, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.OHEMCrossEntropyLoss` returns."""

def top_k_cross_entropy_loss(
    input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None,
    k: float = 0.1, **settings: Unpack[LossSettings],
) -> Tensor:
    """input, target -> what `softdice.TopKCrossEntropyLoss` returns."""
