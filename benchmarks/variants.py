"""What the keywords cost: `python -m benchmarks.variants [name ...]`.

Dice with a softmax over labels, plain and with class weights, ignored voxels, weights of the voxels, label smoothing,
regions, a map, half precision, channels-last: each beside our plain case, and beside the original that has it (MONAI's
DiceLoss or DiceCELoss), or the definition in plain torch where none has. One forward and backward step each,
interleaved in one process (`benchmarks.measure`). Writes results/variants.csv and the table between the marks in
docs/kernels.md; with names, only the rows that contain one of them are measured, and nothing is written.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import monai.losses as original
import torch
from torch import Tensor

import softdice
from benchmarks import measure, publish
from benchmarks.dropins import PAGE
from softdice.compat import monai

MARKS = "<!-- benchmark: variants -->", "<!-- end of variants -->"
SHAPE = (2, 4, 96, 96, 96)
C = SHAPE[1]
MONAI = {"softmax": True, "to_onehot_y": True, "batch": True}

Loss = Callable[[Tensor, Tensor], Tensor]


class Variant(NamedTuple):
    """What the row shows, our loss, its counterpart and that one's name, and what is done to the logits first."""

    name: str
    ours: Loss
    other: Loss
    whose: str
    given: Callable[[Tensor], Tensor] = lambda x: x


def by_definition(loss: Loss) -> Loss:
    """A loss of ours -> the same through `softdice.statistics.reference`, plain torch."""

    def run(logits: Tensor, labels: Tensor) -> Tensor:
        with softdice.use_backend("reference"):
            return loss(logits, labels)

    return run


def monai_pair(name: str, **keywords: Any) -> tuple[Loss, Loss]:
    """A class of MONAI -> ours, and its own."""
    ours, theirs = (getattr(module, name)(**MONAI, **keywords) for module in (monai, original))
    return ours, theirs


def own(loss: Any, **of_call: Any) -> tuple[Loss, Loss]:
    """A loss of ours -> itself on labels (B, 1, *S), and its definition."""

    def run(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels[:, 0], **of_call)

    return run, by_definition(run)


def variants() -> list[Variant]:
    """-> the rows."""
    generator = torch.Generator().manual_seed(2)
    B, _, *S = SHAPE
    mask = (torch.rand(B, 1, *S, generator=generator) > 0.3).float()
    dice = partial(softdice.SoftDiceLoss, C, activation="softmax", cost="one_minus")
    plain = monai_pair("DiceLoss")
    masked = [partial(lambda loss, x, y: loss(x, y, mask), loss) for loss in monai_pair("MaskedDiceLoss")]
    torch_definition = "definition in torch"
    return [
        Variant("plain", *plain, "MONAI"),
        Variant("class weights", *monai_pair("DiceLoss", weight=torch.arange(1.0, C + 1)), "MONAI"),
        Variant("ignore_index, 3 of 10 voxels", *own(dice(ignore_index=0)), torch_definition),
        Variant("weights of the voxels", masked[0], masked[1], "MONAI MaskedDiceLoss"),
        Variant("with cross-entropy", *monai_pair("DiceCELoss"), "MONAI DiceCELoss"),
        Variant("and label smoothing", *monai_pair("DiceCELoss", label_smoothing=0.1), "MONAI DiceCELoss"),
        Variant("squared", *monai_pair("DiceLoss", squared_pred=True), "MONAI"),
        Variant("two regions", *own(dice(regions=((1, 2, 3), (1, 3)))), torch_definition),
        Variant("with a map per class", *own(with_map(dice()), voxel_map=torch.randn(SHAPE)), torch_definition),
        Variant("bfloat16", *plain, "MONAI", lambda x: x.bfloat16()),
        Variant("float16", *plain, "MONAI", lambda x: x.half()),
        Variant("channels-last", *plain, "MONAI", lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    ]


def with_map(loss: Any) -> Any:
    """A loss -> its sum with a boundary loss."""
    return loss + 0.01 * softdice.BoundaryLoss(C, activation="softmax")


def run(row: Variant, budget_s: float) -> dict[str, Any]:
    """A row -> its figures."""
    logits = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(0, C, (SHAPE[0], 1, *SHAPE[2:]), generator=torch.Generator().manual_seed(1))
    given = row.given(logits.detach()).detach().requires_grad_()
    plain = variants()[0].ours

    def plain_step() -> Tensor:
        logits.grad = None  # `interleaved` lets go of that of `given`
        return measure.step(plain, logits, labels)

    turns: dict[str, Callable[[], object]] = {
        "plain": plain_step,
        "ours": partial(measure.step, row.ours, given, labels),
        "other": partial(measure.step, row.other, given, labels),
    }
    times = measure.interleaved(turns, given, budget_s)
    off = measure.apart(row.ours, row.other, given, labels)
    ours_ms = times["ours"].median_ms
    return {
        "variant": row.name,
        "beside": row.whose,
        "ours_ms": ours_ms,
        "times_plain": ours_ms / times["plain"].median_ms,
        "other_ms": times["other"].median_ms,
        "ratio": times["other"].median_ms / ours_ms,
        "loss_difference": off.loss,
        "gradient_difference": off.gradient,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """rows -> Markdown."""
    lines = [
        f"`python -m benchmarks.variants` on {measure.machine()}; forward + backward, logits {SHAPE}, int64 labels, "
        "medians.",
        "",
        "| | ours | ours / plain case | beside | other / ours | difference of loss, gradient |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['variant']} | {r['ours_ms']:.1f} ms | {r['times_plain']:.2f} | {r['beside']} {r['other_ms']:.1f} ms "
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
    for row in variants():
        if wanted and not any(word in row.name for word in wanted):
            continue
        found = run(row, 5.0)
        rows.append(found)
        print(
            f"{found['ours_ms']:8.2f} ms  {found['times_plain']:5.2f} x plain  {found['ratio']:5.1f} x faster than "
            f"{found['beside']}  {found['loss_difference']:.0e} {found['gradient_difference']:.0e}  {row.name}",
            flush=True,
        )
    if wanted:
        return
    publish.keep("variants", rows)
    publish.show(table(rows), PAGE, MARKS)


if __name__ == "__main__":
    main()
