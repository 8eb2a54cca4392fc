"""outputs at several resolutions, their targets or a full-resolution one -> loss (deep supervision)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation


class DeepSupervision(nn.Module):
    """outputs, target -> weighted mean of a loss over outputs of several resolutions.

        loss = sum_i w_i loss(output_i, target at the resolution of output_i) / sum_i w_i

    The target is made smaller to fit each output: labels, integer values and weights by the nearest voxel (nothing
    arises that was not there), floating per-class values by the mean over the area (they stay proportions). A list of
    targets, or of voxel weights, has one for each output.

    Args:
        loss: any loss of this package (of `softdice.compat`, too), or a callable (output, target) -> Tensor, which
            takes a third tensor where a voxel_weight is passed.
        weights: one per output, finite, >= 0, not all 0. An output of weight 0 is not computed.

    Returns (when called): what `loss` returns.

    Raises:
        ValueError: not one output (or target of a list) per weight; an output larger than the target; values to be
            averaged in more than three dimensions.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.DeepSupervision(softdice.SoftDiceLoss(2, activation="softmax"), weights=(1.0, 0.5))
        >>> outputs = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
        >>> labels = torch.tensor([[[0, 0, 1, 1]] * 4])
        >>> loss(outputs, labels)
        tensor(0.6931)

    Source: C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu, "Deeply-supervised nets", AISTATS 2015.
    """

    @validation.public
    def __init__(self, loss: nn.Module, weights: Sequence[float]) -> None:
        super().__init__()
        for position, weight in enumerate(weights):
            validation.number(f"weights[{position}]", weight, 0)
        if not sum(weights) > 0:
            validation.fail("weights that are not all 0", list(weights), "Pass one weight per output.")
        self.loss = loss
        self.weights = tuple(weight / sum(weights) for weight in weights)

    @validation.public
    def forward(
        self,
        outputs: Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        voxel_weight: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """outputs, a full-resolution target or one for each output -> loss."""
        count = len(self.weights)
        if isinstance(outputs, Tensor):
            validation.fail(f"{count} outputs", "a single tensor", "Pass a list with one output for each weight.")
        labels = getattr(self.loss, "ignore_index", None) is not None
        tensors = (outputs, target, voxel_weight)
        each = (_each(*named, count) for named in zip(("outputs", "targets", "voxel weights"), tensors, strict=True))
        values = []
        for weight, output, own, voxels in zip(self.weights, *each, strict=True):
            if weight > 0:
                third = () if voxels is None else (at_resolution(voxels, output, True),)
                values.append(weight * self.loss(output, at_resolution(own, output, labels), *third))
        return sum(values[1:], values[0])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _each(name: str, tensors: Any, count: int) -> Sequence[Any]:
    """One tensor for all outputs, or None, or a list -> a list with one for each output."""
    if tensors is None or isinstance(tensors, Tensor):
        return [tensors] * count
    if len(tensors) != count:
        advice = "Pass a list with one output for each weight, and one target for all or for each."
        validation.fail(f"{count} {name}", len(tensors), advice)
    return list(tensors)


def at_resolution(target: Tensor | None, output: Tensor, labels: bool = False) -> Tensor | None:
    """target (B, *S), (B, 1, *S) or (B, C, *S), output (B, C, *s) -> target with the spatial shape of output.

    Floats with one channel per channel of output (a soft mask for a single one) by the mean over the area, unless
    `labels` says that they are labels; all else by the nearest voxel.

    Example:
        >>> at_resolution(torch.tensor([[7, 7, 9, 9]]), torch.zeros(1, 3, 2))
        tensor([[7, 9]])
        >>> at_resolution(torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]]), torch.zeros(1, 2, 2))
        tensor([[[0.5000, 1.0000],
                 [0.5000, 0.0000]]])
    """
    if target is None:
        return None
    size = output.shape[2:]
    rank = len(size)
    if target.shape[target.ndim - rank :] == size:
        return target
    if target.ndim < rank + 1 or any(
        small > large for small, large in zip(size, target.shape[target.ndim - rank :], strict=True)
    ):
        advice = "Give the target at the resolution of the largest output."
        validation.fail(f"outputs no larger than target {tuple(target.shape)}", tuple(size), advice)
    per_class = target.ndim == output.ndim and target.shape[1] == output.shape[1]
    if target.is_floating_point() and per_class and not labels:
        return _mean_over_area(target, size)
    for dimension, small in zip(range(target.ndim - rank, target.ndim), size, strict=True):
        large = target.shape[dimension]
        centre = ((2 * torch.arange(small, device=target.device) + 1) * large).div(2 * small, rounding_mode="floor")
        target = target.index_select(dimension, centre)
    return target


def _mean_over_area(values: Tensor, size: torch.Size) -> Tensor:
    pool = nn.functional
    pools: dict[int, Any] = {1: pool.adaptive_avg_pool1d, 2: pool.adaptive_avg_pool2d, 3: pool.adaptive_avg_pool3d}
    if len(size) not in pools:
        advice = "Make the targets smaller yourself and call the loss once for each output."
        validation.fail("per-class values in 1 to 3 dimensions", len(size), advice)
    return pools[len(size)](values, tuple(size))
