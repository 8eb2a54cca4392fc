"""The processes that torchrun starts: one rank each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch


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
        """Return rank and counts from the environment that torchrun sets; None if it did not start this process."""
        if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
            return None
        rank, count, per_node = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return cls(rank, count, per_node)

    def __enter__(self) -> Ranks:
        """Connect the processes, unless they are: gloo for CPU tensors, NCCL for CUDA's. Choose this process's GPU."""
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
        """Return the value that rank 0 passes, on every rank, pickled; LostRankError if a rank does not call it."""
        values = [value]
        try:
            torch.distributed.broadcast_object_list(values, src=0)
        except RuntimeError as problem:
            raise LostRankError(str(problem)) from problem
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order, on every rank; LostRankError if a rank does not call it."""
        values: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as problem:
            raise LostRankError(str(problem)) from problem
        return values
