"""a run that could start -> the seconds that one of its steps takes on this machine, found by two of them."""

from __future__ import annotations

import time

import torch

from softdice.training.module import Segmenter
from softdice.training.patches import Patches


def step_seconds(module: Segmenter, device: torch.device, precision: str, enough_s: float) -> float:
    """module -> seconds of its second step, patches and all; of the first, which warms up, where that is far too long.

    The module is spent afterwards. The state of random numbers is left as it was.
    """
    patches = Patches(module.cases, module.training_numbers, module.patch, module.seed)
    module.to(device).train()
    optimizer = module.configure_optimizers()
    took = 0.0
    for turn in range(2):
        started = time.monotonic()
        pairs = [patches[(0, turn * module.batch_size + number)] for number in range(module.batch_size)]
        image, label = (torch.stack(part).to(device) for part in zip(*pairs, strict=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.training_step((image, label), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for an accelerator
        took = time.monotonic() - started
        if took > 3 * enough_s:
            break
    return took
