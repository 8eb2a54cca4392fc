"""The seconds that a step of a run takes on this machine, by a few of them."""

from __future__ import annotations

import time

import torch

from softdice.training.module import Segmenter

STEPS = 3
LONGEST_S = 3.0
"""Seconds after which no further step is timed."""


def step_seconds(module: Segmenter, device: torch.device, precision: str) -> float:
    """Return the seconds of a step, patches and all: the fastest of three, as other programs only slow it down.

    One of a single patch warms up before. Slow steps are not repeated.

    The module is spent afterwards. The state of random numbers is left as it was.
    """
    module.to(device).train()
    optimizer = module.configure_optimizers()
    times: list[float] = []
    for size in (1, *[module.batch_size] * STEPS):
        started = time.monotonic()
        pairs = [module.patches[(0, number)] for number in range(size)]
        image, label = (torch.stack(part).to(device) for part in zip(*pairs, strict=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.training_step((image, label), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for an accelerator
        times.append(time.monotonic() - started)
        if len(times) > 1 and sum(times[1:]) > LONGEST_S:
            break
    return min(times[1:])
