"""The losses that go by the rank of a voxel's error, and so are not functions of sums over voxels.

In a sum, `SoftDiceLoss(...) + 0.5 * LovaszLoss(...)`, such a loss makes its own passes.

Shape suffixes: B sample, C class, V voxel; R row of values that are ranked together, N value of a row; P pool (a
sample, or the batch). Tensors and errors of a call: as for `OverlapLoss`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softdice import internals, reductions, validation
from softdice.losses.base import Loss
from softdice.losses.settings import LossSettings, adopt, pass_of
from softdice.statistics import check
from softdice.statistics.api import cross_entropy_map, map_pass, run_pass
from softdice.statistics.request import columns, equals

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LovaszLoss", "OHEMCrossEntropyLoss", "TopKCrossEntropyLoss"]


class _VoxelEntropyLoss(Loss):
    """A loss of the voxels with the largest cross-entropy. It keeps the settings of the map of cross-entropies."""

    TAKES: tuple[str, ...] = ("activation", "ignore_index", "label_smoothing", "reduction", "validate")

    def __init__(self, num_classes: int, settings: LossSettings) -> None:
        """Check and keep a user's keywords.

        Raise what `OverlapLoss` raises, and ValueError for one class without a sigmoid, or for reduction="none".
        """
        super().__init__()
        options = adopt(self, num_classes, settings, self.TAKES)
        if num_classes == 1 and options["activation"] != "sigmoid":
            got = repr(options["activation"])
            validation.fail("activation='sigmoid' for a single class", got, "Or pass two channels.")
        validation.choice("reduction", options["reduction"], ("mean", "sum"))
        self.settings, self.ignore_index = map_pass(pass_of(options)), options["ignore_index"]

    def _entropies(self, input: Tensor, target: Tensor, voxel_weight: Tensor | None) -> Tensor:
        """Check the tensors of a call; return weight times cross-entropy of each voxel, (B, V), 0 for a weight of 0.

        Raise TypeError or ValueError as `OverlapLoss` does.
        """
        entropy_BV = cross_entropy_map(input, target, self.settings, self.num_classes).flatten(1)
        if voxel_weight is None:
            return entropy_BV
        weight_BV = check.tensors(input, target, voxel_weight, self.num_classes, self.settings).weight
        assert weight_BV is not None
        if self.settings.validate:
            check.check(~(weight_BV >= 0), None, weight_BV, check.weights_error)  # not `< 0`: a NaN is refused
        return torch.where(weight_BV > 0, entropy_BV, 0.0) * weight_BV.to(entropy_BV.dtype)


class TopKCrossEntropyLoss(_VoxelEntropyLoss):
    """input, target -> mean cross-entropy of the k voxels where it is largest.

        loss = 1 / k sum_{i <= k} E_(i),    E_(1) >= E_(2) >= ...

    with E the cross-entropy of a voxel, `softdice.voxel_cross_entropy`.

    Args:
        num_classes: channels of `input`; a single one needs activation="sigmoid".
        k: a float in (0, 1] is the share of all voxels of the batch (rounded down, but one voxel at least), an int >= 1
            their number (all of them, if there are fewer).
        settings: the keywords activation, ignore_index, label_smoothing, validate, pooling and reduction of
            `LossSettings`. pooling="batch" takes the k largest of all samples together, "sample" the k largest of each
            sample; reduction is "mean" or "sum", over the voxels that are taken.

    Shapes: input (B, C, *S), target labels (B, *S) or values (B, C, *S). A voxel_weight (B, *S) multiplies E before the
    largest are sought.

    Memory: the map and its gradient, beside the gradient of `input`.

    Edge cases: an ignored voxel costs 0 and counts as a voxel, as in nnU-Net; of equal voxels some are taken; an empty
    batch costs 0.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.TopKCrossEntropyLoss(2, k=0.5, activation="softmax")
        >>> logits, labels = torch.tensor([[[1.0, 0.0, 3.0, 9.0], [0.0, 2.0, 3.0, 0.0]]]), torch.tensor([[0, 1, 1, 0]])
        >>> loss(logits, labels)  # (0.6931 + 0.3133) / 2
        tensor(0.5032)

    Source: Z. Wu, C. Shen, A. van den Hengel, "Bridging category-level and instance-level semantic image
    segmentation", arXiv:1605.06885, 2016, section 2.2; the form, F. Isensee et al., "nnU-Net", Nature Methods 18, 2021.
    """

    TAKES = (*_VoxelEntropyLoss.TAKES, "pooling")

    def __init__(self, num_classes: int, k: float = 0.1, **settings: Unpack[LossSettings]) -> None:
        super().__init__(num_classes, settings)
        is_fraction = isinstance(k, float)
        validation.number("k", k, 0 if is_fraction else 1, 1 if is_fraction else math.inf)
        if k == 0:
            validation.fail("k in (0, 1], or a number of voxels", repr(k), "Choose k in that range.")
        self.k = k

    def forward(self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None) -> Tensor:
        """input, target -> mean or sum of the k largest cross-entropies of each row, 0-d, on the autograd graph."""
        entropy_BV = self._entropies(input, target, voxel_weight)
        entropy_RN = entropy_BV.reshape(1, -1) if self.pooling == "batch" else entropy_BV
        N = entropy_RN.shape[1]
        k = self.k if isinstance(self.k, int) else max(1, int(N * self.k + 1e-6))  # in floats 0.29 * 100 < 29
        k = min(N, k)
        total = largest(entropy_RN, k)
        return total if self.reduction == "sum" else total / max(len(entropy_RN) * k, 1)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, k={self.k}, activation={self.settings.activation!r}"


class OHEMCrossEntropyLoss(_VoxelEntropyLoss):
    """input, target -> mean cross-entropy of the voxels whose true class has a probability below a threshold.

        loss = mean { E_v : p_v < max(threshold, p_(m + 1)) },    p = exp(-E),    p_(1) <= p_(2) <= ...

    with E the cross-entropy of a voxel, `softdice.voxel_cross_entropy`, and m = B min_kept: online hard example mining.

    Args:
        num_classes: channels of `input`; a single one needs activation="sigmoid".
        threshold: in [0, 1).
        min_kept: how many voxels per sample of the batch are kept, on the average, however easy they are; >= 0.
        settings: the keywords activation, ignore_index, label_smoothing, validate and reduction of `LossSettings`.
            reduction is "mean" or "sum", over the voxels that are kept (mmseg divides the sum by all voxels).

    Shapes: input (B, C, *S), target labels (B, *S) or values (B, C, *S). A voxel_weight (B, *S) multiplies E before the
    bounds are applied.

    Memory: the map and its gradient, beside the gradient of `input`.

    Edge cases: where no more than m voxels count, all but the easiest are kept, as in mmseg; of equal voxels at the
    bound none is kept; if none is kept the loss is 0.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.OHEMCrossEntropyLoss(2, threshold=0.7, min_kept=0)
        >>> loss(torch.tensor([[[0.9, 0.6, 0.8], [0.1, 0.4, 0.2]]]), torch.tensor([[0, 0, 1]]))  # of 0.6 and 0.2
        tensor(1.0601)

    Source: A. Shrivastava, A. Gupta, R. Girshick, "Training region-based object detectors with online hard example
    mining", CVPR 2016; for voxels, and the two bounds, OHEMPixelSampler of MMSegmentation.
    """

    def __init__(
        self, num_classes: int, threshold: float = 0.7, min_kept: int = 100_000, **settings: Unpack[LossSettings]
    ) -> None:
        super().__init__(num_classes, settings)
        validation.number("threshold", threshold, 0, 1, below=True)
        if isinstance(min_kept, bool) or not isinstance(min_kept, int) or min_kept < 0:
            validation.fail("min_kept to be an int >= 0", repr(min_kept), "Pass a number of voxels.")
        self.threshold, self.min_kept = threshold, min_kept

    def forward(self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None) -> Tensor:
        """input, target -> mean or sum of the cross-entropies above a bound, 0-d, on the autograd graph.

        The bound is -ln threshold, or the (m + 1)-th largest cross-entropy if that is lower: then the m = B min_kept
        voxels with the largest ones are kept. input: (B, C, *S), floating; for target and voxel_weight see the class.
        """
        entropy_1N = self._entropies(input, target, voxel_weight).reshape(1, -1)
        ranked_1N = entropy_1N.detach()  # the values that voxels are ranked by: below, -inf for an ignored one
        if self.ignore_index is not None:
            request = check.tensors(input, target, None, self.num_classes, self.settings)
            counted_1N = ~equals(request.target, self.ignore_index).reshape(1, -1)
            ranked_1N = torch.where(counted_1N, ranked_1N, -math.inf)
        bound = ranked_1N.new_tensor(-math.log(self.threshold) if self.threshold else math.inf)
        if self.min_kept and entropy_1N.numel():
            largest_left_11 = kth_largest(ranked_1N, min(len(input) * self.min_kept + 1, entropy_1N.numel()))
            if self.ignore_index is not None:  # if no more than m voxels count, all but the easiest are kept
                easiest = torch.where(counted_1N, ranked_1N, math.inf).amin()
                largest_left_11 = torch.where(largest_left_11 == -math.inf, easiest, largest_left_11)
            bound = torch.minimum(bound, largest_left_11)
        kept_1N = ~(ranked_1N <= bound)  # not `>`, so that a nan is kept and shows in the loss
        total = torch.where(kept_1N, entropy_1N, 0.0).sum()
        return total / kept_1N.sum().clamp_min(1) if self.reduction == "mean" else total

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, threshold={self.threshold}, min_kept={self.min_kept}, "
            f"activation={self.settings.activation!r}"
        )


def kth_largest(values_RN: Tensor, k: int) -> Tensor:
    """Return the k-th largest of the floating values in each row, (R, 1), without a gradient, for 1 <= k <= N."""
    if not _readable(values_RN):
        return values_RN.topk(k, 1, sorted=False).values.amin(1, keepdim=True)
    place = values_RN.shape[1] - k  # in ascending order; numpy's partition is many times as fast as topk
    return torch.from_numpy(np.partition(values_RN.detach().numpy(), place)[:, place : place + 1])


def largest(values_RN: Tensor, k: int) -> Tensor:
    """Return the sum, 0-d, of the k largest values of each row, over all rows, for 0 <= k <= N; differentiable."""
    if not k or not _readable(values_RN):  # numpy's partition below cannot run, on a GPU for example
        return values_RN.topk(k, 1, sorted=False).values.sum()
    bound_R1 = kth_largest(values_RN, k)
    kept_RN = ~(values_RN.detach() <= bound_R1)  # not `>`, so that a nan is kept and shows in the sum
    for kept_N, values_N, bound_1 in zip(kept_RN, values_RN.detach(), bound_R1, strict=True):
        vacancies = max(0, k - int(kept_N.sum()))  # filled with values that equal the bound
        kept_N[(values_N == bound_1).nonzero()[:vacancies, 0]] = True
    return torch.where(kept_RN, values_RN, 0.0).sum()


def _readable(tensor: Tensor) -> bool:
    """Return whether numpy can read the tensor: on the CPU, outside torch.compile and torch.func."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and internals.active_transform() is None


class LovaszLoss(Loss):
    """input, target -> mean over classes of the Lovasz extension of the Jaccard loss.

        cost of a class = sum_i e_(i) (J_i - J_(i-1)),    e_(1) >= e_(2) >= ...

    with e the error of a voxel: abs(y - p) for "softmax" and "none" (Lovasz-Softmax), the hinge max(0, 1 - (2 y - 1) x)
    for "sigmoid" (the Lovasz hinge; x the logit), and J_i = 1 - intersection / union of the class and the voxels
    that are predicted right if those of the i largest errors are wrong. At p of 0 and 1 the cost is the Jaccard loss.

    Args:
        num_classes: channels of `input`; for "sigmoid" each is a mask of its own.
        settings: the keywords activation, pooling ("batch" ranks the voxels of all samples together, "sample" takes the
            mean of the samples' losses, the authors' per_image), classes, class_weight, absent ("count": a class with
            no voxel costs its largest error, the authors' classes="all"; "skip": it is left out, their "present", which
            they use for a softmax), ignore_index (voxels with this label are not ranked), reduction and validate of
            `LossSettings`.

    Shapes: input (B, C, *S); target (B, *S) or (B, 1, *S) labels, or (B, C, *S) values of 0 and 1; voxel_weight (B, *S)
    or (B, 1, *S), of 0 and 1: 0 leaves a voxel out.

    Memory: the gradient of `input` (in float32 at first for half precision), and on a CPU 8 bytes for each voxel of a
    pool, two float32 maps of one class (some maps more for float64 and on CUDA). The forward pass writes the slopes of
    the cost into the memory of the gradient, and the backward pass finishes it in place; a second backward pass of the
    same graph computes them anew. Under torch.compile, torch.func and on other devices the definition serves, with some
    tensors of the size of input.

    Edge cases: of voxels with equal errors the first goes first (the authors' sort leaves that open, and the value does
    not depend on it); an error of 0 has a gradient of 0; if every class is left out the loss is 0.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.LovaszLoss(2, reduction="none")
        >>> loss(torch.tensor([[[0.9, 0.2, 0.5], [0.1, 0.8, 0.5]]]), torch.tensor([[0, 1, 1]]))
        tensor([0.3167, 0.3500])

    Source: M. Berman, A. Rannen Triki, M. B. Blaschko, "The Lovasz-Softmax loss: a tractable surrogate for the
    optimization of the intersection-over-union measure in neural networks", CVPR 2018, eqs. 8, 9 and 11; the hinge,
    J. Yu, M. Blaschko, "Learning submodular losses with the Lovasz hinge", ICML 2015.
    """

    TAKES = ("activation", "pooling", "classes", "class_weight", "absent", "ignore_index", "reduction", "validate")

    def __init__(self, num_classes: int, **settings: Unpack[LossSettings]) -> None:
        super().__init__()
        options = adopt(self, num_classes, settings, self.TAKES)
        self.ignore_index, per_sample = options["ignore_index"], self.pooling == "sample"
        self.settings = pass_of(options, kind="ranks", per_sample=per_sample, classes=self.classes)

    def forward(self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None) -> Tensor:
        """input, target -> loss, on the autograd graph: 0-d, for reduction="none" (C,) or, per sample, (B, C)."""
        # cost of each class, and how many voxels have it; the pools P are the samples, or 1 with pooling="batch"
        cost_PC, voxels_PC = run_pass(input, target, voxel_weight, self.settings, self.num_classes)
        if self.classes is not None:
            cost_PC, voxels_PC = columns(cost_PC, self.classes), columns(voxels_PC, self.classes)

        def reduce(cost: Tensor, voxels: Tensor) -> Tensor:
            """Return the loss for the costs of classes, (..., C), and their numbers of voxels, (..., C)."""
            present = voxels > 0 if self.absent == "skip" else None
            return reductions.reduce(cost, class_weight=self.class_weight, present=present, reduction=self.reduction)

        if self.pooling == "batch":
            return reduce(cost_PC[0], voxels_PC[0])
        if self.reduction != "mean":
            return reduce(cost_PC, voxels_PC)
        # the mean of the samples' means: a sample with fewer classes present weighs as much as another
        means = [reduce(*sample) for sample in zip(cost_PC, voxels_PC, strict=True)]
        return torch.stack(means).mean() if means else cost_PC.sum()

    def extra_repr(self) -> str:
        shown = f"num_classes={self.num_classes}, activation={self.settings.activation!r}, pooling={self.pooling!r}"
        return f"{shown}, classes={self.classes}, absent={self.absent!r}, reduction={self.reduction!r}"
