"""How steady a step is, by the size of its gradient: `python -m benchmarks.gradient_memory`.

A fresh gradient costs the system's pages, and whether the allocator has them at hand changes from step to step. From
`softdice.backends.cpu.gradient_memory.SMALLEST` bytes on ours is the memory of the last one. Fifty steps each of a Dice
loss with
a softmax over labels: least, median and largest time, alone and with a step of MONAI's DiceLoss between any two, each
in a process of its own. Writes the table between the marks in docs/kernels.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings

import torch

import softdice
from benchmarks import measure, peers, publish
from benchmarks.dropins import PAGE
from benchmarks.losses import inputs

MARKS = "<!-- benchmark: gradient memory -->", "<!-- end of gradient memory -->"
SHAPES = [
    (4, 3, 256, 256),
    (8, 3, 256, 256),
    (4, 3, 512, 512),
    (8, 3, 512, 512),
    (8, 12, 360, 480),
    (2, 14, 96, 96, 96),
]
STEPS = 50


def steps(shape: tuple[int, ...], between: bool) -> list[float]:
    """-> least, median and largest milliseconds of a step."""
    warnings.filterwarnings("ignore")  # the peer's
    logits, labels = inputs(shape)
    loss, peer = softdice.SoftDiceLoss(shape[1], activation="softmax"), peers.monai(shape[1])
    taken = []
    for turn in range(STEPS + 3):
        if between:
            logits.grad = None
            measure.step(peer, logits, labels)
        logits.grad = None
        start = time.perf_counter()
        measure.step(loss, logits, labels)
        if turn >= 3:
            taken.append(1e3 * (time.perf_counter() - start))
    taken.sort()
    return [taken[0], taken[len(taken) // 2], taken[-1]]


def main() -> None:
    """The command line."""
    if sys.argv[1:]:
        print(json.dumps(steps(*json.loads(sys.argv[1]))))
        return
    lines = [
        f"`python -m benchmarks.gradient_memory` on {measure.machine()}; milliseconds of a step, least / median / "
        f"largest of {STEPS}.",
        "",
        "| logits | gradient | alone | with a step of MONAI between |",
        "|---|---|---|---|",
    ]
    for shape in SHAPES:
        cells = []
        for between in (False, True):
            command = [sys.executable, "-m", "benchmarks.gradient_memory", json.dumps([shape, between])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cells.append(" / ".join(f"{ms:.1f}" for ms in json.loads(done.stdout.splitlines()[-1])))
        mib = torch.Size(shape).numel() * 4 / 2**20
        lines.append(f"| `{shape}` | {mib:.0f} MiB | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    publish.show("\n".join(lines), PAGE, MARKS)


if __name__ == "__main__":
    main()
