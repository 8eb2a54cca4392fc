"""The same number on one process and on many: 2 and 3 gloo processes against one that holds the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softdice
from softdice.head import FusedHead
from softdice.losses.base import Loss
from softdice.statistics.api import OverlapStatistics, measure

C, SIDE = 3, 12
SHARES = {2: (4, 1), 3: (3, 2, 0)}
"""Ranks -> samples of each: uneven, one rank with none."""
CLOSE = 1e-6

LOSSES: dict[str, Callable[[Any], Loss]] = {
    "dice": lambda group: softdice.SoftDiceLoss(C, activation="softmax", group=group),
    "sum": lambda group: (
        softdice.SoftDiceLoss(C, activation="softmax", group=group)
        + 0.5 * softdice.CrossEntropyLoss(C, activation="softmax", class_weight=(1.0, 2.0, 3.0), group=group)
    ),
    "skip": lambda group: softdice.GeneralizedDiceLoss(
        C, activation="softmax", absent="skip", ignore_index=255, group=group
    ),
}


def whole_batch() -> tuple[Tensor, Tensor]:
    """Return five samples; the last two are all background, so that a rank has no foreground."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(5, 1, SIDE, SIDE, generator=draw)
    target = (image[:, 0] > 0).long() + (image[:, 0] > 1)
    target[3:] = 0
    return image, target


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, C, 1))


class Fused(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        self.network = network()
        self.head = FusedHead(self.network[2], LOSSES["sum"](group))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.head(self.head.features(self.network, image), target)


def result(value: Tensor, model: nn.Module) -> dict[str, Any]:
    """Return loss and parameter gradients, whatever wraps the model."""
    gradients = [parameter.grad for parameter in model.parameters()]
    full = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in gradients]
    return {"loss": value.detach(), "gradients": [grad.clone() for grad in full]}


def train_step(name: str, model: nn.Module, image: Tensor, target: Tensor) -> dict[str, Any]:
    group = "world" if isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "unshard") else None
    model.zero_grad()
    value = LOSSES[name](group)(model(image), target)
    value.backward()
    return result(value, model)


def upsampled_step(model: nn.Module, image: Tensor, target: Tensor) -> dict[str, Any]:
    """Take a step with labels of twice the logits' size."""
    group = "world" if isinstance(model, nn.parallel.DistributedDataParallel) else None
    model.zero_grad()
    larger = target.repeat_interleave(2, 1).repeat_interleave(2, 2)
    value = softdice.Upsampled(LOSSES["sum"](group))(model(image), larger)
    value.backward()
    return result(value, model)


def backward_in_parts(model: nn.Module, image: Tensor, target: Tensor) -> dict[str, Any]:
    """Accumulate exact gradients, as in docs/distributed.md: one sample at a time, in two passes."""
    loss = LOSSES["sum"]("world" if isinstance(model, nn.parallel.DistributedDataParallel) else None)
    batches = list(zip(image.split(1), target.split(1), strict=True))

    def sums(image: Tensor, target: Tensor) -> Tensor:
        stats = measure(model(image), target, None, loss.settings, C).pool()
        return torch.stack([getattr(stats, name) for name in stats.fields])

    with torch.no_grad():
        total = torch.stack([sums(*batch) for batch in batches]).sum(0)
    total.requires_grad_()
    stats = OverlapStatistics(dict(zip(loss.settings.fields, total.unbind(0), strict=True)))
    value = loss.from_statistics(stats if loss.group is None else stats.all_reduce())
    value.backward()
    for batch in batches:
        (sums(*batch) * total.grad).sum().backward()
    return result(value, model)


def on_ranks(rank: int, world: int, folder: str) -> None:
    """Run all scenarios on one rank, and write the results to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    image, target = whole_batch()
    begin = sum(SHARES[world][:rank])
    mine = slice(begin, begin + SHARES[world][rank])
    found: dict[str, Any] = {}

    reduced: list[int] = []
    engine = torch.distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        reduced.append(tensor.numel())
        return engine(tensor, *arguments, **named)

    torch.distributed.all_reduce = counting
    for name in LOSSES:
        for repetition in range(2):
            model = nn.parallel.DistributedDataParallel(network())
            reduced.clear()
            found[name, repetition] = train_step(name, model, image[mine], target[mine])
            found["collectives", name] = list(reduced)

    model = nn.parallel.DistributedDataParallel(network().double())
    found["float64"] = train_step("sum", model, image[mine].double(), target[mine])

    model = nn.parallel.DistributedDataParallel(Fused("world"))
    reduced.clear()
    value = model(image[mine], target[mine])
    value.backward()
    found["fused"] = result(value, model)
    found["collectives", "fused"] = list(reduced)

    model = nn.parallel.DistributedDataParallel(network())
    reduced.clear()
    found["upsampled"] = upsampled_step(model, image[mine], target[mine])
    found["collectives", "upsampled"] = list(reduced)

    even = slice(rank, rank + 1) if world == 3 else slice(2 * rank, 2 * rank + 2)  # as many calls of DDP on each rank
    model = nn.parallel.DistributedDataParallel(network())
    found["in parts"] = backward_in_parts(model, image[even], target[even])

    sharded = network()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found["fsdp"] = train_step("sum", sharded, image[mine], target[mine])

    # a volume in slabs, one on each rank
    model = network()
    logits = model(image).detach()
    slab = logits.tensor_split(world, dim=2)[rank].requires_grad_()
    value = LOSSES["sum"]("world")(slab, target.tensor_split(world, dim=1)[rank])
    value.backward()
    assert slab.grad is not None
    found["slab"] = {"loss": value.detach(), "gradient": slab.grad / world}

    # statistics by hand, and over a part of the ranks
    pair = torch.distributed.new_group([0, 1])
    stats = softdice.overlap_statistics(logits[mine], target[mine], activation="softmax")
    found["statistics"] = stats.pool().all_reduce().prediction
    with pytest.raises(ValueError, match=r"all_reduce: expected pooled statistics, \(C,\), got statistics per sample"):
        stats.all_reduce()
    if rank < 2:
        found["pair"] = stats.pool().all_reduce(pair).prediction
    else:
        with pytest.raises(RuntimeError, match="expected a rank of the group, got a rank outside it"):
            stats.pool().all_reduce(pair)

    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SHARES))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_ranks, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=CLOSE)
    mine, other = (torch.cat([gradient.flatten() for gradient in found["gradients"]]) for found in (ours, theirs))
    assert apart(mine, other) <= (CLOSE if mine.dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_one_process(ranks: list[dict[Any, Any]], name: str) -> None:
    alone = train_step(name, network(), *whole_batch())
    for found in ranks:
        same(found[name, 0], alone)


def test_float64_is_equal_to_rounding(ranks: list[dict[Any, Any]]) -> None:
    image, target = whole_batch()
    alone = train_step("sum", network().double(), image.double(), target)
    for found in ranks:
        assert found["float64"]["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-14)
        same(found["float64"], alone)


def test_fused_head_equals_one_process(ranks: list[dict[Any, Any]]) -> None:
    alone = train_step("sum", network(), *whole_batch())
    for found in ranks:
        same(found["fused"], alone)


def test_upsampled_equals_one_process(ranks: list[dict[Any, Any]]) -> None:
    alone = upsampled_step(network(), *whole_batch())
    for found in ranks:
        same(found["upsampled"], alone)


def test_fully_sharded_equals_one_process(ranks: list[dict[Any, Any]]) -> None:
    alone = train_step("sum", network(), *whole_batch())
    for found in ranks:
        same(found["fsdp"], alone)


def test_accumulation_in_two_passes_equals_one_batch_on_one_process(ranks: list[dict[Any, Any]]) -> None:
    image, target = whole_batch()
    count = {2: 4, 3: 3}[len(ranks)]
    alone = train_step("sum", network(), image[:count], target[:count])
    same(backward_in_parts(network(), image[:count], target[:count]), alone)
    for found in ranks:
        same(found["in parts"], alone)


@pytest.mark.parametrize("name", LOSSES)
def test_two_runs_give_the_same_bits(ranks: list[dict[Any, Any]], name: str) -> None:
    for found in ranks:
        first, second = found[name, 0], found[name, 1]
        assert torch.equal(first["loss"], second["loss"])
        assert torch.equal(first["loss"], ranks[0][name, 0]["loss"])
        assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True))


@pytest.mark.parametrize("name", [*LOSSES, "fused", "upsampled"])
def test_one_collective_forward_and_one_backward(ranks: list[dict[Any, Any]], name: str) -> None:
    fields = len(LOSSES[name if name in LOSSES else "sum"](None).settings.fields)
    for found in ranks:
        assert found["collectives", name] == [fields * C] * 2


def test_a_volume_in_slabs_equals_the_whole(ranks: list[dict[Any, Any]]) -> None:
    image, target = whole_batch()
    logits = network()(image).detach().requires_grad_()
    value = LOSSES["sum"](None)(logits, target)
    value.backward()
    assert logits.grad is not None
    for rank, found in enumerate(ranks):
        assert found["slab"]["loss"].item() == pytest.approx(value.item(), rel=CLOSE)
        expected = logits.grad.tensor_split(len(ranks), dim=2)[rank]
        assert apart(found["slab"]["gradient"], expected) <= CLOSE


def test_statistics_over_all_and_some_ranks(ranks: list[dict[Any, Any]]) -> None:
    image, target = whole_batch()
    logits = network()(image).detach()
    some = sum(SHARES[len(ranks)][:2])
    for rank, found in enumerate(ranks):
        expected = softdice.overlap_statistics(logits, target, activation="softmax").pool().prediction
        assert apart(found["statistics"], expected) <= CLOSE
        if rank < 2:
            part = softdice.overlap_statistics(logits[:some], target[:some], activation="softmax")
            assert apart(found["pair"], part.pool().prediction) <= CLOSE


# --- what goes wrong


MANNERS = ("hangs", "dies")
"""In this order: the second ends the process."""


def on_a_rank_that_is_left_alone(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    image, target = whole_batch()
    for manner in MANNERS:
        message = Path(folder, manner)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store {manner}", rank=rank, world_size=2, timeout=timedelta(seconds=2)
        )
        torch.distributed.barrier()
        if rank == 1:
            if manner == "dies":
                os._exit(0)
            while not message.exists():  # it hangs: it never calls the loss
                pass
        else:
            try:
                LOSSES["dice"]("world")(network()(image), target)
            except RuntimeError as problem:
                message.with_suffix(".half").write_text(str(problem))
                message.with_suffix(".half").rename(message)
        torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    torch.multiprocessing.spawn(on_a_rank_that_is_left_alone, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("manner", MANNERS)
def test_a_rank_that_is_missing_makes_the_others_fail(manner: str, left_alone: Path) -> None:
    message = (left_alone / manner).read_text()
    assert message.startswith("SoftDiceLoss: expected every rank of the group to add its sums within")
    assert "A rank has stopped, or did not call the loss" in message


def test_group_needs_torch_distributed_to_be_started() -> None:
    message = "SoftDiceLoss: expected an initialised process group, since group is set, got none. Start with torchrun"
    with pytest.raises(RuntimeError, match=message):
        LOSSES["dice"]("world")(torch.zeros(1, C, 4), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("group", ["all", 0, True])
def test_group_is_checked_when_the_loss_is_made(group: Any) -> None:
    with pytest.raises(TypeError, match="SoftDiceLoss: expected group to be None, 'world' or a ProcessGroup, got"):
        LOSSES["dice"](group)


def test_group_and_pooling_per_sample_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="expected pooling='batch' with group, got pooling='sample'"):
        softdice.SoftDiceLoss(C, pooling="sample", group="world")


def test_losses_of_a_sum_share_the_group() -> None:
    with pytest.raises(ValueError, match="SumLoss: expected losses that agree on group"):
        LOSSES["dice"]("world") + softdice.CrossEntropyLoss(C, activation="softmax")
    assert LOSSES["sum"]("world").group == "world"
    assert "group='world'" in repr(LOSSES["dice"]("world"))
