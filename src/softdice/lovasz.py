"""input, target -> the Lovasz extension of each class's Jaccard loss, one class at a time.

The forward pass makes errors, sorts them class by class, and leaves in their place the steps of the loss, which the
backward pass turns into the gradient, in the same memory. Beside it there are the keys of one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice import reference, statistics, validation
from softdice.kernels import registry
from softdice.settings import Pass, Voxels


def costs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    settings: Pass,
    *,
    num_classes: int | None = None,
    per_sample: bool = False,
    classes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What a user has -> costs, and whether a class is present, (C,) or (B, C); of `classes` alone, 0 for the others.

    A voxel_weight of 0 leaves a voxel out, one of 1 does not; there are no others.
    """
    given = statistics.prepare(input, target, weight, settings, num_classes)
    input, target, weight, *_ = given
    if settings.validate:
        for name, values in (("target", target if target.ndim == 3 else None), ("voxel_weight", weight)):
            if values is not None and values.dtype != torch.bool:
                validation.check((values != 0) & (values != 1), None, values, _zero_or_one(name))
    backend = registry.choose(input, target, weight)
    if backend == "reference" or torch.compiler.is_compiling():
        if settings.validate:
            validation.values(given, settings)
        return reference.lovasz(given, settings, per_sample)
    chosen = range(input.shape[1]) if classes is None else classes
    return _Lovasz.apply(*given[:3], settings, backend, per_sample, tuple(chosen))


def _zero_or_one(name: str) -> Any:
    def error(value: object = validation.UNSEEN, count: object = validation.SOME) -> str:
        advice = "The order of the errors has no place for values between."
        return validation.message(f"zeros and ones in {name}", f"{value} ({count} values)", advice)

    return error


class _Lovasz(torch.autograd.Function):
    """The costs; their gradient stands half made in memory of its own until the backward pass takes it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, *chosen: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input, target, weight)
        ctx.chosen = chosen
        found, present, steps = _ranked(Voxels(input, target, weight), *chosen)
        ctx.steps = steps if ctx.needs_input_grad[0] else None
        ctx.mark_non_differentiable(present)
        return found, present

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad, _), given, (settings, backend, per_sample, _) = grads, Voxels(*ctx.saved_tensors), ctx.chosen
        input, rest = given.input, (None,) * 6
        if torch.is_grad_enabled():  # of the gradient another one is wanted: the definition has it
            found, _ = reference.lovasz(given, settings, per_sample)
            return *torch.autograd.grad(found, input, grad, create_graph=True), *rest
        steps, ctx.steps = ctx.steps, None
        if steps is None:  # they have become the gradient of an earlier call
            *_, steps = _ranked(given, *ctx.chosen)
        coef = grad.expand(input.shape[:2])
        if settings.activation != "softmax":
            return steps.mul_(coef.unsqueeze(2)).to(input.dtype), *rest
        if backend == "cpu" and steps.dtype == torch.float32:
            from softdice.kernels.cpu import lovasz as cpu

            return cpu.gradient(coef, steps, given, settings), *rest
        result = steps if steps.dtype == input.dtype else torch.empty_like(input)
        for b in range(len(input)):
            with torch.enable_grad():
                part = input[b : b + 1].detach().requires_grad_()
                error, _ = reference.errors(_sample(given, b)._replace(input=part), settings)
            slope = steps[b : b + 1].abs() * coef[b].unsqueeze(1)
            result[b] = torch.autograd.grad(error, part, slope)[0][0]
        return result, *rest


def _ranked(
    given: Voxels, settings: Pass, backend: str, per_sample: bool, classes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> costs and what is present, (C,) or (B, C); the steps of the loss with the signs of the errors' slopes."""
    input = given.input
    B, C, V = input.shape
    if backend == "cpu":
        from softdice.kernels.cpu import lovasz as cpu
    kernel = backend == "cpu" and cpu.fits(input)
    in_range = not settings.validate
    if kernel:
        steps, in_range = cpu.errors(given, settings)
    if not in_range:
        validation.values(given, settings)
    if not kernel:
        steps = torch.empty_like(input, dtype=reference.result_dtype(input.dtype))
        for b in range(B):
            error, true = reference.errors(_sample(given, b), settings)
            steps[b] = torch.where(true, -error, error)[0]
    keys = np.empty((V if per_sample else B * V) if kernel else 0, np.uint64)
    found = steps.new_zeros((2, B if per_sample else 1, C))
    for c in range(C):
        for pool, part in enumerate(steps[:, c].split(1) if per_sample else [steps[:, c]]):
            if c not in classes or not part.numel():
                part.zero_()
            else:
                found[0, pool, c], found[1, pool, c] = cpu.rank(part, keys) if kernel else _rank(part)
    found = found if per_sample else found[:, 0]
    return found[0].clone(), found[1] > 0, steps


def _sample(given: Voxels, b: int) -> Voxels:
    return given.at(slice(b, b + 1), slice(None))


def _rank(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Signed errors of a class (B, V) -> its cost and voxels; the steps are in their place. By torch, on any device."""
    error, order = errors.abs().flatten().sort(descending=True, stable=True)
    of_class = errors.signbit().flatten()[order]
    F = of_class.cumsum(0).double()
    union = F[-1] + torch.arange(1, len(order) + 1, device=order.device) - F
    step = torch.where(of_class, 1 / union, (F[-1] - F) / (union * (union - 1).clamp_min(1)))
    step[:1].masked_fill_((F[-1] == 0), 1.0)
    cost = (error.double() * step).sum()
    signed = torch.where(of_class, -step, step).masked_fill_(error == 0, 0.0)
    errors.copy_(torch.empty_like(signed).scatter_(0, order, signed).view(errors.shape))
    return cost, F[-1]
