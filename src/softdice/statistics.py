"""logits, target -> statistics: the only stage that sees voxels. `measure` validates and chooses a backend.

Everything after this module is ordinary PyTorch on tensors of a few hundred numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softdice import distributed, reference, validation
from softdice.kernels import trial
from softdice.settings import CONFUSION, Pass, Voxels
from softdice.terms import FIELDS, NAMES


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
        positive_cross_entropy sum w y (-ln p), the part of E where the target is
        negative_cross_entropy sum w (1 - y) (-ln(1 - p)) for a sigmoid, else 0: the other part
        positive_focal         sum w y (1 - p)^gamma (-ln p), and
        negative_focal         sum w (1 - y) p^gamma (-ln(1 - p)) for a sigmoid, else 0: the parts of F
        voxels                 sum w, the same for every class
        labelled               sum w y before label smoothing: 0 where a class is absent
        mapped_prediction      sum w m p, with the map m that is given as voxel_map
        mapped_intersection    sum w m p y
        mapped_target          sum w m y
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
        self._fields, self._stack = tuple(sums), torch.stack(tuple(sums.values()))
        self._apart: dict[str, Tensor] | None = None

    @classmethod
    def unstack(cls, fields: Sequence[str], sums: Tensor) -> OverlapStatistics:
        """names, sums (len(fields), B, C) or (len(fields), C) -> statistics."""
        made = object.__new__(cls)  # by object's own name: torch.compile of torch 2.6 knows no other
        made._fields, made._stack, made._apart = tuple(fields), sums, None
        return made

    @property
    def _sums(self) -> dict[str, Tensor]:
        """name -> field; taken apart once. (Not a cached_property, whose lock torch.compile cannot trace.)"""
        if self._apart is None:
            self._apart = dict(zip(self._fields, self._stack.unbind(0), strict=True))
        return self._apart

    def __getattr__(self, name: str) -> Tensor:
        if name in NAMES:
            if name in self._sums:
                return self._sums[name]
            raise AttributeError(
                f"OverlapStatistics: expected a field among {', '.join(self.fields)}, got {name!r}. "
                "The pass was not asked for it: name it in fields."
            )
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"OverlapStatistics: expected a field among {', '.join(NAMES)}, got {name!r}. Correct the spelling."
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that this pass computed."""
        return self._fields

    @property
    def pooled(self) -> bool:
        """Whether the samples have been added up: (C,) and no longer (B, C)."""
        return self._stack.ndim == 2

    def pool(self) -> OverlapStatistics:
        """(B, C) statistics -> (C,), the samples of the batch added up. Pooled ones come back as they are."""
        return self if self.pooled else self._with(self._stack.sum(1))

    def _with(self, stack: Tensor) -> OverlapStatistics:
        return OverlapStatistics.unstack(self._fields, stack)

    @validation.public
    def all_reduce(self, group: Any = "world") -> OverlapStatistics:
        """pooled (C,) statistics of this rank -> the sums over all ranks of the group, in one all-reduce.

        Args:
            group: a torch.distributed ProcessGroup, or "world" for all ranks. Every rank of it must call this.

        Gradients: one all-reduce too; see `softdice.distributed`.

        Raises:
            ValueError: per-sample statistics, since sample 0 of one rank is not sample 0 of another.
            RuntimeError: no process group, or a rank that did not take part in time.
        """
        if not self.pooled:
            shape = tuple(self._stack.shape[1:])
            advice = "Add the samples up first: stats.pool().all_reduce(group)."
            validation.fail("pooled statistics, (C,)", f"statistics per sample, {shape}", advice)
        return self._with(distributed.all_reduce(self._stack, group))

    def select(self, classes: Sequence[int]) -> OverlapStatistics:
        """statistics -> those of the classes named, in that order."""
        return self._with(self._stack[..., list(classes)])

    def fill(self, where: Tensor, value: float) -> OverlapStatistics:
        """statistics -> the same with `value` in every field where `where` is true; no gradient passes there."""
        return self._with(torch.where(where, value, self._stack))

    @validation.public
    def __add__(self, other: OverlapStatistics) -> OverlapStatistics:
        if not isinstance(other, OverlapStatistics):
            return NotImplemented
        if self.fields != other.fields:
            advice = "Ask both passes for the same fields."
            validation.fail(f"the fields {', '.join(self.fields)}", ", ".join(other.fields), advice)
        return self._with(self._stack + other._stack)

    def __repr__(self) -> str:
        rows = "".join(f"\n  {name}={value}," for name, value in self._sums.items())
        return f"OverlapStatistics({rows}\n)"


def measure(
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    settings: Pass,
    num_classes: int | None = None,
    voxel_map: Tensor | None = None,
) -> OverlapStatistics:
    """What a user has, and the settings of the pass -> statistics (B, C). Of a DTensor, those of the whole."""
    sums = sums_of(input, target, voxel_weight, settings, num_classes, voxel_map)
    return OverlapStatistics.unstack(settings.fields, sums)


def sums_of(
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    settings: Pass,
    num_classes: int | None = None,
    voxel_map: Tensor | None = None,
) -> Tensor:
    """What a user has, and the settings of the pass -> its sums (rows, B, C). Of a DTensor, those of the whole."""
    sharded = distributed.sharding(input, target, voxel_weight)
    if sharded is not None:
        if voxel_map is not None:
            advice = "Gather the tensors, or pass the local parts to a loss with group."
            validation.fail("plain tensors with voxel_map", "a DTensor", advice, TypeError)
        x, y, w = distributed.outlines(input, target, voxel_weight)
        validation.tensors(x, y, w, num_classes, settings.ignore_index, False)  # the whole's shapes, on every rank
        input, target, voxel_weight = distributed.local_parts(input, target, voxel_weight)
    sums = sum_voxels(prepare(input, target, voxel_weight, settings, num_classes, voxel_map), settings)
    return sums if sharded is None else sharded.whole(sums)


def prepare(
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    settings: Pass,
    num_classes: int | None = None,
    voxel_map: Tensor | None = None,
) -> Voxels:
    """What a user has -> what a pass works on."""
    if distributed.is_dtensor(input) or distributed.is_dtensor(target):
        advice = "Compute the logits and call the loss with them, or pass the local parts to a loss with group."
        validation.fail("plain tensors", "a DTensor", advice, TypeError)
    given = validation.tensors(input, target, voxel_weight, num_classes, settings.ignore_index, settings.validate)
    if settings.regions is not None:
        given = given._replace(regions=_membership(settings.regions, input.shape[1], input.device))
    return given._replace(voxel_map=validation.voxel_map(voxel_map, input, given.columns, settings.mapped))


def _membership(regions: tuple[tuple[int, ...], ...], num_classes: int, device: torch.device) -> Tensor:
    """regions -> (R, C) bool, which class belongs to which region.

    Made anew each time: a cached tensor would be an inference tensor after validation under `torch.inference_mode`,
    and unusable in the next training step.
    """
    numbers = [validation.class_numbers("regions", region, num_classes) for region in regions]
    return torch.tensor([[c in region for c in range(num_classes)] for region in numbers], device=device)


def sum_voxels(given: Voxels, settings: Pass, backend: str | None = None) -> Tensor:
    """What `prepare` returned -> sums (rows, B, C), by the backend named, else by the one in force."""
    backend = backend or trial.choose(given, settings)
    if backend == "reference":
        if settings.validate:
            validation.values(given, settings)
        return reference.statistics(given, settings)
    from softdice.kernels import ops

    return ops.statistics(given, settings, backend)


def gradient(grad: Tensor, given: Voxels, settings: Pass, backend: str) -> Tensor:
    """dL/dsums, and what `sum_voxels` took -> dL/dinput, for code that keeps no graph of its own."""
    if backend == "reference":
        with torch.enable_grad():
            given = given._replace(input=given.input.detach().requires_grad_())
            return torch.autograd.grad(reference.statistics(given, settings), given.input, grad)[0]
    from softdice.kernels import ops

    return ops.gradient(grad, given, settings, backend)


@validation.public
def overlap_statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    ignore_index: int | None = None,
    voxel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    regions: Sequence[Sequence[int]] | None = None,
    fields: Sequence[str] | None = None,
    gamma: float = 2.0,
    power: float = 1.0,
    validate: bool = True,
    voxel_map: Tensor | None = None,
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
        fields: the statistics wanted (names of `OverlapStatistics`); the pass does no more than these need. None: all,
            those of a map where there is one.
        gamma: exponent of the focal statistic, >= 0.
        power: exponent of the difference statistic, >= 1.
        validate: check the ranges of labels, probabilities and weights (shapes and dtypes are always checked).
        voxel_map: m of the mapped statistics, any real numbers: (B, *S) or (B, 1, *S), the same for every class, or
            (B, C, *S); for regions (B, R, *S). It is read in place, in the same pass. No gradient.

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
    frozen = validation.frozen_regions(regions)
    wanted = (FIELDS if voxel_map is None else NAMES) if fields is None else tuple(fields)
    settings = Pass(activation, ignore_index, label_smoothing, frozen, validate, gamma, power, wanted)
    return measure(input, target, voxel_weight, validation.pass_settings(settings), voxel_map=voxel_map)


@validation.public
def soft_confusion(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    ignore_index: int | None = None,
    voxel_weight: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """input, target -> soft confusion matrix, (B, C, C): one differentiable pass over the voxels.

        K[b, l, c] = sum of w p_c over the voxels of sample b whose label is l

    Of probabilities that are 0 or 1 it is the matrix of counts: rows are true classes, columns predicted ones.

    Args:
        input, ignore_index, voxel_weight, validate: as for `overlap_statistics`; at least two classes.
        target: labels (B, *S) or (B, 1, *S); no per-class values.
        activation: "none" or "softmax", since a voxel has one label.

    Returns:
        (B, C, C), float64 for float64 input, else float32. Gradients reach `input`; the backward pass is one more
        pass, which writes the gradient and holds nothing else. On the CPU both are a kernel, elsewhere plain torch,
        piece by piece.

    Raises:
        TypeError, ValueError: as `overlap_statistics`.

    Edge cases: an absent class has a row of 0; no voxel that counts gives zeros; an empty batch (0, C, C).

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.75, 0.5, 0.0], [0.25, 0.5, 1.0]]]), torch.tensor([[0, 0, 1]])
        >>> softdice.soft_confusion(probabilities, labels)
        tensor([[[1.2500, 0.7500],
                 [0.0000, 1.0000]]])

    Source: the matrix of counts, of J. Gorodkin, "Comparing two K-category assignments by a K-category correlation
    coefficient", Computational Biology and Chemistry 28, 2004, with probabilities in the place of assignments.
    """
    settings = Pass(activation, ignore_index, validate=validate)
    return confusion(input, target, voxel_weight, confusion_pass(settings))


def confusion_pass(settings: Pass) -> Pass:
    """Settings -> those of the pass of a confusion matrix, checked."""
    validation.choice("activation", settings.activation, ("none", "softmax"))
    return validation.pass_settings(settings).but(fields=CONFUSION)


def confusion(
    input: Tensor, target: Tensor, voxel_weight: Tensor | None, settings: Pass, num_classes: int | None = None
) -> Tensor:
    """What a user has, and `confusion_pass` -> (B, C, C)."""
    validation.labels_alone(input, target)
    return sums_of(input, target, voxel_weight, settings, num_classes).transpose(0, 1)
