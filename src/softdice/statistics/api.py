"""The public functions over voxels: statistics, confusion matrix, map. `run_pass` checks, routes, runs and joins.

Everything after this module is ordinary PyTorch on tensors of a few hundred numbers. Shape letters: B sample, C class,
R region, *S the spatial axes, V voxels (all of *S in one axis).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softdice import validation
from softdice.backends import op, route
from softdice.parallel import dtensor, groups
from softdice.statistics import check
from softdice.statistics.declared import FIELDS, NAMES
from softdice.statistics.request import Pass, columns


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
        self._fields, self._stack = tuple(sums), torch.stack(tuple(sums.values()))  # (len(fields), B, C) or without B
        self._apart: dict[str, Tensor] | None = None

    @classmethod
    def unstack(cls, fields: Sequence[str], sums: Tensor) -> OverlapStatistics:
        """Return the statistics named in `fields` with the sums (len(fields), B, C) or (len(fields), C), not copied."""
        made = object.__new__(cls)  # not cls.__new__, which torch.compile of torch 2.6 cannot trace
        made._fields, made._stack, made._apart = tuple(fields), sums, None
        return made

    @property
    def _sums(self) -> dict[str, Tensor]:
        """The sums by field, views of the stack. (Not a cached_property, whose lock torch.compile cannot trace.)"""
        if self._apart is None:
            self._apart = dict(zip(self._fields, self._stack.unbind(0), strict=True))
        return self._apart

    def __getattr__(self, name: str) -> Tensor:
        """Return the field, (B, C) or (C,); raise AttributeError if there is none or the pass was not asked for it."""
        if name in NAMES and name in self._sums:
            return self._sums[name]
        if name.startswith("_"):  # copy and pickle look for private names, and read no advice
            raise AttributeError(name)
        fields, advice = NAMES, "Correct the spelling."
        if name in NAMES:
            fields, advice = self.fields, "The pass was not asked for it: name it in fields."
        raise AttributeError(f"OverlapStatistics: expected a field among {', '.join(fields)}, got {name!r}. {advice}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that this pass computed."""
        return self._fields

    @property
    def pooled(self) -> bool:
        """Whether the samples have been added up: (C,) and no longer (B, C)."""
        return self._stack.ndim == 2

    def pool(self) -> OverlapStatistics:
        """Return the sums over the samples of the batch, (C,). Pooled statistics come back as they are."""
        return self if self.pooled else self._with(self._stack.sum(1))

    def _with(self, stack: Tensor) -> OverlapStatistics:
        return OverlapStatistics.unstack(self._fields, stack)

    @validation.public
    def all_reduce(self, group: Any = "world") -> OverlapStatistics:
        """Return the sums of pooled (C,) statistics over all ranks of the group, in one all-reduce.

        Args:
            group: a torch.distributed ProcessGroup, or "world" for all ranks. Every rank of it must call this.

        Gradients: one all-reduce too; see `softdice.parallel.groups`.

        Raises:
            ValueError: per-sample statistics, since sample 0 of one rank is not sample 0 of another.
            RuntimeError: no process group, or a rank that did not take part in time.
        """
        if not self.pooled:
            shape = tuple(self._stack.shape[1:])
            advice = "Add the samples up first: stats.pool().all_reduce(group)."
            validation.fail("pooled statistics, (C,)", f"statistics per sample, {shape}", advice)
        return self._with(groups.all_reduce(self._stack, group))

    def select(self, classes: Sequence[int]) -> OverlapStatistics:
        """Return the statistics of some classes, by their numbers, in that order."""
        return self._with(columns(self._stack, tuple(classes)))

    def fill(self, where: Tensor, value: float) -> OverlapStatistics:
        """Return the statistics with `value` in every field where `where` is true; no gradient passes there."""
        return self._with(torch.where(where, value, self._stack))

    @validation.public
    def __add__(self, other: OverlapStatistics) -> OverlapStatistics:
        """Return the statistics of both sets of voxels, sample by sample or of pooled ones.

        Raise ValueError if the two have not the same fields, samples and classes.
        """
        if not isinstance(other, OverlapStatistics):
            return NotImplemented
        if self.fields != other.fields:
            advice = "Ask both passes for the same fields."
            validation.fail(f"the fields {', '.join(self.fields)}", ", ".join(other.fields), advice)
        shapes = [tuple(stats._stack.shape[1:]) for stats in (self, other)]
        if shapes[0] != shapes[1]:  # torch would add a sample to each sample of the other batch
            advice = "Add the samples of each batch up first: a.pool() + b.pool()."
            validation.fail(f"statistics of shape {shapes[0]}", shapes[1], advice)
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
    group: Any = None,
) -> OverlapStatistics:
    """Sum the statistics in `settings.fields` over the voxels; return them, (B, C or R), or (C or R,) with a group.

    The user's tensors, input (B, C, *S), target (B, *S) or (B, C, *S) and so on, come unchecked: see `run_pass` for
    them, the other arguments and the errors.
    """
    sums = run_pass(input, target, voxel_weight, settings, num_classes, voxel_map, group)
    return OverlapStatistics.unstack(settings.fields, sums)


def run_pass(
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    settings: Pass,
    num_classes: int | None = None,
    voxel_map: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Check the tensors, choose a backend, run the pass, join the parts of DTensors: return the result of the pass.

    It is on the autograd graph. The kind of pass sets its shape, as the table of `Pass` says: (rows, B, C or R) for
    sums, with a row for each statistic.

    Args:
        input, target, voxel_weight, voxel_map: unchecked, from the user. input (B, C, *S), floating; target labels
            (B, *S) or values (B, C, *S); voxel_weight (B, *S); voxel_map (B, *S) or (B, C, *S); each (B, *S) may be
            (B, 1, *S). DTensors (without a voxel_map) give sums of the whole.
        settings: from `check.pass_settings`. num_classes: what C has to be; None for any.
        group: a ProcessGroup, "world" or None. With a group the result is summed over its samples and over the ranks of
            the group: (rows, C or R).

    Raise TypeError or ValueError for tensors that do not fit, RuntimeError if a rank of the group does not take part.
    """
    shards = dtensor.sharding(input, target, voxel_weight, settings, group)
    if shards is not None:
        input, target, voxel_weight = shards.local_parts(input, target, voxel_weight, voxel_map, settings, num_classes)
    request = check.request(input, target, voxel_weight, settings, num_classes, voxel_map)
    backend = route.choose(request)
    result = op.run(request, backend)
    if shards is not None:
        result = shards.join(result)
    return result if group is None else groups.all_reduce(result.sum(1), group)


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
    """Return the statistics of input and target, (B, C): one fused, differentiable pass over the voxels.

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
    return measure(input, target, voxel_weight, check.pass_settings(settings), voxel_map=voxel_map)


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
    """Return the soft confusion matrix, (B, C, C): one differentiable pass over the voxels.

        K[b, l, c] = sum of w p_c over the voxels of sample b whose label is l

    For probabilities of 0 and 1 it is the matrix of counts: rows are true classes, columns predicted ones.

    Args:
        input: (B, C, *S) with C >= 2, floating. ignore_index, voxel_weight, validate: as for `overlap_statistics`.
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
    settings = confusion_pass(Pass(activation, ignore_index, validate=validate))
    return run_pass(input, target, voxel_weight, settings).transpose(0, 1)


def confusion_pass(settings: Pass) -> Pass:
    """Check a user's settings, and return them for a pass that computes confusion matrices.

    Raise ValueError for a sigmoid, and TypeError or ValueError for a setting out of its range.
    """
    validation.choice("activation", settings.activation, ("none", "softmax"))
    return check.pass_settings(settings).but(kind="confusion")


@validation.public
def voxel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    validate: bool = True,
) -> Tensor:
    """Return the cross-entropy of each voxel, (B, *S): 1 / C of the size of the logits, and differentiable.

        E_v = -sum_c y_c ln p_c        sigmoid:  E_v = -sum_c (y_c ln p_c + (1 - y_c) ln(1 - p_c))

    so -ln p of the true class of a label map. The sum over the voxels is `overlap_statistics(...).cross_entropy`.

    Args: input (B, C, *S), target labels (B, *S) or values (B, C, *S); the rest as for `softdice.overlap_statistics`.

    Returns:
        (B, *S), float64 for float64 input, else float32; 0 at a voxel that is ignored.

    Memory: the map; in the backward pass the gradient of input, made in one pass with a weight per voxel. On CUDA the
    map is made by torch, chunk by chunk; under torch.compile, torch.func and on other devices by the definition, with
    some tensors of the size of input.

    Raises:
        TypeError, ValueError: as `softdice.overlap_statistics`.

    Edge cases: a NaN in input gives NaN at its voxel, unless that is ignored.

    Example:
        >>> import torch, softdice
        >>> logits, labels = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 2.0, 3.0]]]), torch.tensor([[0, 1, 255]])
        >>> softdice.voxel_cross_entropy(logits, labels, activation="softmax", ignore_index=255)
        tensor([[0.3133, 0.1269, 0.0000]])

    Source: `torch.nn.functional.cross_entropy` with reduction="none".
    """
    settings = map_pass(Pass(activation, ignore_index, label_smoothing, validate=bool(validate)))
    return cross_entropy_map(input, target, settings)


def map_pass(settings: Pass) -> Pass:
    """Return the checked settings of the pass for a map of cross-entropies; raise what `check.pass_settings` raises."""
    return check.pass_settings(settings.but(fields=("cross_entropy",), kind="map"))


def cross_entropy_map(input: Tensor, target: Tensor, settings: Pass, num_classes: int | None = None) -> Tensor:
    """Return the cross-entropy of each voxel, (B, *S), for settings from `map_pass`; for the rest see `run_pass`."""
    entropy_BV = run_pass(input, target, None, settings, num_classes)
    return entropy_BV.view(input.shape[0], *input.shape[2:])
