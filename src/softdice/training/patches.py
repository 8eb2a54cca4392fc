"""Patches of cases: a patch is a pure function of (seed, epoch, number), so that any epoch can be had again.

*S are the spatial axes of an image, *patch those of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from softdice.images.orientation import axis_number
from softdice.training.cases import Case, Cases
from softdice.training.config import refusal
from softdice.training.places import exchanged

FOREGROUND_SHARE = 0.5
"""Share of the patches of a larger image that are laid around a voxel of a random class other than the first."""
ANGLE_DEGREES, CHANGE = 15, 0.15
"""Largest turn, and largest change of size, brightness and contrast as a share."""
AUGMENTATION = (
    f"turned by up to {ANGLE_DEGREES} degrees, scaled by up to {CHANGE:.0%}, changes of brightness and contrast, noise"
)
BOTH = ("image", "label")
"""Keys of what MONAI's transforms change alike."""
KEPT_VOXELS = 1000
"""Voxels of each class of a case whose positions are remembered, at least, to lay patches around them."""


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Patches by (epoch, number): image (channels, *patch) float32 and label (*patch) uint8, augmented.

    Every case comes once before one comes twice. Images smaller than the patch are padded: with 0, the mean, and with
    class 0. Augmentation by MONAI: what `AUGMENTATION` says, and mirroring.

    Args:
        cases, numbers: the cases, and the numbers of those to cut patches from.
        patch: voxels along each axis.
        seed: of all that is random.
        mirror: axes by letters, such as "xy", or "none"; None: those that `choose_mirror` takes.

    Attributes:
        pad, augment: MONAI's transforms. positions: number of a case -> voxels (n, axes) of each class but the first.
        foreground_share: `FOREGROUND_SHARE`.
    """

    def __init__(
        self, cases: Cases, numbers: Sequence[int], patch: Sequence[int], seed: int, mirror: str | None = None
    ) -> None:
        """Keep the arguments, which the class describes, and set up MONAI's transforms."""
        from monai.transforms import SpatialPadd

        self.cases, self.numbers, self.patch, self.seed = cases, list(numbers), tuple(patch), seed
        self.foreground_share = FOREGROUND_SHARE
        mirror = choose_mirror(cases, numbers)[0] if mirror is None else mirror
        self.pad = SpatialPadd(BOTH, self.patch)
        self.augment = _augmentation(self.patch, mirrored_axes(cases, mirror))
        self.positions: dict[int, list[np.ndarray]] = {}

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the patch of (epoch, number): image (channels, *patch) float32, class numbers (*patch) uint8."""
        from monai.utils import convert_to_tensor

        epoch, number = key
        rng = np.random.default_rng([self.seed, 1, epoch, number])  # 1 and 2: independent streams, here and below
        cycle, position = divmod(number, len(self.numbers))  # in each cycle every case comes once
        order = np.random.default_rng([self.seed, 2, epoch, cycle]).permutation(len(self.numbers))
        which = self.numbers[order[position]]
        case = self.cases[which]
        window = tuple(slice(s, s + p) for s, p in zip(self._start(which, case, rng), self.patch, strict=True))
        image, label = case.image[(slice(None), *window)].copy(), case.label[(None, *window)].copy()
        self.augment.set_random_state(seed=int(rng.integers(2**32)))
        pair = self.augment(self.pad({"image": torch.from_numpy(image), "label": torch.from_numpy(label)}))
        return convert_to_tensor(pair["image"], torch.float32), convert_to_tensor(pair["label"], torch.uint8)[0]

    def _start(self, which: int, case: Case, rng: np.random.Generator) -> list[int]:
        """Return the first voxel of a patch in `case`, whose number is `which`.

        A share `foreground_share` of the patches holds a random voxel of a random class other than the first. All other
        patches lie anywhere in the image, as do those of an image without such a class.
        """
        room = [max(0, n - p) for n, p in zip(case.label.shape, self.patch, strict=True)]  # the last possible start
        start = [int(rng.integers(r + 1)) for r in room]
        if any(room) and rng.random() < self.foreground_share:
            positions = self._positions(which, case)
            if positions:
                class_positions = positions[rng.integers(len(positions))]
                voxel = class_positions[rng.integers(len(class_positions))]
                # lay the voxel at a random place in the patch, and move the patch into the image
                return [
                    int(np.clip(v - rng.integers(p), 0, r)) for v, p, r in zip(voxel, self.patch, room, strict=True)
                ]
        return start

    def _positions(self, which: int, case: Case) -> list[np.ndarray]:
        """Return voxel positions (n, axes) for each class in the case but the first and the ignored one; cached.

        n is at most about twice `KEPT_VOXELS`. `which` is the number of the case.
        """
        if which not in self.positions:
            positions = []
            for number in np.unique(case.label):
                if number in (0, self.cases.ignore_index):
                    continue
                flat = np.flatnonzero(case.label == number)
                flat = flat[:: max(1, len(flat) // KEPT_VOXELS)]
                positions.append(np.stack(np.unravel_index(flat, case.label.shape), axis=1))
            self.positions[which] = positions
        return self.positions[which]


def epoch_keys(epoch: int, count: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return the keys of `Patches`, (epoch, number), for one of `ranks` ranks: its share of an epoch of `count`."""
    return [(epoch, number) for number in range(rank, count, ranks)]


def choose_mirror(cases: Cases, training: Sequence[int]) -> tuple[str, str]:
    """Return the axes along which training images may be mirrored, "x" or "none", and the reason for "none", else "".

    A body has a left and a right side, and so may any volume. For pictures it is "none" if mirroring would exchange two
    classes, such as left and right lung, in the cases with the numbers `training`.
    """
    if cases.spatial_ndim == 3 or cases.placed:
        return "none", "left and right may differ"
    training_places = [cases.places[number] for number in training if number in cases.places]
    pair = exchanged(training_places, axis_number(cases.axes, "x"))
    if pair is None:
        return "x", ""
    left, right = (cases.class_names[cases.values.index(value)] for value in pair)
    return "none", f"{left} lies left of {right}, and both would change places"


def mirrored_axes(cases: Cases, mirror: str) -> list[int]:
    """Return the numbers of the spatial axes that `mirror` names, "none" or letters as "xy".

    Raise TrainingError for a letter that the cases have no axis for.
    """
    if mirror == "none":
        return []
    letters = "xyz"[: cases.spatial_ndim]
    if not set(mirror) <= set(letters):
        raise refusal(f"axes of {cases.spatial_ndim}-D images, {', '.join(letters)}", mirror, "Change --mirror.")
    return [axis_number(cases.axes, letter) for letter in mirror]


def _augmentation(patch: Sequence[int], mirrored: Sequence[int]) -> Any:
    """Return MONAI's transform of {"image", "label"} that `AUGMENTATION` names, and that flips the axes `mirrored`."""
    from monai import transforms

    affine = {
        "rotate_range": [np.deg2rad(ANGLE_DEGREES)] * (3 if len(patch) == 3 else 1),
        "scale_range": [CHANGE] * len(patch),
    }
    return transforms.Compose(
        [
            *(transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in mirrored),
            transforms.RandAffined(BOTH, prob=0.3, mode=("bilinear", "nearest"), padding_mode="zeros", **affine),
            transforms.RandScaleIntensityd("image", factors=CHANGE, prob=0.5),
            transforms.RandShiftIntensityd("image", offsets=CHANGE, prob=0.5),
            transforms.RandAdjustContrastd("image", prob=0.2, gamma=(0.7, 1.5)),
            transforms.RandGaussianNoised("image", prob=0.15, std=0.1),
        ]
    )
