"""settings -> loss: the losses that read a map beside the target, in the same pass (`voxel_map` when they are called).

`SoftDiceLoss(...) + 0.01 * BoundaryLoss(...)` reads the logits once. `softdice.maps` makes the maps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softdice import costs, indices
from softdice.losses.overlap import LossSettings, OverlapLoss
from softdice.losses.voxelwise import fixed_cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BoundaryLoss"]


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
