"""A loss, and a weighted sum of losses.

A sum makes one pass over the voxels for all terms that are functions of the statistics; any other term makes its own.
Its `terms` are pairs of a factor and a loss, as `_terms` lists them. Shape letters: B sample, C class, *S space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.costs import Cost
from softdice.statistics import check
from softdice.statistics.api import OverlapStatistics, measure
from softdice.statistics.declared import READERS
from softdice.statistics.request import SETTINGS, Pass, constant


class Loss(nn.Module):
    """A loss of logits (or probabilities) and a target, which can be scaled and added to others. Abstract.

    A subclass sets `num_classes` and defines `forward(input, target, voxel_weight=None)`; one that has an
    `ignore_index` keeps it under that name. Errors in its `__init__` and `forward` begin with the name of the class.
    """

    TAKES: tuple[str, ...] = ()
    """The keywords of `LossSettings` that this loss has a meaning for."""

    num_classes: int
    ignore_index: int | None = None
    # the user's settings, set by `softdice.losses.settings.adopt`; class_weight holds the weights of `classes` alone
    cost: Cost
    pooling: str
    absent: str
    reduction: str
    classes: tuple[int, ...] | None
    class_weight: Tensor | None
    group: Any

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Wrap the subclass's `__init__` and `forward`, so that their errors begin with its name."""
        super().__init_subclass__(**keywords)
        for name in ("__init__", "forward"):
            # an inherited one, too, so that each class has a code object: torch.compile limits recompilations of each
            method = getattr(cls, name)
            setattr(cls, name, validation.public(getattr(method, "__wrapped__", method)))

    def __add__(self, other: Loss) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return _sum([*_terms(self), *_terms(other)])

    def __radd__(self, other: object) -> Loss:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # so that sum([...]) works

    def __mul__(self, factor: float) -> Loss:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return _sum([(factor * weight, term) for weight, term in _terms(self)])

    __rmul__ = __mul__


class StatisticsLoss(Loss):
    """A function of the statistics of one pass: losses of this kind share it in a sum. Abstract.

    A subclass sets `num_classes`, `settings` (the pass that it needs) and `group` (the ranks whose statistics are
    added), and defines `from_statistics`.
    """

    settings: Pass
    group: Any = None

    @property
    def ignore_index(self) -> int | None:  # type: ignore[override]
        """The label that the pass leaves out, or None."""
        return self.settings.ignore_index

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """Return the loss, 0-d unless the reduction is "none", for statistics of a batch, (B, C), or pooled ones, (C,).

        counted: (C,) bool, False leaves a class out of the mean; None counts all.
        """
        validation.fail("a subclass with from_statistics", "one without", "Define it.", TypeError)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        voxel_weight: Tensor | None = None,
        *,
        voxel_map: Tensor | None = None,
        merge: Mapping[int, Sequence[int]] | None = None,
    ) -> Tensor:
        """input, target -> loss, a tensor on the autograd graph.

        Args:
            input: (B, C, *S) floating: logits, or probabilities for activation="none".
            target: labels (B, *S) or (B, 1, *S), or values of each class (B, C, *S) in [0, 1].
            voxel_weight: (B, *S) or (B, 1, *S), >= 0; 0 leaves the voxel out.
            voxel_map: numbers (B, *S), (B, 1, *S) or (B, C, *S), only for losses that read them: `BoundaryLoss`,
                `SkeletonRecallLoss`, sums with them.
            merge: for this call, classes that count as part of another: `{0: (2, 3)}` adds the probabilities of
                classes 2 and 3 to that of class 0, takes their labels for label 0, and leaves classes 2 and 3 out of
                the mean (nan for reduction="none"). For images on which someone did not annotate classes 2 and 3.

        Raise TypeError or ValueError for tensors that do not fit, or classes in `merge` that do not.
        """
        settings, counted = self.merged(merge, input)
        stats = measure(input, target, voxel_weight, settings, self.num_classes, voxel_map, self.group)
        return self.from_statistics(stats, counted)

    def merged(self, merge: Mapping[int, Sequence[int]] | None, input: Tensor) -> tuple[Pass, Tensor | None]:
        """Return the pass for a call with the user's `merge`, and which classes count: (C,) bool, None for all.

        The pass has a region for each class: the class with those that it absorbs. Only the device of `input` is read.
        Raise TypeError if `merge` does not map classes to classes, ValueError if the loss has regions or a sigmoid, or
        if a number in `merge` is no class or occurs twice.
        """
        parts = {c: validation.numbers_of(part) for c, part in merge.items()} if isinstance(merge, Mapping) else {}
        if merge is not None and not (
            isinstance(merge, Mapping) and all(isinstance(part, tuple) for part in parts.values())
        ):
            advice = "Pass the classes that count as part of another, for example {0: (2, 3)}."
            validation.fail("merge to map a class to classes", repr(merge), advice, TypeError)
        if not merge:
            return self.settings, None
        if self.settings.regions is not None or self.settings.activation == "sigmoid":
            got = "regions" if self.settings.regions is not None else "activation='sigmoid'"
            advice = "Where channels are decided one by one, leave the class out with classes= or voxel_weight."
            validation.fail("classes that exclude each other, with merge", got, advice)
        absorbed = [c for part in parts.values() for c in part]
        validation.class_numbers("merge", [*parts, *absorbed], self.num_classes)
        all_classes = range(self.num_classes)
        regions = tuple((c, *map(int, parts.get(c, ()))) for c in all_classes)
        counted = constant(tuple(c not in absorbed for c in all_classes), torch.bool, input)
        return self.settings.but(regions=regions), counted


def words(loss: type[Loss]) -> str:
    """Return the name of a loss as functions and commands spell it: in lower case, without "Loss".

    Example:
        >>> words(type("MCCLoss", (), {})), words(type("TopKCrossEntropyLoss", (), {}))
        ('mcc', 'top_k_cross_entropy')
    """
    name = loss.__name__.removesuffix("Loss")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _terms(loss: Loss) -> list[tuple[float, Any]]:
    """Return the weights and losses of a sum; a single loss is a sum of one, with weight 1."""
    if isinstance(loss, (SumLoss, MixedSumLoss)):
        return list(zip(loss.weights, loss.terms, strict=True))
    return [(1.0, loss)]


def _sum(terms: Sequence[tuple[float, Any]]) -> Loss:
    """Return the weighted sum of losses: a `SumLoss` if all are functions of the statistics, else a `MixedSumLoss`."""
    return (SumLoss if all(isinstance(term, StatisticsLoss) for _, term in terms) else MixedSumLoss)(terms)


def _weighted_sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Return the sum of factor times value; a factor of 1 costs no operation."""
    values = [value if weight == 1 else weight * value for weight, value in terms]
    return sum(values[1:], values[0])


def _weights(terms: Sequence[tuple[float, Loss]]) -> tuple[float, ...]:
    """Return the factors of terms; raise ValueError if one is not finite, or the losses differ in num_classes."""
    for weight, term in terms:
        if not math.isfinite(weight):
            validation.fail("a finite factor", weight, "Scale a loss by a number.")
        _agree("num_classes", terms[0][1].num_classes, term.num_classes)
    return tuple(weight for weight, _ in terms)


class SumLoss(StatisticsLoss):
    """losses -> their weighted sum, from one pass over the voxels. Written `a + 0.5 * b`.

    Raises:
        ValueError: the losses differ in a setting that concerns the pass (activation, ignore_index, label_smoothing,
            regions, validate, gamma, power), in num_classes or in group; the message names the setting.

    Example:
        >>> import torch, softdice
        >>> a = softdice.SoftDiceLoss(2, activation="softmax")
        >>> b = softdice.SoftDiceLoss(2, activation="softmax", cost="one_minus")
        >>> both = a + 0.5 * b
        >>> logits, labels = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]])
        >>> torch.equal(both(logits, labels), a(logits, labels) + 0.5 * b(logits, labels))
        True
    """

    def __init__(self, terms: Sequence[tuple[float, StatisticsLoss]]) -> None:
        super().__init__()
        self.weights = _weights(terms)
        self.terms = nn.ModuleList(term for _, term in terms)
        first = terms[0][1]
        self.num_classes, self.settings, self.group = first.num_classes, first.settings, first.group
        for _, term in terms[1:]:
            self.settings = _one_pass(self.settings, term.settings)
            _agree("group", self.group, term.group)

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the terms' losses for the statistics of a batch."""
        return _weighted_sum((weight, term.from_statistics(stats, counted)) for weight, term in _terms(self))

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class MixedSumLoss(Loss):
    """losses -> their weighted sum, where some are not functions of the statistics. Written `a + 0.5 * b`.

    The losses that are functions of the statistics share one pass, as in a `SumLoss`; each of the others makes its own.
    `voxel_weight` goes to all.

    Raises:
        ValueError: as `SumLoss`, for the losses that share a pass; the losses differ in num_classes.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        super().__init__()
        self.weights = _weights(terms)
        self.terms = nn.ModuleList(term for _, term in terms)
        self.num_classes = terms[0][1].num_classes
        # for `DeepSupervision`, which does not average a target that may hold such a label
        self.ignore_index = next((t.ignore_index for _, t in terms if t.ignore_index is not None), None)
        one_pass = [(weight, term) for weight, term in terms if isinstance(term, StatisticsLoss)]
        others = [(weight, term) for weight, term in terms if not isinstance(term, StatisticsLoss)]
        # (factor, loss) of each pass; a plain list, so that no module is registered twice: `terms` holds them
        self.parts = [(1.0, SumLoss(one_pass)), *others] if one_pass else others

    def forward(
        self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None, *, voxel_map: Tensor | None = None
    ) -> Tensor:
        """input, target -> loss, a tensor on the autograd graph.

        Each loss gets input (B, C, *S), target (B, *S) or (B, C, *S) and voxel_weight (B, *S) as they are, and raises
        its errors. voxel_map goes to the losses that share a pass; raise ValueError if there are none.
        """
        if voxel_map is not None and not isinstance(self.parts[0][1], SumLoss):
            got = tuple(voxel_map.shape)
            validation.fail("no voxel_map, since no loss of this sum reads one", got, "Leave it out.")
        values = []
        for weight, loss in self.parts:
            keywords = {"voxel_map": voxel_map} if isinstance(loss, SumLoss) else {}
            values.append((weight, loss(input, target, voxel_weight, **keywords)))
        return _weighted_sum(values)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _one_pass(a: Pass, b: Pass) -> Pass:
    """Return the settings of one pass that computes the statistics (`fields`) of both.

    Raise ValueError if the two differ in another setting. gamma and power change only a few statistics (`READERS`): if
    one of the passes alone computes those, its number is taken.
    """
    both = a.but(fields=a.fields + b.fields)
    for name in (name for name in SETTINGS if name != "fields"):
        readers = READERS.get(name)  # the statistics that depend on it; None for a setting that concerns all
        if readers is None or (readers & {*a.fields} and readers & {*b.fields}):
            _agree(name, getattr(a, name), getattr(b, name))
        elif readers & {*b.fields}:
            both = both.but(**{name: getattr(b, name)})
    return check.pass_settings(both)  # which sorts the fields, each once


def _agree(name: str, first: object, second: object) -> None:
    """Raise ValueError if the setting `name` has the values `first` and `second`, not equal, in two losses of a sum."""
    if first != second:
        advice = f"Give both the same {name}, or call the losses one by one and add the results."
        expected = f"losses that agree on {name}, since they share one pass"
        validation.fail(expected, f"{first!r} and {second!r}", advice)
