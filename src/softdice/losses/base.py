"""input, target -> loss: what a single loss and a sum of losses have in common.

A sum reads the voxels once for all the terms that are functions of the statistics; any other is called by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
    """Keywords of `LossSettings` that mean something for the loss."""

    num_classes: int
    ignore_index: int | None = None
    # what `softdice.losses.settings.adopt` keeps
    cost: Cost
    pooling: str
    absent: str
    reduction: str
    classes: tuple[int, ...] | None
    class_weight: Tensor | None
    group: Any

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in (
            "__init__",
            "forward",
        ):  # an inherited one, too: torch.compile limits recompilations per code object
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
        """The pass's."""
        return self.settings.ignore_index

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """statistics of one batch, (B, C) or pooled (C,) -> loss. counted: (C,) bool, False leaves a class out."""
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
            input, target, voxel_weight: as for `softdice.overlap_statistics`.
            voxel_map: likewise, for losses that read one: `BoundaryLoss`, `SkeletonRecallLoss`, sums with them.
            merge: for this call, classes that count as part of another: `{0: (2, 3)}` adds the probabilities of
                classes 2 and 3 to that of class 0, takes their labels for label 0, and leaves classes 2 and 3 out of
                the mean (nan for reduction="none"). For images on which someone did not annotate classes 2 and 3.
        """
        settings, counted = self.merged(merge, input)
        stats = measure(input, target, voxel_weight, settings, self.num_classes, voxel_map, self.group)
        return self.from_statistics(stats, counted)

    def merged(self, merge: Mapping[int, Sequence[int]] | None, input: Tensor) -> tuple[Pass, Tensor | None]:
        """merge of one call -> the pass that it needs, and which classes count, on input's device (None: all)."""
        if merge is None:
            return self.settings, None
        if self.settings.regions is not None or self.settings.activation == "sigmoid":
            got = "regions" if self.settings.regions is not None else "activation='sigmoid'"
            advice = "Where channels are decided one by one, leave the class out with classes= or voxel_weight."
            validation.fail("classes that exclude each other, with merge", got, advice)
        parts = [part for group in merge.values() for part in group]
        validation.class_numbers("merge", [*merge, *parts], self.num_classes)
        classes = range(self.num_classes)
        unions = tuple((c, *(int(part) for part in merge.get(c, ()))) for c in classes)
        counted = constant(tuple(c not in parts for c in classes), torch.bool, input)
        return self.settings.but(regions=unions), counted


def words(loss: type[Loss]) -> str:
    """class of a loss -> its name as functions and commands have it.

    Example:
        >>> words(type("MCCLoss", (), {})), words(type("TopKCrossEntropyLoss", (), {}))
        ('mcc', 'top_k_cross_entropy')
    """
    name = loss.__name__.removesuffix("Loss")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _terms(loss: Loss) -> list[tuple[float, Any]]:
    if isinstance(loss, (SumLoss, MixedSumLoss)):
        return list(zip(loss.weights, loss.terms, strict=True))
    return [(1.0, loss)]


def _sum(terms: Sequence[tuple[float, Any]]) -> Loss:
    return (SumLoss if all(isinstance(term, StatisticsLoss) for _, term in terms) else MixedSumLoss)(terms)


def _weights(terms: Sequence[tuple[float, Loss]]) -> tuple[float, ...]:
    """Return the weights; raise if one is not finite, or the losses differ in the number of classes."""
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
        """statistics of one batch -> the weighted sum of the terms' losses."""
        values = [weight * term.from_statistics(stats, counted) for weight, term in _terms(self)]
        return sum(values[1:], values[0])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class MixedSumLoss(Loss):
    """losses -> their weighted sum, where some are no functions of the statistics. Written `a + 0.5 * b`.

    Those that are share one pass, as in a `SumLoss`; every other has the passes of its own. `voxel_weight` goes to all.

    Raises:
        ValueError: as `SumLoss`, for the losses that share a pass; the losses differ in num_classes.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        super().__init__()
        self.weights = _weights(terms)
        self.terms = nn.ModuleList(term for _, term in terms)
        self.num_classes = terms[0][1].num_classes
        self.ignore_index = next((t.ignore_index for _, t in terms if t.ignore_index is not None), None)
        shared = [(weight, term) for weight, term in terms if isinstance(term, StatisticsLoss)]
        apart = [(weight, term) for weight, term in terms if not isinstance(term, StatisticsLoss)]
        self.parts = [(1.0, SumLoss(shared)), *apart] if shared else apart  # a list: `terms` holds the modules

    def forward(
        self, input: Tensor, target: Tensor, voxel_weight: Tensor | None = None, *, voxel_map: Tensor | None = None
    ) -> Tensor:
        """input, target -> loss, a tensor on the autograd graph. voxel_map: for the losses that share a pass."""
        if voxel_map is not None and not isinstance(self.parts[0][1], SumLoss):
            got = tuple(voxel_map.shape)
            validation.fail("no voxel_map, since no loss of this sum reads one", got, "Leave it out.")
        values = []
        for weight, loss in self.parts:
            of_pass = {"voxel_map": voxel_map} if isinstance(loss, SumLoss) else {}
            values.append(weight * loss(input, target, voxel_weight, **of_pass))
        return sum(values[1:], values[0])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _one_pass(a: Pass, b: Pass) -> Pass:
    """Return the pass that serves both losses."""
    both = a.but(fields=a.fields + b.fields)
    for name in (name for name in SETTINGS if name != "fields"):
        readers = READERS.get(name)
        if readers is None or (readers & {*a.fields} and readers & {*b.fields}):
            _agree(name, getattr(a, name), getattr(b, name))
        elif readers & {*b.fields}:
            both = both.but(**{name: getattr(b, name)})
    return check.pass_settings(both)


def _agree(name: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        advice = f"Give both the same {name}, or call the losses one by one and add the results."
        expected = f"losses that agree on {name}, since they share one pass"
        validation.fail(expected, f"{ours!r} and {theirs!r}", advice)
