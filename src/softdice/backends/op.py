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
    """Return what a pass gives (`softdice.statistics.request.Pass`), on the autograd graph of its input."""
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
    """Return dL/dinput for dL/dsums, for code that keeps no graph of its own."""
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
    """Return whether no compiler, mode, profiler or subclass has to see an operator."""
    plain = type(request.input) in _PLAIN and type(request.target) in _PLAIN
    return plain and not torch.compiler.is_compiling() and not internals.observed()


class _Sums(torch.autograd.Function):
    """The pass and its gradient. One Function under the operator costs a fifth of `register_autograd` per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, backend = arguments
        request = Request(*fields)
        ctx.save_for_backward(*request[:TENSORS])
        ctx.chosen = request.settings, backend
        if _direct(request):
            return implementation(request.settings.kind, backend).forward(request)
        with internals.below_autograd():
            return torch.ops.softdice.statistics(*request[:TENSORS], request.settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        settings, backend = ctx.chosen
        dinput = gradient(grads[0], Request._make([*ctx.saved_tensors, settings]), backend)
        return dinput, *[None] * (len(ctx.needs_input_grad) - 1)


class _Slopes(torch.autograd.Function):
    """The gradient and its own, which comes from the reference: that is differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *arguments: Any) -> Tensor:
        *fields, backend = arguments
        request = Request(*fields)
        ctx.save_for_backward(grad, *request[:TENSORS])
        ctx.settings = request.settings
        if _direct(request):
            return implementation(request.settings.kind, backend).gradient(grad, request)
        with internals.below_autograd():
            return torch.ops.softdice.statistics_backward(grad, *request[:TENSORS], request.settings.text, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grad, *tensors = ctx.saved_tensors
        request = Request._make([*tensors, ctx.settings])
        with torch.enable_grad():
            grad, request = grad.detach().requires_grad_(), request._replace(input=tensors[0].detach().requires_grad_())
            sums = reference.forward(request)
            (dinput,) = torch.autograd.grad(sums, request.input, grad, create_graph=True)
            dgrad, dsecond = torch.autograd.grad(dinput, (grad, request.input), cotangents, allow_unused=True)
        return dgrad, dsecond, *[None] * (len(ctx.needs_input_grad) - 2)


class _Map(torch.autograd.Function):
    """The cross-entropy of each voxel; its gradient is that of the sum, weighted with the voxel's gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, backend = arguments
        request = Request(*fields)
        ctx.save_for_backward(*request[:TENSORS])
        ctx.chosen = request.settings, backend
        return implementation("map", backend).forward(request)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_BV,), (settings, backend) = grads, ctx.chosen
        request = Request._make([*ctx.saved_tensors, settings])
        rest = [None] * (len(ctx.needs_input_grad) - 1)
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated: the definition can
            return *torch.autograd.grad(reference.forward(request), request.input, grad_BV, create_graph=True), *rest
        ones = grad_BV.new_ones(1, *request.input.shape[:2])
        negative = grad_BV.is_cuda or bool((grad_BV < 0).any())  # on a GPU a look would cost a wait
        weight = grad_BV.abs() if negative else grad_BV  # a pass takes weights >= 0
        dinput = gradient(ones, request._replace(weight=weight, settings=settings.but(kind="sums")), backend)
        if negative:
            dinput.mul_(grad_BV.sign().unsqueeze(1).to(dinput.dtype))
        return dinput, *rest


class _Ranks(torch.autograd.Function):
    """Costs by rank; their gradient stands half made in memory of its own until the backward pass takes it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, backend = arguments
        request = Request(*fields)
        ctx.save_for_backward(*request[:TENSORS])
        ctx.chosen = request.settings, backend
        costs, steps = implementation("ranks", backend).ranks(request)
        ctx.steps = steps if ctx.needs_input_grad[0] else None
        return costs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (settings, backend) = grads, ctx.chosen
        request, rest = Request._make([*ctx.saved_tensors, settings]), [None] * (len(ctx.needs_input_grad) - 1)
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated: the definition can
            costs = reference.forward(request)
            return *torch.autograd.grad(costs, request.input, grad, create_graph=True), *rest
        module = implementation("ranks", backend)
        steps, ctx.steps = ctx.steps, None
        if steps is None:  # an earlier backward pass has used them up
            _, steps = module.ranks(request)
        return module.ranks_gradient(grad[0].expand(request.input.shape[:2]), steps, request), *rest


# --- the operators


def _request(arguments: Any) -> tuple[Request, str]:
    *tensors, text, backend = arguments
    return Request._make([*tensors, decode(text)]), backend


def _statistics(*arguments: Any) -> Tensor:
    request, backend = _request(arguments)
    return implementation(request.settings.kind, backend).forward(request)


def _statistics_backward(grad: Tensor, *arguments: Any) -> Tensor:
    request, backend = _request(arguments)
    return implementation(request.settings.kind, backend).gradient(grad, request)


def _differentiable(function: Any, first: int) -> Any:
    """Return an operator's autograd implementation: a Function that takes the settings decoded."""

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
