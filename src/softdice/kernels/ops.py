"""The fused pass as torch.library operators: schema, shapes, autograd, and the kernel of each device.

    softdice::statistics           input, target -> sums (rows, B, K), a row for each field or as `Pass.rows` says
    softdice::statistics_backward  dL/dsums, input, target -> dL/dinput

backend = "cpu" is the Numba kernel, "triton" the Triton kernels (on CPU tensors, their interpreter), "chunks" the
definition piece by piece; the backward pass stays with the backend of the forward pass.
Where no compiler, mode or profiler looks, the kernels are called directly.

Saved for the backward pass: the inputs, nothing else. A second derivative comes from the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdice import reference, validation
from softdice.kernels import chunks
from softdice.settings import CENTRELINE, Pass, decode

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? regions, Tensor? voxel_map, str settings, str backend"
LIBRARY = torch.library.Library("softdice", "DEF")
LIBRARY.define(f"statistics({_INPUTS}) -> Tensor")
LIBRARY.define(f"statistics_backward(Tensor grad, {_INPUTS}) -> Tensor")


def statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    voxel_map: Tensor | None,
    settings: Pass,
    backend: str,
) -> Tensor:
    """One fused pass -> sums (fields, B, K)."""
    if not _eager(input, target):
        return torch.ops.softdice.statistics(input, target, weight, regions, voxel_map, settings.text, backend)
    if input.requires_grad and torch.is_grad_enabled():
        return _Statistics.apply(input, target, weight, regions, voxel_map, settings, backend)
    return _sums(input, target, weight, regions, voxel_map, settings, backend)


def gradient(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    voxel_map: Tensor | None,
    settings: Pass,
    backend: str,
) -> Tensor:
    """dL/dsums, and what `statistics` was called with -> dL/dinput."""
    if not _eager(input, target):
        return torch.ops.softdice.statistics_backward(
            grad, input, target, weight, regions, voxel_map, settings.text, backend
        )
    if torch.is_grad_enabled() and (grad.requires_grad or input.requires_grad):
        return _Gradient.apply(grad, input, target, weight, regions, voxel_map, settings, backend)
    return _slopes(grad, input, target, weight, regions, voxel_map, settings, backend)


def _eager(input: Tensor, target: Tensor) -> bool:
    """Whether nobody looks: no compiler, mode, profiler or subclass. The operator costs what small inputs feel."""
    return (
        not torch.compiler.is_compiling()
        and type(input) in _PLAIN
        and type(target) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _sums(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    voxel_map: Tensor | None,
    settings: Pass,
    backend: str,
) -> Tensor:
    """`statistics` of tensors that are there, without a graph."""
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        sums, bad = cuda.statistics(input, target, weight, regions, voxel_map, settings)
        if bad is not None and input.is_cuda:
            cuda.assert_in_range(bad, input, target, weight, settings)
        in_range = bad is None or input.is_cuda or not bool(bad.any())
    elif backend == "chunks" or settings.fields == CENTRELINE:
        chunks.check(input, target, weight, settings)
        driver = chunks if backend == "chunks" else _centreline()
        sums, in_range = driver.statistics(input, target, weight, regions, settings), True
    else:
        from softdice.kernels.cpu import driver as cpu

        sums, in_range = cpu.statistics(input, target, weight, regions, voxel_map, settings)
    if not in_range:
        validation.values(input, target, weight, settings.activation, settings.ignore_index)
    return sums.to(reference.result_dtype(input.dtype))


def _slopes(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    voxel_map: Tensor | None,
    settings: Pass,
    backend: str,
) -> Tensor:
    """`gradient` of tensors that are there, without a graph."""
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        return cuda.gradient(grad, input, target, weight, regions, voxel_map, settings)
    if backend == "chunks" or settings.fields == CENTRELINE:
        driver = chunks if backend == "chunks" else _centreline()
        return driver.gradient(grad, input, target, weight, regions, settings)
    from softdice.kernels.cpu import driver as cpu

    return cpu.gradient(grad, input, target, weight, regions, voxel_map, settings)


def _centreline() -> Any:
    from softdice.kernels.cpu import centreline

    return centreline


class _Statistics(torch.autograd.Function):
    """The pass and its gradient. One Function under the operator costs a fifth of `register_autograd` per call."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Any,
        regions: Any,
        voxel_map: Any,
        settings: Pass,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(input, target, weight, regions, voxel_map)
        ctx.chosen = settings, backend
        if _eager(input, target):
            return _sums(input, target, weight, regions, voxel_map, settings, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics(input, target, weight, regions, voxel_map, settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dinput = gradient(*grads, *ctx.saved_tensors, *ctx.chosen)
        return dinput, *[None] * (len(ctx.needs_input_grad) - 1)


class _Gradient(torch.autograd.Function):
    """The gradient and its own, which comes from the reference: that is differentiable as often as one likes."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Any,
        regions: Any,
        voxel_map: Any,
        settings: Pass,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(grad, input, target, weight, regions, voxel_map)
        ctx.settings = settings
        if _eager(input, target):
            return _slopes(grad, input, target, weight, regions, voxel_map, settings, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics_backward(
                grad, input, target, weight, regions, voxel_map, settings.text, backend
            )

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grad, input, target, weight, regions, voxel_map = ctx.saved_tensors
        with torch.enable_grad():
            grad, input = grad.detach().requires_grad_(), input.detach().requires_grad_()
            sums = reference.statistics(input, target, weight, regions, voxel_map, ctx.settings)
            (dinput,) = torch.autograd.grad(sums, input, grad, create_graph=True)
            dgrad, dsecond = torch.autograd.grad(dinput, (grad, input), cotangents, allow_unused=True)
        return dgrad, dsecond, *[None] * (len(ctx.needs_input_grad) - 2)


def _with_settings(function: Any) -> Any:
    """A function of settings -> the operator's implementation, which is given them as text."""

    def implementation(*arguments: Any) -> Tensor:
        *tensors, text, backend = arguments
        return function(*tensors, decode(text), backend)

    return implementation


for device in ("CPU", "CUDA"):
    LIBRARY.impl("statistics", _with_settings(_sums), device)
    LIBRARY.impl("statistics_backward", _with_settings(_slopes), device)
LIBRARY.impl("statistics", _with_settings(_Statistics.apply), "Autograd")
LIBRARY.impl("statistics_backward", _with_settings(_Gradient.apply), "Autograd")


@torch.library.register_fake("softdice::statistics", lib=LIBRARY)
def _statistics_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    voxel_map: Tensor | None,
    text: str,
    backend: str,
) -> Tensor:
    columns = input.shape[1] if regions is None else regions.shape[0]
    shape = (decode(text).rows(input.shape[1]), input.shape[0], columns)
    return input.new_empty(shape, dtype=reference.result_dtype(input.dtype))


@torch.library.register_fake("softdice::statistics_backward", lib=LIBRARY)
def _statistics_backward_fake(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)
