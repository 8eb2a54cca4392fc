"""Losses of confusion and of centre lines beside their originals: `python -m benchmarks.structures [shape]`.

One forward and backward step of each, interleaved in one process (`benchmarks.measure`), on random float32 logits and
labels in blobs; the peak of memory beyond the inputs of each in a process of its own, the gradient included. Writes
results/structures.csv and the table between the marks in docs/losses.md; with a shape, such as 2,3,16,16,16, that one
is measured in the place of the usual, and nothing is written. (A step of MONAI's clDice takes minutes at the others'
size, so that row is smaller.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import softdice
from benchmarks import measure, publish

PAGE = publish.DOCS / "losses.md"
MARKS = "<!-- benchmark: structures -->", "<!-- end of benchmark: structures -->"
SHAPE = (2, 14, 96, 96, 96)
TUBES = (1, 4, 96, 96, 96)
TUBE = (1, 2, 96, 96, 96)
ROWS = {
    "Wasserstein Dice, MONAI": SHAPE,
    "Wasserstein Dice, exacta": SHAPE,
    "Wasserstein Dice (volume), MONAI": SHAPE,
    "Wasserstein Dice (volume), exacta": SHAPE,
    "clDice, MONAI": TUBES,
    "clDice, exacta": TUBE,
}
"""Loss and whose original -> logits. Of several classes exacta's clDice is another mean, so that row has one tube."""


def losses(row: str, classes: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name of a row, classes -> the original, and ours."""
    import exacta.losses as exacta
    import monai.losses as monai

    name, by = row.split(", ")
    ours: Any = {"activation": "softmax", "pooling": "sample"}
    if name == "clDice":
        original: Any = monai.SoftclDiceLoss(softmax=True, to_onehot_y=True)
        if by == "exacta":
            original = _without_channel(exacta.SoftClDiceLoss(iterations=3))
            ours |= {"classes": range(1, classes), "floor": 0.0}
        return {"original": original, "ours": softdice.ClDiceLoss(classes, 3, **ours)}
    volume = name.endswith("(volume)")
    distance = (torch.arange(classes)[:, None] - torch.arange(classes)).abs().float()
    distance[0, 1:] = distance[1:, 0] = classes - 1  # the background is like no class
    made: Any = {"monai": monai, "exacta": exacta}[by.lower()].GeneralizedWassersteinDiceLoss
    original = made(distance, weighting_mode="GDL" if volume else "default")
    weighting: Any = "volume" if volume else "foreground"
    contenders = {"ours": softdice.WassersteinDiceLoss(classes, distance, weighting=weighting, **ours)}
    return {"original": original if by == "MONAI" else _without_channel(original), **contenders}


def _without_channel(loss: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of labels (B, *S) -> the same of labels (B, 1, *S)."""
    return lambda logits, labels: loss(logits, labels[:, 0])


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """-> logits with a gradient, labels (B, 1, *S)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    coarse = torch.randint(0, shape[1], (shape[0], 1, *(max(1, size // 8) for size in shape[2:])), generator=generator)
    return logits, torch.nn.functional.interpolate(coarse.float(), shape[2:]).long()


def peak(row: str, name: str, shape: tuple[int, ...]) -> int:
    """-> bytes beyond the inputs, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.structures", "--memory", row, name, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    return max(forward, backward)


def run(row: str, shape: tuple[int, ...], budget_s: float) -> dict[str, Any]:
    """Name of a row -> its figures."""
    logits, labels = inputs(shape)
    contenders = losses(row, shape[1])
    off = measure.apart(contenders["ours"], contenders["original"], logits, labels)
    turns = {name: partial(measure.step, loss, logits, labels) for name, loss in contenders.items()}
    times = measure.interleaved(turns, logits, budget_s)
    one = 4 * labels.numel()
    return {
        "loss": row,
        "shape": str(shape),
        "original_ms": times["original"].median_ms,
        "ours_ms": times["ours"].median_ms,
        "ratio": times["original"].median_ms / times["ours"].median_ms,
        "loss_difference": off.loss,
        "gradient_difference": off.gradient,
        "original_maps": peak(row, "original", shape) / one - shape[1],
        "ours_maps": peak(row, "ours", shape) / one - shape[1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """rows -> Markdown."""
    lines = [
        f"`python -m benchmarks.structures` on {measure.machine()}; forward + backward, float32 logits, medians. "
        "Memory is the peak beyond the inputs and the gradient, in maps of one class (B x voxels float32). Where "
        "float32 puts two neighbours in another order, the gradients of a skeleton change places.",
        "",
        "| | logits | original | ours | original / ours | memory: original | ours | difference of loss, gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['loss']} | {r['shape']} | {r['original_ms']:.0f} ms | {r['ours_ms']:.0f} ms | **{r['ratio']:.1f}** "
        f"| {r['original_maps']:.1f} | {r['ours_maps']:.1f} "
        f"| {r['loss_difference']:.0e}, {r['gradient_difference']:.0e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    warnings.filterwarnings("ignore")  # the peer's
    if sys.argv[1:2] == ["--memory"]:
        row, name, *sizes = sys.argv[2:]
        shape = tuple(map(int, sizes))
        measure.prepare_memory()
        used = measure.memory(losses(row, shape[1])[name], *inputs(shape))
        print(json.dumps([used.forward, used.backward]))
        return
    given = tuple(map(int, sys.argv[1].split(","))) if sys.argv[1:] else None
    print(measure.machine())
    rows = []
    for row, shape in ROWS.items():
        rows.append(run(row, given or shape, 6.0))
        print(rows[-1], flush=True)
    if sys.argv[1:]:
        return
    publish.keep("structures", rows)
    publish.show(table(rows), PAGE, MARKS)


if __name__ == "__main__":
    main()
