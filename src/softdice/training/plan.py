"""cases -> plan: patch, batch and network that suit the images and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from softdice.training.config import TrainingError

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


@dataclass(frozen=True)
class NetworkPlan:
    """Numbers that MONAI's DynUNet is built from: plain values, stored in the checkpoint."""

    spatial_ndim: int
    channels: int
    num_classes: int
    strides: list[list[int]]
    filters: list[int]

    def build(self) -> nn.Module:
        """A U-Net with instance normalisation and untrained weights: (B, channels, *patch) -> (B, classes, *patch)."""
        from monai.networks.nets import DynUNet

        return DynUNet(
            self.spatial_ndim,
            self.channels,
            self.num_classes,
            kernel_size=[[3] * self.spatial_ndim] * len(self.strides),
            strides=self.strides,
            upsample_kernel_size=self.strides[1:],
            filters=self.filters,
        )

    def plain(self) -> dict[str, Any]:
        """As a dict of numbers and lists."""
        return asdict(self)


def choose_patch(shapes: Sequence[tuple[int, ...]], asked: Sequence[int] | None, accelerator: bool) -> tuple[int, ...]:
    """shapes of the images -> patch: the median image rounded up to multiples of 8 (16 from 64 on), cut to size.

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
            raise TrainingError(
                f"softdice train: expected a patch of 1 or {ndim} numbers for {ndim}-D images, got {len(asked)}. "
                "Change --patch."
            )
        return tuple(asked) * ndim if len(asked) == 1 else tuple(asked)
    limit = PATCH_VOXELS[ndim] * (ACCELERATOR_FACTOR if accelerator else 1)
    patch = [_round_up(float(n)) for n in np.median(np.array(shapes), axis=0)]
    while np.prod(patch) > limit:
        longest = int(np.argmax(patch))
        patch[longest] = _round_up(patch[longest] - 16 if patch[longest] > 64 else patch[longest] - 8)
    return tuple(patch)


def choose_batch(patch: Sequence[int], asked: int | None, accelerator: bool) -> int:
    """patch -> patches per step, so that a step sees about as many voxels whatever the patch."""
    if asked is not None:
        return asked
    voxels = BATCH_VOXELS * (ACCELERATOR_FACTOR if accelerator else 1)
    return int(min(max(2, round(voxels / np.prod(patch))), MAX_BATCH))


def choose_network(patch: Sequence[int], channels: int, num_classes: int, accelerator: bool) -> NetworkPlan:
    """patch -> network: an axis is halved while it is even and at least 4 voxels remain.

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
    filters = [min(FIRST_FILTERS[accelerator] * 2**level, MAX_FILTERS[accelerator]) for level in range(len(strides))]
    return NetworkPlan(len(size), channels, num_classes, strides, filters)


def _round_up(size: float) -> int:
    multiple = 16 if size > 64 else 8
    return max(8, int(-(-size // multiple)) * multiple)
