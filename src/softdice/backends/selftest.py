"""The self-test of Triton's kernels on the device at hand, before "auto" trusts them.

They are compiled on the user's machine, by the user's versions, for the user's card. So the first pass of a kind on a
device is preceded by a small case of that kind, its statistics and its gradient by kernel and reference. Where they
differ, or nothing compiles, the reference serves, and a warning says so once. A backend that was asked for by name is
not tried: it never falls back.

The case lies in memory as the tensors of the pass do and its programs walk several tiles, so the machine code that is
compared is the machine code that serves.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Hashable
from traceback import walk_tb

import torch
from torch import Tensor

from softdice.statistics import reference
from softdice.statistics.request import Pass, Request, without_autocast

SAMPLES, PROGRAMS, TILES = 2, 2, 3
"""Of a case: samples; programs of a sample; tiles that a program walks, at least. A program is an instance of a Triton
kernel, a tile the voxels that it works on at once."""
VOXELS = 1500
"""Voxels of a sample at least."""
TOLERANCE = 1e-4
"""Of float32 and half precision, relative to the largest value: rounding stays far below, a wrong kernel far above."""
TOLERANCE_DOUBLE = 1e-9

_outcomes: dict[Hashable, str | None] = {}  # what the machine code depends on -> how its case failed, or None
_failed: list[str] = []  # all failures of this process
_lock = threading.Lock()


def failed(request: Request) -> bool:
    """Return whether Triton's kernels fail the self-test for a request; under torch.compile, whether any has failed."""
    return bool(_failed) if torch.compiler.is_compiling() else problem(request) is not None


def problem(request: Request) -> str | None:
    """Return, in words, how Triton's kernels fail a small case of the request's kind on its device; None if they pass.
    The answer is kept, and a failure gives a warning once. While a CUDA graph is captured, nothing is tried: None."""
    from softdice.backends.cuda import layout

    input, target, weight, regions, voxel_map, settings = request
    key = (
        input.device, input.dtype, input.shape[1], target.dtype, target.ndim, layout.layout(request),
        None if weight is None else weight.dtype, None if regions is None else regions.shape[0],
        None if voxel_map is None else (voxel_map.dtype, voxel_map.shape[1]), settings,
    )  # fmt: skip
    with _lock:
        if key not in _outcomes:
            if _capturing(input.device):
                return None
            outcome = _outcomes[key] = _outcome(request)
            if outcome is not None:
                _failed.append(outcome)
                warnings.warn(_advice(input.device, settings, outcome), RuntimeWarning, stacklevel=2)
        return _outcomes[key]


def _capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _advice(device: torch.device, settings: Pass, outcome: str) -> str:
    """Return the text of the warning that the kernels failed. outcome: how, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"softdice: expected Triton's kernels to agree with the reference on {name}, got {outcome} "
        f"({settings.activation}). The reference serves in their place. Please report what `softdice check` prints."
    )


def _voxels(request: Request) -> int:
    """Return the number of voxels of a sample of the case: enough for TILES tiles in each program, and equal to the
    request's number modulo `layout.WIDEST`, since machine code depends on the unit that divides it."""
    from softdice.backends.cuda import driver, layout

    least = max(VOXELS, ((TILES - 1) * PROGRAMS + 1) * driver.longest_tile(request))
    return least + (request.input.shape[2] - least) % layout.WIDEST


def _case(request: Request) -> Request:
    """Return SAMPLES random samples with the classes, dtypes, memory layout and settings of a request for sums or maps.
    They lie on its device; torch's global generator stays as it is."""
    from softdice.backends.cuda import layout

    input, target, weight, regions, voxel_map, settings = request
    generator = torch.Generator().manual_seed(0)
    B, V, C = SAMPLES, _voxels(request), input.shape[1]
    value = torch.rand(B, C, V, generator=generator, dtype=torch.float64) * 0.9 + 0.05  # 1 / p stays in half precision
    if settings.activation != "none":
        value = value * 10 - 5
    elif settings.regions is not None:  # a union's probability is a sum
        value = (value + 1) / (2 * C)
    if target.ndim == 2:
        truth = torch.randint(0, max(C, 2), (B, V), generator=generator)
        if settings.ignore_index is not None:
            truth[:, ::7] = settings.ignore_index if settings.ignore_index < 2**63 else 0
    else:
        truth = torch.rand(B, C, V, generator=generator, dtype=torch.float64)
        truth = truth if target.is_floating_point() else truth.round()
    value, truth = layout.laid_out(value.to(input), input), layout.laid_out(truth.to(target), target)
    if weight is not None:
        weight = layout.laid_out(torch.randint(0, 3, (B, V), generator=generator).to(weight), weight)
    if voxel_map is not None:
        numbers = torch.randint(0, 3, (B, voxel_map.shape[1], V), generator=generator)
        voxel_map = layout.laid_out(numbers.to(voxel_map), voxel_map)
    return Request(value, truth, weight, regions, voxel_map, settings)


def _outcome(request: Request) -> str | None:
    """Return, in words, how kernels and reference differ on a request's case, or what was raised; None if they agree.
    Raise torch.OutOfMemoryError, if the case does: it says nothing about the kernels."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(request.input.device):
            off = _error(_case(request))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever Triton's versions and compilers raise
        first = (str(error).splitlines() or [""])[0]
        return f"an error of {_whose(error)}: {type(error).__name__}: {first}"
    dtype = request.input.dtype
    rounding = 0.0 if dtype == torch.float64 else max(TOLERANCE, 2 * torch.finfo(dtype).eps)
    return None if off <= max(TOLERANCE_DOUBLE, rounding) else f"statistics or a gradient that are off by {off:.1e}"


def _error(case: Request) -> float:
    """Return the largest relative distance of the kernels' statistics and gradient from the reference's in float64.
    The gradient is of a fixed weighted sum of the statistics; inf stands for a NaN. Autograd has to be on."""
    from softdice.backends.cuda import driver

    wide = case.input.detach().double().requires_grad_()
    exact = reference.statistics(case._replace(input=wide))
    mix = torch.linspace(0.5, 1, exact.numel(), dtype=exact.dtype, device=exact.device).view(exact.shape)
    (slope,) = torch.autograd.grad(exact, wide, mix)
    wanted = SAMPLES * PROGRAMS
    sums, _ = driver.statistics(case, wanted)
    gradient = driver.gradient(mix.to(sums.dtype), case, wanted)
    return max(_distance(sums.flatten(1), exact.flatten(1)), _distance(gradient.flatten(), slope.flatten()))


def _whose(error: Exception) -> str:
    """Return "Triton" and its version if its code is in the traceback of an error, else "softdice"; for the warning."""
    through = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)}
    return f"Triton {getattr(sys.modules['triton'], '__version__', '')}" if "triton" in through else "softdice"


def _distance(ours: Tensor, exact: Tensor) -> float:
    """Return the largest distance of `ours` from `exact`, (..., N), relative to the largest of N; inf if one is NaN."""
    scale = exact.detach().abs().amax(-1).clamp_min(1e-3)
    off = ((ours.double() - exact.detach()).abs().amax(-1) / scale).amax().item()
    return off if off == off else float("inf")
