"""tensors -> the backend that serves them: the one place where that is decided.

A backend asked for by name never falls back: it serves, or it raises and says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from softdice.validation import choice, public, public_as

NAMES = ("auto", "reference", "cpu", "triton")

SMALL_NUMEL = 4096
"""Inputs of fewer elements go to the reference under "auto": what a step would save (`python -m benchmarks.small`) the
compiling of a kernel is not worth."""

_chosen: list[str] = []


@public
def use_backend(name: str) -> AbstractContextManager[None]:
    """backend name -> every pass inside the `with` runs on it.

    Args:
        name: "auto" (by device and size), "reference" (plain PyTorch, any device), "cpu" (Numba), "triton" (CUDA
            devices; with TRITON_INTERPRET=1 in the environment from the start the same kernels run on CPU tensors).

    The environment variable SOFTDICE_BACKEND sets the same for a whole process; `use_backend` goes before it.
    The choice holds for all threads of the process.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: from the pass itself, where the named backend cannot serve the tensors; it never falls back.

    Example:
        >>> import torch, softdice
        >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[0, 1, 1, 1]])
        >>> with softdice.use_backend("reference"):
        ...     softdice.SoftDiceLoss(2, activation="softmax")(logits, labels)
        tensor(0.8047)
    """
    choice("name", name, NAMES)
    return _using(name)


@contextmanager
def _using(name: str) -> Iterator[None]:
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@public_as("SOFTDICE_BACKEND")
def asked() -> str:
    """The name that is in force: `use_backend`, else SOFTDICE_BACKEND, else "auto"."""
    if _chosen:
        return _chosen[-1]
    name = os.environ.get("SOFTDICE_BACKEND", "auto")
    choice("the variable", name, NAMES)
    return name


def _numba_missing() -> str | None:
    """Why Numba compiles nothing in this process, or None."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'softdice[cpu]'"
    asked = os.environ.get("NUMBA_DISABLE_JIT", "")
    if asked.lstrip("+-").isdecimal() and int(asked) != 0:  # as Numba reads it
        return f"NUMBA_DISABLE_JIT={asked} keeps numba from compiling: unset it before Python starts"
    return None


_NUMBA_MISSING = _numba_missing()
_HAS_TRITON = importlib.util.find_spec("triton") is not None
OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on the Triton kernels are compiled and checked."""


@cache
def compiled_loops(module: str) -> Any:
    """A module of Numba loops by its full name, imported when first wanted; None where Numba cannot compile."""
    return None if _NUMBA_MISSING else importlib.import_module(module)


_forks: list[int] = []
if hasattr(os, "register_at_fork"):  # from the package's first import on: the threads of a parent are gone in its child
    os.register_at_fork(after_in_child=lambda: _forks.append(os.getpid()))


def forked() -> bool:
    """Whether this process is a fork, whose copy of torch's OpenMP runtime has lost its threads."""
    return bool(_forks)


def cpu_missing() -> str | None:
    """Why the CPU kernel cannot run on this machine, or None."""
    return _NUMBA_MISSING


def interpreting() -> bool:
    """Whether Triton kernels are to be interpreted, on CPU tensors: the environment variable TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_missing() -> str | None:
    """Why the Triton kernels cannot run on this machine, or None."""
    if not _HAS_TRITON:
        return "triton is not installed: pip install triton (Linux)"
    if interpreting():
        return None
    if torch.version.hip is not None:
        return "the kernels are not checked on ROCm"
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"


def kernel_backends() -> dict[str, str | None]:
    """() -> every kernel backend by name, with the reason why it cannot run on this machine, or None."""
    return {"cpu": cpu_missing(), "triton": triton_missing()}


def automatic() -> list[str]:
    """() -> what "auto" does on this machine, in words."""
    triton = torch.cuda.is_available() and triton_missing() is None
    unchecked = [name for name, there in (("ROCm", torch.version.hip), ("XPU", torch.xpu.is_available())) if there]
    rules = ["CUDA inputs go to 'triton'"] if triton else []
    rules += [f"CPU inputs of at least {SMALL_NUMEL} elements go to 'cpu'"] if cpu_missing() is None else []
    rules += [f"{name} inputs go to 'reference', since no kernel is checked there" for name in unchecked]
    return [*rules, f"all {'others' if rules else 'inputs'} go to 'reference'"]


def choose(input: Tensor, *others: Tensor | None) -> str:
    """input, and what belongs to its voxels (target, weight, map) -> "reference", "cpu" or "triton"."""
    name = asked()
    if name == "reference":
        return name
    if name == "auto":
        return _automatic(input, *others)
    unfit = _unfit(name, input, *others)
    if unfit is not None:
        raise RuntimeError(
            f"use_backend: expected tensors that the {name!r} backend serves, got a case that it does not: {unfit}. "
            "Use 'auto' or 'reference'."
        )
    return name


def _automatic(input: Tensor, *others: Tensor | None) -> str:
    """The kernel of the device where it can serve; on a CPU only for inputs that are not small."""
    name = "triton" if input.device.type == "cuda" else "cpu"
    if (name == "cpu" and input.numel() < SMALL_NUMEL) or _unfit(name, input, *others) is not None:
        return "reference"
    return name


def _unfit(name: str, input: Tensor, *others: Tensor | None) -> str | None:
    """Why a kernel cannot serve these tensors, or None."""
    device = input.device.type
    if device != ("cuda" if name == "triton" else "cpu") and not (name == "triton" and device == "cpu"):
        return f"input is on {input.device}"
    return watched(*others) or (cpu_missing() if name == "cpu" else _triton_unfit(input))


def watched(*others: Tensor | None) -> str | None:
    """Why nothing but the definition can serve, whatever the device; or None. Given: what belongs to the voxels."""
    if any(other is not None and other.requires_grad for other in others):
        return "target, voxel_weight or voxel_map requires a gradient"
    return transform()


def transform() -> str | None:
    """What looks into tensors as only torch's operations allow it, or None."""
    if not torch.compiler.is_compiling():  # the compiler has a stack of transforms of its own, and no forward mode
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a torch.func transform is active"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
    return None


def _triton_unfit(input: Tensor) -> str | None:
    """Why the Triton kernels cannot serve an input on its device, or None."""
    if input.device.type == "cpu" and not interpreting():
        return "input is on cpu, and TRITON_INTERPRET=1 was not set before Python started"
    missing = triton_missing()
    if missing is not None or input.device.type == "cpu" or torch.compiler.is_compiling():
        return missing
    if torch.cuda.get_device_capability(input.device) < OLDEST_CAPABILITY:
        return f"the device is older than compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    return None
