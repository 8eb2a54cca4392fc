"""Time and error of the drop-in classes beside their originals: `python -m benchmarks.dropins [name ...]`.

One forward and backward step of each, interleaved in one process (`benchmarks.measure`); random float32 logits. Writes
results/dropins_*.csv and the table between the marks in docs/kernels.md, those of the processor's vectors; with names,
only the rows that contain one of them are measured, and nothing is written.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure, peers, publish
from softdice.compat import monai, nnunet, smp

PAGE = publish.DOCS / "kernels.md"
VECTORS = torch.backends.cpu.get_cpu_capability()
MARKS = f"<!-- benchmark: drop-ins {VECTORS} -->", "<!-- end of benchmark -->"

IMAGES, VOLUMES, ORGANS = (16, 1, 512, 512), (2, 3, 96, 96, 96), (2, 14, 96, 96, 96)
SIGMOID, SOFTMAX = {"sigmoid": True}, {"softmax": True}


class Row(NamedTuple):
    """A class, its arguments, the shape of the logits and the sort of target."""

    library: str
    name: str
    arguments: Any  # keywords, or a tuple of positions
    shape: tuple[int, ...]
    target: str  # "mask" (B, C, *S) of 0.0 and 1.0, "labels" (B, 1, *S), "one-hot", "flat" labels (B, *S)

    @property
    def text(self) -> str:
        if isinstance(self.arguments, tuple):
            what = ", ".join(repr(value) for value in self.arguments)
        else:
            what = ", ".join(name if value is True else f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.library} {self.name}({what})"


ROWS = [
    Row("MONAI", "DiceLoss", SIGMOID, IMAGES, "mask"),
    Row("MONAI", "DiceLoss", {"sigmoid": True, "batch": True}, VOLUMES, "mask"),
    Row("MONAI", "DiceCELoss", SIGMOID, VOLUMES, "mask"),
    Row("MONAI", "DiceFocalLoss", SIGMOID, VOLUMES, "mask"),
    Row("MONAI", "TverskyLoss", SIGMOID, IMAGES, "mask"),
    Row("nnU-Net", "DC_and_BCE_loss", ({}, {"smooth": 1e-5}), VOLUMES, "mask"),
    Row("smp", "DiceLoss", ("binary",), IMAGES, "labels"),
    Row("MONAI", "DiceLoss", SOFTMAX, ORGANS, "one-hot"),
    Row("MONAI", "DiceLoss", {"softmax": True, "to_onehot_y": True}, ORGANS, "labels"),
    Row("MONAI", "DiceCELoss", {"softmax": True, "to_onehot_y": True}, ORGANS, "labels"),
    Row("smp", "DiceLoss", ("multiclass",), (8, 21, 256, 256), "flat"),
    Row("MONAI", "DiceLoss", {"softmax": True, "to_onehot_y": True}, (2, 3, 64, 64), "labels"),
    Row("MONAI", "DiceLoss", {"softmax": True, "to_onehot_y": True}, (1, 2, 32, 32), "labels"),
    Row("MONAI", "DiceLoss", {"softmax": True, "to_onehot_y": True}, (1, 3, 224, 224), "labels"),
]


def modules(library: str) -> tuple[Any, Any]:
    """Name of a library -> where its classes are, and where ours are."""
    if library == "MONAI":
        import monai.losses as original

        return original, monai
    if library == "smp":
        peers.smp(2)  # its losses, without the rest of the package
        return sys.modules["segmentation_models_pytorch.losses.dice"], smp
    import nnunetv2.training.loss.compound_losses as compound

    return compound, nnunet


def target_of(row: Row) -> Tensor:
    """-> the target that the class takes."""
    B, C, *S = row.shape
    generator = torch.Generator().manual_seed(1)
    if row.target == "mask":
        return (torch.rand(row.shape, generator=generator) > 0.7).float()
    labels = torch.randint(0, max(C, 2), (B, 1, *S), generator=generator)
    if row.target == "one-hot":
        return torch.nn.functional.one_hot(labels[:, 0], C).movedim(-1, 1).float().contiguous()
    return labels[:, 0] if row.target == "flat" else labels


def run(row: Row, budget_s: float) -> dict[str, Any]:
    """A row -> its figures."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for name, module in zip(("original", "ours"), modules(row.library), strict=True):
        made = getattr(module, row.name)
        losses[name] = made(*row.arguments) if isinstance(row.arguments, tuple) else made(**row.arguments)
    logits = torch.randn(row.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = target_of(row)
    turns = {name: partial(measure.step, loss, logits, target) for name, loss in losses.items()}
    times = measure.interleaved(turns, logits, budget_s)
    off = measure.apart(losses["ours"], losses["original"], logits, target)
    return {
        "loss": row.text,
        "shape": str(row.shape),
        "target": row.target,
        "original_ms": times["original"].median_ms,
        "ours_ms": times["ours"].median_ms,
        "ratio": times["original"].median_ms / times["ours"].median_ms,
        "loss_difference": off.loss,
        "gradient_difference": off.gradient,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """rows -> Markdown."""
    lines = [
        f"`python -m benchmarks.dropins` on {measure.machine()}; forward + backward, float32 logits, medians. Below 1 "
        "we are slower.",
        "",
        "| | logits, target | original | ours | original / ours | difference of loss, gradient |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['loss']} | {r['shape']}, {r['target']} | {r['original_ms']:.2f} ms | {r['ours_ms']:.2f} ms "
        f"| **{r['ratio']:.1f}** | {r['loss_difference']:.0e}, {r['gradient_difference']:.0e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    warnings.filterwarnings("ignore")  # the peers'
    wanted = sys.argv[1:]
    print(measure.machine())
    rows = []
    for row in ROWS:
        if wanted and not any(word in f"{row.text} {row.shape}" for word in wanted):
            continue
        found = run(row, 6.0)
        rows.append(found)
        print(
            f"{found['ratio']:5.1f}  {found['original_ms']:8.2f} / {found['ours_ms']:7.2f} ms  "
            f"{found['loss_difference']:.0e} {found['gradient_difference']:.0e}  {row.text} {row.shape} {row.target}",
            flush=True,
        )
    if wanted:
        return
    publish.keep(f"dropins_{VECTORS.lower()}", rows)
    publish.show(table(rows), PAGE, MARKS)


if __name__ == "__main__":
    main()
