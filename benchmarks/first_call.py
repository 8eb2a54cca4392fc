"""What the first call of a loss costs: `python -m benchmarks.first_call`.

Processor seconds of one forward and backward step on the CPU kernels, for one loss after the other in a process of its
own whose cache is empty. Each loss finds what those before it have compiled; the second step of the first one compiles
nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import torch

import softdice
from benchmarks import measure

INSIDE = "inside"
"""The argument of the process whose cache is empty."""


def steps() -> None:
    """Print a line per loss."""
    generator = torch.Generator().manual_seed(0)

    def step(name: str, loss: torch.nn.Module, C: int = 3, values: bool = False) -> None:
        logits = torch.randn(2, C, 64, 64, generator=generator).requires_grad_()
        labels = torch.randint(0, C, (2, 64, 64), generator=generator)
        target = torch.rand(2, C, 64, 64, generator=generator) if values else labels
        start = time.process_time()
        loss(logits, target).backward()
        print(f"{time.process_time() - start:5.2f} s  {name}", flush=True)

    dice = softdice.SoftDiceLoss(3, activation="softmax")
    with softdice.use_backend("cpu"):
        step("Dice of a softmax", dice)
        step("the same again", dice)
        step("with cross-entropy", dice + softdice.CrossEntropyLoss(3, activation="softmax"))
        step("Dice of a sigmoid, target of values", softdice.SoftDiceLoss(3, activation="sigmoid"), values=True)
        step("Dice with focal", dice + softdice.FocalLoss(3, activation="softmax"))
        step("Dice of 40 classes", softdice.SoftDiceLoss(40, activation="softmax"), 40)
        step("multi-class MCC", softdice.MultiClassMCCLoss(3, activation="softmax"))
        step("Lovasz", softdice.LovaszLoss(3, activation="softmax"))
        step("top-k cross-entropy", softdice.TopKCrossEntropyLoss(3, activation="softmax"))
        step("clDice", softdice.ClDiceLoss(3, activation="softmax"))


def main() -> None:
    """Run `steps` in a process whose cache is a new folder."""
    if sys.argv[1:] == [INSIDE]:
        steps()
        return
    print(measure.machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        subprocess.run([sys.executable, "-m", "benchmarks.first_call", INSIDE], env=environment, check=True)


if __name__ == "__main__":
    main()
