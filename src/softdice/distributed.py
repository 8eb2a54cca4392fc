"""this rank's sums -> those of all ranks: a group's, a DTensor's. The engine is torch.distributed.

The gradient with a group. Every rank r has a loss L_r, a function of the sums s = sum_r s_r. The backward pass hands
each rank

    sum_q dL_q / ds        (an all-reduce of dL_r / ds)

so that averaging the ranks' parameter gradients, as DistributedDataParallel and FSDP do, gives
1/W sum_r (sum_q dL_q/ds) ds_r/dparameter = d(1/W sum_q L_q)/dparameter: where all ranks have the same loss, the
gradient of a single process that holds the whole batch, however it is split.

A DTensor is one tensor that many ranks hold together, and its loss is one loss: the sums of this rank's part are
partial sums (split over space) or some of the samples (split over the batch), put together by DTensor itself, and each
rank's gradient is its part of the whole one. Nothing is multiplied by the number of ranks.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdice import validation


def check_group(group: Any, pooling: str = "batch") -> None:
    """A setting that is None, "world" or a process group; whether it can be used is seen when it is."""
    known = group is None or (isinstance(group, str) and group == "world") or _not_a_member(group)
    if not known and not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        advice = "Make one with torch.distributed.new_group, or take it from a mesh with get_group()."
        validation.fail("group to be None, 'world' or a ProcessGroup", repr(group), advice, TypeError)
    if group is not None and pooling == "sample":
        advice = "Sample 0 of one rank is not sample 0 of another: leave group out and average the losses."
        validation.fail("pooling='batch' with group", "pooling='sample'", advice)


def has_ranks() -> bool:
    """() -> whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(value: Tensor, group: Any) -> Tensor:
    """this rank's tensor -> the sum over the group's, on every rank; differentiable as often as one likes.

    Args:
        value: the same shape and dtype on every rank.
        group: a ProcessGroup, or "world" for all ranks.

    Raises:
        RuntimeError: there is no process group, this rank is not in it, or a rank did not take part in time.
    """
    check_group(group)
    if not has_ranks():
        validation.fail(
            "an initialised process group, since group is set",
            "none",
            "Start with torchrun and call torch.distributed.init_process_group, or leave group out.",
            RuntimeError,
        )
    if _not_a_member(group):
        advice = "Call it on the ranks of the group alone."
        validation.fail("a rank of the group", "a rank outside it", advice, RuntimeError)
    group = torch.distributed.group.WORLD if isinstance(group, str) else group
    return _SumOverRanks.apply(value, group)


def _not_a_member(group: Any) -> bool:
    """Whether it is what torch.distributed.new_group returns on a rank that is not in the group."""
    return torch.distributed.is_available() and group is torch.distributed.GroupMember.NON_GROUP_MEMBER


class _SumOverRanks(torch.autograd.Function):
    """tensor -> sum over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.detach().clone(memory_format=torch.contiguous_format)
        try:
            torch.distributed.all_reduce(total, group=group)
        except RuntimeError as problem:
            raise _missing(problem) from problem
        return total

    @staticmethod
    @validation.public_as("OverlapStatistics.all_reduce")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOverRanks.apply(grad, ctx.group), None


def _missing(problem: RuntimeError) -> RuntimeError:
    return RuntimeError(
        validation.message(
            "every rank of the group to add its sums within the group's timeout",
            repr(str(problem).splitlines()[0]),
            "A rank has stopped, or did not call the loss (or its backward pass) as often as the others: look at the "
            "first error of the other ranks.",
        )
    )


# --- DTensor


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor; does not import what makes them."""
    if type(value) in (Tensor, torch.nn.Parameter) or "torch.distributed.tensor" not in sys.modules:
        return False
    return isinstance(value, sys.modules["torch.distributed.tensor"].DTensor)


@dataclass(frozen=True)
class Sharded:
    """How a DTensor's statistics lie on its mesh: placements of sums (fields, B, C)."""

    mesh: Any
    placements: tuple[Any, ...]
    samples: int

    def whole(self, sums: Tensor) -> Tensor:
        """sums of this rank's part (fields, b, C) -> of the whole (fields, B, C), on every rank; differentiable.

        One all-reduce of all fields for a volume that is split, one all-gather for a batch that is; none backward.
        """
        from torch.distributed.tensor import DTensor

        fields, _, columns = sums.shape
        shape = torch.Size((fields, self.samples, columns))
        stride = (self.samples * columns, columns, 1)
        part = DTensor.from_local(sums.contiguous(), self.mesh, self.placements, shape=shape, stride=stride)
        try:
            return part.full_tensor()
        except RuntimeError as problem:
            raise _missing(problem) from problem


def sharding(input: Tensor, target: Tensor, voxel_weight: Tensor | None) -> Sharded | None:
    """input, target, voxel_weight -> how they are split; None where input is no DTensor.

    Raises:
        TypeError: some are DTensors and some are not.
        ValueError: split over the classes, partial, or not split alike.
    """
    given = {"input": input, "target": target}
    if voxel_weight is not None:
        given["voxel_weight"] = voxel_weight
    if not any(is_dtensor(value) for value in given.values()):
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard

    for name, value in given.items():
        if not is_dtensor(value):
            advice = "Make it one with torch.distributed.tensor.distribute_tensor, or pass the local parts of all."
            what = f"{name} to be a DTensor, since another is one"
            validation.fail(what, type(value).__name__, advice, TypeError)
    whole: Any = input
    of_sums: list[Any] = []
    for placement in whole.placements:
        dim = placement.dim % input.ndim if type(placement) is Shard else None
        if dim is None and not isinstance(placement, Replicate):
            advice = "Call input.redistribute(placements=...) first."
            validation.fail("input with the placements Shard or Replicate", placement, advice)
        if dim == 1:
            advice = "A softmax needs all classes of a voxel: redistribute input over the batch or over space."
            validation.fail("input that is not sharded over the classes", f"{placement}", advice)
        of_sums.append(Replicate() if dim is None else Shard(1) if dim == 0 else Partial())
    for name, value in list(given.items())[1:]:
        other: Any = value
        missing = input.ndim - value.ndim  # labels without a channel dimension
        expected = tuple(
            Shard(p.dim % input.ndim - (missing if p.dim % input.ndim > 1 else 0)) if type(p) is Shard else p
            for p in whole.placements
        )
        got = tuple(Shard(p.dim % value.ndim) if type(p) is Shard else p for p in other.placements)
        if other.device_mesh != whole.device_mesh or got != expected:
            what = f"{name} on the mesh of input with the placements {expected}, as input has {whole.placements}"
            advice = f"Call {name}.redistribute(placements=...) first."
            validation.fail(what, f"{other.placements} on {other.device_mesh}", advice)
    return Sharded(whole.device_mesh, tuple(of_sums), input.shape[0])


def outlines(*given: Any) -> tuple[Any, ...]:
    """DTensors or None -> what has their whole shape and dtype, and no memory."""
    return tuple(t if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in given)


def local_parts(*given: Any) -> tuple[Any, ...]:
    """DTensors or None -> this rank's parts."""
    return tuple(t if t is None else t.to_local() for t in given)


def check_mesh(input: Tensor, group: Any) -> None:
    """A DTensor's loss is that of the whole already: a group must not add the ranks of its mesh once more."""
    if group is None or not is_dtensor(input):
        return
    mesh: Any = input.device_mesh  # type: ignore[attr-defined]
    ranks = torch.distributed.get_process_group_ranks(None if isinstance(group, str) else group)
    if set(ranks) & set(mesh.mesh.flatten().tolist()) - {torch.distributed.get_rank()}:
        advice = "Leave group out: the loss of a DTensor is that of the whole already."
        validation.fail("a group without the other ranks of input's mesh", f"group={group!r}", advice)


# --- the processes that torchrun starts


class LostRankError(RuntimeError):
    """Another process has ended, or did not come in time."""


@dataclass
class Ranks:
    """Which of the processes that torchrun started this is: `rank` of `count`, `per_node` of them on each machine.

    The commands use it as a context: inside, the processes are connected.
    """

    rank: int = 0
    count: int = 1
    per_node: int = 1
    connected_here: bool = False

    @classmethod
    def here(cls) -> Ranks | None:
        """() -> what torchrun put into the environment, None where it did not start this process."""
        if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
            return None
        rank, count, per_node = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return cls(rank, count, per_node)

    def __enter__(self) -> Ranks:
        if not torch.distributed.is_initialized():
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            torch.distributed.init_process_group(backend)
            self.connected_here = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.connected_here:  # after an error too: the others notice at once
            torch.distributed.destroy_process_group()

    def from_first(self, value: Any) -> Any:
        """value of rank 0 -> the same on every rank. Pickled: between processes of one program."""
        box = [value]
        try:
            torch.distributed.broadcast_object_list(box, src=0)
        except RuntimeError as problem:
            raise LostRankError(str(problem)) from problem
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """value of each rank -> all of them in the order of the ranks, on every rank."""
        values: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as problem:
            raise LostRankError(str(problem)) from problem
        return values
