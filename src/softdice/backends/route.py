"""The one place where the implementation of a pass is chosen.

`KINDS` lists the five kinds of pass with their implementations. `choose` asks, in this order: a backend asked for by
name, transforms and gradients that only the definition serves, the device and the dtype, Triton's self-test, the size.
A backend asked for by name never falls back: it serves, or it raises and says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

from softdice import internals
from softdice.backends import selftest
from softdice.statistics.request import Request
from softdice.validation import choice, public, public_as

NAMES = ("auto", "reference", "cpu", "triton")
"""Names that a user may ask for."""

_CPU, _TRITON = "softdice.backends.cpu.driver", "softdice.backends.cuda.driver"
_SLICED = "softdice.statistics.sliced"
KINDS: dict[str, dict[str, str]] = {
    "sums": {"sliced": _SLICED, "cpu": _CPU, "triton": _TRITON},
    "confusion": {"sliced": _SLICED, "cpu": _CPU},
    "skeletons": {"sliced": _SLICED, "cpu": "softdice.backends.cpu.centreline"},
    "map": {"sliced": _SLICED, "cpu": _CPU, "triton": _TRITON},
    "ranks": {"sliced": _SLICED, "cpu": "softdice.backends.cpu.ranks"},
}
"""Kind of pass -> implementations by backend: modules with `forward(request)` and `gradient(grad, request)`, for ranks
with `ranks` and `ranks_gradient`. "sliced" is the definition in bounded memory; it serves what a backend lacks. Beside
them "reference", the definition itself, serves every kind."""

SMALL_NUMEL = 4096
"""Inputs of fewer elements go to the reference under "auto": a kernel saves less time there
(`python -m benchmarks.small`) than it takes to compile."""
OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on the Triton kernels are compiled and checked."""

LARGE_NUMEL = 2**20
"""Inputs of so many elements are worth a hint, once, where Numba is missing."""

_in_use: list[str] = []
_hinted: list[str] = []


@public
def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every pass inside the `with` on one backend.

    Args:
        name: "auto" (by device and size), "reference" (plain PyTorch, any device), "cpu" (Numba; no float64), "triton"
            (CUDA devices; with TRITON_INTERPRET=1 in the environment from the start the same kernels run on CPU
            tensors).

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
    """Run every pass inside the `with` on the backend `name`; the innermost `with` counts."""
    _in_use.append(name)
    try:
        yield
    finally:
        _in_use.pop()


@public_as("SOFTDICE_BACKEND")
def asked() -> str:
    """Return the name of the backend in force, one of NAMES: of the innermost `use_backend`, else of SOFTDICE_BACKEND,
    else "auto". Raise ValueError if SOFTDICE_BACKEND holds another word."""
    if _in_use:
        return _in_use[-1]
    name = os.environ.get("SOFTDICE_BACKEND", "auto")
    choice("the variable", name, NAMES)
    return name


def choose(request: Request) -> str:
    """Return the backend that serves a request: "reference", "sliced", "cpu" or "triton"; KINDS explains the first two.
    Raise RuntimeError if a backend was asked for by name and cannot serve it, ValueError as `asked` does."""
    name, kind, input = asked(), request.settings.kind, request.input
    if name == "reference":
        return name
    automatic, device = name == "auto", "triton" if input.is_cuda else "cpu"
    definition = _needs_definition(request)
    unfit = definition or _unfit(device if automatic else name, request)
    if not automatic and unfit is not None:
        raise RuntimeError(
            f"use_backend: expected tensors that the {name!r} backend serves, got a case that it does not: {unfit}. "
            "Use 'auto' or 'reference'."
        )
    if automatic and (definition is not None or (device == "cpu" and input.numel() < SMALL_NUMEL)):
        return "reference"
    name = device if automatic else name
    if kind in ("map", "ranks") and torch.compiler.is_compiling():  # no torch.library operator serves these two
        return "reference"
    if unfit is not None:
        _hint_at_numba(request)
        # both are the definition: slices hold little memory and no graph
        in_slices = input.dtype == torch.float64 or kind in ("confusion", "skeletons")
        return "sliced" if in_slices else "reference"
    if name not in KINDS[kind] or (kind == "skeletons" and not request.hard):
        return "sliced"
    return "reference" if automatic and name == "triton" and selftest.failed(request) else name


def _hint_at_numba(request: Request) -> None:
    """Warn, once in a process, that plain PyTorch serves a large input on the CPU because Numba is not installed."""
    input = request.input
    large = input.device.type == "cpu" and input.dtype != torch.float64 and input.numel() >= LARGE_NUMEL
    if not large or _HAS_NUMBA or _hinted or torch.compiler.is_compiling():
        return
    _hinted.append("numba")
    warnings.warn(
        f"softdice: expected numba for an input of shape {tuple(input.shape)} on the CPU, got no such package. Plain "
        "PyTorch serves it: the same numbers in more time and memory. Run: pip install numba",
        RuntimeWarning,
        stacklevel=2,
    )


def on_graph(backend: str) -> bool:
    """Return whether a backend is the definition, whose result is on the autograd graph by itself."""
    return backend == "reference"


def implementation(kind: str, backend: str) -> Any:
    """Return the module that serves a kind of pass on a backend, imported when first wanted."""
    return importlib.import_module(KINDS[kind][backend])


def _needs_definition(request: Request) -> str | None:
    """Return, in words, why only the definition can serve a request on any device; None if other backends can."""
    if any(
        tensor is not None and tensor.requires_grad for tensor in (request.target, request.weight, request.voxel_map)
    ):
        return "target, voxel_weight or voxel_map requires a gradient"
    return internals.active_transform()


def _unfit(name: str, request: Request) -> str | None:
    """Return, in words, why the kernels of a backend, "cpu" or "triton", cannot serve the tensors; None if they can."""
    input = request.input
    device = input.device.type
    if device != ("cuda" if name == "triton" else "cpu") and not (name == "triton" and device == "cpu"):
        return f"input is on {input.device}"
    if name == "cpu":
        wide = "input is float64, which the definition serves in slices" if input.dtype == torch.float64 else None
        return cpu_missing() or wide
    if device == "cpu" and not interpreting():
        return "input is on cpu, and TRITON_INTERPRET=1 was not set before Python started"
    missing = triton_missing()
    if missing is not None or device == "cpu" or torch.compiler.is_compiling():  # no device is asked
        return missing
    if torch.cuda.get_device_capability(input.device) < OLDEST_CAPABILITY:
        return f"the device is older than compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    return None


# --- what this machine has


_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def _numba_missing() -> str | None:
    """Return, in words, why Numba cannot compile in this process; None if it can."""
    if not _HAS_NUMBA:
        return "numba is not installed: pip install 'softdice[cpu]'"
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "")
    if disabled.lstrip("+-").isdecimal() and int(disabled) != 0:  # as Numba reads it
        return f"NUMBA_DISABLE_JIT={disabled} keeps numba from compiling: unset it before Python starts"
    return None


_NUMBA_MISSING = _numba_missing()
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@internals.untraced  # the compiler would trace into Numba's import, which takes it half a minute
@cache
def compiled_loops(module: str) -> Any:
    """Return a module of Numba loops by its full name, imported when first wanted; None where Numba cannot compile."""
    return None if _NUMBA_MISSING else importlib.import_module(module)


def cpu_missing() -> str | None:
    """Return why the CPU kernels cannot run on this machine, or None."""
    return _NUMBA_MISSING


def interpreting() -> bool:
    """Return whether Triton kernels are interpreted, on CPU tensors: the environment variable TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_missing() -> str | None:
    """Return, in words, why the Triton kernels cannot run on this machine; None if they can."""
    if not _HAS_TRITON:
        return "triton is not installed: pip install triton (Linux)"
    if interpreting():
        return None
    if torch.version.hip is not None:
        return "the kernels are not checked on ROCm"
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"


def device_of(name: str) -> torch.device:
    """Return the device on which a backend's kernels run in this process."""
    return torch.device("cuda" if name == "triton" and not interpreting() else "cpu")


def kernel_backends() -> dict[str, str | None]:
    """Return every kernel backend by name, with the reason why it cannot run on this machine, or None."""
    return {"cpu": cpu_missing(), "triton": triton_missing()}


def automatic() -> list[str]:
    """Return in words, rule by rule, which backend "auto" chooses on this machine."""
    triton = torch.cuda.is_available() and triton_missing() is None
    unchecked = [name for name, there in (("ROCm", torch.version.hip), ("XPU", torch.xpu.is_available())) if there]
    rules = ["CUDA inputs go to 'triton'"] if triton else []
    if cpu_missing() is None:
        rules += [f"CPU inputs of at least {SMALL_NUMEL} elements go to 'cpu'", "float64 ones to 'reference' in slices"]
    rules += [f"{name} inputs go to 'reference', since no kernel is checked there" for name in unchecked]
    return [*rules, f"all {'others' if rules else 'inputs'} go to 'reference'"]
