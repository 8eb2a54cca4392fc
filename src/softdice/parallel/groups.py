"""Sums over the ranks of a process group, in one differentiable all-reduce. The engine is torch.distributed.

The gradient. Every rank r has a loss L_r, a function of the sums s = sum_r s_r. The backward pass hands
each rank

    sum_q dL_q / ds        (an all-reduce of dL_r / ds)

so that averaging the ranks' parameter gradients, as DistributedDataParallel and FSDP do, gives
1/W sum_r (sum_q dL_q/ds) ds_r/dparameter = d(1/W sum_q L_q)/dparameter: where all ranks have the same loss, the
gradient of a single process that holds the whole batch, however it is split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdice import validation


def check_group(group: Any, pooling: str = "batch") -> None:
    """Raise TypeError if a loss's setting `group` is not None, "world" or a ProcessGroup.

    pooling: "batch" or "sample", over what the loss sums; raise ValueError for a group with "sample". A group without
    this rank passes: `all_reduce` raises for it.
    """
    known = group is None or (isinstance(group, str) and group == "world") or _not_a_member(group)
    if not known and not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        advice = "Make one with torch.distributed.new_group, or take it from a mesh with get_group()."
        validation.fail("group to be None, 'world' or a ProcessGroup", repr(group), advice, TypeError)
    if group is not None and pooling == "sample":
        advice = "Sample 0 of one rank is not sample 0 of another: leave group out and average the losses."
        validation.fail("pooling='batch' with group", "pooling='sample'", advice)


def has_ranks() -> bool:
    """Return whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(value: Tensor, group: Any) -> Tensor:
    """Return the sum of the group's tensors on every rank; differentiable as often as one likes.

    Args:
        value: the same shape and dtype on every rank.
        group: a ProcessGroup, or "world" for all ranks.

    Raises:
        RuntimeError: there is no process group, this rank is not in it, or a rank did not take part in time.
    """
    check_group(group)
    if not has_ranks():
        advice = "Start with torchrun and call torch.distributed.init_process_group, or leave group out."
        validation.fail("an initialised process group, since group is set", "none", advice, RuntimeError)
    if _not_a_member(group):
        advice = "Call it on the ranks of the group alone."
        validation.fail("a rank of the group", "a rank outside it", advice, RuntimeError)
    group = torch.distributed.group.WORLD if isinstance(group, str) else group
    return _SumOverRanks.apply(value, group)


def _not_a_member(group: Any) -> bool:
    """Return whether it is what torch.distributed.new_group gives a rank that is not in the group."""
    return torch.distributed.is_available() and group is torch.distributed.GroupMember.NON_GROUP_MEMBER


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        """Return the sum of the ranks' values, a new tensor; `all_reduce` has checked the ProcessGroup."""
        ctx.group = group
        total = value.detach().clone(memory_format=torch.contiguous_format)
        try:
            torch.distributed.all_reduce(total, group=group)
        except RuntimeError as problem:
            raise lost_rank(problem) from problem
        return total

    @staticmethod
    @validation.public_as("OverlapStatistics.all_reduce")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOverRanks.apply(grad, ctx.group), None


def lost_rank(problem: RuntimeError) -> RuntimeError:
    """Return the error to raise instead of torch.distributed's `problem`: a rank did not join a collective call."""
    expected, got = "every rank of the group to add its sums within the group's timeout", str(problem).splitlines()[0]
    advice = "A rank has stopped, or did not call the loss (or its backward pass) as often as the others: "
    return RuntimeError(validation.message(expected, repr(got), advice + "look at the first error of the other ranks."))
