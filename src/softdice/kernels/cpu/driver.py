"""logits, target -> statistics, and their gradient, on a CPU: from tensors to the Numba kernels.

The voxels of each sample are cut into a fixed grid of chunks, whatever the number of threads. Every chunk writes its
sums to a slot of its own and the slots are added in order, so 1 and N threads give the same bits. The kernels release
the GIL; `softdice.kernels.cpu.threads` runs them. Beside its inputs the pass holds the slots, some rows of scratch per
thread, and in the backward pass the gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.kernels.cpu import confusion, kernel
from softdice.kernels.cpu.kernel import Job, Kind, Plane, Scalars
from softdice.kernels.cpu.loops import MANY
from softdice.kernels.cpu.memory import gradient_like
from softdice.kernels.cpu.rows import CODES, DTYPES
from softdice.kernels.cpu.threads import share_out
from softdice.reference import outcomes
from softdice.settings import CONFUSION, Pass, Voxels
from softdice.terms import READERS
from softdice.validation import probability_slack

BLOCK_BYTES = 1 << 19  # what the exponentials of a block may take: they stay in L2
BLOCK_VOXELS = 2048  # where nothing but rows of a class is kept
FEW_VOXELS, MANY_VOXELS = 512, 256  # so that a softmax's rows of few classes, or of MANY, stay in L1
CHUNKS = 64  # at most, per sample
CHUNK_VOXELS = 8192  # at least

u = np.uint64
_NOTHING = Plane(u(0), 0, False, u(0), u(0), u(0))
_NO_MEMBERS = np.empty((0, 0), np.uint8)


def plane_of(tensor: Tensor | None, wide: Any) -> Plane:
    """A tensor (B, C, V), (B, V) or none -> how the kernels see it: its own memory, of any strides; no copy."""
    if tensor is None:
        return _NOTHING
    name, (sB, *sC, sV) = DTYPES[tensor.dtype], tensor.stride()
    direct = name == wide.__name__ and (sV == 1 or tensor.shape[-1] == 1)
    return Plane(u(tensor.data_ptr()), CODES[name], direct, u(sB), u(sC[0] if sC else 0), u(sV))


def _readable(given: Voxels) -> Voxels:
    """The same, with a copy of a weight or map whose dtype is none that the kernel reads."""
    weight, voxel_map = (
        tensor if tensor is None or tensor.dtype in DTYPES else tensor.float()
        for tensor in (given.weight, given.voxel_map)
    )
    return given._replace(weight=weight, voxel_map=voxel_map)


def _settled(exponent: float, known: float, read: bool) -> float | None:
    """An exponent that the compiler is told, else None; the one that it knows where none is read."""
    return known if exponent == known or not read else None


def kind_of(dtype: torch.dtype, C: int, hard: bool, masked: bool, union: bool, settings: Pass) -> Kind:
    """What the tensors are like, and settings -> what the kernels are compiled for."""
    fields = settings.fields
    kind = Kind(
        double=dtype == torch.float64,
        fields=fields,
        activation=settings.activation,
        target="labels" if hard else "values",
        masked=masked,
        union=union,
        gamma=_settled(settings.gamma, 2.0, bool(READERS["gamma"] & {*fields})),
        power=_settled(settings.power, 1.0, bool(READERS["power"] & {*fields})),
    )
    apart = hard and settings.activation == "softmax" and C > MANY
    if apart and not (union or settings.label_smoothing or settings.mapped or fields == CONFUSION):
        return kind._replace(target="own")
    return kind


@lru_cache(maxsize=256)
def _plan(
    dtype: torch.dtype, C: int, V: int, of_target: torch.dtype, hard: bool, weighted: bool, unions: int | None, s: Pass
) -> tuple[Kind, Job]:
    """What the work is like (unions: of how many regions) -> which kernels do it, and the job but for its tensors."""
    wide = np.float64 if dtype == torch.float64 else np.float32
    union = unions is not None
    ignore, has_ignore = s.ignore_index or 0, False
    if s.ignore_index is not None and hard:  # a number that the dtype cannot hold equals no label
        limits = torch.iinfo(torch.uint8 if of_target == torch.bool else of_target)
        has_ignore = limits.min <= ignore <= limits.max
        ignore = ignore if ignore < 2**63 else ignore - 2**64
    kind = kind_of(dtype, C, hard, has_ignore or weighted, union, s)
    columns = C + 1 if union else C
    most = BLOCK_VOXELS if s.activation != "softmax" else (FEW_VOXELS if C < MANY else MANY_VOXELS)
    block = min(most, max(64, BLOCK_BYTES // np.dtype(wide).itemsize // columns // 64 * 64))
    chunk = -(-max(CHUNK_VOXELS, -(-V // CHUNKS)) // block) * block
    slack = probability_slack(dtype)
    share = s.label_smoothing / outcomes(C, s.activation)
    job = Job(
        input=_NOTHING,
        target=_NOTHING,
        weight=_NOTHING,
        map=_NOTHING,
        member=_NO_MEMBERS,
        scalars=Scalars(*(wide(x) for x in (s.gamma, s.power, 1 - s.label_smoothing, share, -slack, 1 + slack))),
        C=u(C),
        K=u(C if unions is None else unions),
        V=u(V),
        weighted=weighted,
        first=np.int32(1 if C == 1 else 0),
        top=np.int64(max(C, 2)),
        has_ignore=has_ignore,
        ignore=np.int64(ignore if has_ignore else 0),
        chunk=u(chunk),
        chunks=u(max(1, -(-V // chunk))),
        block=u(block),
    )
    return kind, job


def job_of(given: Voxels, s: Pass) -> tuple[Kind, Job]:
    """Tensors of dtypes that the kernels read, and settings -> which kernels, and the work to do."""
    input, target, weight, regions, voxel_map = given
    _, C, V = input.shape
    unions = None if regions is None else regions.shape[0]
    kind, job = _plan(input.dtype, C, V, target.dtype, target.ndim == 2, weight is not None, unions, s)
    wide = np.float64 if kind.double else np.float32
    if voxel_map is not None:
        voxel_map = voxel_map.expand(-1, int(job.K), -1)
    planes = plane_of(input, wide), plane_of(target, wide), plane_of(weight, wide), plane_of(voxel_map, wide)
    member = _NO_MEMBERS if regions is None else regions.contiguous().view(torch.uint8).numpy()
    return kind, job._replace(input=planes[0], target=planes[1], weight=planes[2], map=planes[3], member=member)


def _loops(settings: Pass) -> Any:
    """Settings -> the module whose kernels, `forward` and `backward` of a kind, do the pass."""
    return confusion if settings.fields == CONFUSION else kernel


def statistics(given: Voxels, settings: Pass) -> tuple[Tensor, bool]:
    """What the pass works on -> sums (rows, B, K) in float64, and whether all values were in range."""
    given = _readable(given)
    input, (kind, job) = given.input, job_of(given, settings)
    B, chunks, K = input.shape[0], int(job.chunks), int(job.K)
    rows = settings.rows(input.shape[1])
    slots = np.zeros((rows, B * chunks, K))
    bad = np.zeros(B * chunks, np.int64)
    if input.numel():
        share_out(_loops(settings).forward(kind), (job, slots, bad), B * chunks, input.numel())
    sums = slots if chunks == 1 else slots.reshape(rows, B, chunks, K).sum(2)
    return torch.from_numpy(sums), not (settings.validate and any(bad.tolist()))


def gradient(grad: Tensor, given: Voxels, settings: Pass) -> Tensor:
    """dL/dstatistics (rows, B, K), and what made them -> dL/dinput, laid out as it is read where that is dense."""
    given = _readable(given)
    input, (kind, job) = given.input, job_of(given, settings)
    kind = kind._replace(backward=True)
    wide = np.float64 if kind.double else np.float32
    result = gradient_like(input)
    coef = np.ascontiguousarray(grad.detach().numpy(), wide)
    if input.numel():
        tasks = input.shape[0] * int(job.chunks)
        share_out(_loops(settings).backward(kind), (job, coef, plane_of(result, wide)), tasks, input.numel())
    return result
