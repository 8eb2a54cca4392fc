"""DTensor: one tensor that many ranks hold together, and its loss is one loss.

The sums of this rank's part are partial sums (split over space) or some of the samples (split over the batch), joined
by DTensor itself, and each rank's gradient is its part of the whole one. Nothing is multiplied by the number of ranks.
B is a sample, C a class, *S the axes of space. `input` is logits or probabilities (B, C, *S), float; `target` is labels
(B, *S) or (B, 1, *S), or float values (B, C, *S); `voxel_weight` is (B, *S) or (B, 1, *S), float, or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdice import validation
from softdice.parallel.groups import lost_rank
from softdice.statistics import check
from softdice.statistics.request import Pass


@dataclass(frozen=True)
class Shards:
    """How the statistics of a DTensor lie on its mesh; made by `sharding`, which has checked the placements."""

    mesh: Any  # the input's DeviceMesh
    placements: tuple[Any, ...]  # of the sums (fields, B, C), one for each dimension of the mesh
    samples: int  # B of the whole input

    def local_parts(
        self, input: Any, target: Any, voxel_weight: Any, voxel_map: Any, settings: Pass, num_classes: int | None
    ) -> tuple[Any, Any, Any]:
        """Return this rank's parts of the DTensors input, target and voxel_weight (or None), plain tensors.

        Raise TypeError or ValueError for a wrong dtype or shape of the whole tensors, on all ranks alike, and TypeError
        for a `voxel_map`, values of voxels beside the target. settings: what the pass computes. num_classes: the C that
        the loss expects, or None.
        """
        tensors = input, target, voxel_weight
        if voxel_map is not None:
            advice = "Gather the tensors, or pass the local parts to a loss with group."
            validation.fail("plain tensors with voxel_map", "a DTensor", advice, TypeError)
        x, y, w = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors)
        check.tensors(x, y, w, num_classes, settings.but(validate=False))  # type: ignore[arg-type]  # meta: no values
        return input.to_local(), target.to_local(), None if voxel_weight is None else voxel_weight.to_local()

    def join(self, sums: Tensor) -> Tensor:
        """Join this rank's sums (fields, b, C) into (fields, B, C) of all samples, on every rank; differentiable.

        A field is a statistic, such as sum p y. Ranks that split the batch gather their b samples in one all-gather;
        ranks that split space add their sums in one all-reduce. The backward pass does not communicate. Raise
        RuntimeError if a rank does not take part in time.
        """
        from torch.distributed.tensor import DTensor

        fields, _, columns = sums.shape
        shape = torch.Size((fields, self.samples, columns))
        stride = (self.samples * columns, columns, 1)
        part = DTensor.from_local(sums.contiguous(), self.mesh, self.placements, shape=shape, stride=stride)
        try:
            return part.full_tensor()
        except RuntimeError as problem:
            raise lost_rank(problem) from problem


def sharding(
    input: Tensor, target: Tensor, voxel_weight: Tensor | None, settings: Pass, group: Any = None
) -> Shards | None:
    """Return how the statistics of input, target and voxel_weight lie on the ranks; None if no tensor is a DTensor.

    The tensors come from the user, unchecked. Return None, too, for a kind of pass whose parts cannot be added: "map",
    the loss of each voxel, and "ranks", a ranking of all voxels; `check` refuses their DTensors. `group`: the ranks
    whose sums the loss adds, "world" or a ProcessGroup.

    Raises:
        TypeError: some are DTensors and some are not.
        ValueError: input is split over the classes or partial, the tensors are not split alike, or `group` has other
            ranks of the mesh, whose sums would count twice.
    """
    if settings.kind in ("map", "ranks"):
        return None
    tensors: dict[str, Any] = {"input": input, "target": target}
    if voxel_weight is not None:
        tensors["voxel_weight"] = voxel_weight
    if not any(check.is_dtensor(value) for value in tensors.values()):
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard

    for name, value in tensors.items():
        if not check.is_dtensor(value):
            advice = "Make it one with torch.distributed.tensor.distribute_tensor, or pass the local parts of all."
            what = f"{name} to be a DTensor, since another is one"
            validation.fail(what, type(value).__name__, advice, TypeError)
    mesh, placements = tensors["input"].device_mesh, tensors["input"].placements
    if group is not None:
        ranks = torch.distributed.get_process_group_ranks(None if isinstance(group, str) else group)
        if set(ranks) & set(mesh.mesh.flatten().tolist()) - {torch.distributed.get_rank()}:
            advice = "Leave group out: the loss of a DTensor is that of the whole already."
            validation.fail("a group without the other ranks of input's mesh", f"group={group!r}", advice)
    placements_of_sums: list[Any] = []  # input split over B: so are the sums; over space: each rank has partial sums
    for placement in placements:
        dim = placement.dim % input.ndim if type(placement) is Shard else None  # %: Shard(-1) counts from the end
        if dim is None and not isinstance(placement, Replicate):
            advice = "Call input.redistribute(placements=...) first."
            validation.fail("input with the placements Shard or Replicate", placement, advice)
        if dim == 1:
            advice = "A softmax needs all classes of a voxel: redistribute input over the batch or over space."
            validation.fail("input that is not sharded over the classes", f"{placement}", advice)
        placements_of_sums.append(Replicate() if dim is None else Shard(1) if dim == 0 else Partial())
    for name, value in tensors.items():
        missing = input.ndim - value.ndim  # 1 for labels without a channel dimension: space begins one axis earlier
        expected = tuple(
            Shard(p.dim % input.ndim - (missing if p.dim % input.ndim > 1 else 0)) if type(p) is Shard else p
            for p in placements
        )
        got = tuple(Shard(p.dim % value.ndim) if type(p) is Shard else p for p in value.placements)
        if value.device_mesh != mesh or got != expected:
            what = f"{name} on the mesh of input with the placements {expected}, as input has {placements}"
            advice = f"Call {name}.redistribute(placements=...) first."
            validation.fail(what, f"{value.placements} on {value.device_mesh}", advice)
    return Shards(mesh, tuple(placements_of_sums), input.shape[0])
