"""A DTensor has the loss, the statistics and the gradient of the whole: four gloo processes, meshes of 4 and of 2x2."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softdice
from softdice.head import FusedHead
from softdice.losses.base import Loss

pytest.importorskip("torch.distributed.tensor")

RANKS, C = 4, 3
CLOSE = 1e-6
SETTINGS: dict[str, Any] = {"activation": "softmax", "ignore_index": 255, "absent": "skip"}
LOSSES: dict[str, Callable[..., Loss]] = {
    "sum": lambda **more: (
        softdice.SoftDiceLoss(C, **SETTINGS, **more)
        + 0.5 * softdice.CrossEntropyLoss(C, class_weight=(1.0, 2.0, 3.0), **SETTINGS, **more)
    ),
    "per sample": lambda **more: softdice.JaccardLoss(C, pooling="sample", **SETTINGS, **more),
    "over classes": lambda **more: softdice.GeneralizedDiceLoss(C, **SETTINGS, **more),
}
SPLITS: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "batch": ((4,), (0,)),  # 5 samples: 2, 2, 1 and none
    "rows": ((4,), (2,)),  # 6 rows: 2, 2, 2 and none
    "columns": ((4,), (3,)),
    "replicated": ((4,), (None,)),
    "batch and rows": ((2, 2), (0, 2)),
    "rows and rows": ((2, 2), (2, 2)),
    "replicated and columns": ((2, 2), (None, 3)),
    "rows and replicated": ((2, 2), (2, None)),
}
"""Shape of the mesh, and for each of its dimensions the dimension of the logits that is split over it."""


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, C, 6, 9, generator=draw)
    target = torch.randint(0, C, (5, 6, 9), generator=draw)
    target[0, 1], target[3:] = 255, 0
    return logits, target, torch.rand(5, 6, 9, generator=draw)


def split(tensor: Tensor, dims: tuple[int | None, ...], mesh: Any) -> Any:
    """Split a target as the logits are split, with or without a channel dimension."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    shift = 4 - tensor.ndim
    placements = [Replicate() if dim is None else Shard(dim - shift if dim > 1 else dim) for dim in dims]
    return distribute_tensor(tensor, mesh, placements)


def found_by(loss: Loss, logits: Tensor, *target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, *target)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def on_ranks(rank: int, folder: str) -> None:
    """Run all scenarios on one rank, and write the results to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    logits, target, weight = whole_batch()
    dense = torch.nn.functional.one_hot(target.clamp(max=C - 1), C).movedim(-1, 1).float()
    meshes = {shape: init_device_mesh("cpu", shape) for shape in {shape for shape, _ in SPLITS.values()}}
    found: dict[Any, Any] = {}
    for name, (shape, dims) in SPLITS.items():
        parts = [split(tensor, dims, meshes[shape]) for tensor in (logits, target, weight, dense)]
        for loss in LOSSES:
            with CommDebugMode() as collectives:
                value, gradient = found_by(LOSSES[loss](), *parts[:3])
            found["collectives", name, loss] = collectives.get_total_counts()
            assert isinstance(gradient, DTensor)
            assert not isinstance(value, DTensor)
            assert gradient.placements == parts[0].placements
            found[name, loss] = value, gradient.full_tensor()
        value, gradient = found_by(softdice.SoftDiceLoss(C, activation="sigmoid"), parts[0], parts[3])
        found[name, "dense"] = value, gradient.full_tensor()
        stats = softdice.overlap_statistics(parts[0], parts[1][:, None], activation="softmax", ignore_index=255)
        found[name, "statistics"] = torch.stack([getattr(stats, field) for field in stats.fields])

    # samples over the ranks of one dimension, with a group; rows over those of the other, as DTensors
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    mine = slice(0, 3) if mesh.get_local_rank("data") == 0 else slice(3, 5)
    parts = [split(tensor[mine], (2,), mesh["rows"]) for tensor in (logits, target, weight)]
    value, gradient = found_by(LOSSES["sum"](group=mesh.get_group("data")), *parts)
    found["both"] = value, gradient.full_tensor() / 2, (mine.start, mine.stop)

    # what is refused, on every rank alike
    mesh, errors = meshes[4,], []
    rows, labels = split(logits, (2,), mesh), split(target, (2,), mesh)
    loss = LOSSES["sum"]()
    for arguments in (
        (loss, distribute_tensor(logits, mesh, [Shard(1)]), split(target, (None,), mesh)),
        (loss, DTensor.from_local(logits, mesh, [Partial()]), split(target, (None,), mesh)),
        (loss, rows, target),
        (loss, logits, labels),
        (loss, rows, split(target, (3,), mesh)),
        (loss, rows, split(target, (None,), mesh)),
        (loss, split(logits, (2, None), meshes[2, 2]), labels),
        (loss, rows, labels, split(weight, (0,), mesh)),
        (loss, rows, split(target[:4], (2,), mesh)),
        (LOSSES["sum"](group="world"), rows, labels),
        (FusedHead(torch.nn.Conv2d(C, C, 1), loss), rows, labels),
        (softdice.Upsampled(loss), rows, labels),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            arguments[0](*arguments[1:])
        errors.append(f"{error.type.__name__}: {error.value}")
    found["errors"] = errors
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_ranks, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(RANKS)]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("loss", [*LOSSES, "dense"])
@pytest.mark.parametrize("name", SPLITS)
def test_loss_and_gradient_are_those_of_the_whole(ranks: list[dict[Any, Any]], name: str, loss: str) -> None:
    logits, target, weight = whole_batch()
    if loss == "dense":
        dense = torch.nn.functional.one_hot(target.clamp(max=C - 1), C).movedim(-1, 1).float()
        expected = found_by(softdice.SoftDiceLoss(C, activation="sigmoid"), logits, dense)
    else:
        expected = found_by(LOSSES[loss](), logits, target, weight)
    for found in ranks:
        value, gradient = found[name, loss]
        assert apart(value, expected[0]) <= CLOSE
        assert apart(gradient, expected[1]) <= CLOSE


@pytest.mark.parametrize("name", SPLITS)
def test_statistics_are_those_of_the_whole_for_each_sample(ranks: list[dict[Any, Any]], name: str) -> None:
    logits, target, _ = whole_batch()
    stats = softdice.overlap_statistics(logits, target, activation="softmax", ignore_index=255)
    expected = torch.stack([getattr(stats, field) for field in stats.fields])
    for found in ranks:
        assert found[name, "statistics"].shape == expected.shape
        assert apart(found[name, "statistics"], expected) <= CLOSE


@pytest.mark.parametrize("name", SPLITS)
def test_one_collective_for_each_dimension_of_the_mesh_that_splits(ranks: list[dict[Any, Any]], name: str) -> None:
    for found in ranks:
        for loss in LOSSES:  # all fields together, forward; none backward
            assert found["collectives", name, loss] == sum(dim is not None for dim in SPLITS[name][1])


def test_samples_in_a_group_and_rows_in_a_dtensor(ranks: list[dict[Any, Any]]) -> None:
    value, gradient = found_by(LOSSES["sum"](), *whole_batch())
    for found in ranks:
        theirs, part, mine = found["both"]
        assert apart(theirs, value) <= CLOSE
        assert apart(part, gradient[slice(*mine)]) <= CLOSE


def test_what_cannot_be_is_refused_on_every_rank(ranks: list[dict[Any, Any]]) -> None:
    messages = (
        "ValueError: SumLoss: expected input that is not sharded over the classes, got S(1). A softmax needs all",
        "ValueError: SumLoss: expected input with the placements Shard or Replicate, got P(sum). Call input.redist",
        "TypeError: SumLoss: expected target to be a DTensor, since another is one, got Tensor. Make it one with",
        "TypeError: SumLoss: expected input to be a DTensor, since another is one, got Tensor. Make it one with",
        "ValueError: SumLoss: expected target on the mesh of input with the placements (Shard(dim=1),), as input has",
        "ValueError: SumLoss: expected target on the mesh of input with the placements (Shard(dim=1),), as input has",
        "ValueError: SumLoss: expected target on the mesh of input with the placements (Shard(dim=1), Replicate()), as",
        "ValueError: SumLoss: expected voxel_weight on the mesh of input with the placements (Shard(dim=1),), as input",
        "ValueError: SumLoss: expected target of shape (5, 6, 9), (5, 1, 6, 9) or (5, 3, 6, 9) for input (5, 3, 6, 9),",
        "ValueError: SumLoss: expected a group without the other ranks of input's mesh, got group='world'. Leave",
        "TypeError: FusedHead: expected plain tensors, got a DTensor. Compute the logits",
        "TypeError: Upsampled: expected plain tensors, got a DTensor. Pass the local parts, to a loss with group",
    )
    for found in ranks:
        for message, got in zip(messages, found["errors"], strict=True):
            assert got.startswith(message), got
