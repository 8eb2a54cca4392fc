"""Patches of cases: a patch is a pure function of (seed, epoch, number), so that any epoch can be had again."""

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
AUGMENTATION = (
    f"turned by up to {ANGLE_DEGREES} degrees, scaled by up to {CHANGE:.0%}, changes of brightness and contrast, noise"
)
BOTH = ("image", "label")
KEPT_VOXELS = 1000
"""Voxels of each class whose position is remembered for that."""


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Patches by (epoch, number): image (channels, *patch) float32 and label (*patch) uint8, augmented.

    Every case comes once before one comes twice. Images smaller than the patch are padded: with 0, the mean, and with
    class 0. Augmentation by MONAI: what `AUGMENTATION` says, and mirrored along the axes that `mirror` names; None:
    those that `choose_mirror` takes.
    """

    def __init__(
        self, cases: Cases, numbers: Sequence[int], patch: Sequence[int], seed: int, mirror: str | None = None
    ) -> None:
        from monai.transforms import SpatialPadd

        self.cases, self.numbers, self.patch, self.seed = cases, list(numbers), tuple(patch), seed
        self.foreground_share = FOREGROUND_SHARE
        mirror = choose_mirror(cases, numbers)[0] if mirror is None else mirror
        self.pad = SpatialPadd(BOTH, self.patch)
        self.augment = _augmentation(self.patch, mirrored_axes(cases, mirror))
        self.positions: dict[int, list[np.ndarray]] = {}

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, number = key
        rng = np.random.default_rng([self.seed, 1, epoch, number])
        turn, place = divmod(number, len(self.numbers))
        order = np.random.default_rng([self.seed, 2, epoch, turn]).permutation(len(self.numbers))
        which = self.numbers[order[place]]
        case = self.cases[which]
        window = tuple(slice(s, s + p) for s, p in zip(self._start(which, case, rng), self.patch, strict=True))
        image, label = case.image[(slice(None), *window)].copy(), case.label[(None, *window)].copy()
        self.augment.set_random_state(seed=int(rng.integers(2**32)))
        pair = self.augment(self.pad({"image": torch.from_numpy(image), "label": torch.from_numpy(label)}))
        return _plain(pair["image"]).float(), _plain(pair["label"])[0].to(torch.uint8)

    def _start(self, which: int, case: Case, rng: np.random.Generator) -> list[int]:
        """Return the corner of a patch: anywhere, or so that a voxel of a class other than the first lies in it."""
        room = [max(0, n - p) for n, p in zip(case.label.shape, self.patch, strict=True)]
        start = [int(rng.integers(r + 1)) for r in room]
        if any(room) and rng.random() < self.foreground_share:
            positions = self._positions(which, case)
            if positions:
                of_class = positions[rng.integers(len(positions))]
                voxel = of_class[rng.integers(len(of_class))]
                return [
                    int(np.clip(v - rng.integers(p), 0, r)) for v, p, r in zip(voxel, self.patch, room, strict=True)
                ]
        return start

    def _positions(self, which: int, case: Case) -> list[np.ndarray]:
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
    """Return (epoch, number) of every `ranks`-th patch of an epoch of `count` patches: the share of one rank."""
    return [(epoch, number) for number in range(rank, count, ranks)]


def choose_mirror(cases: Cases, training: Sequence[int]) -> tuple[str, str]:
    """Return the axes along which training images may be mirrored, "x" or "none", and why where it is none.

    A body has a left and a right side, and so may any volume. Of pictures the labels decide.
    """
    if cases.spatial_ndim == 3 or cases.placed:
        return "none", "left and right may differ"
    where = [cases.places[number] for number in training] if cases.places else []
    pair = exchanged(where, axis_number(cases.axes, "x"))
    if pair is None:
        return "x", ""
    left, right = (cases.class_names[cases.values.index(value)] for value in pair)
    return "none", f"{left} lies left of {right}, and both would change places"


def mirrored_axes(cases: Cases, mirror: str) -> list[int]:
    """Return the axes of the array along which `mirror`, letters or "none", mirrors.

    Raises:
        TrainingError: the images have no such axis.
    """
    letters = "xyz"[: cases.spatial_ndim]
    if mirror != "none" and not set(mirror) <= set(letters):
        raise refusal(f"axes of {cases.spatial_ndim}-D images, {', '.join(letters)}", mirror, "Change --mirror.")
    return [] if mirror == "none" else [axis_number(cases.axes, letter) for letter in mirror]


def _augmentation(patch: Sequence[int], mirrored: Sequence[int]) -> Any:
    """Return the transform of MONAI that augments a patch; `AUGMENTATION` says it in words."""
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    affine = {
        "rotate_range": [np.deg2rad(ANGLE_DEGREES)] * (3 if len(patch) == 3 else 1),
        "scale_range": [CHANGE] * len(patch),
    }
    return Compose(
        [
            *(RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in mirrored),
            RandAffined(BOTH, prob=0.3, mode=("bilinear", "nearest"), padding_mode="zeros", **affine),
            RandScaleIntensityd("image", factors=CHANGE, prob=0.5),
            RandShiftIntensityd("image", offsets=CHANGE, prob=0.5),
            RandAdjustContrastd("image", prob=0.2, gamma=(0.7, 1.5)),
            RandGaussianNoised("image", prob=0.15, std=0.1),
        ]
    )


def _plain(tensor: Any) -> Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
