"""The fused pass as torch.library operators: schema, shapes, autograd, and the kernel of each device.

    softdice::statistics           input, target -> sums (fields, B, K)
    softdice::statistics_backward  dL/dsums, input, target -> dL/dinput

Saved for the backward pass: the inputs, nothing else. A second derivative comes from the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdice import reference, validation

_SETTINGS = (
    "Tensor input, Tensor target, Tensor? weight, Tensor? regions, str[] fields, str activation, int? ignore_index, "
    "float label_smoothing, float gamma, float power"
)
LIBRARY = torch.library.Library("softdice", "DEF")
LIBRARY.define(f"statistics({_SETTINGS}, bool validate, str caller) -> Tensor")
LIBRARY.define(f"statistics_backward(Tensor grad, {_SETTINGS}) -> Tensor")


def statistics(
    caller: str, settings: Any, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None
) -> Tensor:
    """One fused pass with the settings of a `softdice.statistics.Pass` -> sums (fields, B, K)."""
    return torch.ops.softdice.statistics(
        input,
        target,
        weight,
        regions,
        list(settings.fields),
        settings.activation,
        settings.ignore_index,
        settings.label_smoothing,
        settings.gamma,
        settings.power,
        settings.validate,
        caller,
    )


def gradient(
    settings: Any, grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None
) -> Tensor:
    """dL/dsums, and what `statistics` was called with -> dL/dinput."""
    return torch.ops.softdice.statistics_backward(
        grad,
        input,
        target,
        weight,
        regions,
        list(settings.fields),
        settings.activation,
        settings.ignore_index,
        settings.label_smoothing,
        settings.gamma,
        settings.power,
    )


@torch.library.impl(LIBRARY, "statistics", "CPU")
def _statistics_cpu(input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, *rest: Any) -> Tensor:
    from softdice.kernels import cpu

    *chosen, validate, caller = rest
    settings = cpu.Settings(*chosen)
    sums, in_range = cpu.statistics(input, target, weight, regions, settings, validate)
    if not in_range:
        validation.values(caller, input, target, weight, settings.activation, settings.ignore_index)
    return sums.to(reference.result_dtype(input.dtype))


@torch.library.impl(LIBRARY, "statistics_backward", "CPU")
def _statistics_backward_cpu(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, *chosen: Any
) -> Tensor:
    from softdice.kernels import cpu

    return cpu.gradient(grad, input, target, weight, regions, cpu.Settings(*chosen))


@torch.library.register_fake("softdice::statistics", lib=LIBRARY)
def _statistics_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, fields: list[str], *rest: Any
) -> Tensor:
    columns = input.shape[1] if regions is None else regions.shape[0]
    return input.new_empty((len(fields), input.shape[0], columns), dtype=reference.result_dtype(input.dtype))


@torch.library.register_fake("softdice::statistics_backward", lib=LIBRARY)
def _statistics_backward_fake(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    _, C, V = input.shape
    if input.is_contiguous() or input.stride() == (C * V, 1, C):
        return torch.empty_like(input)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


class _Statistics(torch.autograd.Function):
    """The pass and its gradient. One Function under the operator costs a fifth of `register_autograd` per call."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Any, regions: Any, *rest: Any) -> Tensor:
        ctx.save_for_backward(input, target, weight, regions)
        ctx.chosen = rest[:6]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics(input, target, weight, regions, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dinput = torch.ops.softdice.statistics_backward(*grads, *ctx.saved_tensors, *ctx.chosen)
        return dinput, *[None] * 11


class _Gradient(torch.autograd.Function):
    """The gradient and its own, which comes from the reference: that is differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, input: Tensor, target: Tensor, weight: Any, regions: Any, *rest: Any) -> Tensor:
        ctx.save_for_backward(grad, input, target, weight, regions)
        ctx.chosen = rest
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics_backward(grad, input, target, weight, regions, *rest)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grad, input, target, weight, regions = ctx.saved_tensors
        fields, activation, ignore_index, label_smoothing, gamma, power = ctx.chosen
        with torch.enable_grad():
            grad, input = grad.detach().requires_grad_(), input.detach().requires_grad_()
            sums = reference.statistics(
                input,
                target,
                weight,
                regions,
                fields=tuple(fields),
                activation=activation,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                gamma=gamma,
                power=power,
            )
            (dinput,) = torch.autograd.grad(sums, input, grad, create_graph=True)
            dgrad, dsecond = torch.autograd.grad(dinput, (grad, input), cotangents, allow_unused=True)
        return dgrad, dsecond, *[None] * 9


@torch.library.impl(LIBRARY, "statistics", "Autograd")
def _statistics_autograd(*arguments: Any) -> Tensor:
    return _Statistics.apply(*arguments)


@torch.library.impl(LIBRARY, "statistics_backward", "Autograd")
def _statistics_backward_autograd(*arguments: Any) -> Tensor:
    return _Gradient.apply(*arguments)
