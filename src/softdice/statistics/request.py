"""What one pass over the voxels works on, from the losses down to the kernels: its tensors, and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdice.statistics.declared import FIELDS, MAPPED

ACTIVATIONS = ("none", "softmax", "sigmoid")


@dataclass(frozen=True)
class Pass:
    """The settings of one pass; losses that agree on them share the pass.

    `kind` is one of the five kinds of pass (`softdice.backends.route.KINDS`):

        ==========  ==========================================================================================
        sums        the declared statistics `fields`, (len(fields), B, C or R)
        confusion   for each label the probabilities of its voxels, (C, B, C)
        skeletons   with S the soft skeleton: sum w S(p) y, sum w S(p), sum w S(y) p, sum w S(y), (4, B, C)
        map         the cross-entropy of each voxel, (B, V)
        ranks       the Lovasz extension of each class's Jaccard loss, and its voxels, (2, 1 or B, C)
        ==========  ==========================================================================================
    """

    activation: str = "none"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    regions: tuple[tuple[int, ...], ...] | None = None
    validate: bool = True
    gamma: float = 2.0
    power: float = 1.0
    fields: tuple[str, ...] = FIELDS
    kind: str = "sums"
    shape: tuple[int, ...] | None = None  # skeletons: of the volume
    iterations: int = 0  # skeletons: erosions
    per_sample: bool = False  # ranks: whether each sample is ranked by itself
    classes: tuple[int, ...] | None = None  # ranks: the classes that are wanted

    @property
    def mapped(self) -> bool:
        """Whether a map is read beside the target."""
        return any(name in MAPPED for name in self.fields)

    def but(self, **changes: Any) -> Pass:
        """Return the settings with some changed. (torch.compile of torch 2.6 cannot trace dataclasses.replace.)"""
        return Pass(**{**{name: getattr(self, name) for name in SETTINGS}, **changes})

    @property
    def text(self) -> str:
        """The settings as an operator takes them: all but the regions, which are a tensor there.

        Numbers in hex: it is exact, and unlike str torch.compile can trace it for a number that varies between calls.
        """
        smoothing, gamma, power = float(self.label_smoothing).hex(), float(self.gamma).hex(), float(self.power).hex()
        sizes = "None" if self.shape is None else "x".join(str(size) for size in self.shape)
        words = f"{self.kind} {self.activation} {self.ignore_index} {self.validate} {smoothing} {gamma} {power}"
        return f"{words} {sizes} {self.iterations} {' '.join(self.fields)}"


SETTINGS = tuple(setting.name for setting in fields(Pass))


@lru_cache(maxsize=1024)
def decode(text: str) -> Pass:
    """Return the settings, without regions, that `Pass.text` wrote.

    Example:
        >>> decode(Pass(activation="softmax", ignore_index=255).text) == Pass(activation="softmax", ignore_index=255)
        True
    """
    kind, activation, ignore_index, validate, smoothing, gamma, power, sizes, iterations, *names = text.split()
    return Pass(
        activation=activation,
        ignore_index=None if ignore_index == "None" else int(ignore_index),
        label_smoothing=float.fromhex(smoothing),
        validate=validate == "True",
        gamma=float.fromhex(gamma),
        power=float.fromhex(power),
        fields=tuple(names),
        kind=kind,
        shape=None if sizes == "None" else tuple(int(size) for size in sizes.split("x")),
        iterations=int(iterations),
    )


class Request(NamedTuple):
    """The tensors of one pass, with one axis for the voxels, and its settings; `softdice.statistics.check` makes it."""

    input: Tensor  # (B, C, V), floating
    target: Tensor  # (B, V) labels, or (B, C, V) values
    weight: Tensor | None = None  # (B, V)
    regions: Tensor | None = None  # (R, C) bool, the classes of which each region is the union
    voxel_map: Tensor | None = None  # (B, R or C, V), or (B, 1, V) for every class
    settings: Pass = Pass()

    @property
    def hard(self) -> bool:
        """Whether the target is a label map."""
        return self.target.ndim == 2

    @property
    def columns(self) -> int:
        """Number of classes or regions that have sums."""
        return self.input.shape[1] if self.regions is None else self.regions.shape[0]

    def cut(self, samples: slice, voxels: slice) -> Request:
        """Return the request for some samples and voxels."""
        weight = None if self.weight is None else self.weight[samples, voxels]
        voxel_map = None if self.voxel_map is None else self.voxel_map[samples, :, voxels]
        input, target = self.input[samples, :, voxels], self.target[samples, ..., voxels]
        return Request(input, target, weight, self.regions, voxel_map, self.settings)


TENSORS = len(Request._fields) - 1
"""Tensors of a request: all fields but the settings."""


def result_shape(request: Request) -> tuple[int, ...]:
    """Return the shape of what a pass gives, see `Pass`."""
    (B, C, V), s = request.input.shape, request.settings
    if s.kind == "map":
        return B, V
    if s.kind == "ranks":
        return 2, B if s.per_sample else 1, C
    rows = {"confusion": C, "skeletons": 4}.get(s.kind, len(s.fields))
    return rows, B, request.columns


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics for an input's: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outcomes(num_classes: int, activation: str) -> int:
    """Return K, the number of outcomes that label smoothing spreads its share over.

    Classes that exclude each other are C outcomes; a class decided by itself (a sigmoid, a single mask) has two.
    """
    return 2 if activation == "sigmoid" or num_classes == 1 else num_classes


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their factors; some devices (meta) have no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def equals(labels: Tensor, value: int) -> Tensor:
    """Return where labels equal a number; one that the dtype cannot hold equals none of them.

    torch would wrap it round: `torch.tensor([255], dtype=torch.uint8) == -1` is true.
    """
    limits = torch.iinfo(torch.uint8 if labels.dtype == torch.bool else labels.dtype)
    if limits.min <= value <= limits.max:
        return signed(labels) == (value if value < 2**63 else value - 2**64)
    return torch.zeros_like(labels, dtype=torch.bool)


def signed(labels: Tensor) -> Tensor:
    """Return labels in a dtype that torch can compare; those from 2^63 on become negative."""
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
    return labels.to(wider[labels.dtype]) if labels.dtype in wider else labels


# --- constants beside the voxels: a device takes them once, not in every call, which would wait for it


def columns(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return some places of the last axis, in that order, by slices: an index would be copied to the device.

    Example:
        >>> columns(torch.arange(6), range(1, 6)), columns(torch.arange(6), (4, 0, 1, 2))
        (tensor([1, 2, 3, 4, 5]), tensor([4, 0, 1, 2]))
    """
    runs: list[list[int]] = []
    size = values.shape[-1]
    for number in numbers:
        if not -size <= number < size:
            raise IndexError(f"softdice: expected class numbers in [0, {size}), got {number}. Pass other numbers.")
        place = number % size
        if runs and place == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    parts = [values[..., first:last] for first, last in runs or [[0, 0]]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@lru_cache(maxsize=256)
def _kept(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor would be of no use in the next training step
        return torch.tensor(numbers, dtype=dtype, device=device)


def constant(numbers: Any, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return nested tuples of numbers as a tensor on the device of `like`, that of an earlier call if there was one.

    It must not be written to.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.tensor(numbers, dtype=dtype, device=like.device)
    return _kept(numbers, dtype, like.device)


def moved(values: Tensor, like: Tensor) -> Tensor:
    """Return values in the dtype and on the device of `like`; and keep what a CPU's become there."""
    stays = values.device == like.device or values.device.type != "cpu" or values.requires_grad
    if stays or values.ndim != 1 or torch.compiler.is_compiling():
        return values.to(like)
    return constant(tuple(values.tolist()), like.dtype, like)
