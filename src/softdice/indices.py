"""statistics -> score, higher is better (1 is perfect); `cross_entropy`, `focal_entropy` and `boundary` are costs.

Every index is a plain function of `OverlapStatistics` (or of anything with the same fields), so a new one is a new
function; see the documentation page "Your own index". An index of single classes returns one score per class; an
index over all classes takes the keyword `class_weight` (0 leaves a class out) and returns a last dimension of 1.

Sums are written I = intersection, P = prediction, T = target, Q = prediction_squared, R = target_squared,
D = difference, N = voxels. Shape suffixes: C class; a leading B is kept where it is there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from softdice import validation
from softdice.statistics import OverlapStatistics


def dice(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> Dice coefficient per class.

        dice = (2 I + eps) / (P + T + eps)

    Args:
        stats: statistics with `intersection`, `prediction` and `target`, (B, C) or (C,).
        eps: smoothing, >= 0, in voxels; it stands once in the numerator and once in the denominator.

    Returns:
        The score, same shape as the statistics.

    Edge cases: a class that is neither predicted nor present scores 1 (0 / 0 = nan for eps = 0); a class that is
    present and not predicted, or predicted and not present, scores about eps / (its voxels, P + T), close to 0.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]])
        >>> stats = softdice.overlap_statistics(probabilities, labels)
        >>> softdice.indices.dice(stats.pool(), eps=0)
        tensor([0.8000, 0.6667])

    Source: L. R. Dice, "Measures of the amount of ecologic association between species", Ecology 26 (3), 1945,
    coincidence index; with probabilities, F. Milletari et al., "V-Net", 3DV 2016.
    """
    return (2 * stats.intersection + eps) / (stats.prediction + stats.target + eps)


def jaccard(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> Jaccard index (intersection over union) per class.

        jaccard = (I + eps) / (P + T - I + eps)

    Args:
        stats: statistics with `intersection`, `prediction` and `target`, (B, C) or (C,).
        eps: smoothing, >= 0, in voxels.

    Returns:
        The score in [0, 1], same shape as the statistics.

    Edge cases: neither predicted nor present: 1 (nan for eps = 0); one without the other: about eps / voxels.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]])
        >>> jaccard(softdice.overlap_statistics(probabilities, labels).pool(), eps=0)
        tensor([0.6667, 0.5000])

    Source: M. A. Rahman, Y. Wang, "Optimizing intersection-over-union in deep neural networks for image
    segmentation", ISVC 2016.
    """
    return (stats.intersection + eps) / (stats.prediction + stats.target - stats.intersection + eps)


def tversky(stats: OverlapStatistics, *, alpha: float = 0.3, beta: float = 0.7, eps: float = 1e-5) -> Tensor:
    """statistics -> Tversky index per class: what false positives and false negatives cost is chosen.

        tversky = (I + eps) / (I + alpha (P - I) + beta (T - I) + eps)

    Args:
        stats: statistics with `intersection`, `prediction` and `target`, (B, C) or (C,).
        alpha: price of a false positive, >= 0. beta: price of a false negative, >= 0. Both 0.5 give Dice, both 1
            Jaccard. (Some libraries give these letters the opposite roles.)
        eps: smoothing, >= 0, in voxels.

    Returns:
        The score in [0, 1], same shape as the statistics.

    Edge cases: neither predicted nor present: 1 (nan for eps = 0); one without the other: about eps / voxels.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]])
        >>> tversky(softdice.overlap_statistics(probabilities, labels).pool(), alpha=0.2, beta=0.8, eps=0)
        tensor([0.9091, 0.5556])

    Source: S. S. M. Salehi, D. Erdogmus, A. Gholipour, "Tversky loss function for image segmentation using 3D fully
    convolutional deep networks", MLMI 2017.
    """
    false_positives, false_negatives = stats.prediction - stats.intersection, stats.target - stats.intersection
    return (stats.intersection + eps) / (stats.intersection + alpha * false_positives + beta * false_negatives + eps)


def squared_dice(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> Dice coefficient with squares in the denominator, per class (the V-Net form).

        squared_dice = (2 I + eps) / (Q + R + eps)

    Args:
        stats: statistics with `intersection`, `prediction_squared` and `target_squared`, (B, C) or (C,).
        eps: smoothing, >= 0, in voxels.

    Returns:
        The score in [0, 1], same shape as the statistics; 1 exactly where p = y, also for soft y.

    Edge cases: neither predicted nor present: 1 (nan for eps = 0); one without the other: about eps / voxels.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]])
        >>> squared_dice(softdice.overlap_statistics(probabilities, labels).pool(), eps=0)
        tensor([0.8889, 0.8000])

    Source: F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016, section 3.
    """
    return (2 * stats.intersection + eps) / (stats.prediction_squared + stats.target_squared + eps)


@validation.public
def generalized_dice(
    stats: OverlapStatistics,
    *,
    class_weight: Tensor | None = None,
    weighting: Literal["square", "simple", "uniform"] = "square",
    eps: float = 1e-5,
) -> Tensor:
    """statistics -> one Dice coefficient over all classes, rare classes weighted up.

        generalized_dice = (2 sum_c v_c I_c + eps) / (sum_c v_c (P_c + T_c) + eps),    v_c = u_c / sum_k u_k,
        u_c = 1 / T_c^2 ("square"), 1 / T_c ("simple") or 1 ("uniform")

    An absent class (T = 0) takes the weight u of the rarest class that is present; if none is, all weights are 1.
    So every weight is finite, an absent class that is predicted always costs, and because the weights are normalised
    the score does not change when all weights, or (but for eps) all sums, are multiplied by one number.

    Args:
        stats: statistics with `intersection`, `prediction` and `target`, (B, C) or (C,).
        class_weight: multiplies u, broadcast to the statistics; 0 leaves a class out. None for 1.
        weighting: how a class's weight falls with its size.
        eps: smoothing, >= 0, in voxels.

    Returns:
        The score in [0, 1], (1,) or (B, 1).

    Edge cases: nothing present and nothing predicted: 1 (nan for eps = 0).

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0, 1.0], [0.5, 0.0, 0.0]]]), torch.tensor([[1, 0, 0]])
        >>> stats = softdice.overlap_statistics(probabilities, labels).pool()
        >>> generalized_dice(stats, eps=0)
        tensor([0.7619])
        >>> generalized_dice(stats, weighting="uniform", eps=0)
        tensor([0.8333])

    Source: C. H. Sudre et al., "Generalised Dice overlap as a deep learning loss function for highly unbalanced
    segmentations", DLMIA 2017.
    """
    validation.choice("weighting", weighting, ("square", "simple", "uniform"))
    target, present = stats.target, stats.target > 0
    if class_weight is not None:
        present = present & (class_weight > 0)
    rarest = torch.where(present, target, torch.inf).amin(-1, keepdim=True)
    size = torch.where(present, target / rarest, 1.0)  # in units of the rarest class; an absent one counts as that
    weight = size ** -{"square": 2.0, "simple": 1.0, "uniform": 0.0}[weighting]
    if class_weight is not None:
        weight = weight * class_weight
    weight = weight / weight.sum(-1, keepdim=True)
    overlap = (weight * stats.intersection).sum(-1, keepdim=True)
    extent = (weight * (stats.prediction + target)).sum(-1, keepdim=True)
    return (2 * overlap + eps) / (extent + eps)


def mcc(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> Matthews correlation coefficient per class, each against the rest.

        mcc = (I/N - pt + e a) / sqrt((p (1 - p) + e) (t (1 - t) + e)),    p = P/N, t = T/N, e = eps/N,
        a = 1 - 2 (p + t - 2 I/N): the share of the voxels that agree minus the share of those that do not

    which for eps = 0 is (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)), divided through by N^2 so
    that large volumes do not overflow. The smoothing keeps 1 for a perfect prediction and -1 for its opposite, also
    where every voxel has the class, or none has.

    Args:
        stats: statistics with `intersection`, `prediction`, `target` and `voxels`, (B, C) or (C,).
        eps: smoothing, >= 0, in voxels.

    Returns:
        The score in [-1, 1], same shape as the statistics: 0 is what chance gives.

    Edge cases: a class that is neither predicted nor present, one that fills everything and is predicted everywhere,
    and no voxels: 1 (nan for eps = 0). Where a class fills everything, or nothing, the score is monotone in p: 1 where
    every p is right, 0 at p = 1/2, -1 where every p is wrong; in between about +-sqrt(eps / wrong or right voxels).

    Example:
        >>> import torch, softdice
        >>> probabilities = torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]])
        >>> mcc(softdice.overlap_statistics(probabilities, torch.tensor([[1, 0, 0, 1]])).pool(), eps=0)
        tensor([0.5774, 0.5774])

    Source: K. Abhishek, G. Hamarneh, "Matthews correlation coefficient loss for deep convolutional networks:
    application to skin lesion segmentation", ISBI 2021, eqs. 3 to 5.
    """
    voxels = torch.where(stats.voxels > 0, stats.voxels, 1.0)
    e, p, t = eps / voxels, stats.prediction / voxels, stats.target / voxels
    both = stats.intersection / voxels
    covariance, agreement = both - p * t, 1 - 2 * (p + t - 2 * both)
    # a sum of probabilities may exceed N by rounding
    spread = ((p * (1 - p)).clamp_min(0) + e) * ((t * (1 - t)).clamp_min(0) + e)
    return (covariance + e * agreement) / spread.sqrt()


@validation.public
def dice_semimetric(stats: OverlapStatistics, *, form: Literal["sum", "product"] = "sum", eps: float = 1e-5) -> Tensor:
    """statistics -> a Dice coefficient that is right for soft labels, per class.

        "sum":      1 - D / (P + T + eps)
        "product":  1 - D / (2 I + D + eps)

    On hard labels both are the Dice coefficient; on soft ones they are 1 exactly where p = y, which it is not.

    Args:
        stats: statistics with `difference` (power 1) and `intersection`, for "sum" also `prediction` and `target`;
            (B, C) or (C,).
        form: "sum" (DML1 of the paper) or "product" (DML2).
        eps: smoothing of the denominator, >= 0, in voxels.

    Returns:
        The score in [0, 1], same shape as the statistics.

    Edge cases: neither predicted nor present: 1 (nan for eps = 0); one without the other: about eps / voxels.

    Example:
        >>> import torch, softdice
        >>> soft = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
        >>> dice_semimetric(softdice.overlap_statistics(soft, soft).pool())
        tensor([1., 1.])

    Source: Z. Wang, T. Popordanoska, J. Bertels, R. Lemmens, M. B. Blaschko, "Dice semimetric losses: optimizing the
    Dice score with soft labels", MICCAI 2023, DML1 and DML2.
    """
    validation.choice("form", form, ("sum", "product"))
    common = _twice_common(stats, form)
    extent = stats.prediction + stats.target if form == "sum" else common + stats.difference
    return (common + eps) / (extent + eps)


@validation.public
def jaccard_metric(stats: OverlapStatistics, *, form: Literal["sum", "product"] = "sum", eps: float = 1e-5) -> Tensor:
    """statistics -> a Jaccard index that is right for soft labels, per class.

        "sum":      1 - 2 D / (P + T + D + eps)
        "product":  1 - D / (I + D + eps)

    On hard labels both are the Jaccard index; on soft ones they are 1 exactly where p = y, which it is not.

    Args:
        stats: statistics with `difference` (power 1) and `intersection`, for "sum" also `prediction` and `target`;
            (B, C) or (C,).
        form: "sum" (JML1 of the paper, a metric) or "product" (JML2).
        eps: smoothing of the denominator, >= 0, in voxels.

    Returns:
        The score in [0, 1], same shape as the statistics.

    Edge cases: neither predicted nor present: 1 (nan for eps = 0); one without the other: about eps / voxels.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]])
        >>> jaccard_metric(softdice.overlap_statistics(probabilities, labels).pool(), eps=0)
        tensor([0.6667, 0.5000])

    Source: Z. Wang, X. Ning, M. B. Blaschko, "Jaccard metric losses: optimizing the Jaccard index with soft labels",
    NeurIPS 2023, JML1 and JML2.
    """
    validation.choice("form", form, ("sum", "product"))
    if form == "sum":
        return (_twice_common(stats, form) + eps) / (stats.prediction + stats.target + stats.difference + eps)
    return (stats.intersection + eps) / (stats.intersection + stats.difference + eps)


def _twice_common(stats: OverlapStatistics, form: str) -> Tensor:
    """Return what p and y have in common, twice, shaped as the statistics: P + T - D for the form "sum", else 2 I.

    The score is made of it, and not as 1 - D / (...), which rounds to 0 where a class is absent: -ln would be infinite.
    """
    both = 2 * stats.intersection
    if form == "product":
        return both
    # sum 2 min(p, y), which for hard labels is 2 I, and never less: 2 I has all its digits where D takes those of P + T
    common = stats.prediction + stats.target - stats.difference
    eps = torch.finfo(common.dtype).eps if common.is_floating_point() else 0
    rounding = 8 * eps * stats.difference
    return torch.where(common > both + rounding, common, both)


def noise_robust_dice(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> noise-robust Dice coefficient per class.

        noise_robust_dice = 1 - D / (Q + R + eps),    D = sum abs(p - y)^power

    with the `power` of the pass: 2 gives the squared Dice coefficient, 1 a mean absolute error normalised by size.

    Args:
        stats: statistics with `difference`, `prediction_squared` and `target_squared`, (B, C) or (C,).
        eps: smoothing of the denominator, >= 0, in voxels.

    Returns:
        The score, same shape as the statistics: at most 1. For a power below 2 it has no lower bound: small
        probabilities of an absent class have sum p^power much larger than sum p^2.

    Edge cases: neither predicted nor present: 1 (nan for eps = 0).

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.75, 1.0], [0.25, 0.0]]]), torch.tensor([[0, 1]])
        >>> noise_robust_dice(softdice.overlap_statistics(probabilities, labels, power=1.5).pool(), eps=0)
        tensor([ 0.5610, -0.0588])

    Source: G. Wang et al., "A noise-robust framework for automatic segmentation of COVID-19 pneumonia lesions from CT
    images", IEEE TMI 39 (8), 2020.
    """
    return 1 - stats.difference / (stats.prediction_squared + stats.target_squared + eps)


def cross_entropy(stats: OverlapStatistics, *, class_weight: Tensor | None = None, binary: bool = False) -> Tensor:
    """statistics -> mean cross-entropy over voxels, a cost.

        classes that exclude each other:  sum_c w_c E_c / sum_c w_c T_c    (T before label smoothing)
        binary, each class by itself:     sum_c w_c E_c / sum_c w_c N

    Args:
        stats: statistics with `cross_entropy`, and `labelled` (or `voxels` for binary), (B, C) or (C,).
        class_weight: w, broadcast to the statistics; 0 leaves a class out. None for 1.
        binary: the statistics come from a sigmoid.

    Returns:
        The cost >= 0, (1,) or (B, 1).

    Edge cases: no voxel that counts: 0, with a gradient of 0.

    Example:
        >>> import torch, softdice
        >>> probabilities = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
        >>> cross_entropy(softdice.overlap_statistics(probabilities, torch.tensor([[1, 0]])).pool())
        tensor([0.3466])

    Source: as `torch.nn.CrossEntropyLoss` and, for binary, `torch.nn.BCEWithLogitsLoss` define it.
    """
    return _mean_over_voxels(stats.cross_entropy, stats.voxels if binary else stats.labelled, class_weight)


def focal_entropy(stats: OverlapStatistics, *, class_weight: Tensor | None = None, binary: bool = False) -> Tensor:
    """statistics -> mean focal loss over voxels, a cost: a cross-entropy that easy voxels hardly enter.

        classes that exclude each other:  sum_c w_c F_c / sum_c w_c T_c    (T before label smoothing)
        binary, each class by itself:     sum_c w_c F_c / sum_c w_c N

    with the `gamma` of the pass in F; gamma = 0 is the cross-entropy.

    Args:
        stats: statistics with `focal`, and `labelled` (or `voxels` for binary), (B, C) or (C,).
        class_weight: w (the paper's alpha, per class), broadcast to the statistics; None for 1.
        binary: the statistics come from a sigmoid.

    Returns:
        The cost >= 0, (1,) or (B, 1).

    Edge cases: no voxel that counts: 0, with a gradient of 0.

    Example:
        >>> import torch, softdice
        >>> probabilities = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
        >>> focal_entropy(softdice.overlap_statistics(probabilities, torch.tensor([[1, 0]]), gamma=2.0).pool())
        tensor([0.0866])

    Source: T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollár, "Focal loss for dense object detection", ICCV 2017,
    eq. 5.
    """
    return _mean_over_voxels(stats.focal, stats.voxels if binary else stats.labelled, class_weight)


def boundary(stats: OverlapStatistics) -> Tensor:
    """statistics -> mean of distance times probability per class, a cost: negative for a good prediction.

        boundary = sum w m p / N

    p is the probability, and the map m the signed distance to the boundary of the target, negative inside
    (`softdice.distance_map`), or another number for each voxel.

    Args:
        stats: statistics with `mapped_prediction` and `voxels`, (B, C) or (C,).

    Returns:
        The cost in the unit of the map, same shape as the statistics; no voxel that counts: 0.

    Example:
        >>> import torch, softdice
        >>> probabilities, far = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[-1.0, 2.0]])
        >>> boundary(softdice.overlap_statistics(probabilities, torch.tensor([[1, 0]]), voxel_map=far).pool())
        tensor([0.])

    Source: H. Kervadec et al., "Boundary loss for highly unbalanced segmentation", MIDL 2019, eq. 5.
    """
    return stats.mapped_prediction / torch.where(stats.voxels > 0, stats.voxels, 1.0)


def skeleton_recall(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> recall on the map, the skeleton of the target, per class.

        skeleton_recall = (sum m p y + eps) / (sum m y + eps)

    Args:
        stats: statistics with `mapped_intersection` and `mapped_target`, (B, C) or (C,).
        eps: smoothing, >= 0, in voxels.

    Returns:
        The score in [0, 1] for a map >= 0, same shape as the statistics; no voxel on the skeleton: 1 (nan for eps = 0).

    Example:
        >>> import torch, softdice
        >>> probabilities, skeleton = torch.tensor([[[0.75, 0.5]]]), torch.tensor([[True, False]])
        >>> stats = softdice.overlap_statistics(probabilities, torch.tensor([[1, 1]]), voxel_map=skeleton)
        >>> skeleton_recall(stats.pool(), eps=0)
        tensor([0.7500])

    Source: Y. Kirchhoff et al., "Skeleton recall loss for connectivity conserving and resource efficient segmentation
    of thin tubular structures", ECCV 2024, eq. 2.
    """
    return (stats.mapped_intersection + eps) / (stats.mapped_target + eps)


def _mean_over_voxels(cost: Tensor, count: Tensor, class_weight: Tensor | None) -> Tensor:
    """Return sum_c w_c cost_c / sum_c w_c count_c, (..., 1), for costs and voxels (..., C); 0 where no voxel counts."""
    if class_weight is not None:
        cost, count = class_weight * cost, class_weight * count
    total, amount = cost.sum(-1, keepdim=True), count.sum(-1, keepdim=True)
    return total / torch.where(amount > 0, amount, 1.0)
