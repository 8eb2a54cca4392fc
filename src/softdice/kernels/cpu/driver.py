"""logits, target -> statistics, and their gradient, on a CPU: from tensors to the Numba kernels.

The voxels of each sample are cut into a fixed grid of chunks, whatever the number of threads. Every chunk writes its
sums to a slot of its own and the slots are added in order, so 1 and N threads give the same bits. The kernels release
the GIL; `softdice.kernels.cpu.threads` runs them. Beside its inputs the pass holds the slots, some rows of scratch per
thread, and in the backward pass the gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.kernels.cpu.kernel import Job, Kind, Plane, Scalars, backward, forward
from softdice.kernels.cpu.loops import MANY
from softdice.kernels.cpu.memory import gradient_like
from softdice.kernels.cpu.rows import CODES, DTYPES
from softdice.kernels.cpu.threads import share_out
from softdice.reference import outcomes
from softdice.settings import Pass
from softdice.terms import READERS
from softdice.validation import probability_slack

BLOCK_BYTES = 1 << 19  # what the exponentials of a block may take: they stay in L2
BLOCK_VOXELS, FEW_VOXELS = 512, 256  # so that the rows of few classes, or of MANY, stay in L1
CHUNKS = 64  # at most, per sample
CHUNK_VOXELS = 8192  # at least

u = np.uint64
_NOTHING = {dtype: np.empty(0, dtype) for dtype in (np.float32, np.float64, np.uint8)}
_NO_MEMBERS = np.empty((0, 0), np.uint8)


def _plane(tensor: Tensor | None, wide: Any) -> Plane:
    """A tensor (B, C, V), (B, V) or none -> how the kernels see it: its own memory, of any strides; no copy."""
    if tensor is None or tensor.numel() == 0:
        return Plane(_NOTHING[np.uint8], _NOTHING[wide], 0, False, u(0), u(0), u(0))
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.detach().as_strided((span,), (1,)).view(torch.uint8).numpy()
    name = DTYPES[tensor.dtype]
    strides = [u(stride) for stride in tensor.stride()]
    direct = name == np.dtype(wide).name and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
    sB, sC, sV = strides if len(strides) == 3 else (strides[0], u(0), strides[1])
    return Plane(memory, memory.view(wide) if direct else _NOTHING[wide], CODES[name], direct, sB, sC, sV)


def _readable(tensor: Tensor | None) -> Tensor | None:
    """Itself, or a copy where its dtype is none that the kernel reads."""
    return tensor if tensor is None or tensor.dtype in DTYPES else tensor.float()


def _settled(exponent: float, known: float, read: bool) -> float | None:
    """An exponent that the compiler is told, else None; the one that it knows where none is read."""
    return known if exponent == known or not read else None


def kind_of(input: Tensor, target: Tensor, masked: bool, union: bool, settings: Pass) -> Kind:
    """Tensors and settings -> what the kernels are compiled for."""
    hard = target.ndim == 2
    fields = settings.fields
    kind = Kind(
        double=input.dtype == torch.float64,
        fields=fields,
        activation=settings.activation,
        target="labels" if hard else "values",
        masked=masked,
        union=union,
        gamma=_settled(settings.gamma, 2.0, bool(READERS["gamma"] & {*fields})),
        power=_settled(settings.power, 1.0, bool(READERS["power"] & {*fields})),
    )
    apart = hard and settings.activation == "softmax" and input.shape[1] > MANY
    if apart and not (union or settings.label_smoothing):
        return kind._replace(target="own")
    return kind


def _job(input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None, s: Pass) -> tuple[Kind, Job]:
    """Tensors and settings -> which kernels, and the work to do."""
    _, C, V = input.shape
    wide = np.float64 if input.dtype == torch.float64 else np.float32
    ignore, has_ignore = s.ignore_index or 0, False
    if s.ignore_index is not None and target.ndim == 2:  # a number that the dtype cannot hold equals no label
        limits = torch.iinfo(torch.uint8 if target.dtype == torch.bool else target.dtype)
        has_ignore = limits.min <= ignore <= limits.max
        ignore = ignore if ignore < 2**63 else ignore - 2**64
    kind = kind_of(input, target, has_ignore or weight is not None, regions is not None, s)
    columns = C + 1 if regions is not None else C
    block = min(
        FEW_VOXELS if C >= MANY else BLOCK_VOXELS, max(64, BLOCK_BYTES // np.dtype(wide).itemsize // columns // 64 * 64)
    )
    chunk = -(-max(CHUNK_VOXELS, -(-V // CHUNKS)) // block) * block
    slack = probability_slack(input.dtype)
    share = s.label_smoothing / outcomes(C, s.activation)
    job = Job(
        input=_plane(input, wide),
        target=_plane(target, wide),
        weight=_plane(_readable(weight), wide),
        member=_NO_MEMBERS if regions is None else regions.contiguous().view(torch.uint8).numpy(),
        scalars=Scalars(wide(s.gamma), wide(s.power), wide(1 - s.label_smoothing), wide(share)),
        C=u(C),
        K=u(C if regions is None else regions.shape[0]),
        V=u(V),
        weighted=weight is not None,
        first=np.int32(1 if C == 1 else 0),
        top=np.int64(max(C, 2)),
        has_ignore=has_ignore,
        ignore=np.int64(ignore if has_ignore else 0),
        low=wide(-slack),
        high=wide(1 + slack),
        chunk=u(chunk),
        chunks=u(max(1, -(-V // chunk))),
        block=u(block),
    )
    return kind, job


def statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    settings: Pass,
) -> tuple[Tensor, bool]:
    """input (B, C, V), target, weight -> sums (fields, B, K) in float64, and whether all values were in range."""
    kind, job = _job(input, target, weight, regions, settings)
    tasks = len(input) * int(job.chunks)
    slots = np.zeros((tasks, len(kind.fields), int(job.K)))
    bad = np.zeros((tasks, 4), np.int64)
    if input.numel():
        share_out(forward(kind), (job, settings.validate, slots, bad), tasks, input.numel())
    sums = slots.reshape(len(input), int(job.chunks), len(kind.fields), int(job.K)).sum(1)
    in_range = not (settings.validate and bad.any())
    return torch.from_numpy(np.ascontiguousarray(sums.transpose(1, 0, 2))), in_range


def gradient(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    regions: Tensor | None,
    settings: Pass,
) -> Tensor:
    """dL/dstatistics (fields, B, K), and what made them -> dL/dinput, laid out as it is read where that is dense."""
    kind, job = _job(input, target, weight, regions, settings)
    kind = kind._replace(backward=True)
    wide = np.float64 if kind.double else np.float32
    result = gradient_like(input)
    coef = np.ascontiguousarray(grad.detach().transpose(0, 1).numpy(), wide)
    if input.numel():
        tasks = len(input) * int(job.chunks)
        share_out(backward(kind), (job, coef, _plane(result, wide)), tasks, input.numel())
    return result
