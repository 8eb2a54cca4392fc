"""input, target -> loss: what a single loss and a sum of losses have in common. A sum reads the voxels once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdice import distributed, validation
from softdice.settings import SETTINGS, Pass
from softdice.statistics import OverlapStatistics, measure
from softdice.terms import READERS


class Loss(nn.Module):
    """A function of the statistics of one pass: what sums of losses and single ones have in common. Abstract.

    A subclass sets `num_classes`, `settings` (the pass that it needs) and `group` (the ranks whose statistics are
    added), and defines `from_statistics`. Errors in its `__init__` begin with the name of the class.
    """

    num_classes: int
    settings: Pass
    group: Any = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            cls.__init__ = validation.public(cls.__init__)  # type: ignore[method-assign]

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """statistics of one batch, (B, C) or pooled (C,) -> loss. counted: (C,) bool, False leaves a class out."""
        validation.fail("a subclass with from_statistics", "one without", "Define it.", TypeError)

    @validation.public
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        voxel_weight: Tensor | None = None,
        *,
        merge: Mapping[int, Sequence[int]] | None = None,
    ) -> Tensor:
        """input, target -> loss, a tensor on the autograd graph.

        Args:
            input, target, voxel_weight: as for `softdice.overlap_statistics`.
            merge: for this call, classes that count as part of another: `{0: (2, 3)}` adds the probabilities of
                classes 2 and 3 to that of class 0, takes their labels for label 0, and leaves classes 2 and 3 out of
                the mean (nan for reduction="none"). For images on which someone did not annotate classes 2 and 3.
        """
        distributed.check_mesh(input, self.group)
        settings, counted = self.merged(merge, input)
        stats = measure(input, target, voxel_weight, settings, self.num_classes)
        if self.group is not None:
            stats = stats.pool().all_reduce(self.group)
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
        counted = torch.tensor([c not in parts for c in classes], device=input.device)
        return self.settings.but(regions=unions), counted

    def __add__(self, other: Loss) -> SumLoss:
        if not isinstance(other, Loss):
            return NotImplemented
        return SumLoss([*_terms(self), *_terms(other)])

    def __radd__(self, other: object) -> Loss:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # so that sum([...]) works

    def __mul__(self, factor: float) -> SumLoss:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return SumLoss([(factor * weight, term) for weight, term in _terms(self)])

    __rmul__ = __mul__


def _terms(loss: Loss) -> list[tuple[float, Loss]]:
    if isinstance(loss, SumLoss):
        return list(zip(loss.weights, loss.terms, strict=True))  # type: ignore[arg-type]
    return [(1.0, loss)]


class SumLoss(Loss):
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

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        super().__init__()
        self.weights = tuple(weight for weight, _ in terms)
        for weight in self.weights:
            if not math.isfinite(weight):
                validation.fail("a finite factor", weight, "Scale a loss by a number.")
        self.terms = nn.ModuleList(term for _, term in terms)
        first = terms[0][1]
        self.num_classes, self.settings, self.group = first.num_classes, first.settings, first.group
        for _, term in terms[1:]:
            _agree("num_classes", self.num_classes, term.num_classes)
            self.settings = _one_pass(self.settings, term.settings)
            _agree("group", self.group, term.group)

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """statistics of one batch -> the weighted sum of the terms' losses."""
        values = [weight * term.from_statistics(stats, counted) for weight, term in _terms(self)]
        return sum(values[1:], values[0])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _one_pass(a: Pass, b: Pass) -> Pass:
    """Two losses' passes -> one that serves both."""
    both = a.but(fields=a.fields + b.fields)
    for name in (name for name in SETTINGS if name != "fields"):
        readers = READERS.get(name)
        if readers is None or (readers & {*a.fields} and readers & {*b.fields}):
            _agree(name, getattr(a, name), getattr(b, name))
        elif readers & {*b.fields}:
            both = both.but(**{name: getattr(b, name)})
    return validation.pass_settings(both)


def _agree(name: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        advice = f"Give both the same {name}, or call the losses one by one and add the results."
        expected = f"losses that agree on {name}, since they share one pass"
        validation.fail(expected, f"{ours!r} and {theirs!r}", advice)
