"""The losses that go by the rank of a voxel, beside their originals: `python -m benchmarks.voxelwise [name ...]`.

Per-voxel cross-entropy (torch), top-k (nnU-Net), hard examples (MMSegmentation's rule, written here: it is not
installed) and Lovasz (smp), and exacta's top-k and Lovasz: one forward and backward step of each, interleaved in one
process (`benchmarks.measure`), random float32 logits; peak memory beyond the inputs, in a process of its own. Writes
results/voxelwise.csv and the table between the marks in docs/losses.md; with names, only the rows that contain one of
them are measured, and nothing is written.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import softdice
from benchmarks import measure, peers, publish

PAGE = publish.DOCS / "losses.md"
MARKS = "<!-- benchmark: ranks -->", "<!-- end of benchmark -->"
SHAPES = [(2, 14, 96, 96, 96), (8, 21, 256, 256)]
Loss = Callable[[Tensor, Tensor], Tensor]


def nnunet_top_k() -> Loss:
    """nnU-Net's, of a tenth of the voxels."""
    loss = importlib.import_module("nnunetv2.training.loss.robust_ce_loss").TopKLoss()
    return lambda logits, labels: loss(logits, labels.unsqueeze(1))


def mmseg_ohem(logits: Tensor, labels: Tensor) -> Tensor:
    """MMSegmentation's OHEMPixelSampler(thresh=0.7, min_kept=100000); the mean of what it keeps."""
    with torch.no_grad():
        p = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        ranked = p.flatten().sort().values
        bound = ranked[min(100_000 * len(labels), len(ranked) - 1)].clamp_min(0.7)
        kept = (p < bound).to(logits.dtype)
    return (cross_entropy(logits, labels, reduction="none") * kept).sum() / kept.sum()


def smp_lovasz(mode: str) -> Loss:
    """smp's, of the losses without the rest of the package."""
    peers.smp(2)
    made: Loss = importlib.import_module("segmentation_models_pytorch.losses.lovasz").LovaszLoss(mode)
    return made


def smp_hinge() -> Loss:
    """smp's of masks, which takes logits without channels."""
    made = smp_lovasz("binary")
    return lambda logits, labels: made(logits[:, 0], labels)


def exacta(name: str, **options: Any) -> Loss:
    """exacta's loss of that name."""
    made: Loss = getattr(importlib.import_module("exacta.losses"), name)(**options)
    return made


class Row(NamedTuple):
    """What is compared: both take logits (B, C, *S) and labels (B, *S)."""

    name: str
    ours: Callable[[int], Loss]
    original: Callable[[], Loss]
    by: str
    binary: bool = False

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.name}, {self.by}"


def _map(logits: Tensor, labels: Tensor) -> Tensor:
    return softdice.voxel_cross_entropy(logits, labels, activation="softmax").mean()


ROWS = [
    Row("voxel_cross_entropy", lambda C: _map,
        lambda: lambda x, y: cross_entropy(x, y, reduction="none").mean(), "torch"),
    Row("TopKCrossEntropyLoss", lambda C: softdice.TopKCrossEntropyLoss(C, activation="softmax"),
        nnunet_top_k, "nnU-Net"),
    Row("OHEMCrossEntropyLoss", lambda C: softdice.OHEMCrossEntropyLoss(C, activation="softmax"),
        lambda: mmseg_ohem, "MMSegmentation's rule"),
    Row("LovaszLoss, softmax", lambda C: softdice.LovaszLoss(C, activation="softmax", absent="skip"),
        partial(smp_lovasz, "multiclass"), "smp"),
    Row("LovaszLoss, sigmoid", lambda C: softdice.LovaszLoss(1, activation="sigmoid"),
        smp_hinge, "smp", binary=True),
    Row("TopKCrossEntropyLoss", lambda C: softdice.TopKCrossEntropyLoss(C, 0.1, activation="softmax"),
        partial(exacta, "TopKCELoss"), "exacta"),
    Row("LovaszLoss, softmax", lambda C: softdice.LovaszLoss(C, activation="softmax", absent="skip"),
        partial(exacta, "LovaszSoftmaxLoss"), "exacta"),
    Row("LovaszLoss, sigmoid", lambda C: softdice.LovaszLoss(1, activation="sigmoid"),
        partial(exacta, "LovaszHingeLoss", per_image=False), "exacta", binary=True),
]  # fmt: skip


def problem(row: Row, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """-> logits, and labels of which each class is as frequent."""
    B, C, *S = shape
    C = 1 if row.binary else C
    logits = torch.randn((B, C, *S), generator=torch.Generator().manual_seed(0)).requires_grad_()
    return logits, torch.randint(0, max(C, 2), (B, *S), generator=torch.Generator().manual_seed(1))


def losses(row: Row, shape: tuple[int, ...]) -> dict[str, Loss]:
    """-> the two losses."""
    return {"original": row.original(), "ours": row.ours(1 if row.binary else shape[1])}


def definition(row: Row, C: int) -> Loss:
    """Ours in plain torch, which takes float64; smp's does not."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        with softdice.use_backend("reference"):
            return row.ours(C)(logits, labels)

    return loss


def peak(row: Row, shape: tuple[int, ...], name: str) -> float:
    """Most memory beyond the inputs, in maps of one class, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.voxelwise", "--memory-of", row.key, name, json.dumps(shape)]
    found = measure.Memory(*json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return max(found) / (4 * shape[0] * torch.Size(shape[2:]).numel())


def run(row: Row, shape: tuple[int, ...], budget_s: float) -> dict[str, Any]:
    """A row -> its figures."""
    logits, labels = problem(row, shape)
    made = losses(row, shape)
    turns = {name: partial(measure.step, loss, logits, labels) for name, loss in made.items()}
    times = measure.interleaved(turns, logits, budget_s)
    exact = definition(row, logits.shape[1])
    errors = {name: measure.error(loss, exact, logits, labels) for name, loss in made.items()}
    return {
        "loss": row.name,
        "original": row.by,
        "shape": str(tuple(logits.shape)),
        "original_ms": times["original"].median_ms,
        "ours_ms": times["ours"].median_ms,
        "ratio": times["original"].median_ms / times["ours"].median_ms,
        "original_class_maps": peak(row, shape, "original"),
        "ours_class_maps": peak(row, shape, "ours"),
        "gradient_class_maps": logits.shape[1],
        "loss_error": errors["ours"].loss,
        "gradient_error": errors["ours"].gradient,
        "original_gradient_error": errors["original"].gradient,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """rows -> Markdown."""
    lines = [
        f"`python -m benchmarks.voxelwise` on {measure.machine()}; forward + backward, float32 logits, medians; peak "
        "memory beyond the inputs in float32 maps of one class, the gradient's included; error against the definition "
        "in float64 (where float32 puts two neighbours in another order, their gradients change places; exacta's top-k "
        "may take one voxel more).",
        "",
        "| | logits | original | ours | original / ours | memory: original, ours (gradient) "
        "| error of loss, gradient (original's) |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['loss']} | {r['shape']} | {r['original_ms']:.1f} ms ({r['original']}) | {r['ours_ms']:.1f} ms "
        f"| **{r['ratio']:.1f}** "
        f"| {r['original_class_maps']:.1f}, {r['ours_class_maps']:.1f} ({r['gradient_class_maps']}) "
        f"| {r['loss_error']:.0e}, {r['gradient_error']:.0e} ({r['original_gradient_error']:.0e}) |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    warnings.filterwarnings("ignore")  # the peers'
    wanted = sys.argv[1:]
    if wanted[:1] == ["--memory-of"]:
        row = next(row for row in ROWS if row.key == wanted[1])
        shape = tuple(json.loads(wanted[3]))
        measure.prepare_memory()
        print(json.dumps(measure.memory(losses(row, shape)[wanted[2]], *problem(row, shape))))
        return
    print(measure.machine())
    rows = []
    for shape in SHAPES:
        for row in ROWS:
            if wanted and not any(word in f"{row.key} {shape}" for word in wanted):
                continue
            found = run(row, shape, 6.0)
            rows.append(found)
            print(
                f"{found['ratio']:5.1f}  {found['original_ms']:9.1f} / {found['ours_ms']:8.1f} ms  memory "
                f"{found['original_class_maps']:6.1f} / {found['ours_class_maps']:5.1f} class maps  errors "
                f"{found['loss_error']:.0e} {found['gradient_error']:.0e} ({found['original_gradient_error']:.0e})  "
                f"{row.key} {found['shape']}",
                flush=True,
            )
    if wanted:
        return
    publish.keep("voxelwise", rows)
    publish.show(table(rows), PAGE, MARKS)


if __name__ == "__main__":
    main()
