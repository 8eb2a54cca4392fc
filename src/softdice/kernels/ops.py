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
from softdice.settings import CENTRELINE, Pass, Voxels, decode

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? regions, Tensor? voxel_map, str settings, str backend"
LIBRARY = torch.library.Library("softdice", "DEF")
LIBRARY.define(f"statistics({_INPUTS}) -> Tensor")
LIBRARY.define(f"statistics_backward(Tensor grad, {_INPUTS}) -> Tensor")


def statistics(given: Voxels, settings: Pass, backend: str) -> Tensor:
    """One fused pass -> sums (fields, B, K)."""
    if not _eager(given):
        return torch.ops.softdice.statistics(*given, settings.text, backend)
    if given.input.requires_grad and torch.is_grad_enabled():
        return _Statistics.apply(*given, settings, backend)
    return _sums(given, settings, backend)


def gradient(grad: Tensor, given: Voxels, settings: Pass, backend: str) -> Tensor:
    """dL/dsums, and what `statistics` was called with -> dL/dinput."""
    if not _eager(given):
        return torch.ops.softdice.statistics_backward(grad, *given, settings.text, backend)
    if torch.is_grad_enabled() and (grad.requires_grad or given.input.requires_grad):
        return _Gradient.apply(grad, *given, settings, backend)
    return _slopes(grad, given, settings, backend)


def _eager(given: Voxels) -> bool:
    """Whether nobody looks: no compiler, mode, profiler or subclass. The operator costs what small inputs feel."""
    return (
        not torch.compiler.is_compiling()
        and type(given.input) in _PLAIN
        and type(given.target) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _sums(given: Voxels, settings: Pass, backend: str) -> Tensor:
    """`statistics` of tensors that are there, without a graph."""
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        sums, bad = cuda.statistics(given, settings)
        if bad is not None and given.input.is_cuda:
            cuda.assert_in_range(bad, given, settings)
        in_range = bad is None or given.input.is_cuda or not bool(bad.any())
    elif backend == "chunks" or settings.fields == CENTRELINE:
        chunks.check(given, settings)
        driver = chunks if backend == "chunks" else _centreline()
        sums, in_range = driver.statistics(given, settings), True
    else:
        from softdice.kernels.cpu import driver as cpu

        sums, in_range = cpu.statistics(given, settings)
    if not in_range:
        validation.values(given, settings)
    return sums.to(reference.result_dtype(given.input.dtype))


def _slopes(grad: Tensor, given: Voxels, settings: Pass, backend: str) -> Tensor:
    """`gradient` of tensors that are there, without a graph."""
    if backend == "triton":
        from softdice.kernels.triton import driver as cuda

        return cuda.gradient(grad, given, settings)
    if backend == "chunks" or settings.fields == CENTRELINE:
        driver = chunks if backend == "chunks" else _centreline()
        return driver.gradient(grad, given, settings)
    from softdice.kernels.cpu import driver as cpu

    return cpu.gradient(grad, given, settings)


def _centreline() -> Any:
    from softdice.kernels.cpu import centreline

    return centreline


class _Statistics(torch.autograd.Function):
    """The pass and its gradient. One Function under the operator costs a fifth of `register_autograd` per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, settings, backend = arguments
        given = Voxels(*tensors)
        ctx.save_for_backward(*given)
        ctx.chosen = settings, backend
        if _eager(given):
            return _sums(given, settings, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics(*given, settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dinput = gradient(grads[0], Voxels(*ctx.saved_tensors), *ctx.chosen)
        return dinput, *[None] * (len(ctx.needs_input_grad) - 1)


class _Gradient(torch.autograd.Function):
    """The gradient and its own, which comes from the reference: that is differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *arguments: Any) -> Tensor:
        *tensors, settings, backend = arguments
        given = Voxels(*tensors)
        ctx.save_for_backward(grad, *given)
        ctx.settings = settings
        if _eager(given):
            return _slopes(grad, given, settings, backend)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.softdice.statistics_backward(grad, *given, settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grad, *tensors = ctx.saved_tensors
        given = Voxels(*tensors)
        with torch.enable_grad():
            grad, given = grad.detach().requires_grad_(), given._replace(input=given.input.detach().requires_grad_())
            sums = reference.statistics(given, ctx.settings)
            (dinput,) = torch.autograd.grad(sums, given.input, grad, create_graph=True)
            dgrad, dsecond = torch.autograd.grad(dinput, (grad, given.input), cotangents, allow_unused=True)
        return dgrad, dsecond, *[None] * (len(ctx.needs_input_grad) - 2)


def _with_settings(function: Any) -> Any:
    """A function of the tensors, settings and a backend -> the operator's implementation, which takes them as text."""

    def implementation(*arguments: Any) -> Tensor:
        *tensors, text, backend = arguments
        return function(*tensors, decode(text), backend)

    return implementation


for device in ("CPU", "CUDA"):
    LIBRARY.impl("statistics", _with_settings(lambda *given: _sums(Voxels(*given[:-2]), *given[-2:])), device)
    LIBRARY.impl(
        "statistics_backward",
        _with_settings(lambda grad, *given: _slopes(grad, Voxels(*given[:-2]), *given[-2:])),
        device,
    )
LIBRARY.impl("statistics", _with_settings(_Statistics.apply), "Autograd")
LIBRARY.impl("statistics_backward", _with_settings(_Gradient.apply), "Autograd")


@torch.library.register_fake("softdice::statistics", lib=LIBRARY)
def _statistics_fake(*arguments: Any) -> Tensor:
    *tensors, text, _ = arguments
    given = Voxels(*tensors)
    B, C, _ = given.input.shape
    dtype = reference.result_dtype(given.input.dtype)
    return given.input.new_empty((decode(text).rows(C), B, given.columns), dtype=dtype)


@torch.library.register_fake("softdice::statistics_backward", lib=LIBRARY)
def _statistics_backward_fake(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)
