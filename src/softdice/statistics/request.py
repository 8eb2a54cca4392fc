"""The tensors and the settings of one pass over the voxels, as losses pass them down to kernels.

Both are checked before, in `softdice.statistics.check`. Shape letters: B sample, C class, R region, V voxel.
"""

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
    shape: tuple[int, ...] | None = None  # skeletons: (H, W) or (D, H, W), whose product is V
    iterations: int = 0  # skeletons: erosions
    per_sample: bool = False  # ranks: whether each sample is ranked apart from the others
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
        """The settings as words in a string, which an operator of torch.library can take; `decode` reads it.

        Regions are left out, since the operator takes them as a tensor, and so are `per_sample` and `classes`, since
        the kind "ranks" has no operator. Numbers are hex, which is exact and which torch.compile can trace, unlike str.
        """
        smoothing, gamma, power = float(self.label_smoothing).hex(), float(self.gamma).hex(), float(self.power).hex()
        sizes = "None" if self.shape is None else "x".join(str(size) for size in self.shape)
        words = f"{self.kind} {self.activation} {self.ignore_index} {self.validate} {smoothing} {gamma} {power}"
        return f"{words} {sizes} {self.iterations} {' '.join(self.fields)}"


SETTINGS = tuple(setting.name for setting in fields(Pass))


@lru_cache(maxsize=1024)
def decode(text: str) -> Pass:
    """Return the settings that `Pass.text` wrote; what it leaves out has its default.

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

    @property
    def counted(self) -> Tensor | None:
        """Which voxels count, (B, V) bool or None for all: the weight is above 0, the label is not ignore_index."""
        counted_BV = None if self.weight is None else self.weight > 0
        if self.settings.ignore_index is not None:
            labelled_BV = ~equals(self.target, self.settings.ignore_index)
            counted_BV = labelled_BV if counted_BV is None else counted_BV & labelled_BV
        return counted_BV

    def cut(self, samples: slice, voxels: slice) -> Request:
        """Return the request for some samples and voxels, slices of B and V; its tensors are views."""
        weight = None if self.weight is None else self.weight[samples, voxels]
        voxel_map = None if self.voxel_map is None else self.voxel_map[samples, :, voxels]
        input, target = self.input[samples, :, voxels], self.target[samples, ..., voxels]
        return Request(input, target, weight, self.regions, voxel_map, self.settings)


TENSORS = len(Request._fields) - 1
"""Tensors of a request: all fields but the settings."""


def result_shape(request: Request) -> tuple[int, ...]:
    """Return the shape of the tensor that the pass gives, as the table of `Pass` lists them."""
    (B, C, V), settings = request.input.shape, request.settings
    if settings.kind == "map":
        return B, V
    if settings.kind == "ranks":
        return 2, B if settings.per_sample else 1, C
    sums = {"confusion": C, "skeletons": 4}.get(settings.kind, len(settings.fields))
    return sums, B, request.columns


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics for an input's: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outcomes(num_classes: int, activation: str) -> int:
    """Return K, the number of outcomes that label smoothing spreads its share over.

    Classes that exclude each other are C outcomes; a class with a sigmoid, or a single mask, has two.
    """
    return 2 if activation == "sigmoid" or num_classes == 1 else num_classes


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their factors; some devices (meta) have no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def equals(labels: Tensor, value: int) -> Tensor:
    """Return where labels, of any integer dtype or bool, equal a number: bool, in their shape.

    A number that the dtype cannot hold equals none of them. torch would wrap it round:
    `torch.tensor([255], dtype=torch.uint8) == -1` is true.
    """
    limits = torch.iinfo(torch.uint8 if labels.dtype == torch.bool else labels.dtype)
    if limits.min <= value <= limits.max:
        return signed(labels) == (value if value < 2**63 else value - 2**64)  # as `signed` turns uint64 to int64
    return torch.zeros_like(labels, dtype=torch.bool)


def signed(labels: Tensor) -> Tensor:
    """Return labels, or values of any dtype, in one that torch can compare: only uint16, uint32 and uint64 change.

    Labels from 2^63 on become negative.
    """
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
    return labels.to(wider[labels.dtype]) if labels.dtype in wider else labels


# --- small constants: copied to a device once, since a copy in every call would wait for the device


def columns(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return values (..., N) at some places of the last axis, in that order; a place may be negative, as an index may.

    There is a slice for each run of consecutive places: a tensor of indices would have to be copied to the device.

    Raises:
        IndexError: a place outside of the axis.

    Example:
        >>> columns(torch.arange(6), range(1, 6)), columns(torch.arange(6), (4, 0, 1, 2))
        (tensor([1, 2, 3, 4, 5]), tensor([4, 0, 1, 2]))
    """
    runs: list[list[int]] = []  # [first, end) of each
    size = values.shape[-1]
    for number in numbers:
        if not -size <= number < size:
            raise IndexError(f"softdice: expected class numbers in [0, {size}), got {number}. Pass other numbers.")
        place = number % size
        if runs and place == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    parts = [values[..., first:end] for first, end in runs or [[0, 0]]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@lru_cache(maxsize=256)
def _kept(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor would be of no use in the next training step
        return torch.tensor(numbers, dtype=dtype, device=device)


def constant(numbers: Any, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return nested tuples of numbers as a tensor on the device of `like`, shared between calls: never write to it.

    While torch.compile traces, or if `like` is of a subclass (such as a fake tensor), it is a new one: nothing that is
    made in a trace may be kept after it.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.tensor(numbers, dtype=dtype, device=like.device)
    return _kept(numbers, dtype, like.device)


def moved(values: Tensor, like: Tensor) -> Tensor:
    """Return values in the dtype and on the device of `like`.

    (N,) values of a CPU go to another device by `constant`, which keeps the copy for later calls with equal numbers.
    """
    # `constant` reads the numbers, which would wait for a GPU, and cut a graph off
    not_by_constant = values.device == like.device or values.device.type != "cpu" or values.requires_grad
    if not_by_constant or values.ndim != 1 or torch.compiler.is_compiling():
        return values.to(like)
    return constant(tuple(values.tolist()), like.dtype, like)
