"""logits, target -> statistics, and their gradient, on a GPU: the driver of the Triton kernels.

The tensors are read where they lie, whatever their strides. Nothing waits for the device. A launch starts a grid of
programs; each of them walks some tiles of voxels of one sample, for a tile of columns (classes, or regions). `values`
are the arguments of a kernel by name, as the legends of `math` and `forward` explain them. Beside its inputs the pass
holds the partial sums and, in the backward pass, the gradient; for a softmax over more classes than a tile holds two
numbers per voxel more, in the forward pass. The same program runs on CPU tensors where TRITON_INTERPRET=1 was set
before Triton was imported.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdice.backends.cuda import declared, launch, layout
from softdice.backends.cuda.backward import backward_kernel
from softdice.backends.cuda.forward import forward_kernel, rows_kernel
from softdice.backends.cuda.launch import Tile
from softdice.statistics import check, sliced
from softdice.statistics.request import ACTIVATIONS, Pass, Request, outcomes, result_dtype

INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1: the kernels are then Python that runs on CPU tensors."""
REGIONS = 32
"""Regions that one launch takes; more of them are done in groups, since their sums are independent."""

_interpreter = threading.Lock()  # it patches the language while a kernel runs


def _same_sum(name: str, hard: bool, smooth: bool) -> str:
    """Return the name of the statistic to sum for a statistic: "target" where it has the same value, else its own.
    With a label map (hard), y is 0 or 1, so y^2 is y; without label smoothing (smooth), y is the label's t."""
    if smooth or not (name == "labelled" or (hard and name == "target_squared")):
        return name
    return "target"


def arguments(request: Request) -> dict[str, Any]:
    """Return the arguments that both kernels take, by name: tensors, strides, sizes and constants of a request."""
    input, target, weight, regions, voxel_map, s = request
    C, columns, hard = input.shape[1], request.columns, request.hard
    voxel_map = None if voxel_map is None else voxel_map.expand(-1, columns, -1)
    values: dict[str, Any] = {"VU": gcd(layout.WIDEST, input.shape[2])}
    for letter, tensor in zip("xtwu", (input, target, weight, voxel_map), strict=True):
        values |= _strides(letter, tensor)
    del values["wC"]
    return {
        "x": input, "target": launch.readable(target), "weight": None if weight is None else launch.readable(weight),
        "voxel_map": None if voxel_map is None else launch.readable(voxel_map),
        "member": None if regions is None else launch.readable(regions.contiguous()),
        "V": input.shape[2] // values["VU"], **values, "ignore": 0 if s.ignore_index is None else s.ignore_index,
        "C": C, "K": columns, "TOP": max(C, 2), "ACT": ACTIVATIONS.index(s.activation), "HARD": hard,
        "WEIGHTED": weight is not None, "IGNORE": s.ignore_index is not None, "REGIONS": regions is not None,
        "MAPPED": voxel_map is not None, "CT": launch.bucket(C),
        "W": tl.float64 if input.dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def _strides(letter: str, tensor: Tensor | None) -> dict[str, Any]:
    """Return the strides and units of a tensor, (B, C, V), (B, V) or None, by the kernels' names: xB, xC, xV, XU."""
    steps, units = layout.strides(tensor)
    return {**dict(zip((f"{letter}B", f"{letter}C", f"{letter}V"), steps, strict=True)), f"{letter.upper()}U": units}


def constants(input: Tensor, s: Pass) -> declared.Constants:
    """Return what a statistic's term depends on beside the voxel, for an input (B, C, V)."""
    share = s.label_smoothing / outcomes(input.shape[1], s.activation)
    activation = ACTIVATIONS.index(s.activation)
    return declared.Constants(1.0 - s.label_smoothing, share, float(s.gamma), float(s.power), activation)


def _start(kernel: Any, values: dict[str, Any], grid: tuple[int, int], warps: int) -> None:
    """Launch a kernel on the tensors' device and its current stream, without waiting for it.
    values: exactly the arguments that it takes. grid: programs along samples and voxels, and along columns. warps: of a
    program. Raise TypeError if an argument is missing or unknown, RuntimeError for CPU tensors in compiled Triton."""
    if values.keys() != set(kernel.arg_names):  # the interpreter drops what it does not know
        raise TypeError(f"{kernel.__name__}: {sorted(values.keys() ^ set(kernel.arg_names))} are missing or unknown")
    device = values["x"].device
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "use_backend('triton'): expected Triton imported with TRITON_INTERPRET=1, got CPU tensors and Triton "
            "imported without it. Set the variable before Python starts."
        )
    if INTERPRETED:
        with _interpreter:
            kernel[grid](**values)
        return
    with launch.on(device):
        kernel[grid](**values, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def _regions(request: Request) -> int:
    """Return how many regions there are; 0 for classes."""
    return 0 if request.regions is None else request.regions.shape[0]


def longest_tile(request: Request) -> int:
    """Return how many voxels the longest tile has that either kernel takes for a request."""
    shape = request.input.shape[1], min(_regions(request), REGIONS), request.input.element_size()
    return max(launch.tile(*shape, sums).voxels for sums in range(len(request.settings.fields) + 1))


def _groups(request: Request) -> list[Request]:
    """Return a request for each group of regions that a launch takes, in order, with its part of the map."""
    if request.regions is None or len(request.regions) <= REGIONS:
        return [request]
    groups = request.regions.split(REGIONS)
    maps: Sequence[Tensor | None] = [None] * len(groups)
    if request.voxel_map is not None:
        maps = request.voxel_map.expand(-1, request.columns, -1).split(REGIONS, dim=1)
    return [request._replace(regions=regions, voxel_map=part) for regions, part in zip(groups, maps, strict=True)]


def _columns(values: dict[str, Any], forward: bool) -> int:
    """Return the number of programs along the columns: one for each tile of columns, or one where a program needs all
    classes together: with regions, and for the gradient of a softmax. forward: whether for the forward kernel."""
    together = values["REGIONS"] or (values["ACT"] == ACTIVATIONS.index("softmax") and not forward)
    return 1 if together else -(-values["K"] // (values["KT"] * values["GROUPS"]))


def _partial(
    values: dict[str, Any], rows: int, validate: bool, tile: Tile, wanted: int
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel, for a softmax over more classes than a program holds after `rows_kernel`.
    Return (partial, bad): the sums of each program, (B, programs, rows, K), and with `validate` counts of labels,
    targets, probabilities and weights out of range, (all programs, 4) int32, else None.
    values: all arguments but those of the launch. rows: how many statistics are summed. wanted: programs in all."""
    x = values["x"]
    B, _, V = x.shape
    programs, steps = launch.grid(B, V, tile.voxels, wanted)
    values = {**values, "programs": programs, "steps": steps, **tile.constants}
    columns = _columns(values, forward=True)
    partial = x.new_empty((B, programs, rows, values["K"]), dtype=result_dtype(x.dtype))
    bad = x.new_empty((B * programs * columns, 4), dtype=torch.int32) if validate else None
    maxima = logs = None
    if columns > 1 and values["ACT"] == ACTIVATIONS.index("softmax"):
        maxima, logs = x.new_empty((2, B, V), dtype=partial.dtype).unbind(0)
        known = {**values, "maxima": maxima, "logs": logs}
        _start(rows_kernel, {name: known[name] for name in rows_kernel.arg_names}, (B * programs, 1), tile.warps)
    slack = check.probability_slack(x.dtype)
    values |= {"maxima": maxima, "logs": logs, "partial": partial, "bad": bad, "ROWS": rows}
    values |= {"VALIDATE": validate, "LOW": -slack, "HIGH": 1 + slack}
    _start(forward_kernel, values, (B * programs, columns), tile.warps)
    return partial, bad


def forward(request: Request) -> Tensor:
    """Return the statistics (fields, B, K) of a request; or a map (B, V), which torch makes slice by slice.
    With `validate`, a value out of range fails an assertion on the device, which nothing waits for, or on CPU tensors
    raises ValueError."""
    if request.settings.kind == "map":
        return sliced.forward(request)
    sums, bad = statistics(request)
    if bad is not None:
        if request.input.is_cuda:
            assert_in_range(bad, request)
        elif bool(bad.any()):
            check.values(request)
    return sums


def statistics(request: Request, wanted: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return (sums, bad): sums (fields, B, K) of K columns; with `validate` counts out of range (programs, 4).
    The four columns of bad: labels, targets by class, probabilities, weights; the caller raises where one is not 0. bad
    is None without `validate`, and for an empty input. wanted: programs in all; None: as many as keep the device busy.
    The request comes checked; one of more regions than a kernel takes is served in groups of them."""
    input, s = request.input, request.settings
    wanted = launch.wanted(input.device) if wanted is None else wanted
    dtype = result_dtype(input.dtype)
    if input.numel() == 0:
        return input.new_zeros((len(s.fields), input.shape[0], request.columns), dtype=dtype), None
    groups = _groups(request)
    if len(groups) > 1:
        parts = [statistics(group, wanted) for group in groups]
        return torch.cat([sums for sums, _ in parts], dim=2), parts[0][1]  # every group checks the same classes
    # statistics of the same value are summed once: `rows` are those that the kernel sums
    same = [_same_sum(name, request.hard, s.label_smoothing > 0) for name in s.fields]
    rows = list(dict.fromkeys(same))
    call = arguments(request) | declared.terms(tuple(rows), constants(input, s))
    tile = launch.tile(input.shape[1], _regions(request), input.element_size(), len(rows))
    partial, bad = _partial(call, len(rows), s.validate, tile, wanted)
    sums = partial.sum(1, dtype=torch.float64)
    if same == rows:
        return sums.movedim(1, 0).to(dtype).contiguous(), bad
    return torch.stack([sums[:, rows.index(name)] for name in same]).to(dtype), bad


def assert_in_range(bad: Tensor, request: Request) -> None:
    """Enqueue assertions on the device that no count of `bad`, (programs, 4) as of `statistics`, is above 0.
    The host does not wait for them, and raises nothing here."""
    errors = (
        (request.hard, check.labels_error(request.input.shape[1], request.settings.ignore_index)),
        (not request.hard, check.target_error()),
        (request.settings.activation == "none", check.probabilities_error()),
        (request.weight is not None, check.weights_error()),
    )
    right = (bad == 0).all(0)
    for kind, (checked, error) in enumerate(errors):
        if checked:
            torch._assert_async(right[kind], error)


def gradient(grad: Tensor, request: Request, wanted: int | None = None) -> Tensor:
    """Return dL/dinput (B, C, V), with the input's strides where it is dense, for grad = dL/dstatistics (fields, B, K).
    wanted: programs in all; None: as many as keep the device busy."""
    input, s = request.input, request.settings
    wanted = launch.wanted(input.device) if wanted is None else wanted
    out = torch.empty_like(input)
    if input.numel() == 0:
        return out
    groups = _groups(request)
    if len(groups) > 1:
        pairs = zip(grad.split(REGIONS, dim=2), groups, strict=True)
        parts = [gradient(part, group, wanted) for part, group in pairs]
        return torch.stack(parts).sum(0, dtype=result_dtype(input.dtype)).to(input.dtype)
    B, C, V = input.shape
    values = arguments(request) | declared.slopes(s.fields, constants(input, s))
    values |= {"grad": grad, "out": out} | dict(zip(("gF", "gB", "gK"), grad.stride(), strict=True))
    tile = launch.tile(C, _regions(request), input.element_size(), values.pop("SLOPED"))
    programs, steps = launch.grid(B, V, tile.voxels, wanted)
    values |= {"programs": programs, "steps": steps} | tile.constants | _strides("o", out)
    _start(backward_kernel, values, (B * programs, _columns(values, forward=False)), tile.warps)
    return out
