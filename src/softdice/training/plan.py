"""Plan of a run: patch, batch and network that suit the images, the machine and the minutes.

A machine with a GPU is called one with an accelerator. Patches are numbers of voxels along each spatial axis.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from softdice.training.cases import memory_bytes
from softdice.training.config import refusal, size
from softdice.training.evaluate import default_device

if TYPE_CHECKING:
    from softdice.training.module import Budget, Segmenter

PATCH_VOXELS = {2: 320**2, 3: 64**3}
"""Voxels of the largest patch on a CPU, by the number of axes."""
BATCH_VOXELS = 100_000
"""Voxels per step on a CPU."""
ACCELERATOR_FACTOR = 8
"""How many times more of both an accelerator takes."""
MAX_BATCH = 32
MAX_LEVELS, LEAST_LEVELS = 5, 3
"""Resolutions of the network; MONAI's DynUNet needs three."""
MAX_FILTERS = {False: 128, True: 320}
FIRST_FILTERS = {False: 16, True: 32}
"""Filters at full resolution, and most at any, by whether there is an accelerator."""
NARROW = {False: 8, True: 32}
"""Filters at full resolution where time is short."""
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
"""Share of the time left that steps get; the rest is for validation, scores of the held-out cases and pictures."""
PREDICTION_SHARE = 0.5
"""Time that a voxel of a prediction takes, as a share of that of a step, before it is measured."""
FINISH_S = 6.0
"""What curves, pictures and summary take at the end, beside the predictions."""
KEPT_TENSORS = 4
"""Tensors of first filters, of 4 bytes a value, that a step holds at the very least."""


class StepPlan(NamedTuple):
    """What a step works on, and how wide the network is.

    Args:
        patch: voxels along each axis. batch_size: patches per step and device.
        first_filters: of the network at full resolution; None: what suits the machine.
        step_s: seconds that a step takes, by its voxels; nan where that is not known.
    """

    patch: tuple[int, ...]
    batch_size: int
    first_filters: int | None = None
    step_s: float = math.nan


@dataclass(frozen=True)
class NetworkPlan:
    """Numbers that MONAI's DynUNet is built from: plain values, stored in the checkpoint.

    Args:
        spatial_ndim: 2 or 3. channels: of an image. num_classes: channels of the logits.
        strides: of each level along each axis, 1 or 2; 1 at the first level.
        filters: of each level.
    """

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
        channels_last = self.spatial_ndim == 3 and not torch.cuda.is_available()
        return network.to(memory_format=torch.channels_last_3d) if channels_last else network


def choose_patch(shapes: Sequence[tuple[int, ...]], asked: Sequence[int] | None, accelerator: bool) -> tuple[int, ...]:
    """Return a patch: the median image rounded up to multiples of 8 (16 from 64 on), cut to `PATCH_VOXELS`.

    Args:
        shapes: of the training images. asked: a patch, or one number for all axes, to take instead, as `TrainConfig`
            has checked it: multiples of 8; or None.

    Raises:
        TrainingError: `asked` has another number of axes than the images.

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
    """Return the patches per step: `asked`, or so many that a step sees about as many voxels whatever the patch."""
    if asked is not None:
        return asked
    voxels = BATCH_VOXELS * (ACCELERATOR_FACTOR if accelerator else 1)
    return int(min(max(2, round(voxels / math.prod(patch))), MAX_BATCH))


def choose_network(
    patch: Sequence[int], channels: int, num_classes: int, accelerator: bool, first: int | None = None
) -> NetworkPlan:
    """Return a network for a patch: an axis is halved while it is even and at least 4 voxels remain.

    `first` filters are at full resolution; None: as many as suit the machine.

    Example:
        >>> choose_network((40, 56, 16), 1, 3, False).strides
        [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 1]]
    """
    sizes = list(patch)
    strides = [[1] * len(sizes)]
    while len(strides) < MAX_LEVELS:
        stride = [2 if n % 2 == 0 and n // 2 >= 4 else 1 for n in sizes]
        if max(stride) == 1 and len(strides) >= LEAST_LEVELS:
            break
        strides.append(stride)
        sizes = [n // s for n, s in zip(sizes, stride, strict=True)]
    first = first or FIRST_FILTERS[accelerator]
    filters = [min(first * 2**level, MAX_FILTERS[accelerator]) for level in range(len(strides))]
    return NetworkPlan(len(sizes), channels, num_classes, strides, filters)


def fit(
    plan: StepPlan, accelerator: bool, left_s: float, wide_s: Callable[[], float], fixed_patch: bool, fixed_batch: bool
) -> StepPlan:
    """Return a plan so small that `ENOUGH_STEPS` fit into `left_s`: first filters are cut, then batch, then patch.

    The seconds of a step are taken to be proportional to each of the three.

    Args:
        plan: patch and batch that suit the data; its `step_s` was measured with the fewest filters.
        left_s: seconds that are left for steps.
        wide_s: measures the seconds of a step with the usual filters; called only where there may be time for them.
        fixed_patch, fixed_batch: the user set it, so it is not cut.

    Example:
        >>> tuple(fit(StepPlan((128, 128), 4, None, 0.4), False, 60, lambda: 0.8, fixed_patch=False, fixed_batch=False))
        ((128, 128), 2, 8, 0.2)
    """
    patch, batch_size, _, narrow_s = plan
    first, step_s = NARROW[accelerator], narrow_s
    if 2 * narrow_s * ENOUGH_STEPS < left_s and first < FIRST_FILTERS[accelerator]:  # twice the filters, twice the time
        measured_s = wide_s()
        if measured_s * ENOUGH_STEPS <= left_s:
            first, step_s = FIRST_FILTERS[accelerator], measured_s
    least_batch, least_side = LEAST_BATCH[len(patch)], LEAST_PATCH[len(patch)]
    while step_s * ENOUGH_STEPS > left_s:
        side = max(patch)
        if batch_size > least_batch and not fixed_batch:
            smaller = max(least_batch, batch_size // 2)
            step_s, batch_size = step_s * smaller / batch_size, smaller
        elif side > least_side and not fixed_patch:
            shorter, axis = max(least_side, _round_up(side / 2)), patch.index(side)
            step_s, patch = step_s * shorter / side, (*patch[:axis], shorter, *patch[axis + 1 :])
        else:
            break
    return StepPlan(patch, batch_size, first, step_s)


def fit_to_minutes(
    make: Callable[[StepPlan], Segmenter],
    plan: StepPlan,
    settings: dict[str, Any],
    budget: Budget,
    end_voxels: int,
    line: Callable[[str], None],
) -> tuple[StepPlan, str]:
    """Time a few steps; return a plan whose steps are short enough for the minutes, and the reason in words.

    Set the seconds of a step in the budget (`step_s`), those kept back for the end (`reserve_s`), and torch's number of
    threads. The caller has set the budget's `seconds`.

    Args:
        make: returns an untrained module for a plan. plan: patch and batch that suit the data.
        settings: of the run; patch and batch size are None where they may be changed.
        end_voxels: of all images that are predicted at the end. line: takes a line for the user.
    """
    # 1. time a step of the narrow network, with all threads and with one
    assert budget.seconds is not None
    accelerator = torch.cuda.is_available()

    def timed_s(plan: StepPlan) -> float:
        """Return the seconds of a step with a plan; the state of random numbers stays."""
        with torch.random.fork_rng(devices=[0] if accelerator else []):
            return step_seconds(make(plan), default_device(), settings["precision"])

    narrow = plan._replace(first_filters=NARROW[accelerator])
    narrow_s, threads = timed_s(narrow), torch.get_num_threads()
    if threads > 1 and not accelerator:  # where other programs want the cores, threads mostly wait for each other
        torch.set_num_threads(1)
        if (alone_s := timed_s(narrow)) < narrow_s:
            narrow_s, threads = alone_s, 1
        torch.set_num_threads(threads)
    # 2. fit the plan into the time that is left for steps, and tell the budget
    left_s = TRAINING_SHARE * (budget.seconds - budget.elapsed_s())  # compiling may have taken some
    wide = plan._replace(first_filters=FIRST_FILTERS[accelerator])
    fixed_patch, fixed_batch = settings["patch"] is not None, settings["batch_size"] is not None
    measured = plan._replace(step_s=narrow_s)
    fitted = fit(measured, accelerator, left_s, lambda: timed_s(wide), fixed_patch, fixed_batch)
    changed = fitted[:2] != plan[:2]  # patch or batch size: time again, as a step's time is not all by its voxels
    budget.step_s = step_s = timed_s(fitted) if changed else fitted.step_s
    voxel_s = PREDICTION_SHARE * step_s / (fitted.batch_size * math.prod(fitted.patch))
    budget.reserve_s = FINISH_S + voxel_s * end_voxels
    steps = max(0, round(left_s / step_s))
    if steps < FEW_STEPS:
        enough = math.ceil(budget.seconds / 60 * ENOUGH_STEPS / max(1, steps))
        line(
            f"About {steps} steps fit into {budget.seconds / 60:g} minutes, and fewer than {FEW_STEPS} learn little. "
            f"Give --max-minutes {enough}, or a smaller --patch."
        )
    width = f"{fitted.first_filters} first filters, {threads} thread{'s' * (threads > 1)}"
    return fitted, f"{width}, since a step takes {step_s:.2g} s and about {steps} fit"


def step_seconds(module: Segmenter, device: torch.device, precision: str) -> float:
    """Return the seconds of a step, patches and all: the fastest of three, as other programs only slow it down.

    A step of a single patch comes first, to warm up. No further step is timed once they took `TIMED_S`. The steps train
    the module, which the caller throws away. `precision` is "32-true" or "bf16-mixed".
    """
    module.to(device).train()
    optimizer = module.configure_optimizers()
    times: list[float] = []
    for batch_size in (1, *[module.batch_size] * TIMED_STEPS):
        started = time.monotonic()
        pairs = [module.patches[(0, number)] for number in range(batch_size)]
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


def check_memory(plan: StepPlan, network: NetworkPlan) -> None:
    """Raise TrainingError if a step certainly takes more memory than the GPU, or else the machine, has."""
    accelerator = torch.cuda.is_available()
    available = torch.cuda.get_device_properties(0).total_memory if accelerator else memory_bytes()
    needed = KEPT_TENSORS * 4 * network.filters[0] * plan.batch_size * math.prod(plan.patch)  # bytes, 4 a value
    if needed > available:
        expected = f"a step to fit into {available / 2**30:.0f} GiB of memory"
        got = f"{plan.batch_size} patches of {size(plan.patch)}, which take more than {needed / 2**30:.0f}"
        raise refusal(expected, got, "Lower --batch-size or --patch.")


def _round_up(voxels: float) -> int:
    """Round a number of voxels up to a multiple of 8 (above 64, of 16), at least 8."""
    multiple = 16 if voxels > 64 else 8
    return max(8, math.ceil(voxels / multiple) * multiple)
