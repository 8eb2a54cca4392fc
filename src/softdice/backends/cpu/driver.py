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
LABEL_VOXELS, VALUE_VOXELS = 2048, 4096  # of a block that keeps the rows of one class alone; labels take a row more
FEW_VOXELS, MANY_VOXELS = 512, 256  # of a block whose rows of a softmax, of few classes or of MANY, stay in L1
CHUNKS = 64  # at most, per sample
CHUNK_VOXELS = 8192  # at least


class Plane(NamedTuple):
    """A tensor as the kernels see it: the fields of `walk.PLANE`, which explains them, in its order."""

    address: int
    convert: int
    direct: bool
    per_sample: int
    per_class: int
    per_voxel: int
    step: int


class Plan(NamedTuple):
    """What a walk needs: the kind of its loops, and the job with all that the bodies read."""

    kind: Kind
    job: np.ndarray  # the bytes of a `walk.JOB`
    scratch: int  # bytes for each thread
    tasks: int  # of a sample

    def put(self, name: str, *numbers: int) -> None:
        """Set fields of the job that hold addresses, strides or counts: the one named, and those behind it."""
        offset = JOB.fields[name][1]  # type: ignore[index]
        pack_into(f"{len(numbers)}Q", self.job.data, offset, *numbers)


def address(array: np.ndarray) -> int:
    """Return the address of an array's first element."""
    place: int = array.__array_interface__["data"][0]
    return place


def plane_of(tensor: Tensor, convert: Any, in_place: bool = True) -> Plane:
    """Return the PLANE of a tensor (B, C, V) or (B, V), of any strides. in_place: whether rows may be used in place.
    convert: address of the function of `convert` that reads or writes its rows, 0 where none is called."""
    size, (sB, *sC, sV) = tensor.element_size(), tensor.stride()
    direct = in_place and tensor.dtype == torch.float32 and (sV == 1 or tensor.shape[-1] == 1)
    return Plane(tensor.data_ptr(), convert, direct, sB * size, sC[0] * size if sC else 0, sV * size, sV)


def readable(request: Request) -> Request:
    """Return the request; a weight or map of a dtype that the kernels cannot read is copied to float32."""
    weight, voxel_map = (
        tensor if tensor is None or tensor.dtype in WIDTHS else tensor.float()
        for tensor in (request.weight, request.voxel_map)
    )
    return request._replace(weight=weight, voxel_map=voxel_map)


def _ignored_label(s: Pass, target_dtype: torch.dtype) -> int | None:
    """Return ignore_index as an int64 with the same bits, or None if no label of the target's dtype equals it.
    Kernels compare labels with it as int64, so a uint64 from 2^63 on becomes negative."""
    if s.ignore_index is None:
        return None
    limits = torch.iinfo(torch.uint8 if target_dtype == torch.bool else target_dtype)
    if not limits.min <= s.ignore_index <= limits.max:
        return None
    return s.ignore_index if s.ignore_index < 2**63 else s.ignore_index - 2**64


@lru_cache(maxsize=256)
def plan(
    C: int, V: int, target_dtype: torch.dtype, hard: bool, weighted: bool, regions: int | None, writes: bool,
    copies: bool, slack: float, s: Pass,
) -> Plan:  # fmt: skip
    """Return the plan of a pass over C classes and V voxels of a sample, as far as it does not depend on addresses.

    Args:
        hard: whether the target is a label map. weighted: whether there are weights. regions: how many, or None.
        writes: whether the body writes a row for each class, the gradient or errors; copies: whether it writes them to
            scratch, from which the walk copies them to the result.
        slack: how far beyond [0, 1] rounding may put a probability. s: the settings.
    """
    # 1. the kind of the loops
    ignore = _ignored_label(s, target_dtype) if hard else None
    softmaxed, unions = s.activation == "softmax", regions is not None
    # each voxel's own class, the one of its label, can have a loop apart if all other classes have t = y = 0
    own_loop = hard and softmaxed and not (unions or s.label_smoothing or s.mapped)
    target = "own" if own_loop and (C > MANY or s.kind == "map") else "labels" if hard and not unions else "values"
    names = bundle(s.fields) if s.kind == "sums" else ("cross_entropy",)
    kind = kind_of(names, s.activation, target, weighted or ignore is not None, s.gamma, s.power)
    # 2. the grid: the rows of a block stay in cache, a chunk is some whole blocks, a task is one chunk
    K = C if regions is None else regions
    most = LABEL_VOXELS if hard else VALUE_VOXELS
    if softmaxed:  # sizes by kind of target, as a clock chose them
        most = MANY_VOXELS if C >= MANY and target != "labels" else FEW_VOXELS
    block = min(most, max(64, BLOCK_BYTES // 4 // (C + unions) // 64 * 64))
    chunk = -(-max(CHUNK_VOXELS, -(-V // CHUNKS)) // block) * block
    tasks = max(1, -(-V // chunk))
    # 3. float32 numbers of scratch: rows and exponentials; copied logits; gradients; slopes or confusion's table; z
    slopes = max(block * K, C * (C + 1)) if writes else 0
    sizes = [block * (ROWS + (C + 1) * softmaxed), block * C, block * C * copies, slopes, block * K * unions]
    x_offset, g_offset, slopes_offset, z_offset, end = (4 * int(offset) for offset in np.cumsum(sizes))
    # 4. the job, whose fields `walk.JOB` explains
    low, high = (-slack, 1 + slack) if s.activation == "none" else (-np.inf, np.inf)
    job = np.zeros((), JOB)
    values: dict[str, Any] = {
        "softmax": softmax(C, writes and s.kind == "sums" and kind.fused) if softmaxed else 0,
        "C": C, "K": K, "V": V, "chunk_voxels": chunk, "chunks": tasks, "block_voxels": block,
        "x_offset": x_offset, "g_offset": g_offset, "slopes_offset": slopes_offset, "z_offset": z_offset,
        "weighted": weighted, "labels": hard, "writes": writes, "unions": unions,
        "logits": s.activation != "none",
        "first": 1 if C == 1 else 0, "top": max(C, 2), "ignoring": ignore is not None, "ignore": ignore or 0,
        "logs": softmaxed and kind.logs and s.kind in ("sums", "map"),
        "gamma": s.gamma, "power": s.power,
        "keep": 1 - s.label_smoothing, "share": s.label_smoothing / outcomes(C, s.activation),
        "low": low, "high": high, "row_low": -np.inf if unions else low, "row_high": np.inf if unions else high,
    }  # fmt: skip
    if unions:
        values |= {"region_row": region_row(s.activation), "region_gradient": region_gradient(s.activation)}
        values |= {"region_check": region_check()}
    for name, value in values.items():
        job[name] = value
    return Plan(kind, job.reshape(1).view(np.uint8), int(HEAD) + end, tasks)


def planned(request: Request, result: Tensor | None = None, in_place: bool = True) -> Plan:
    """Return the plan for a request that `readable` returned, with addresses of its tensors. The caller keeps these
    alive. result: the tensor (B, C, V) that the body writes, or None. in_place: whether the body may write to it
    directly, where its memory allows it; else it writes to scratch, and the walk copies."""
    input, target, weight, regions, voxel_map, s = request
    _, C, V = input.shape
    output = None if result is None else plane_of(result, writer(result.dtype), in_place)
    slack, unions = check.probability_slack(input.dtype), None if regions is None else len(regions)
    writes, copies = output is not None, output is not None and not output.direct
    walk_plan = plan(C, V, target.dtype, request.hard, weight is not None, unions, writes, copies, slack, s)
    walk_plan = walk_plan._replace(job=walk_plan.job.copy())  # `plan` is cached; addresses go into this copy alone
    masked = weight is not None or (request.hard and s.ignore_index is not None)

    def values(tensor: Tensor) -> Plane:
        """Return the PLANE of values by class; their reader is compiled only if a block may have to be copied."""
        plane = plane_of(tensor, 0)
        return plane if plane.direct and not masked else plane_of(tensor, reader(tensor.dtype))

    walk_plan.put("input", *values(input))
    walk_plan.put("target", *(plane_of(target, label_reader(target.dtype)) if request.hard else values(target)))
    if output is not None:
        walk_plan.put("result", *output)
    if weight is not None:
        walk_plan.put("weight", *plane_of(weight, reader(weight.dtype)))
    if voxel_map is not None:
        walk_plan.put("map", *values(voxel_map.expand(-1, request.columns, -1)))
    if regions is not None:
        walk_plan.put("member", regions.data_ptr())
    return walk_plan


def run(body: np.uint64, walk_plan: Plan, input: Tensor) -> bool:
    """Walk over all tasks of an input (B, C, V) with a body, by its address; return whether all values were in range.
    walk_plan: from `planned`, for this input; the caller has put slots, coefs or map into it, as the body needs."""
    tasks = input.shape[0] * walk_plan.tasks
    bad = np.zeros(tasks, np.int64)
    walk_plan.put("body", int(body))
    walk_plan.put("bad", address(bad))
    if input.numel():
        share_out(walk, (np.uint64(address(walk_plan.job)),), tasks, input.numel(), walk_plan.scratch)
    return not any(bad.tolist())


def forward(request: Request) -> Tensor:
    """Return the sums (fields, B, K), confusion matrix (C, B, C) or map (B, V) of a request.
    Raise ValueError, with `validate`, for a label, target, probability or weight that is out of range."""
    request, s = readable(request), request.settings
    input, K = request.input, request.columns
    B, _, V = input.shape
    walk_plan = planned(request)
    kind, tasks = walk_plan.kind, B * walk_plan.tasks
    if s.kind == "map":
        result = torch.empty(B, V)
        walk_plan.put("result", *plane_of(result, 0))
        in_range = run(voxel_map.forward(kind), walk_plan, input)
    else:
        confused = s.kind == "confusion"
        rows = K if confused else len(kind.summed) + 1
        slots = np.zeros((rows, tasks, K))
        walk_plan.put("slots", address(slots), tasks * K)
        in_range = run(confusion.forward(s.activation) if confused else sums.forward(kind), walk_plan, input)
        total = slots if walk_plan.tasks == 1 else slots.reshape(rows, B, walk_plan.tasks, K).sum(2)
        share = s.label_smoothing / outcomes(input.shape[1], s.activation)
        result = torch.from_numpy(total if confused else _fields(total, kind, s, share))
    if s.validate and not in_range:
        check.values(request)
    return result.to(result_dtype(input.dtype))


def _fields(total: np.ndarray, kind: Kind, s: Pass, share: float) -> np.ndarray:
    """Return the statistics of s.fields, (fields, B, K) float64, from what the body has summed.
    total: (rows, B, K) float64, a row for each statistic of `kind.summed`; the first column of the last row is the sum
    of the weights. share: what label smoothing e adds to every class's target, y = (1 - e) t + share."""
    names = [statistic.name for statistic in kind.summed]
    result = np.empty((len(s.fields), *total.shape[1:]))
    for row, name in enumerate(s.fields):
        if name == "voxels":
            result[row] = total[-1, :, :1]
        elif name == "target":  # sum w y, from "labelled", sum w t
            result[row] = total[names.index("labelled")]
            if s.label_smoothing:
                result[row] = (1 - s.label_smoothing) * result[row] + share * total[-1, :, :1]
        else:
            result[row] = total[names.index(name)]
    return result


def gradient(grad: Tensor, request: Request) -> Tensor:
    """Return dL/dinput (B, C, V), with the input's strides where it is dense.
    grad: dL/dsums (fields, B, K), or dL/d(confusion matrix) (C, B, C)."""
    request, s = readable(request), request.settings
    input, B, K = request.input, request.input.shape[0], request.columns
    result = gradient_like(input)
    walk_plan = planned(request, result)
    if s.kind == "confusion":
        coefs, body = grad.detach().float().contiguous().numpy(), confusion.backward(s.activation)
    else:
        names, body = [statistic.name for statistic in walk_plan.kind.sloped], sums.backward(walk_plan.kind)
        coefs, by_field = np.zeros((len(names), B, K), np.float32), grad.detach().numpy()
        for row, name in enumerate(s.fields):
            if name in names:
                coefs[names.index(name)] = by_field[row]
    walk_plan.put("coefs", address(coefs), B * K)
    run(body, walk_plan, input)
    return result
