"""torch's private names, all of them: what softdice needs that has no public form, and why.

tests/test_package.py fails when a release of torch takes one of them away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def observed() -> bool:
    """Return whether a dispatch mode or a profiler is on. Then a pass has to go through its torch operator, to be seen;
    else the operator is skipped, since its overhead shows for small inputs."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled()


def tracing() -> bool:
    """Return whether torch.jit.trace is active, under which the sizes of a tensor are tensors."""
    return torch._C._get_tracing_state() is not None


def active_transform() -> str | None:
    """Return a sentence that names the active transform or trace, which raw kernels cannot serve; None without one."""
    if not torch.compiler.is_compiling():  # the compiler has a stack of transforms of its own, and no forward mode
        if tracing():
            return "torch.jit.trace is active"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a torch.func transform is active"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
    return None


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor beneath the wrappers of torch.func, where vmap lets nobody read a value."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of NumPy, SciPy or Numba as one that torch.compile does not look into.

    It raises RuntimeError under torch.jit.trace, which would take the result for a constant.
    """

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        """Call the function; apply torch.compiler.disable, which imports the compiler, only in compiled code."""
        if tracing():
            raise RuntimeError(
                "softdice: expected tensors of eager or compiled code, got a trace (torch.jit.trace), which would keep "
                "this result as a constant. Trace the network alone, or use torch.compile."
            )
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        result: R = run(*args, **keywords)
        return result

    return call


def below_autograd() -> AbstractContextManager[Any]:
    """Return a context in which torch operators skip their autograd implementations: the cheapest way in a Function,
    which has no use for a graph."""
    context: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return context


@contextmanager
def recording() -> Iterator[None]:
    """Record a graph even inside an operator's implementation, which runs below autograd, where enable_grad is mute."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield
