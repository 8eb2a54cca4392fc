"""Error of the CPU kernel in float32 against float64, up to 134 million voxels: `python -m benchmarks.accuracy`.

The float64 side is the reference, one slab of the volume at a time: its statistics add, and its gradient needs only
their sum. That keeps a billion float64 numbers out of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

import softdice
from benchmarks.losses import WORKLOADS, inputs
from softdice.statistics.reference import statistics
from softdice.statistics.request import Pass, Request

FIELDS = ("intersection", "prediction", "target")
SLAB = 1 << 20


def exact(loss: softdice.SoftDiceLoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """loss, logits (B, C, V), labels (B, V) -> the loss in float64, and its gradient slab by slab."""
    slabs = list(zip(logits.split(SLAB, 2), labels.split(SLAB, 1), strict=True))

    def sums(slab: Tensor, target: Tensor) -> Tensor:
        return statistics(Request(slab, target, settings=Pass(activation="softmax", fields=FIELDS)))

    with torch.no_grad():
        total = sum(sums(slab.double(), target) for slab, target in slabs)
    assert isinstance(total, Tensor)
    total.requires_grad_()
    value = loss.from_statistics(softdice.OverlapStatistics(dict(zip(FIELDS, total, strict=True))))
    (upstream,) = torch.autograd.grad(value, total)
    gradients = []
    for slab, target in slabs:
        leaf = slab.double().requires_grad_()
        gradients.append(torch.autograd.grad(sums(leaf, target), leaf, upstream)[0].float())
    return value.detach(), gradients


def main() -> None:
    """Print a line per shape."""
    print("relative error of the loss, and of the gradient relative to its largest entry (float32, softmax, -log Dice)")
    for shape in [*WORKLOADS, (1, 2, 512, 512, 512)]:
        logits, labels = inputs(shape)
        loss = softdice.SoftDiceLoss(shape[1], activation="softmax")
        with softdice.use_backend("cpu"):
            value = loss(logits, labels)
            value.backward()
        assert logits.grad is not None
        exact_value, slabs = exact(loss, logits.detach().flatten(2), labels.flatten(1))
        off = abs(value.item() - exact_value.item()) / exact_value.item()
        largest, worst = 0.0, 0.0
        for ours, theirs in zip(logits.grad.flatten(2).split(SLAB, 2), slabs, strict=True):
            largest = max(largest, theirs.abs().max().item())
            worst = max(worst, (ours - theirs).abs().max().item())
        print(f"{shape!s:24} loss {off:.1e}  gradient {worst / largest:.1e}", flush=True)


if __name__ == "__main__":
    main()
