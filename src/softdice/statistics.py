"""logits, target -> statistics: the only stage that sees voxels.

Everything after this module is ordinary PyTorch on tensors of a few hundred numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softdice import distributed, reference, validation
from softdice.kernels import registry
from softdice.reference import FIELDS


class OverlapStatistics:
    """Sums over voxels, per sample and class: all that an overlap loss or score needs to know.

    With p the probability, y the target and w the weight of a voxel (0 = ignored), the fields are

        ====================== ======================================================================
        intersection           I = sum w p y
        prediction             P = sum w p
        target                 T = sum w y
        prediction_squared     Q = sum w p^2
        target_squared         R = sum w y^2
        difference             D = sum w abs(p - y)^power
        cross_entropy          E = sum w y (-ln p); for a sigmoid also w (1 - y) (-ln(1 - p))
        focal                  F = sum w y (1 - p)^gamma (-ln p); for a sigmoid also w (1 - y) p^gamma (-ln(1 - p))
        voxels                 sum w, the same for every class
        labelled               sum w y before label smoothing: 0 where a class is absent
        ====================== ======================================================================

    each of shape (B, C), or (C,) once pooled. A field that the pass was not asked for raises AttributeError.
    Sums add: `a + b` are the statistics of both sets of voxels together.

    Example:
        >>> import torch, softdice
        >>> probabilities = torch.tensor([[[0.9, 0.2], [0.1, 0.8]]])
        >>> stats = softdice.overlap_statistics(probabilities, torch.tensor([[0, 1]]))
        >>> stats.intersection
        tensor([[0.9000, 0.8000]])
        >>> stats.pool().prediction
        tensor([1.1000, 0.9000])
    """

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self._sums = dict(sums)

    def __getattr__(self, name: str) -> Tensor:
        if name in FIELDS:
            if name in self._sums:
                return self._sums[name]
            raise AttributeError(
                f"OverlapStatistics: expected a field among {', '.join(self._sums)}, got {name!r}. "
                "The pass was not asked for it: name it in fields."
            )
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"OverlapStatistics: expected a field among {', '.join(FIELDS)}, got {name!r}. Correct the spelling."
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that this pass computed."""
        return tuple(self._sums)

    @property
    def pooled(self) -> bool:
        """Whether the samples have been added up: (C,) and no longer (B, C)."""
        return next(iter(self._sums.values())).ndim == 1

    def pool(self) -> OverlapStatistics:
        """(B, C) statistics -> (C,), the samples of the batch added up. Pooled ones come back as they are."""
        if self.pooled:
            return self
        return OverlapStatistics({name: value.sum(0) for name, value in self._sums.items()})

    def all_reduce(self, group: Any = "world") -> OverlapStatistics:
        """pooled (C,) statistics of this rank -> the sums over all ranks of the group, in one all-reduce.

        Args:
            group: a torch.distributed ProcessGroup, or "world" for all ranks. Every rank of it must call this.

        Gradients: one all-reduce too; see `softdice.distributed`.

        Raises:
            ValueError: per-sample statistics, since sample 0 of one rank is not sample 0 of another.
            RuntimeError: no process group, or a rank that did not take part in time.
        """
        caller = "OverlapStatistics.all_reduce"
        if not self.pooled:
            shape = tuple(next(iter(self._sums.values())).shape)
            advice = "Add the samples up first: stats.pool().all_reduce(group)."
            validation.fail(caller, "pooled statistics, (C,)", f"statistics per sample, {shape}", advice)
        sums = distributed.all_reduce(caller, torch.stack(tuple(self._sums.values())), group)
        return OverlapStatistics(dict(zip(self._sums, sums.unbind(0), strict=True)))

    def select(self, classes: Sequence[int]) -> OverlapStatistics:
        """statistics -> those of the classes named, in that order."""
        index = list(classes)
        return OverlapStatistics({name: value[..., index] for name, value in self._sums.items()})

    def fill(self, where: Tensor, value: float) -> OverlapStatistics:
        """statistics -> the same with `value` in every field where `where` is true; no gradient passes there."""
        return OverlapStatistics({name: torch.where(where, value, field) for name, field in self._sums.items()})

    def __add__(self, other: OverlapStatistics) -> OverlapStatistics:
        if not isinstance(other, OverlapStatistics):
            return NotImplemented
        if self.fields != other.fields:
            validation.fail(
                "OverlapStatistics.__add__",
                f"the fields {', '.join(self.fields)}",
                ", ".join(other.fields),
                "Ask both passes for the same fields.",
            )
        return OverlapStatistics({name: value + other._sums[name] for name, value in self._sums.items()})

    def __repr__(self) -> str:
        rows = "".join(f"\n  {name}={value}," for name, value in self._sums.items())
        return f"OverlapStatistics({rows}\n)"


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
    group: Any = None

    def checked(self, caller: str) -> Pass:
        """Itself, with the fields in the package's order; or an error that names the setting."""
        validation.pass_settings(
            caller,
            self.activation,
            self.ignore_index,
            self.label_smoothing,
            self.gamma,
            self.power,
            self.fields,
            self.regions,
        )
        distributed.check_group(caller, self.group)
        ordered = tuple(name for name in FIELDS if name in self.fields)
        return replace(self, fields=ordered)

    def __call__(
        self, caller: str, input: Tensor, target: Tensor, voxel_weight: Tensor | None, num_classes: int | None = None
    ) -> OverlapStatistics:
        """input, target -> statistics: check, choose a backend, differentiate. Of a DTensor, those of the whole."""
        sharded = distributed.sharding(caller, input, target, voxel_weight, self.group)
        if sharded is None:
            return self.named(self.sums(caller, *self.prepare(caller, input, target, voxel_weight, num_classes)))
        given: list[Any] = [input, target, voxel_weight]
        x: Any
        y: Any
        x, y, w = (t if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in given)
        validation.tensors(caller, x, y, w, num_classes, self.ignore_index, False)  # the whole's shapes, on every rank
        x, y, w = (t if t is None else t.to_local() for t in given)
        return self.named(sharded.whole(caller, self.sums(caller, *self.prepare(caller, x, y, w, num_classes))))

    def prepare(
        self, caller: str, input: Tensor, target: Tensor, voxel_weight: Tensor | None, num_classes: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What a user has -> input (B, C, V), target, weight (B, V) or None, regions (R, C) or None; checked."""
        if distributed.is_dtensor(input) or distributed.is_dtensor(target):
            advice = "Compute the logits and call the loss with them, or pass the local parts to a loss with group."
            validation.fail(caller, "plain tensors", "a DTensor", advice, TypeError)
        input, target, weight = validation.tensors(
            caller, input, target, voxel_weight, num_classes, self.ignore_index, self.validate
        )
        regions = None
        if self.regions is not None:
            regions = _membership(caller, self.regions, input.shape[1], input.device)
        return input, target, weight, regions

    def sums(
        self,
        caller: str,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        regions: Tensor | None,
        backend: str | None = None,
    ) -> Tensor:
        """What `prepare` returned -> sums (len(fields), B, C), by the backend named, else by the one in force."""
        backend = backend or registry.choose(input, target, weight)
        if backend == "reference":
            if self.validate:
                validation.values(caller, input, target, weight, self.activation, self.ignore_index)
            return self._reference(input, target, weight, regions)
        from softdice.kernels import ops

        return ops.statistics(caller, self, input, target, weight, regions, backend)

    def gradient(
        self,
        grad: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        regions: Tensor | None,
        backend: str,
    ) -> Tensor:
        """dL/dsums, and what made the sums -> dL/dinput, for code that keeps no graph of its own."""
        if backend == "reference":
            with torch.enable_grad():
                input = input.detach().requires_grad_()
                return torch.autograd.grad(self._reference(input, target, weight, regions), input, grad)[0]
        from softdice.kernels import ops

        return ops.gradient(self, grad, input, target, weight, regions, backend)

    def named(self, sums: Tensor) -> OverlapStatistics:
        """sums (len(fields), B, C) -> statistics (B, C); or, with a group, its ranks' together, pooled (C,)."""
        stats = OverlapStatistics(dict(zip(self.fields, sums.unbind(0), strict=True)))
        return stats if self.group is None else stats.pool().all_reduce(self.group)

    def _reference(self, input: Tensor, target: Tensor, weight: Tensor | None, regions: Tensor | None) -> Tensor:
        return reference.statistics(
            input,
            target,
            weight,
            regions,
            fields=self.fields,
            activation=self.activation,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
            power=self.power,
        )


def _membership(caller: str, regions: tuple[tuple[int, ...], ...], num_classes: int, device: torch.device) -> Tensor:
    """regions -> (R, C) bool, which class belongs to which region.

    Made anew each time: a cached tensor would be an inference tensor after validation under `torch.inference_mode`,
    and unusable in the next training step.
    """
    numbers = [validation.class_numbers(caller, "regions", region, num_classes) for region in regions]
    return torch.tensor([[c in region for c in range(num_classes)] for region in numbers], device=device)


def overlap_statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    ignore_index: int | None = None,
    voxel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    regions: Sequence[Sequence[int]] | None = None,
    fields: Sequence[str] = FIELDS,
    gamma: float = 2.0,
    power: float = 1.0,
    validate: bool = True,
) -> OverlapStatistics:
    """input, target -> statistics, (B, C): one fused, differentiable pass over the voxels.

    Args:
        input: (B, C, *S), float16, bfloat16, float32 or float64; any strides, contiguous and channels-last are read
            in place. Probabilities for `activation="none"`, logits otherwise.
        target: labels (B, *S) or (B, 1, *S), any integer dtype or bool (a float map with whole values is converted
            once); or per-class values (B, C, *S) in [0, 1]. With C = 1 the mask of that class, hard or soft.
        activation: "none", "softmax" or "sigmoid": what turns `input` into probabilities, inside the pass.
        ignore_index: voxels with this label enter no sum and get a gradient of exactly 0. Only for label maps.
        voxel_weight: (B, *S) or (B, 1, *S), >= 0; a voxel of weight 0 is ignored.
        label_smoothing: e in [0, 1): y' = (1 - e) y + e / K with K = C, or K = 2 for a sigmoid or a single class.
        regions: unions of classes, for example ((1, 2, 3), (1, 3), (3,)); the statistics are then per region, with the
            sum of the classes' probabilities and the union of their labels.
        fields: the statistics wanted (names of `OverlapStatistics`); the pass does no more than these need.
        gamma: exponent of the focal statistic, >= 0.
        power: exponent of the difference statistic, >= 1.
        validate: check the ranges of labels, probabilities and weights (shapes and dtypes are always checked).

    Returns:
        OverlapStatistics of shape (B, C) ((B, R) with regions), float64 for float64 input, else float32. Gradients
        reach `input` (and, on the reference backend, a floating `target` and `voxel_weight`).

    Raises:
        TypeError: a tensor of the wrong kind or dtype.
        ValueError: shapes that do not fit, a label outside [0, C), a probability outside [0, 1], a negative weight.

    Edge cases: no voxel that counts gives sums of 0; a NaN in `input` gives NaN, unless the voxel is ignored; an empty
    batch gives statistics of shape (0, C); of DTensors split over the batch or over space, every rank gets the
    statistics of the whole as plain tensors.

    Example:
        >>> import torch, softdice
        >>> logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]]])
        >>> labels = torch.tensor([[0, 1, 255]])
        >>> stats = softdice.overlap_statistics(logits, labels, activation="softmax", ignore_index=255)
        >>> stats.intersection
        tensor([[0.8808, 0.8808]])
        >>> stats.voxels
        tensor([[2., 2.]])

    Source: the sums behind F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016, and the losses that followed it.
    """
    caller = "overlap_statistics"
    frozen = validation.frozen_regions(caller, regions)
    settings = Pass(activation, ignore_index, label_smoothing, frozen, validate, gamma, power, tuple(fields))
    return settings.checked(caller)(caller, input, target, voxel_weight)
