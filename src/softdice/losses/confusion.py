"""The losses that are functions of the soft confusion matrix: how much of each class was taken for which other.

No sum over a single class holds that, so they make a pass of their own: `softdice.soft_confusion`.

Shape suffixes: B sample (or 1, pooled), L label, C class that is predicted. Tensors and errors of a call are those of
`OverlapLoss`, except that the target has to be a label map.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from softdice import costs, reductions, validation
from softdice.losses.base import Loss
from softdice.losses.settings import LossSettings, adopt, pass_of
from softdice.statistics.api import confusion_pass, run_pass

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MultiClassMCCLoss", "WassersteinDiceLoss"]


class _ConfusionLoss(Loss):
    """A loss of the soft confusion matrix: pool the matrices of the samples, score them, take the cost, reduce."""

    TAKES = ("activation", "cost", "pooling", "ignore_index", "reduction", "group", "validate")

    def __init__(self, num_classes: int, eps: float, settings: LossSettings) -> None:
        """Check and keep a user's eps, in voxels, and keywords.

        Raise TypeError or ValueError as `OverlapLoss` does, and ValueError for a single class.
        """
        super().__init__()
        validation.number("eps", eps, 0)
        options = adopt(self, num_classes, settings, self.TAKES)
        if num_classes < 2:
            validation.fail("num_classes >= 2", num_classes, "With one class there is nothing to confuse.")
        self.settings = confusion_pass(pass_of(options))
        self.eps, self.ignore_index = eps, options["ignore_index"]

    def forward(self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None) -> Tensor:
        """input, target -> loss, on the autograd graph: 0-d, for reduction="none" (1,) or, per sample, (B, 1).

        input: (B, C, *S), floating. target: labels (B, *S) or (B, 1, *S). voxel_weight: (B, *S) or (B, 1, *S), >= 0.
        """
        sums = run_pass(input, target, voxel_weight, self.settings, self.num_classes, group=self.group)
        sums_LBC = sums if self.group is None else sums.unsqueeze(1)  # a group has added the samples: (L, C)
        matrix_BLC = sums_LBC.transpose(0, 1)
        if self.pooling == "batch":
            matrix_BLC = matrix_BLC.sum(0, keepdim=True)
        cost_B = self.cost(self.score(matrix_BLC))
        cost = cost_B if self.pooling == "batch" else cost_B.unsqueeze(1)  # (1,) or (B, 1): one cost for all classes
        return reductions.reduce(cost, reduction=self.reduction)

    @abstractmethod
    def score(self, matrix_BLC: Tensor) -> Tensor:
        """Return the score of each soft confusion matrix, (B,); if the samples are pooled, B = 1."""

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, pooling={self.pooling!r}, reduction={self.reduction!r}"


class WassersteinDiceLoss(_ConfusionLoss):
    """input, target -> 1 - generalised Wasserstein Dice: mistakes cost by how far apart the two classes are.

        score = (2 A + eps) / (denominator + eps),    A = sum_l a_l (N_l - W_l),    W_l = sum_c M[l, c] K[l, c]
        weighting "foreground":  a = 0 for class 0, else 1;    denominator = 2 A + sum_l W_l
        weighting "volume":      a_l = 1 / (N_l + 1);          denominator = sum_l a_l (2 N_l - W_l)

    with K the soft confusion matrix, N_l its row sums (the voxels of label l) and M the distances over their largest:
    sum_c M[l, c] p_c is the Wasserstein distance of a voxel's probabilities p from its label l.

    Args:
        num_classes: channels of `input`, >= 2.
        distance: (C, C), distance[l, c] of class c from the true class l, >= 0, 0 on the diagonal, not all 0; None
            for 1 between any two classes.
        weighting: "foreground" (the paper's) or "volume" (rare classes weigh more, class 0 counts).
        eps: smoothing in voxels, >= 0.
        settings: the keywords activation ("none": probabilities that sum to 1; "softmax"), cost, pooling, ignore_index,
            reduction, group and validate of `LossSettings`. reduction="none" gives (1,) or, with pooling="sample",
            (B, 1). MONAI's has pooling="sample".

    Edge cases: no voxel that counts, or nothing but background, all of it right: 0 (nan for eps = 0).

    Example:
        >>> import torch, softdice
        >>> near = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]  # classes 1 and 2 are alike
        >>> loss = softdice.WassersteinDiceLoss(3, near)
        >>> loss(torch.tensor([[[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.3333)

    Source: L. Fidon et al., "Generalised Wasserstein Dice score for imbalanced multi-class segmentation using holistic
    convolutional networks", BrainLes 2017, eqs. 6 to 9; "volume": S. Tilborghs et al., arXiv:2007.15546, 2020.
    """

    def __init__(
        self,
        num_classes: int,
        distance: Tensor | Sequence[Sequence[float]] | None = None,
        *,
        weighting: Literal["foreground", "volume"] = "foreground",
        eps: float = 1e-5,
        **settings: Unpack[LossSettings],
    ) -> None:
        validation.choice("weighting", weighting, ("foreground", "volume"))
        super().__init__(num_classes, eps, settings)
        self.weighting = weighting
        self.distance: Tensor
        self.register_buffer("distance", _distances(distance, num_classes), persistent=False)

    def score(self, matrix_BLC: Tensor) -> Tensor:
        """Return the generalised Wasserstein Dice of each soft confusion matrix, (B,).

        Names, and their letters in the class's formula: error W (the sum over c of M K), voxels N, weight a, overlap A.
        """
        error_BL = (self.distance.to(matrix_BLC) * matrix_BLC).sum(-1)
        voxels_BL = matrix_BLC.detach().sum(-1)  # a constant: the probabilities of a voxel sum to 1
        if self.weighting == "volume":
            weight_BL = 1 / (voxels_BL + 1)
            overlap_B = (weight_BL * (voxels_BL - error_BL)).sum(-1)
            denominator_B = (weight_BL * (2 * voxels_BL - error_BL)).sum(-1)
        else:
            overlap_B = (voxels_BL - error_BL)[:, 1:].sum(-1)
            denominator_B = 2 * overlap_B + error_BL.sum(-1)
        return (2 * overlap_B + self.eps) / (denominator_B + self.eps)


class MultiClassMCCLoss(_ConfusionLoss):
    """input, target -> 1 - R_K, the correlation of prediction and truth over all classes at once; in [0, 2].

        R_K = (k - sum_c t_c p_c + e (2 k - 1)) / sqrt((1 - sum_c p_c^2 + e) (1 - sum_c t_c^2 + e)),    e = eps / N

    with N the sum of the soft confusion matrix and, over N, k its trace, t its row sums and p its column sums. For two
    classes it is the MCC of either; `MCCLoss` is the mean of each class against the rest.

    Args:
        num_classes: channels of `input`, >= 2.
        eps: smoothing in voxels, >= 0.
        settings: the keywords activation ("none" or "softmax"), cost (not "neg_log", since the score may be negative),
            pooling, ignore_index, reduction, group and validate of `LossSettings`.

    The smoothing leaves R_K of a perfect prediction at 1. With two classes one that is wrong everywhere stays at -1,
    also where only one class occurs; with more classes the least R_K lies between -1 and 0.

    Edge cases: the loss is 0 (nan for eps = 0) where all voxels have one class and are predicted so, and where no voxel
    counts.

    Example:
        >>> import torch, softdice
        >>> probabilities = torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]])
        >>> softdice.MultiClassMCCLoss(2, eps=0.0)(probabilities, torch.tensor([[1, 0, 0, 1]]))
        tensor(0.4226)

    Source: J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", Computational
    Biology and Chemistry 28, 2004, eq. 8, with probabilities in the place of assignments.
    """

    def __init__(self, num_classes: int, *, eps: float = 1e-5, **settings: Unpack[LossSettings]) -> None:
        costs.refuse_logarithm(settings.get("cost", "one_minus"))
        super().__init__(num_classes, eps, settings)

    def score(self, matrix_BLC: Tensor) -> Tensor:
        """Return R_K of each soft confusion matrix, (B,), by the formula of the class.

        Computed in float64 (MPS has none), since 1 - sum p^2 loses its digits where one class fills nearly everything.
        """
        counts_BLC = matrix_BLC if matrix_BLC.device.type == "mps" else matrix_BLC.double()
        total_B11 = counts_BLC.sum((1, 2), keepdim=True)
        divisor_B11 = torch.where(total_B11 > 0, total_B11, 1.0)
        frequency_BLC, e_B = counts_BLC / divisor_B11, self.eps / divisor_B11[:, 0, 0]
        t_BL, p_BC = frequency_BLC.sum(2), frequency_BLC.sum(1)
        one_B = frequency_BLC.sum((1, 2))  # stands for the 1 of the formula: 1 up to rounding, 0 where no voxel counts
        k_B = frequency_BLC.diagonal(dim1=1, dim2=2).sum(-1)
        covariance_B = one_B * k_B - (t_BL * p_BC).sum(-1)
        variance_p_B, variance_t_B = ((one_B**2 - (x**2).sum(-1)).clamp_min(0) + e_B for x in (p_BC, t_BL))
        agreement_B = torch.where(total_B11[:, 0, 0] > 0, 2 * k_B - one_B, 1.0)  # the formula's 2 k - 1
        return ((covariance_B + e_B * agreement_B) / (variance_p_B * variance_t_B).sqrt()).to(matrix_BLC.dtype)


def _distances(values: Any, count: int) -> Tensor:
    """Return the distances between C = count classes, divided by the largest, (C, C) float32.

    values: a user's tensor or rows; None is 1 between any two classes. Raise TypeError if they are no numbers, and
    ValueError unless they are (C, C), finite, >= 0, not all 0, and 0 on the diagonal.
    """
    if values is None:
        return 1 - torch.eye(count)
    try:
        distance = torch.as_tensor(values, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        validation.fail("distance to be numbers", repr(values), "Pass a row for each class.", TypeError)
    if distance.shape != (count, count):
        got = tuple(distance.shape)
        validation.fail(f"distance of shape ({count}, {count})", got, "Pass one distance for each pair of classes.")
    if not bool(((distance >= 0) & distance.isfinite()).all()) or bool(distance.diagonal().any()) or not distance.any():
        expected = "distance finite, >= 0, 0 on the diagonal and not all 0"
        validation.fail(expected, distance.tolist(), "A class is at distance 0 from itself alone.")
    return (distance / distance.max()).float()
