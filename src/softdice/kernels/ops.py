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
from softdice.settings import Pass, decode

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? regions, str settings, str backend"
LIBRARY = torch.library.Library("softdice", "DEF")
LIBRARY.define(f"statistics({_INPUTS}) -> Tensor")
LIBRARY.define(f"statistics_backward(Tensor grad, {_INPUTS}) -> Tensor")


def statistics(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, settings: Pass, backend: str
) -> Tensor:
    """One fused pass -> sums (fields, B, K)."""
    return torch.ops.softdice.statistics(input, target, weight, regions, settings.text, backend)


def gradient(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    settings: Pass,
    backend: str,
) -> Tensor:
    """dL/dsums, and what `statistics` was called with -> dL/dinput."""
    return torch.ops.softdice.statistics_backward(grad, input, target, weight, regions, settings.text, backend)


@torch.library.impl(LIBRARY, "statistics", "CPU")
def _statistics_cpu(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, text: str, backend: str
) -> Tensor:
    settings = decode(text)
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        sums, bad = cuda.statistics(input, target, weight, regions, settings)
        in_range = bad is None or not bool(bad.any())
    else:
        from softdice.kernels.cpu import driver as cpu

        sums, in_range = cpu.statistics(input, target, weight, regions, settings)
    if not in_range:
        validation.values(input, target, weight, settings.activation, settings.ignore_index)
    return sums.to(reference.result_dtype(input.dtype))


@torch.library.impl(LIBRARY, "statistics", "CUDA")
def _statistics_cuda(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, text: str, backend: str
) -> Tensor:
    from softdice.kernels.triton import driver as cuda

    settings = decode(text)
    sums, bad = cuda.statistics(input, target, weight, regions, settings)
    if bad is not None:
        cuda.assert_in_range(bad, input, target, weight, settings)
    return sums


@torch.library.impl(LIBRARY, "statistics_backward", "CPU")
def _statistics_backward_cpu(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    text: str,
    backend: str,
) -> Tensor:
    if backend == "triton":
        return _statistics_backward_cuda(grad, input, target, weight, regions, text, backend)
    from softdice.kernels.cpu import driver as cpu

    return cpu.gradient(grad, input, target, weight, regions, decode(text))


@torch.library.impl(LIBRARY, "statistics_backward", "CUDA")
def _statistics_backward_cuda(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    text: str,
    backend: str,
) -> Tensor:
    from softdice.kernels.triton import driver as cuda

    return cuda.gradient(grad, input, target, weight, regions, decode(text))


@torch.library.register_fake("softdice::statistics", lib=LIBRARY)
def _statistics_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, text: str, backend: str
) -> Tensor:
    columns = input.shape[1] if regions is None else regions.shape[0]
    shape = (len(decode(text).fields), input.shape[0], columns)
    return input.new_empty(shape, dtype=reference.result_dtype(input.dtype))


@torch.library.register_fake("softdice::statistics_backward", lib=LIBRARY)
def _statistics_backward_fake(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


class _Statistics(torch.autograd.Function):
    """The pass and its gradient. One Function under the operator costs a fifth of `register_autograd` per call."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Any, regions: Any, text: str, backend: str) -> Tensor:
        ctx.save_for_backward(input, target, weight, regions)
        ctx.chosen = text, backend
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics(input, target, weight, regions, text, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dinput = torch.ops.softdice.statistics_backward(*grads, *ctx.saved_tensors, *ctx.chosen)
        return dinput, *[None] * (len(ctx.needs_input_grad) - 1)


class _Gradient(torch.autograd.Function):
    """The gradient and its own, which comes from the reference: that is differentiable as often as one likes."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, input: Tensor, target: Tensor, weight: Any, regions: Any, text: str, backend: str
    ) -> Tensor:
        ctx.save_for_backward(grad, input, target, weight, regions)
        ctx.text = text
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics_backward(grad, input, target, weight, regions, text, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grad, input, target, weight, regions = ctx.saved_tensors
        with torch.enable_grad():
            grad, input = grad.detach().requires_grad_(), input.detach().requires_grad_()
            sums = reference.statistics(input, target, weight, regions, decode(ctx.text))
            (dinput,) = torch.autograd.grad(sums, input, grad, create_graph=True)
            dgrad, dsecond = torch.autograd.grad(dinput, (grad, input), cotangents, allow_unused=True)
        return dgrad, dsecond, *[None] * (len(ctx.needs_input_grad) - 2)


@torch.library.impl(LIBRARY, "statistics", "Autograd")
def _statistics_autograd(*arguments: Any) -> Tensor:
    return _Statistics.apply(*arguments)


@torch.library.impl(LIBRARY, "statistics_backward", "Autograd")
def _statistics_backward_autograd(*arguments: Any) -> Tensor:
    return _Gradient.apply(*arguments)
