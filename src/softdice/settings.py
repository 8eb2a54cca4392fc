"""One pass over the voxels in two records, from the losses down to the kernels: its tensors, and its settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from softdice.terms import FIELDS, MAPPED

ACTIVATIONS = ("none", "softmax", "sigmoid")

CONFUSION = ("confusion",)
"""The fields of a pass whose sums are not one row for each: a row for each label, the probabilities of its voxels."""

CENTRELINE = ("skeleton_intersection", "skeleton_prediction", "skeleton_covered", "skeleton_target")
"""The fields of a pass over soft skeletons, S of p and of y: sum w S(p) y, sum w S(p), sum w S(y) p, sum w S(y)."""


class Voxels(NamedTuple):
    """What one pass works on, checked and with one axis for the voxels, as `softdice.statistics.prepare` returns it."""

    input: Tensor  # (B, C, V), floating
    target: Tensor  # (B, V) labels, or (B, C, V) values
    weight: Tensor | None = None  # (B, V)
    regions: Tensor | None = None  # (R, C) bool, the classes of which each region is the union
    voxel_map: Tensor | None = None  # (B, K, V), or (B, 1, V) for every class

    @property
    def columns(self) -> int:
        """K, the classes or regions that have sums."""
        return self.input.shape[1] if self.regions is None else self.regions.shape[0]

    def at(self, samples: slice, voxels: slice) -> Voxels:
        """Those of some samples and voxels."""
        weight = None if self.weight is None else self.weight[samples, voxels]
        voxel_map = None if self.voxel_map is None else self.voxel_map[samples, :, voxels]
        input, target = self.input[samples, :, voxels], self.target[samples, ..., voxels]
        return Voxels(input, target, weight, self.regions, voxel_map)


@dataclass(frozen=True)
class Pass:
    """What one pass over the voxels has to know; losses that agree on it share the pass."""

    activation: str = "none"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    regions: tuple[tuple[int, ...], ...] | None = None
    validate: bool = True
    gamma: float = 2.0
    power: float = 1.0
    fields: tuple[str, ...] = FIELDS
    shape: tuple[int, ...] | None = None  # of the volume, where neighbours are read
    iterations: int = 0  # of a skeleton

    def rows(self, num_classes: int) -> int:
        """classes -> how many sums the pass has for each sample and class."""
        return num_classes if self.fields == CONFUSION else len(self.fields)

    @property
    def mapped(self) -> bool:
        """Whether a map is read beside the target."""
        return any(name in MAPPED for name in self.fields)

    def but(self, **changes: Any) -> Pass:
        """The same with other values for some settings. (torch.compile of torch 2.6 has no dataclasses.replace.)"""
        return Pass(**{**{name: getattr(self, name) for name in SETTINGS}, **changes})

    @property
    def text(self) -> str:
        """All but the regions (a tensor there) in the form in which an operator takes them.

        Numbers by hex: it is exact, and torch.compile has it, unlike str, of a number that varies between calls.
        """
        smoothing, gamma, power = float(self.label_smoothing).hex(), float(self.gamma).hex(), float(self.power).hex()
        sizes = "None" if self.shape is None else "x".join(str(size) for size in self.shape)
        words = f"{self.activation} {self.ignore_index} {self.validate} {smoothing} {gamma} {power}"
        words = f"{words} {sizes} {self.iterations}"
        return f"{words} {' '.join(self.fields)}"


SETTINGS = tuple(setting.name for setting in fields(Pass))


@lru_cache(maxsize=1024)
def decode(text: str) -> Pass:
    """`Pass.text` -> the settings, without the regions.

    Example:
        >>> decode(Pass(activation="softmax", ignore_index=255).text) == Pass(activation="softmax", ignore_index=255)
        True
    """
    activation, ignore_index, validate, label_smoothing, gamma, power, sizes, iterations, *fields = text.split()
    return Pass(
        activation=activation,
        ignore_index=None if ignore_index == "None" else int(ignore_index),
        label_smoothing=float.fromhex(label_smoothing),
        validate=validate == "True",
        gamma=float.fromhex(gamma),
        power=float.fromhex(power),
        fields=tuple(fields),
        shape=None if sizes == "None" else tuple(int(size) for size in sizes.split("x")),
        iterations=int(iterations),
    )
