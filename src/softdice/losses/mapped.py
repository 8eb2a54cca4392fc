"""settings -> loss: the losses that read a map beside the target, in the same pass (`voxel_map` when they are called).

`SoftDiceLoss(...) + 0.01 * BoundaryLoss(...)` reads the logits once. `softdice.maps` makes the maps.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from softdice import costs, indices, validation
from softdice.losses.overlap import OverlapLoss
from softdice.losses.settings import LossSettings
from softdice.losses.voxelwise import fixed_cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BoundaryLoss", "SkeletonRecallLoss"]


class BoundaryLoss(OverlapLoss):
    """input, target, distance map -> mean over classes of the mean of distance times probability.

        loss = mean_c ( sum_v m_cv p_cv / N ),    m_cv < 0 inside the true region of class c, > 0 outside

    Called as `loss(input, target, voxel_map=softdice.distance_map(target, num_classes))`; the map may come from the
    data loader, of any dtype. The target enters no sum; it says which voxels are ignored.

    Args:
        num_classes: channels of `input`.
        settings: the keywords of `LossSettings`, without `cost`. The authors leave class 0 out: classes=range(1, C).

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
        fixed_cost(settings, "the distance itself")
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
        settings: the keywords of `LossSettings`. The authors leave class 0 out: classes=range(1, C).

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
