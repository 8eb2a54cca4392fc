"""The losses that read a map of numbers beside the target, in the same pass, and `distance_map`, which makes one.

A map holds one number for each voxel, or for each voxel and class; it is the argument `voxel_map` of a call.

`SoftDiceLoss(...) + 0.01 * BoundaryLoss(...)` reads the logits once. Shape suffixes: B sample, C class, S space.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softdice import costs, indices, validation
from softdice.internals import untraced
from softdice.losses.overlap import OverlapLoss
from softdice.losses.settings import LossSettings
from softdice.losses.voxelwise import refuse_cost
from softdice.statistics import check

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BoundaryLoss", "SkeletonRecallLoss", "distance_map"]


class BoundaryLoss(OverlapLoss):
    """input, target, distance map -> mean over classes of the mean of distance times probability.

        loss = mean_c ( sum_v m_cv p_cv / N ),    m_cv < 0 inside the true region of class c, > 0 outside

    Called as `loss(input, target, voxel_map=softdice.distance_map(target, num_classes))`; the map may come from the
    data loader, of any dtype. The target enters no sum; it says which voxels are ignored.

    Args:
        num_classes: channels of `input`.
        settings: the keywords of `softdice.losses.LossSettings`, without `cost`. The authors leave class 0 out:
            classes=range(1, C).

    Returns (when called): in the unit of the map; negative where the prediction lies inside.

    Edge cases: no voxel that counts: 0. A map of zeros, which `distance_map` gives an absent class, costs nothing.
    The loss alone has a trivial minimum (an empty prediction, for small objects): the authors add it to a Dice loss.

    Example:
        >>> import torch, softdice
        >>> labels = torch.tensor([[0, 1, 1, 0]])
        >>> far = softdice.distance_map(labels, 2)
        >>> far
        tensor([[[0., 1., 1., 0.],
                 [1., 0., 0., 1.]]])
        >>> softdice.BoundaryLoss(2)(torch.full((1, 2, 4), 0.5), labels, voxel_map=far)
        tensor(0.2500)

    Source: H. Kervadec et al., "Boundary loss for highly unbalanced segmentation", MIDL 2019, eq. 5.
    """

    def __init__(self, num_classes: int, **settings: Unpack[LossSettings]) -> None:
        refuse_cost(settings, "the distance itself")
        settings["cost"] = costs.identity
        super().__init__(indices.boundary, num_classes, **settings)


class SkeletonRecallLoss(OverlapLoss):
    """input, target, skeleton -> mean over classes of 1 - recall on the skeleton of the target.

        loss = mean_c 1 - (sum_v m_v p_cv y_cv + eps) / (sum_v m_v y_cv + eps)

    Called as `loss(input, target, voxel_map=skeleton)`, with 1 (or True) on the skeleton of the target, widened to a
    tube, and 0 elsewhere: the same for all classes, since the target says whose skeleton it is.

    Args:
        num_classes: channels of `input`.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`. The authors leave class 0 out: classes=range(1, C).

    Edge cases: a class without a voxel on the skeleton costs 0 (eps / eps), whatever is predicted. It is a recall and
    forgives every false positive: the authors add it to Dice and cross-entropy.

    Example:
        >>> import torch, softdice
        >>> labels, skeleton = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[False, False, True, False]])
        >>> probabilities = torch.tensor([[[0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.75, 0.5]]])
        >>> softdice.SkeletonRecallLoss(2, classes=(1,))(probabilities, labels, voxel_map=skeleton)
        tensor(0.2500)

    Source: Y. Kirchhoff et al., "Skeleton recall loss for connectivity conserving and resource efficient segmentation
    of thin tubular structures", ECCV 2024, eq. 2.
    """

    def __init__(self, num_classes: int, eps: float = 1e-5, **settings: Unpack[LossSettings]) -> None:
        validation.number("eps", eps, 0)
        self.eps = eps
        super().__init__(partial(indices.skeleton_recall, eps=eps), num_classes, **settings)


@validation.public
@untraced
def distance_map(target: Tensor, num_classes: int, *, spacing: float | Sequence[float] | None = None) -> Tensor:
    """labels -> signed distance of every voxel from the region of every class: the map of `softdice.BoundaryLoss`.

        m = distance to the nearest voxel of the class             outside of it
        m = one voxel - distance to the nearest voxel of another   inside: 0 at its border, negative further in

    Args:
        target: labels (B, *S) or (B, 1, *S), integers or bool.
        num_classes: C >= 1. With C = 1 the mask of the voxels with label 1.
        spacing: edge lengths of a voxel, one for each dimension of S, or one for all; distances have their unit, and
            "one voxel" is the shortest of them. None: 1 each.

    Returns:
        (B, C, *S), float32, on the device of target. A class that is absent, or everywhere, has a map of zeros.

    Raises:
        TypeError: target is no tensor, or its dtype is neither an integer dtype nor bool.
        ValueError: target has fewer than two axes, or spacing another length or an edge that is not above 0.
        ModuleNotFoundError: scipy is not installed.

    Example:
        >>> distance_map(torch.tensor([[0, 0, 1, 1, 1, 0]]), 2)[0, 1]
        tensor([ 2.,  1.,  0., -1.,  0.,  1.])

    Source: H. Kervadec et al., "Boundary loss for highly unbalanced segmentation", MIDL 2019, and its published code.
    """
    ndimage = validation.package("softdice.distance_map", "scipy.ndimage", "metrics")
    labels_BS = _labels(target)
    count = validation.num_classes(num_classes)
    sizes = validation.voxel_sizes(spacing, labels_BS.shape[1:])
    map_BCS = np.zeros((labels_BS.shape[0], count, *labels_BS.shape[1:]), np.float32)
    for b, labels_S in enumerate(labels_BS):
        for c in range(count):
            inside_S = labels_S == (1 if count == 1 else c)
            if inside_S.any() and not inside_S.all():
                to_class_S = ndimage.distance_transform_edt(~inside_S, sampling=sizes)
                to_others_S = ndimage.distance_transform_edt(inside_S, sampling=sizes)
                map_BCS[b, c] = np.where(inside_S, min(sizes) - to_others_S, to_class_S)
    return torch.from_numpy(map_BCS).to(target.device)


def _labels(target: Tensor) -> np.ndarray:
    """Return a user's labels, (B, *S) or (B, 1, *S) on any device, as an array (B, *S).

    Raise TypeError unless the dtype is an integer dtype or bool, ValueError for fewer than two axes.
    """
    validation.are_tensors(target=target)
    if target.dtype not in check.LABEL_DTYPES:
        validation.fail("target of an integer dtype or bool", target.dtype, "Pass labels.", TypeError)
    if target.ndim < 2:
        validation.fail("target of shape (B, *S)", tuple(target.shape), "Add the missing dimension with unsqueeze.")
    labels = check.without_metadata(target).detach().cpu().numpy()
    return labels[:, 0] if labels.ndim > 2 and labels.shape[1] == 1 else labels
