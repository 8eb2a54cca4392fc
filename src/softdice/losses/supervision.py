"""Deep supervision: a loss of outputs at several resolutions. B sample, C class, *S and *s space, large and small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation


class DeepSupervision(nn.Module):
    """outputs, target -> weighted mean of a loss over outputs of several resolutions.

        loss = sum_i w_i loss(output_i, target at the resolution of output_i) / sum_i w_i,    w_i = 1, 1/2, 1/4, ...

    The target is made smaller to fit each output: labels, integer values and weights by the nearest voxel (nothing
    arises that was not there), floating per-class values by the mean over the area (they stay proportions). A list of
    targets, or of voxel weights, has one for each output.

    Args:
        loss: any loss of this package (of `softdice.compat`, too), or a callable (output, target) -> Tensor, which
            takes a third tensor where a voxel_weight is passed.
        weights: one per output, finite, >= 0, not all 0. An output of weight 0 is not computed. None: 1 / 2^i for
            output i of as many as a call passes, largest first, as in nnU-Net (which drops the smallest).

    Returns (when called): what `loss` returns.

    Raises:
        ValueError: not one output per weight, or target per output; an output larger than the target; values to be
            averaged in more than three dimensions.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.DeepSupervision(softdice.SoftDiceLoss(2, activation="softmax"))
        >>> outputs = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
        >>> labels = torch.tensor([[[0, 0, 1, 1]] * 4])
        >>> loss(outputs, labels)
        tensor(0.6931)

    Source: C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu, "Deeply-supervised nets", AISTATS 2015.
    """

    @validation.public
    def __init__(self, loss: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if weights is not None:  # numbers of NumPy and torch, too
            weights = validation.numbers_of(weights)
        for position, weight in enumerate(weights or ()):
            validation.number(f"weights[{position}]", weight, 0)
        if weights is not None and not sum(weights) > 0:
            validation.fail("weights that are not all 0", list(weights), "Pass one weight per output.")
        self.loss = loss
        self.weights = None if weights is None else _normalised(weights)

    @validation.public
    def forward(
        self,
        outputs: Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        voxel_weight: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """outputs, target -> the weighted mean of the losses, 0-d.

        outputs: one (B, C, *s) for each weight. target, voxel_weight: one of full resolution, or a list with one for
        each output. Raise ValueError for a list of another length, and what `at_resolution` and the loss raise.
        """
        is_list = hasattr(outputs, "__len__") and not isinstance(outputs, (Tensor, Mapping))
        if not is_list or (self.weights is None and not outputs):
            expected = "a list of outputs" if self.weights is None else f"{len(self.weights)} outputs"
            got = "none" if is_list else "a single tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
            validation.fail(expected, got, "Pass a list with one output for each resolution.")
        weights = _normalised([0.5**i for i in range(len(outputs))]) if self.weights is None else self.weights
        named = (("outputs", outputs), ("targets", target), ("voxel weights", voxel_weight))
        lists = (_one_per_output(name, tensors, len(weights)) for name, tensors in named)
        has_labels = getattr(self.loss, "ignore_index", None) is not None  # averages would mix it with other values
        values = []
        for weight, output, large_target, large_weight in zip(weights, *lists, strict=True):
            if weight > 0:
                weights_of_voxels = () if large_weight is None else (at_resolution(large_weight, output, labels=True),)
                small_target = at_resolution(large_target, output, has_labels)
                values.append(weight * self.loss(output, small_target, *weights_of_voxels))
        return sum(values[1:], values[0])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum."""
    return tuple(weight / sum(weights) for weight in weights)


def _one_per_output(name: str, tensors: Any, count: int) -> Sequence[Any]:
    """Return a list of `count` tensors, one for each output: a single tensor, or None, is repeated.

    Raise ValueError for a list of another length. name: of the tensors, for the message.
    """
    if tensors is None or isinstance(tensors, Tensor):
        return [tensors] * count
    if len(tensors) != count:
        advice = "Pass one output for each weight, and one target for all of them or one for each."
        validation.fail(f"{count} {name}", len(tensors), advice)
    return list(tensors)


def at_resolution(target: Tensor | None, output: Tensor, labels: bool = False) -> Tensor | None:
    """Return a target (B, *S), (B, 1, *S) or (B, C, *S), of any dtype, at the spatial shape of an output (B, C, *s).

    Floats with as many channels as the output are averaged over the area of each output voxel, unless `labels` says
    that they are labels. Everything else takes the nearest voxel. None stays None; a target that fits is not copied.
    Raise TypeError for an argument that is no tensor, ValueError for a target without a batch or smaller than output.

    Example:
        >>> at_resolution(torch.tensor([[7, 7, 9, 9]]), torch.zeros(1, 3, 2))
        tensor([[7, 9]])
        >>> at_resolution(torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]]), torch.zeros(1, 2, 2))
        tensor([[[0.5000, 1.0000],
                 [0.5000, 0.0000]]])
    """
    if target is None:
        return None
    validation.are_tensors(output=output, target=target)
    size = output.shape[2:]
    rank = len(size)
    large_size = target.shape[target.ndim - rank :]
    if large_size == size:
        return target
    if target.ndim < rank + 1 or any(small > large for small, large in zip(size, large_size, strict=True)):
        advice = "Give the target at the resolution of the largest output."
        validation.fail(f"outputs no larger than target {tuple(target.shape)}", tuple(size), advice)
    per_class = target.ndim == output.ndim and target.shape[1] == output.shape[1]
    if target.is_floating_point() and per_class and not labels:
        return _averaged(target, size)
    for dimension, large, small in zip(range(target.ndim - rank, target.ndim), large_size, size, strict=True):
        # output voxel i has its centre at (i + 1/2) large / small
        nearest = ((2 * torch.arange(small, device=target.device) + 1) * large).div(2 * small, rounding_mode="floor")
        target = target.index_select(dimension, nearest)
    return target


def _averaged(values: Tensor, size: torch.Size) -> Tensor:
    """Return floating values (B, C, *S) averaged down to the spatial shape `size`; ValueError beyond 3 dimensions."""
    if len(size) > 3:
        advice = "Make the targets smaller yourself and call the loss once for each output."
        validation.fail("per-class values in 1 to 3 dimensions", len(size), advice)
    pool: Any = getattr(nn.functional, f"adaptive_avg_pool{len(size)}d")
    return pool(values, tuple(size))
