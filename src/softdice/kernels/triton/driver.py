"""logits, target -> statistics, and their gradient, on a GPU: the driver of the Triton kernels.

The tensors are read where they lie, whatever their strides. Nothing waits for the device. Beside its inputs the pass
holds the partial sums and, in the backward pass, the gradient; for a softmax over more classes than a tile holds two
numbers per voxel more, in the forward pass. The same program runs on CPU tensors where TRITON_INTERPRET=1 was set
before Triton was imported.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdice import validation
from softdice.kernels.triton import declared, launch
from softdice.kernels.triton.backward import backward_kernel
from softdice.kernels.triton.forward import forward_kernel, rows_kernel
from softdice.kernels.triton.launch import Tile
from softdice.reference import outcomes, result_dtype
from softdice.settings import ACTIVATIONS, Pass, Voxels

INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1: the kernels are then Python that runs on CPU tensors."""
REGIONS = 32
"""Regions that one launch takes; more of them are done in groups, since their sums are independent."""

_interpreter = threading.Lock()  # it patches the language while a kernel runs


def _same_sum(name: str, hard: bool, smooth: bool) -> str:
    """The statistic with the same value: y is 0 or 1 in a label map, and without smoothing y' is y."""
    if smooth or not (name == "labelled" or (hard and name == "target_squared")):
        return name
    return "target"


def arguments(given: Voxels, s: Pass) -> dict[str, Any]:
    """Tensors and settings -> what both kernels are called with, by name."""
    input, target, weight, regions, voxel_map = given
    C, columns = input.shape[1], given.columns
    hard = target.ndim == 2
    strides = dict(zip(("xB", "xC", "xV"), input.stride(), strict=True))
    strides |= dict(zip(("tB", "tV") if hard else ("tB", "tC", "tV"), target.stride(), strict=True))
    strides |= dict(zip(("wB", "wV"), (0, 0) if weight is None else weight.stride(), strict=True))
    voxel_map = None if voxel_map is None else voxel_map.expand(-1, columns, -1)
    strides |= dict(zip(("uB", "uC", "uV"), (0, 0, 0) if voxel_map is None else voxel_map.stride(), strict=True))
    class_rows = launch.bucket(C)
    return {
        "x": input,
        "target": launch.readable(target),
        "weight": None if weight is None else launch.readable(weight),
        "voxel_map": None if voxel_map is None else launch.readable(voxel_map),
        "member": None if regions is None else launch.readable(regions.contiguous()),
        "V": input.shape[2],
        "tC": 0,
        **strides,
        "ignore": 0 if s.ignore_index is None else s.ignore_index,
        "C": C,
        "K": columns,
        "TOP": max(C, 2),
        "ACT": ACTIVATIONS.index(s.activation),
        "HARD": hard,
        "WEIGHTED": weight is not None,
        "IGNORE": s.ignore_index is not None,
        "REGIONS": regions is not None,
        "MAPPED": voxel_map is not None,
        "CT": class_rows,
        "KT": class_rows if regions is None else triton.next_power_of_2(columns),
        "W": tl.float64 if input.dtype == torch.float64 else tl.float32,
    }


def constants(input: Tensor, s: Pass) -> declared.Constants:
    """Tensor and settings -> what a statistic's term depends on beside the voxel."""
    share = s.label_smoothing / outcomes(input.shape[1], s.activation)
    activation = ACTIVATIONS.index(s.activation)
    return declared.Constants(1.0 - s.label_smoothing, share, float(s.gamma), float(s.power), activation)


def _start(kernel: Any, given: dict[str, Any], grid: tuple[int, int], warps: int) -> None:
    """Launch on the tensors' device and its current stream, with what the kernel takes and nothing else."""
    if given.keys() != set(kernel.arg_names):  # the interpreter drops what it does not know
        raise TypeError(f"{kernel.__name__}: {sorted(given.keys() ^ set(kernel.arg_names))} are missing or unknown")
    device = given["x"].device
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "use_backend('triton'): expected Triton imported with TRITON_INTERPRET=1, got CPU tensors and Triton "
            "imported without it. Set the variable before Python starts."
        )
    if INTERPRETED:
        with _interpreter:
            kernel[grid](**given)
        return
    with launch.on(device):
        kernel[grid](**given, num_warps=warps, num_stages=1, enable_fp_fusion=True)


def _regions(given: Voxels) -> int:
    return 0 if given.regions is None else given.regions.shape[0]


def _groups(given: Voxels) -> list[Voxels]:
    """What the pass works on -> the same for each group of regions that a launch takes, in order."""
    if given.regions is None or len(given.regions) <= REGIONS:
        return [given]
    groups = given.regions.split(REGIONS)
    maps: Sequence[Tensor | None] = [None] * len(groups)
    if given.voxel_map is not None:
        maps = given.voxel_map.expand(-1, given.columns, -1).split(REGIONS, dim=1)
    return [given._replace(regions=own, voxel_map=part) for own, part in zip(groups, maps, strict=True)]


def _columns(given: dict[str, Any], forward: bool) -> int:
    """Programs along the classes: one per tile of them, but for what needs all classes of a voxel together."""
    together = given["REGIONS"] or (given["ACT"] == ACTIVATIONS.index("softmax") and not forward)
    return 1 if together else -(-given["K"] // given["KT"])


def _key(given: dict[str, Any]) -> tuple[Any, ...]:
    """What tells apart the cases that are tuned one by one."""
    fixed = [value for name, value in given.items() if name.isupper()]
    return (given["x"].dtype, given["x"].device, given["target"].dtype, given["xV"] == 1, *fixed)


def _partial(given: dict[str, Any], rows: int, validate: bool, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """One forward launch -> partial sums (B, programs, rows, K), and the counts of what is out of range."""
    x = given["x"]
    B, _, V = x.shape
    programs, steps = launch.grid(B, V, tile.voxels, launch.processors(x.device))
    columns = _columns(given, forward=True)
    partial = x.new_empty((B, programs, rows, given["K"]), dtype=result_dtype(x.dtype))
    bad = x.new_empty((B * programs * columns, 4), dtype=torch.int32) if validate else None
    maxima = logs = None
    given = {**given, "programs": programs, "steps": steps, **tile.constants}
    if columns > 1 and given["ACT"] == ACTIVATIONS.index("softmax"):
        maxima, logs = x.new_empty((2, B, V), dtype=partial.dtype).unbind(0)
        known = {**given, "maxima": maxima, "logs": logs}
        _start(rows_kernel, {name: known[name] for name in rows_kernel.arg_names}, (B * programs, 1), tile.warps)
    slack = validation.probability_slack(x.dtype)
    given |= {"maxima": maxima, "logs": logs, "partial": partial, "bad": bad, "ROWS": rows}
    given |= {"VALIDATE": validate, "LOW": -slack, "HIGH": 1 + slack}
    _start(forward_kernel, given, (B * programs, columns), tile.warps)
    return partial, bad


def statistics(given: Voxels, settings: Pass) -> tuple[Tensor, Tensor | None]:
    """What the pass works on -> sums (fields, B, K), and counts (n, 4) of what is out of range, per program.

    The four columns: labels, per-class targets, probabilities, weights.
    """
    input = given.input
    dtype = result_dtype(input.dtype)
    if input.numel() == 0:
        return input.new_zeros((len(settings.fields), input.shape[0], given.columns), dtype=dtype), None
    groups = _groups(given)
    if len(groups) > 1:
        parts = [statistics(own, settings) for own in groups]
        return torch.cat([sums for sums, _ in parts], dim=2), parts[0][1]
    same = [_same_sum(name, given.target.ndim == 2, settings.label_smoothing > 0) for name in settings.fields]
    rows = list(dict.fromkeys(same))
    call = arguments(given, settings) | declared.terms(tuple(rows), constants(input, settings))
    entry = launch.tile(launch.FORWARD, input.shape[1], _regions(given), input.element_size(), len(rows))
    tile = launch.tuned(
        ("forward", *_key(call)), entry, lambda tile: _partial(call, len(rows), settings.validate, tile), input.device
    )
    partial, bad = _partial(call, len(rows), settings.validate, tile)
    sums = partial.sum(1, dtype=torch.float64)
    if same == rows:
        return sums.movedim(1, 0).to(dtype).contiguous(), bad
    return torch.stack([sums[:, rows.index(name)] for name in same]).to(dtype), bad


def assert_in_range(bad: Tensor, given: Voxels, settings: Pass) -> None:
    """Counts of what is out of range -> assertions on the device, which the host does not wait for."""
    hard = given.target.ndim == 2
    errors = (
        (hard, validation.labels_error(given.input.shape[1], settings.ignore_index)),
        (not hard, validation.target_error()),
        (settings.activation == "none", validation.probabilities_error()),
        (given.weight is not None, validation.weights_error()),
    )
    right = (bad == 0).all(0)
    for kind, (checked, error) in enumerate(errors):
        if checked:
            torch._assert_async(right[kind], error)


def _slope(given: dict[str, Any], out: Tensor, tile: Tile) -> None:
    """One backward launch into `out`."""
    B, _, V = out.shape
    programs, steps = launch.grid(B, V, tile.voxels, launch.processors(out.device))
    given = {**given, "out": out, "programs": programs, "steps": steps, **tile.constants}
    given |= dict(zip(("oB", "oC", "oV"), out.stride(), strict=True))
    _start(backward_kernel, given, (B * programs, _columns(given, forward=False)), tile.warps)


def gradient(grad: Tensor, given: Voxels, settings: Pass) -> Tensor:
    """dL/dstatistics (fields, B, K) of any strides, and what made them -> dL/dinput, dense and laid out as input."""
    input = given.input
    out = torch.empty_like(input)
    if input.numel() == 0:
        return out
    groups = _groups(given)
    if len(groups) > 1:
        parts = [gradient(part, own, settings) for part, own in zip(grad.split(REGIONS, dim=2), groups, strict=True)]
        return torch.stack(parts).sum(0, dtype=result_dtype(input.dtype)).to(input.dtype)
    call = arguments(given, settings) | declared.slopes(settings.fields, constants(input, settings))
    call |= {"grad": grad} | dict(zip(("gF", "gB", "gK"), grad.stride(), strict=True))
    entry = launch.tile(launch.BACKWARD, input.shape[1], _regions(given), input.element_size(), call.pop("SLOPED"))
    tile = launch.tuned(("backward", *_key(call)), entry, lambda tile: _slope(call, out, tile), input.device)
    _slope(call, out, tile)
    return out
