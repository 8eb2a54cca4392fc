"""input, target -> a cost for each voxel, differentiable: what losses need that look at voxels one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdice import reference, statistics, validation
from softdice.kernels import registry
from softdice.settings import Pass, Voxels

CHUNK_NUMEL = 1 << 24
"""Logits of a chunk, where torch's operations make the map: what they make beside it stays a few times that small."""


@validation.public
def voxel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    validate: bool = True,
) -> Tensor:
    """input, target -> the cross-entropy of each voxel, (B, *S): 1 / C of the logits, and differentiable.

        E_v = -sum_c y_c ln p_c        sigmoid:  E_v = -sum_c (y_c ln p_c + (1 - y_c) ln(1 - p_c))

    so -ln p of the true class of a label map. The sum over the voxels is `overlap_statistics(...).cross_entropy`.

    Args: as for `softdice.overlap_statistics`.

    Returns:
        (B, *S), float64 for float64 input, else float32; 0 at a voxel that is ignored.

    Memory: the map; in the backward pass the gradient of input, made in one pass with a weight per voxel. On CUDA the
    map is made by torch, chunk by chunk; under torch.compile, torch.func and on other devices by the definition, with
    some tensors of the size of input.

    Raises:
        TypeError, ValueError: as `softdice.overlap_statistics`.

    Edge cases: a NaN in input gives NaN at its voxel, unless that is ignored.

    Example:
        >>> import torch, softdice
        >>> logits, labels = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 2.0, 3.0]]]), torch.tensor([[0, 1, 255]])
        >>> softdice.voxel_cross_entropy(logits, labels, activation="softmax", ignore_index=255)
        tensor([[0.3133, 0.1269, 0.0000]])

    Source: `torch.nn.functional.cross_entropy` with reduction="none".
    """
    settings = Pass(activation, ignore_index, label_smoothing, validate=bool(validate), fields=("cross_entropy",))
    return cross_entropy(input, target, validation.pass_settings(settings))


def cross_entropy(input: Tensor, target: Tensor, settings: Pass, num_classes: int | None = None) -> Tensor:
    """What a user has, settings with the field cross_entropy -> the map (B, *S)."""
    shape = (input.shape[0], *input.shape[2:]) if isinstance(input, Tensor) else ()
    given = statistics.prepare(input, target, None, settings, num_classes)
    backend = registry.choose(given.input, given.target)
    if backend == "reference" or torch.compiler.is_compiling():
        if settings.validate:
            validation.values(given, settings)
        return reference.cross_entropy(given, settings).view(shape)
    return _CrossEntropy.apply(given.input, given.target, settings, backend).view(shape)


class _CrossEntropy(torch.autograd.Function):
    """The map; its gradient is that of the statistic, where a voxel's weight is what the map is multiplied with."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, settings: Pass, backend: str) -> Tensor:
        ctx.save_for_backward(input, target)
        ctx.chosen = settings, backend
        given = Voxels(input, target)
        in_range = not settings.validate
        if backend == "cpu":
            from softdice.kernels.cpu import voxelwise

            result, in_range = voxelwise.cross_entropy(given, settings)
        if not in_range:
            validation.values(given, settings)
        return result if backend == "cpu" else _in_chunks(given, settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (input, target), (settings, backend) = grads, ctx.saved_tensors, ctx.chosen
        if torch.is_grad_enabled():  # of the gradient another one is wanted: the definition has it
            entropy = reference.cross_entropy(Voxels(input, target), settings)
            return *torch.autograd.grad(entropy, input, grad, create_graph=True), None, None, None
        each = grad.new_ones(1, *input.shape[:2])
        negative = grad.is_cuda or bool((grad < 0).any())  # on a GPU a look would cost a wait
        weight = grad.abs() if negative else grad  # a pass takes weights >= 0
        found = statistics.gradient(each, Voxels(input, target, weight), settings, backend)
        if negative:
            found.mul_(grad.sign().unsqueeze(1).to(found.dtype))
        return found, None, None, None


def _in_chunks(given: Voxels, settings: Pass) -> Tensor:
    """input (B, C, V), target -> the map (B, V), by the definition, a chunk of voxels at a time."""
    B, C, V = given.input.shape
    result = given.input.new_empty((B, V), dtype=reference.result_dtype(given.input.dtype))
    size = max(1, CHUNK_NUMEL // max(C, 1))
    for b in range(B):
        for v in range(0, V, size):
            some = slice(b, b + 1), slice(v, v + size)
            result[some] = reference.cross_entropy(given.at(*some), settings)
    return result
