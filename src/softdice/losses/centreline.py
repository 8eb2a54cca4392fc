"""The loss of clDice: whether the centre lines of tubes agree.

Shape suffixes: 4 the sums of S(p) y, S(p), S(y) p and S(y), in this order; B sample, C class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from softdice import reductions, validation
from softdice.losses.base import Loss
from softdice.losses.settings import LossSettings, adopt, pass_of
from softdice.statistics import check
from softdice.statistics.api import run_pass

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ClDiceLoss"]


class ClDiceLoss(Loss):
    """input, target -> 1 - soft clDice: do prediction and truth cover each other's skeletons; for tubes and networks.

        precision = (sum S(p) y + eps) / (sum S(p) + eps)       sensitivity = (sum S(y) p + eps) / (sum S(y) + eps)
        score     = 2 precision sensitivity / (precision + sensitivity + floor)

    with S(x) the soft skeleton of x and the sums over all voxels and all `classes` together. With E_0 = x, E_(k+1) the
    erosion of E_k (least of 3 in a row along each axis), D the dilation (largest of 3 x 3 x 3) and
    d_k = relu(E_k - D(E_(k+1))): S_0 = d_0, S_k = S_(k-1) + relu(d_k - S_(k-1) d_k), S = S_iterations.

    Args:
        num_classes: channels of `input`; input is (B, C, H, W) or (B, C, D, H, W).
        iterations: erosions, >= 0: as many as half the largest diameter of a tube, in voxels.
        eps: smoothing in voxels, >= 0. floor: added to the last denominator, >= 0 (the paper's is 0, MONAI's 1e-4).
        settings: the keywords activation, cost, pooling, classes (those that enter the sums; without the background:
            `range(1, C)`), ignore_index, reduction, group and validate of `LossSettings`. reduction="none" gives (1,)
            or, with pooling="sample", (B, 1). MONAI's has pooling="sample".

    When called: a voxel of label `ignore_index` or of weight 0 enters no sum and has a gradient of 0; the skeletons see
    it as a voxel of no class with p = 0. Other weights multiply the voxel's terms of the sums.

    Memory: for a label map on the CPU, two maps of one class and a tile for each thread. Per-class values and other
    devices are served by plain torch, one class of one sample at a time.

    Edge cases: nothing predicted and nothing there: about 0 (nan for eps = 0). An empty batch costs 0. A DTensor must
    not be split over space, for skeletons do not add.

    Example:
        >>> import torch, softdice
        >>> line = torch.zeros(1, 1, 5, 5, dtype=torch.long)
        >>> line[..., 2, :] = 1
        >>> loss = softdice.ClDiceLoss(1)
        >>> float(loss(line.float(), line)) < 1e-4, loss(line.float().roll(2, 2), line) > 0.8
        (True, tensor(True))

    Source: S. Shit, J. C. Paetzold et al., "clDice - a novel topology-preserving loss function for tubular structure
    segmentation", CVPR 2021, eqs. 1 and 2 and algorithm 2.
    """

    TAKES = ("activation", "cost", "pooling", "classes", "ignore_index", "reduction", "group", "validate")

    def __init__(
        self,
        num_classes: int,
        iterations: int = 3,
        *,
        eps: float = 1.0,
        floor: float = 1e-4,
        **settings: Unpack[LossSettings],
    ) -> None:
        super().__init__()
        validation.number("eps", eps, 0)
        validation.number("floor", floor, 0)
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            validation.fail("iterations to be an int >= 0", repr(iterations), "Pass how often to erode.")
        options = adopt(self, num_classes, settings, self.TAKES)
        self.settings = pass_of(options, kind="skeletons", iterations=iterations)
        self.eps, self.floor, self.ignore_index = eps, floor, options["ignore_index"]

    def forward(self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None) -> Tensor:
        """input, target -> loss, on the autograd graph: 0-d, for reduction="none" (1,) or, per sample, (B, 1).

        input: (B, C, H, W) or (B, C, D, H, W), floating. target: labels (B, *S) or (B, 1, *S), or values (B, C, *S) in
        [0, 1]. voxel_weight: (B, *S) or (B, 1, *S), >= 0. Raise TypeError or ValueError for tensors that do not fit,
        and ValueError for a DTensor that is split over a spatial dimension.
        """
        validation.are_tensors(input=input)
        if input.ndim not in (4, 5):
            expected = "input of shape (B, C, H, W) or (B, C, D, H, W)"
            validation.fail(expected, tuple(input.shape), "A skeleton needs two or three dimensions.")
        placements: Any = getattr(input, "placements", ()) if check.is_dtensor(input) else ()
        if any(placement.is_shard() and placement.dim > 1 for placement in placements):
            validation.fail("input that is not split over space", placements, "Split it over the batch.")
        settings = self.settings.but(shape=tuple(input.shape[2:]))
        sums_4BC = run_pass(input, target, voxel_weight, settings, self.num_classes, group=self.group)
        if self.group is not None:  # the group has added the samples, too: (4, C)
            sums_4BC = sums_4BC.unsqueeze(1)
        if self.classes is not None:
            sums_4BC = sums_4BC[:, :, list(self.classes)]
        sums_4B1 = sums_4BC.sum(2, keepdim=True)
        if self.pooling == "batch":
            sums_4B1 = sums_4B1.sum(1)
        return reductions.reduce(self.cost(self.score(sums_4B1)), reduction=self.reduction)

    def score(self, sums_4B1: Tensor) -> Tensor:
        """Return soft clDice, (B, 1) or pooled (1,), for the sums of S(p) y, S(p), S(y) p and S(y) over the classes."""
        prediction_skeleton_in_target, prediction_skeleton, target_skeleton_in_prediction, target_skeleton = sums_4B1
        precision = (prediction_skeleton_in_target + self.eps) / (prediction_skeleton + self.eps)
        sensitivity = (target_skeleton_in_prediction + self.eps) / (target_skeleton + self.eps)
        return 2 * precision * sensitivity / (precision + sensitivity + self.floor)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, iterations={self.settings.iterations}, pooling={self.pooling!r}"
