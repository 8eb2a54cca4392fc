"""The fused pass as torch.library operators: schema, shapes, autograd, and the kernel of each device.

    softdice::statistics           input, target -> sums (fields, B, K)
    softdice::statistics_backward  dL/dsums, input, target -> dL/dinput

On CUDA tensors the Triton kernels serve. On CPU tensors it is the Numba kernel, or, with backend = "triton", Triton's
interpreter; the backward pass stays with the backend of the forward pass.

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
LIBRARY.define(f'statistics({_SETTINGS}, bool validate, str caller, str backend="cpu") -> Tensor')
LIBRARY.define(f'statistics_backward(Tensor grad, {_SETTINGS}, str backend="cpu") -> Tensor')


def statistics(
    caller: str,
    settings: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    backend: str,
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
        backend,
    )


def gradient(
    settings: Any,
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    backend: str,
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
        backend,
    )


@torch.library.impl(LIBRARY, "statistics", "CPU")
def _statistics_cpu(input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, *rest: Any) -> Tensor:
    *chosen, validate, caller, backend = _with_backend(rest, 8)
    tensors = input, target, weight, regions
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        sums, bad = cuda.statistics(*tensors, cuda.Settings(*chosen), validate)
        in_range = bad is None or not bool(bad.any())
    else:
        from softdice.kernels.cpu import driver as cpu

        sums, in_range = cpu.statistics(*tensors, cpu.Settings(*chosen), validate)
    if not in_range:
        _, activation, ignore_index, *_ = chosen
        validation.values(caller, input, target, weight, activation, ignore_index)
    return sums.to(reference.result_dtype(input.dtype))


@torch.library.impl(LIBRARY, "statistics", "CUDA")
def _statistics_cuda(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, *rest: Any
) -> Tensor:
    from softdice.kernels.triton import driver as cuda

    *chosen, validate, caller, _ = _with_backend(rest, 8)
    settings = cuda.Settings(*chosen)
    sums, bad = cuda.statistics(input, target, weight, regions, settings, validate)
    if bad is not None:
        cuda.assert_in_range(caller, bad, input, target, weight, settings)
    return sums


@torch.library.impl(LIBRARY, "statistics_backward", "CPU")
def _statistics_backward_cpu(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, *rest: Any
) -> Tensor:
    *chosen, backend = _with_backend(rest, 6)
    tensors = grad, input, target, weight, regions
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        return cuda.gradient(*tensors, cuda.Settings(*chosen))
    from softdice.kernels.cpu import driver as cpu

    return cpu.gradient(*tensors, cpu.Settings(*chosen))


@torch.library.impl(LIBRARY, "statistics_backward", "CUDA")
def _statistics_backward_cuda(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, *rest: Any
) -> Tensor:
    from softdice.kernels.triton import driver as cuda

    return cuda.gradient(grad, input, target, weight, regions, cuda.Settings(*_with_backend(rest, 6)[:-1]))


def _with_backend(rest: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """An operator's last arguments, with the backend: torch leaves one out that equals its default."""
    return rest if len(rest) > count else (*rest, "cpu")


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
        ctx.chosen = (*rest[:6], _with_backend(rest, 8)[-1])
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics(input, target, weight, regions, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dinput = torch.ops.softdice.statistics_backward(*grads, *ctx.saved_tensors, *ctx.chosen)
        return dinput, *[None] * (len(ctx.needs_input_grad) - 1)


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
        fields, activation, ignore_index, label_smoothing, gamma, power = ctx.chosen[:6]
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
        return dgrad, dsecond, *[None] * (len(ctx.needs_input_grad) - 2)


@torch.library.impl(LIBRARY, "statistics", "Autograd")
def _statistics_autograd(*arguments: Any) -> Tensor:
    return _Statistics.apply(*arguments)


@torch.library.impl(LIBRARY, "statistics_backward", "Autograd")
def _statistics_backward_autograd(*arguments: Any) -> Tensor:
    return _Gradient.apply(*arguments)
