"""What float64 costs on a CPU: `python -m benchmarks.wide`.

One forward and backward step of SoftDiceLoss, interleaved: float32 through the kernel, float64 as `auto` routes it, and
float64 through the reference, which holds the whole graph.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

import softdice
from benchmarks import measure
from benchmarks.losses import inputs
from benchmarks.small import step_on

SHAPES = (8, 3, 512, 512), (2, 14, 96, 96, 96)


def narrow_step(loss: softdice.SoftDiceLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """One step; `interleaved` lets go of the gradient of the float64 logits alone."""
    logits.grad = None
    return measure.step(loss, logits, labels)


def main() -> None:
    """Print a line per shape."""
    print(measure.machine())
    for shape in SHAPES:
        logits, labels = inputs(shape)
        wide = logits.detach().double().requires_grad_()
        loss = softdice.SoftDiceLoss(shape[1], activation="softmax")

        turns = {
            "float32": partial(narrow_step, loss, logits, labels),
            "float64": partial(step_on, "auto", loss, wide, labels),
            "reference": partial(step_on, "reference", loss, wide, labels),
        }
        times = measure.interleaved(turns, wide, 10.0)
        print(shape, *(f"{name} {time.median_ms:.1f} ms" for name, time in times.items()), flush=True)


if __name__ == "__main__":
    main()
