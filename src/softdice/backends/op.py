"""Run a pass on a backend, with its gradient: autograd functions and torch.library operators (schema, fake, autograd).

    softdice::statistics           tensors of a request -> sums, as `softdice.statistics.request.result_shape` says
    softdice::statistics_backward  dL/dsums, tensors of a request -> dL/dinput

Where no compiler, mode or profiler observes, implementations are called directly. The backward pass stays with the
backend of the forward pass. Saved for it: the inputs, nothing else. A second derivative comes from the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdice import internals
from softdice.backends.route import implementation, on_graph
from softdice.statistics import check, reference
from softdice.statistics.request import TENSORS, Request, decode, result_dtype, result_shape

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? regions, Tensor? voxel_map, str settings, str backend"
LIBRARY = torch.library.Library("softdice", "DEF")
LIBRARY.define(f"statistics({_INPUTS}) -> Tensor")
LIBRARY.define(f"statistics_backward(Tensor grad, {_INPUTS}) -> Tensor")


def run(request: Request, backend: str) -> Tensor:
    """Return the result of a pass (`softdice.statistics.request.Pass` says of which shape), on the autograd graph of
    its input. backend: what `route.choose` returned for the request. Raise ValueError, with `validate`, for a label,
    target, probability or weight out of range; with Triton on a GPU an assertion of the device fails instead."""
    if on_graph(backend):
        if request.settings.validate:
            check.values(request)
        return reference.forward(request)
    kind = request.settings.kind
    if kind == "ranks":
        return _Ranks.apply(*request, backend)
    if kind == "map":
        return _Map.apply(*request, backend)
    if not _direct(request):
        return torch.ops.softdice.statistics(*request[:TENSORS], request.settings.text, backend)
    if request.input.requires_grad and torch.is_grad_enabled():
        return _Sums.apply(*request, backend)
    return implementation(kind, backend).forward(request)


def gradient(grad: Tensor, request: Request, backend: str) -> Tensor:
    """Return dL/dinput (B, C, V) for grad = dL/dsums, for callers that have kept no autograd graph of the pass.
    The request is not for a map or ranks. In grad mode a kernel's result is on the autograd graph of grad and input."""
    if on_graph(backend):
        with torch.enable_grad():
            request = request._replace(input=request.input.detach().requires_grad_())
            return torch.autograd.grad(reference.forward(request), request.input, grad)[0]
    if not _direct(request):
        return torch.ops.softdice.statistics_backward(grad, *request[:TENSORS], request.settings.text, backend)
    if torch.is_grad_enabled() and (grad.requires_grad or request.input.requires_grad):
        return _Slopes.apply(grad, *request, backend)
    return implementation(request.settings.kind, backend).gradient(grad, request)


_PLAIN = (Tensor, torch.nn.Parameter)


def _direct(request: Request) -> bool:
    """Return whether no compiler, mode, profiler or tensor subclass has to see an operator, but kernels suffice."""
    plain = type(request.input) in _PLAIN and type(request.target) in _PLAIN
    return plain and not torch.compiler.is_compiling() and not internals.observed()


_NO_GRADIENTS = (None,) * len(Request._fields)
"""Gradients of the arguments of a Function behind the input: the other fields of a request, and the backend."""


def _keep(ctx: Any, arguments: tuple[Any, ...], *more: Tensor) -> tuple[Request, str]:
    """Save a Function's arguments and `more` tensors for its backward pass; return (request, backend) from them."""
    *fields, backend = arguments
    request = Request(*fields)
    ctx.save_for_backward(*request[:TENSORS], *more)
    ctx.settings, ctx.backend = request.settings, backend
    return request, backend


def _kept(ctx: Any) -> Request:
    """Return the request of a Function for which `_keep` saved no `more` tensors."""
    return Request._make([*ctx.saved_tensors, ctx.settings])


class _Sums(torch.autograd.Function):
    """The pass and its gradient. A Function around the operator costs a fifth of `register_autograd` per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Return the result of a pass. The operator makes it if a compiler, mode or profiler has to see one."""
        request, backend = _keep(ctx, arguments)
        if _direct(request):
            return implementation(request.settings.kind, backend).forward(request)
        with internals.below_autograd():
            return torch.ops.softdice.statistics(*request[:TENSORS], request.settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return gradient(grads[0], _kept(ctx), ctx.backend), *_NO_GRADIENTS


class _Slopes(torch.autograd.Function):
    """The gradient, and its own gradient from the reference, which is differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *arguments: Any) -> Tensor:
        """Return dL/dinput for grad = dL/dsums. The operator makes it if a compiler, mode or profiler must see one."""
        request, backend = _keep(ctx, arguments, grad)
        if _direct(request):
            return implementation(request.settings.kind, backend).gradient(grad, request)
        with internals.below_autograd():
            return torch.ops.softdice.statistics_backward(grad, *request[:TENSORS], request.settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return the gradients of grad and input, on the autograd graph. cotangents: one, of dL/dinput, (B, C, V)."""
        input, *others, grad = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        with torch.enable_grad():
            input, grad = input.detach().requires_grad_(), grad.detach().requires_grad_()
            sums = reference.forward(Request._make([input, *others, ctx.settings]))
            (dinput,) = torch.autograd.grad(sums, input, grad, create_graph=True)
            dgrad, dsecond = torch.autograd.grad(dinput, (grad, input), cotangents, allow_unused=True)
        return dgrad, dsecond, *_NO_GRADIENTS


class _Map(torch.autograd.Function):
    """The cross-entropy of each voxel. Its backward pass is the sum's, with the map's gradient as voxel weights."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        request, backend = _keep(ctx, arguments)
        return implementation("map", backend).forward(request)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return dL/dinput for the gradient of the map, (B, V) of any sign. A map has no weights of its own, and a pass
        of sums takes weights >= 0 alone: it gets the absolute value, and the result the sign."""
        (grad_BV,), request = grads, _kept(ctx)
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated: the definition can
            cost = reference.forward(request)
            return *torch.autograd.grad(cost, request.input, grad_BV, create_graph=True), *_NO_GRADIENTS
        ones = grad_BV.new_ones(1, *request.input.shape[:2])
        negative = grad_BV.is_cuda or bool((grad_BV < 0).any())  # on a GPU to ask would mean to wait
        weight = grad_BV.abs() if negative else grad_BV
        sums = request._replace(weight=weight, settings=request.settings.but(kind="sums"))
        dinput = gradient(ones, sums, ctx.backend)
        if negative:
            dinput.mul_(grad_BV.sign().unsqueeze(1).to(dinput.dtype))
        return dinput, *_NO_GRADIENTS


class _Ranks(torch.autograd.Function):
    """Costs by rank. The forward pass keeps the steps, (B, C, V); the backward pass replaces them by the gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Return costs and numbers of voxels, (2, P, C), P = 1 or B; keep the steps if there is a backward pass."""
        request, backend = _keep(ctx, arguments)
        costs, steps = implementation("ranks", backend).ranks(request)
        ctx.steps = steps if ctx.needs_input_grad[0] else None
        return costs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return dL/dinput for grad = dL/d(costs, numbers of voxels), (2, P, C): the numbers are constants."""
        (grad,), request = grads, _kept(ctx)
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated: the definition can
            costs = reference.forward(request)
            return *torch.autograd.grad(costs, request.input, grad, create_graph=True), *_NO_GRADIENTS
        module = implementation("ranks", ctx.backend)
        steps, ctx.steps = ctx.steps, None
        if steps is None:  # an earlier backward pass has used them up
            _, steps = module.ranks(request)
        return module.ranks_gradient(grad[0].expand(request.input.shape[:2]), steps, request), *_NO_GRADIENTS


# --- the operators


def _request(arguments: Any) -> tuple[Request, str]:
    """Return request and backend from the arguments of an operator: tensors, settings as text, backend."""
    *tensors, text, backend = arguments
    return Request._make([*tensors, decode(text)]), backend


def _statistics(*arguments: Any) -> Tensor:
    request, backend = _request(arguments)
    return implementation(request.settings.kind, backend).forward(request)


def _statistics_backward(grad: Tensor, *arguments: Any) -> Tensor:
    request, backend = _request(arguments)
    return implementation(request.settings.kind, backend).gradient(grad, request)


def _differentiable(function: Any, first: int) -> Any:
    """Return what an operator does on tensors that require a gradient: decode the settings and apply `function`, an
    autograd.Function. first: how many arguments (grad) come before the request's, and are passed on as they are."""

    def implementation(*arguments: Any) -> Tensor:
        request, backend = _request(arguments[first:])
        return function.apply(*arguments[:first], *request, backend)

    return implementation


for device in ("CPU", "CUDA"):
    LIBRARY.impl("statistics", _statistics, device)
    LIBRARY.impl("statistics_backward", _statistics_backward, device)
LIBRARY.impl("statistics", _differentiable(_Sums, 0), "Autograd")
LIBRARY.impl("statistics_backward", _differentiable(_Slopes, 1), "Autograd")


@torch.library.register_fake("softdice::statistics", lib=LIBRARY)
def _statistics_fake(*arguments: Any) -> Tensor:
    request, _ = _request(arguments)
    return request.input.new_empty(result_shape(request), dtype=result_dtype(request.input.dtype))


@torch.library.register_fake("softdice::statistics_backward", lib=LIBRARY)
def _statistics_backward_fake(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)
