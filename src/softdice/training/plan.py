"""Plan of a run: patch, batch and network that suit the images, the machine and the minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from softdice.training.config import refusal

if TYPE_CHECKING:
    from softdice.training.module import Budget, Segmenter

PATCH_VOXELS = {2: 320**2, 3: 64**3}
"""Largest patch on a CPU."""
BATCH_VOXELS = 100_000
"""Voxels per step on a CPU."""
ACCELERATOR_FACTOR = 8
"""How many times more of both an accelerator takes."""
MAX_BATCH = 32
MAX_LEVELS = 5
MAX_FILTERS = {False: 128, True: 320}
FIRST_FILTERS = {False: 16, True: 32}
"""By whether there is an accelerator."""
NARROW = {False: 8, True: 32}
"""The fewest, where time is short."""
ENOUGH_STEPS = 300
"""Fewer steps learn less than a smaller network, batch or patch would with more of them, at equal time."""
FEW_STEPS = 100
LEAST_PATCH = {2: 128, 3: 32}
"""A patch is not cut below, along any axis, to save time: what a step takes beside its voxels then outweighs them."""
LEAST_BATCH = {2: 1, 3: 2}
"""Nor a batch: on a CPU torch convolves a single small volume by other code, for longer than two at once."""
TIMED_STEPS, TIMED_S = 3, 3.0
"""Steps that are timed, and the seconds after which no further one is."""
TRAINING_SHARE = 0.8
"""Of the minutes left, so much is for steps; the rest for validation, the scores of the held-out cases and pictures."""
PREDICTION_SHARE = 0.5
"""Seconds per voxel of a prediction, in those of a step, before they are measured."""
FINISH_S = 6.0
"""What curves, pictures and summary take at the end, beside the predictions."""
KEPT_TENSORS = 4
"""Of first filters and of 4 bytes a voxel, that a step holds at the very least."""


@dataclass(frozen=True)
class NetworkPlan:
    """Numbers that MONAI's DynUNet is built from: plain values, stored in the checkpoint."""

    spatial_ndim: int
    channels: int
    num_classes: int
    strides: list[list[int]]
    filters: list[int]

    def build(self) -> nn.Module:
        """Return a U-Net with instance normalisation and untrained weights, which takes (B, channels, *patch).

        For volumes on a CPU the weights lie channels-last, as torch convolves them faster: see docs/training.md.
        """
        from monai.networks.nets import DynUNet

        network = DynUNet(
            self.spatial_ndim,
            self.channels,
            self.num_classes,
            kernel_size=[[3] * self.spatial_ndim] * len(self.strides),
            strides=self.strides,
            upsample_kernel_size=self.strides[1:],
            filters=self.filters,
        )
        apart = self.spatial_ndim == 3 and not torch.cuda.is_available()
        return network.to(memory_format=torch.channels_last_3d) if apart else network


def choose_patch(shapes: Sequence[tuple[int, ...]], asked: Sequence[int] | None, accelerator: bool) -> tuple[int, ...]:
    """Return a patch: the median image rounded up to multiples of 8 (16 from 64 on), cut to size.

    Raises:
        TrainingError: the patch asked for has another number of axes than the images.

    Example:
        >>> choose_patch([(35, 51, 35), (36, 50, 33)], None, False)
        (40, 56, 40)
        >>> choose_patch([(2000, 2000)], None, False)
        (320, 320)
    """
    ndim = len(shapes[0])
    if asked is not None:
        if len(asked) not in (1, ndim):
            raise refusal(f"a patch of 1 or {ndim} numbers for {ndim}-D images", len(asked), "Change --patch.")
        return tuple(asked) * ndim if len(asked) == 1 else tuple(asked)
    limit = PATCH_VOXELS[ndim] * (ACCELERATOR_FACTOR if accelerator else 1)
    patch = [_round_up(float(n)) for n in np.median(np.array(shapes), axis=0)]
    while math.prod(patch) > limit:
        longest = int(np.argmax(patch))
        patch[longest] = _round_up(patch[longest] - 16 if patch[longest] > 64 else patch[longest] - 8)
    return tuple(patch)


def choose_batch(patch: Sequence[int], asked: int | None, accelerator: bool) -> int:
    """Return the patches per step, so that a step sees about as many voxels whatever the patch."""
    if asked is not None:
        return asked
    voxels = BATCH_VOXELS * (ACCELERATOR_FACTOR if accelerator else 1)
    return int(min(max(2, round(voxels / math.prod(patch))), MAX_BATCH))


def choose_network(
    patch: Sequence[int], channels: int, num_classes: int, accelerator: bool, first: int | None = None
) -> NetworkPlan:
    """Return a network for a patch: an axis is halved while it is even and at least 4 voxels remain.

    Example:
        >>> choose_network((40, 56, 16), 1, 3, False).strides
        [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 1]]
    """
    size = list(patch)
    strides = [[1] * len(size)]
    while len(strides) < MAX_LEVELS:
        step = [2 if n % 2 == 0 and n // 2 >= 4 else 1 for n in size]
        if max(step) == 1:
            break
        strides.append(step)
        size = [n // s for n, s in zip(size, step, strict=True)]
    while len(strides) < 3:  # the fewest levels that the network has
        strides.append([1] * len(size))
    first = first or FIRST_FILTERS[accelerator]
    filters = [min(first * 2**level, MAX_FILTERS[accelerator]) for level in range(len(strides))]
    return NetworkPlan(len(size), channels, num_classes, strides, filters)


def fit(
    patch: tuple[int, ...],
    batch_size: int,
    accelerator: bool,
    left_s: float,
    narrow_s: float,
    wide_s: Callable[[], float],
    *,
    fixed_patch: bool,
    fixed_batch_size: bool,
) -> tuple[tuple[int, ...], int, int, float]:
    """Return patch, batch and first filters of which enough steps fit, and the seconds of a step.

    Width is given first, then the batch, then the patch.

    Args:
        patch, batch_size: what suits the data.
        accelerator: whether there is one.
        left_s: seconds for training.
        narrow_s: seconds that a step with patch and batch takes with the fewest filters.
        wide_s: measures what it takes with those that suit the data; called only where there may be time for them.
        fixed_patch, fixed_batch_size: it was asked for, and stays.

    Returns:
        patch, patches per step, first filters, and the seconds that a step will take, by its voxels.

    Example:
        >>> fit((128, 128), 4, False, 60, 0.4, lambda: 0.8, fixed_patch=False, fixed_batch_size=False)
        ((128, 128), 2, 8, 0.2)
    """
    first, took = NARROW[accelerator], narrow_s
    if 2 * narrow_s * ENOUGH_STEPS < left_s and first < FIRST_FILTERS[accelerator]:  # twice the filters, twice the time
        measured_s = wide_s()
        if measured_s * ENOUGH_STEPS <= left_s:
            first, took = FIRST_FILTERS[accelerator], measured_s
    while took * ENOUGH_STEPS > left_s:
        longest, fewer = max(patch), max(LEAST_BATCH[len(patch)], batch_size // 2)
        if fewer < batch_size and not fixed_batch_size:
            took, batch_size = took * fewer / batch_size, fewer
        elif longest > LEAST_PATCH[len(patch)] and not fixed_patch:
            less = max(LEAST_PATCH[len(patch)], _round_up(longest / 2))
            at = patch.index(longest)
            took, patch = took * less / longest, (*patch[:at], less, *patch[at + 1 :])
        else:
            break
    return patch, batch_size, first, took


def fit_to_minutes(
    make: Callable[[tuple[int, ...], int, int], Segmenter],
    patch: tuple[int, ...],
    batch_size: int,
    settings: dict[str, Any],
    budget: Budget,
    end_voxels: int,
    line: Callable[[str], None],
) -> tuple[tuple[int, ...], int, int, str]:
    """Return patch, batch and first filters of which enough steps fit into the minutes, and why.

    Sets what the budget knows of a step and of the end, and torch's number of threads.

    Args:
        make: patch, batch and first filters -> what is trained, to be timed.
        patch, batch_size: what suits the data.
        settings: of the run. budget: with its minutes.
        end_voxels: of the images that are predicted at the end.
        line: takes a line for the user.
    """
    assert budget.seconds is not None
    accelerator = torch.cuda.is_available()

    def step_s(first: int, patch: tuple[int, ...] = patch, batch_size: int = batch_size) -> float:
        with torch.random.fork_rng(devices=[0] if accelerator else []):
            device = torch.device("cuda" if accelerator else "cpu")
            return step_seconds(make(patch, batch_size, first), device, settings["precision"])

    fixed = {f"fixed_{name}": settings[name] is not None for name in ("patch", "batch_size")}
    narrow_s, threads = step_s(NARROW[accelerator]), torch.get_num_threads()
    if threads > 1 and not accelerator:  # where other programs want the cores, threads mostly wait for each other
        torch.set_num_threads(1)
        if (alone_s := step_s(NARROW[accelerator])) < narrow_s:
            narrow_s, threads = alone_s, 1
        torch.set_num_threads(threads)
    left_s = TRAINING_SHARE * (budget.seconds - budget.elapsed_s())  # compiling may have taken some
    wide_s = partial(step_s, FIRST_FILTERS[accelerator])
    chosen, batch, first, took = fit(patch, batch_size, accelerator, left_s, narrow_s, wide_s, **fixed)
    if (chosen, batch) != (patch, batch_size):
        took = step_s(first, chosen, batch)  # not all that a step takes is by its voxels
    budget.step_s = took
    budget.reserve_s = FINISH_S + PREDICTION_SHARE * took * end_voxels / (batch * math.prod(chosen))
    steps = max(0, round(left_s / took))
    width = f"{first} first filters, {threads} thread{'s' * (threads > 1)}"
    why = f"{width}, since a step takes {took:.2g} s and about {steps} fit"
    if steps < FEW_STEPS:
        enough = math.ceil(budget.seconds / 60 * ENOUGH_STEPS / max(1, steps))
        line(
            f"About {steps} steps fit into {budget.seconds / 60:g} minutes, and fewer than {FEW_STEPS} learn little. "
            f"Give --max-minutes {enough}, or a smaller --patch."
        )
    return chosen, batch, first, why


def step_seconds(module: Segmenter, device: torch.device, precision: str) -> float:
    """Return the seconds of a step, patches and all: the fastest of three, as other programs only slow it down.

    One of a single patch warms up before. Slow steps are not repeated.

    The module is spent afterwards. The state of random numbers is left as it was.
    """
    module.to(device).train()
    optimizer = module.configure_optimizers()
    times: list[float] = []
    for size in (1, *[module.batch_size] * TIMED_STEPS):
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
        if sum(times[1:]) > TIMED_S:
            break
    return min(times[1:])


def check_memory(patch: Sequence[int], batch_size: int, plan: NetworkPlan, memory_bytes: int) -> None:
    """Refuse what cannot be held for certain, before the first step.

    Raises:
        TrainingError: a step would take more memory than there is.
    """
    needed = KEPT_TENSORS * 4 * plan.filters[0] * batch_size * math.prod(patch)
    if needed > memory_bytes:
        patches = f"{batch_size} patches of {'x'.join(map(str, patch))}"
        expected, got = f"a step to fit into {memory_bytes / 2**30:.0f} GiB of memory", f"{needed / 2**30:.0f}"
        raise refusal(expected, f"{patches}, which take more than {got}", "Lower --batch-size or --patch.")


def _round_up(size: float) -> int:
    multiple = 16 if size > 64 else 8
    return max(8, int(-(-size // multiple)) * multiple)
