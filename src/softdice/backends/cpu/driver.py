"""Sums, confusion matrix and map on a CPU: from a request to the kernels of `softdice.backends.cpu`.

Every task of the fixed grid (sample, chunk) writes its sums to a slot of its own and the slots are added in order, so 1
and N threads give the same bits. Beside its tensors the pass holds the slots, some rows of scratch per thread, and in
the backward pass the gradient.
"""

from __future__ import annotations

from functools import lru_cache
from struct import pack_into
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice.backends.cpu import confusion, sums, voxel_map
from softdice.backends.cpu.convert import WIDTHS, label_reader, reader, writer
from softdice.backends.cpu.gradient_memory import gradient_like
from softdice.backends.cpu.loops import MANY, Kind, kind_of
from softdice.backends.cpu.regions import region_check, region_gradient, region_row
from softdice.backends.cpu.softmax import softmax
from softdice.backends.cpu.walk import HEAD, JOB, ROWS, walk
from softdice.parallel.threads import share_out
from softdice.statistics import check
from softdice.statistics.declared import bundle
from softdice.statistics.request import Pass, Request, outcomes, result_dtype

BLOCK_BYTES = 1 << 19  # of the exponentials of a block: they stay in L2
LABEL_VOXELS, VALUE_VOXELS = 2048, 4096  # where nothing but rows of one class is kept: labels take a row more
FEW_VOXELS, MANY_VOXELS = 512, 256  # so that a softmax's rows of few classes, or of MANY, stay in L1
CHUNKS = 64  # at most, per sample
CHUNK_VOXELS = 8192  # at least

SMALLEST, LARGEST = -np.inf, np.inf
NO_PLANE = (0, 0, 0, 0, 0, 0, 0)


class Plan(NamedTuple):
    """What a pass needs: the kind of its loops, the job (a `walk.JOB`), bytes of scratch, and tasks of a sample."""

    kind: Kind
    job: np.ndarray  # bytes
    scratch: int
    tasks: int

    def put(self, name: str, *numbers: int) -> None:
        """Set fields of the job that hold addresses, strides or counts: the one named, and those behind it."""
        offset = JOB.fields[name][1]  # type: ignore[index]
        pack_into(f"{len(numbers)}Q", self.job.data, offset, *numbers)


def address(array: np.ndarray) -> int:
    """Return the address of an array's first element."""
    place: int = array.__array_interface__["data"][0]
    return place


def plane_of(tensor: Tensor, convert: Any) -> tuple[int, ...]:
    """Describe a tensor (B, C, V) or (B, V), of any strides, as a `walk.PLANE`."""
    size, (sB, *sC, sV) = tensor.element_size(), tensor.stride()
    direct = tensor.dtype == torch.float32 and (sV == 1 or tensor.shape[-1] == 1)
    return tensor.data_ptr(), convert, direct, sB * size, sC[0] * size if sC else 0, sV * size, sV


def readable(request: Request) -> Request:
    """Copy a weight or map whose dtype the kernels do not read."""
    weight, voxel_map = (
        tensor if tensor is None or tensor.dtype in WIDTHS else tensor.float()
        for tensor in (request.weight, request.voxel_map)
    )
    return request._replace(weight=weight, voxel_map=voxel_map)


@lru_cache(maxsize=256)
def plan(
    C: int, V: int, target_dtype: torch.dtype, hard: bool, weighted: bool, regions: int | None, writes: bool,
    copies: bool, slack: float, s: Pass,
) -> Plan:  # fmt: skip
    """Settle the kind of the loops and all of the job but its tensors.

    Args:
        regions: how many there are, None for classes. writes: whether the body writes a row for each class; copies:
            whether it writes them into scratch.
    """
    ignoring, ignore = False, s.ignore_index or 0
    if s.ignore_index is not None and hard:  # a number that the dtype cannot hold equals no label
        limits = torch.iinfo(torch.uint8 if target_dtype == torch.bool else target_dtype)
        ignoring = limits.min <= ignore <= limits.max
        ignore = ignore if ignore < 2**63 else ignore - 2**64
    exponential, unions = s.activation == "softmax", regions is not None
    apart = hard and exponential and not (unions or s.label_smoothing or s.mapped)
    target = "own" if apart and (C > MANY or s.kind == "map") else "labels" if hard and not unions else "values"
    names = bundle(s.fields) if s.kind == "sums" else ("cross_entropy",)
    kind = kind_of(names, s.activation, target, weighted or ignoring, s.gamma, s.power)
    K = C if regions is None else regions
    most = LABEL_VOXELS if hard else VALUE_VOXELS
    if exponential:
        most = MANY_VOXELS if C >= MANY and target != "labels" else FEW_VOXELS
    block = min(most, max(64, BLOCK_BYTES // 4 // (C + unions) // 64 * 64))
    chunk = -(-max(CHUNK_VOXELS, -(-V // CHUNKS)) // block) * block
    tasks = max(1, -(-V // chunk))
    # float32 numbers of scratch: rows and exponentials; copied logits; gradients; slopes or a table; regions' sums
    slopes = max(block * K, C * (C + 1)) if writes else 0
    sizes = [block * (ROWS + (C + 1) * exponential), block * C, block * C * copies, slopes, block * K * unions]
    at_x, at_g, at_h, at_z, end = (4 * int(offset) for offset in np.cumsum(sizes))
    bounds = (-slack, 1 + slack) if s.activation == "none" else (SMALLEST, LARGEST)
    job = np.zeros((), JOB)
    values: dict[str, Any] = {
        "softmax": softmax(C, writes and s.kind == "sums" and kind.fused) if exponential else 0,
        "C": C, "K": K, "V": V, "chunk": chunk, "chunks": tasks, "block": block,
        "at_x": at_x, "at_g": at_g, "at_h": at_h, "at_z": at_z,
        "weighted": weighted, "labels": hard, "writes": writes, "unions": unions,
        "logits": s.activation != "none",
        "first": 1 if C == 1 else 0, "top": max(C, 2), "ignoring": ignoring, "ignore": ignore if ignoring else 0,
        "logs": exponential and kind.logs and s.kind in ("sums", "map"),
        "gamma": s.gamma, "power": s.power,
        "keep": 1 - s.label_smoothing, "share": s.label_smoothing / outcomes(C, s.activation),
        "low": bounds[0], "high": bounds[1],
        "row_low": SMALLEST if unions else bounds[0], "row_high": LARGEST if unions else bounds[1],
    }  # fmt: skip
    if unions:
        values |= {"region_row": region_row(s.activation), "region_gradient": region_gradient(s.activation)}
        values |= {"region_check": region_check()}
    for name, value in values.items():
        job[name] = value
    return Plan(kind, job.reshape(1).view(np.uint8), int(HEAD) + end, tasks)


def planned(request: Request, result: Tensor | None = None, in_place: bool = True) -> Plan:
    """Return the plan for a request of dtypes that the kernels read, with its tensors filled in.

    result: what the body writes, a row for each class; in place where its memory allows it and in_place is true.
    """
    input, target, weight, regions, voxel_map, s = request
    _, C, V = input.shape
    output = NO_PLANE if result is None else plane_of(result, writer(result.dtype))
    output = (*output[:2], output[2] and in_place, *output[3:])
    slack, unions = check.probability_slack(input.dtype), None if regions is None else len(regions)
    writes = result is not None
    copies = writes and not output[2]
    made = plan(C, V, target.dtype, request.hard, weight is not None, unions, writes, copies, slack, s)
    made = made._replace(job=made.job.copy())
    masked = weight is not None or (request.hard and s.ignore_index is not None)

    def values(tensor: Tensor) -> tuple[int, ...]:
        plane = plane_of(tensor, 0)
        return plane if plane[2] and not masked else plane_of(tensor, reader(tensor.dtype))

    made.put("input", *values(input))
    made.put("target", *(plane_of(target, label_reader(target.dtype)) if request.hard else values(target)))
    if writes:
        made.put("result", *output)
    if weight is not None:
        made.put("weight", *plane_of(weight, reader(weight.dtype)))
    if voxel_map is not None:
        made.put("map", *values(voxel_map.expand(-1, request.columns, -1)))
    if regions is not None:
        made.put("member", regions.data_ptr())
    return made


def run(body: np.uint64, made: Plan, input: Tensor) -> bool:
    """Walk over all tasks with a body; return whether every value was in range."""
    tasks = input.shape[0] * made.tasks
    bad = np.zeros(tasks, np.int64)
    made.put("body", int(body))
    made.put("bad", address(bad))
    if input.numel():
        share_out(walk, (np.uint64(address(made.job)),), tasks, input.numel(), made.scratch)
    return not any(bad.tolist())


def forward(request: Request) -> Tensor:
    """Return the statistics (rows, B, K), the confusion matrix (C, B, C) or the map (B, V)."""
    request, s = readable(request), request.settings
    input, K = request.input, request.columns
    B, _, V = input.shape
    made = planned(request)
    kind, tasks = made.kind, B * made.tasks
    if s.kind == "map":
        result = torch.empty(B, V)
        made.put("result", *plane_of(result, 0))
        in_range = run(voxel_map.forward(kind), made, input)
    else:
        rows = K if s.kind == "confusion" else len(kind.summed) + 1
        slots = np.zeros((rows, tasks, K))
        made.put("slots", address(slots), tasks * K)
        in_range = run(confusion.forward(s.activation) if s.kind == "confusion" else sums.forward(kind), made, input)
        total = slots if made.tasks == 1 else slots.reshape(rows, B, made.tasks, K).sum(2)
        share = s.label_smoothing / outcomes(input.shape[1], s.activation)
        result = torch.from_numpy(total if s.kind == "confusion" else _fields(total, kind, s, share))
    if s.validate and not in_range:
        check.values(request)
    return result.to(result_dtype(input.dtype))


def _fields(total: np.ndarray, kind: Kind, s: Pass, share: float) -> np.ndarray:
    """Return the fields that were asked for, from the sums (summed statistics and weights, B, K) of a bundle."""
    names = [statistic.name for statistic in kind.summed]
    result = np.empty((len(s.fields), *total.shape[1:]))
    for row, name in enumerate(s.fields):
        if name == "voxels":
            result[row] = total[-1, :, :1]
        elif name == "target":  # sum w y with y = (1 - e) t + share
            result[row] = total[names.index("labelled")]
            if s.label_smoothing:
                result[row] = (1 - s.label_smoothing) * result[row] + share * total[-1, :, :1]
        else:
            result[row] = total[names.index(name)]
    return result


def gradient(grad: Tensor, request: Request) -> Tensor:
    """Return dL/dinput for dL/dsums (rows, B, K), laid out as the input is read where that is dense."""
    request, s = readable(request), request.settings
    input, B, K = request.input, request.input.shape[0], request.columns
    result = gradient_like(input)
    made = planned(request, result)
    if s.kind == "confusion":
        coefs, body = grad.detach().float().contiguous().numpy(), confusion.backward(s.activation)
    else:
        names, body = [statistic.name for statistic in made.kind.sloped], sums.backward(made.kind)
        coefs, by_field = np.zeros((len(names), B, K), np.float32), grad.detach().numpy()
        for row, name in enumerate(s.fields):
            if name in names:
                coefs[names.index(name)] = by_field[row]
    made.put("coefs", address(coefs), B * K)
    run(body, made, input)
    return result
