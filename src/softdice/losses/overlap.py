"""The loss of any index: the chain statistics, pool, index, cost, reduce.

No formula stands here: indices are in `softdice.indices`, costs in `softdice.costs`. Shape letters: B sample, C class
(with regions: region), *S space.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softdice import costs, reductions, validation
from softdice.losses.base import StatisticsLoss
from softdice.losses.settings import DEFAULTS, LossSettings, adopt, pass_of
from softdice.statistics import OverlapStatistics
from softdice.statistics.declared import NAMES
from softdice.statistics.request import columns, moved

if TYPE_CHECKING:
    from typing_extensions import Unpack

Index = Callable[..., Tensor]


class OverlapLoss(StatisticsLoss):
    """input, target -> loss of any index: statistics, pool, index, cost, reduce.

    Args:
        index: statistics -> score per class, for example `softdice.indices.dice` or a function of your own. It is
            called once when the loss is made, to see which statistics it reads: the pass computes those and no others.
            An index over all classes, with a last dimension of 1, takes the keyword `class_weight`: the loss's weights
            with 0 for a class that is left out, or None.
        num_classes: channels of `input`.
        gamma: exponent of the focal statistic. power: exponent of the difference statistic.
        settings: the keywords of `softdice.losses.LossSettings`.

    Shapes: input (B, C, *S), target (B, *S), (B, 1, *S) or (B, C, *S), voxel_weight (B, *S) or (B, 1, *S). See
    `softdice.overlap_statistics`.

    Returns (when called): a 0-d tensor on the autograd graph, float64 for float64 input, else float32; for
    reduction="none" the costs, (C,) or, with pooling="sample", (B, C).

    Raises:
        TypeError, ValueError: as `softdice.overlap_statistics`, and for a setting out of its range, naming it.

    Edge cases: with absent="skip" and every class absent the loss is 0 with a gradient of 0. What a single absent
    class does with absent="count" is the index's to say.

    Example:
        >>> import torch, softdice
        >>> recall = softdice.OverlapLoss(lambda s: (s.intersection + 1) / (s.target + 1), num_classes=2)
        >>> recall(torch.tensor([[[0.5, 0.0], [0.5, 1.0]]]), torch.tensor([[0, 1]]))
        tensor(0.1250)
    """

    TAKES = tuple(DEFAULTS)

    def __init__(
        self,
        index: Index,
        num_classes: int,
        *,
        gamma: float = 2.0,
        power: float = 1.0,
        **settings: Unpack[LossSettings],
    ) -> None:
        super().__init__()
        options = adopt(self, num_classes, settings)
        self.index, self.over_classes = index, _over_classes(index)
        scored = self.classes or options["regions"] or range(num_classes)
        fields = fields_read(index, len(scored)) + (("labelled",) if self.absent == "skip" else ())
        self.settings = pass_of(options, gamma=gamma, power=power, fields=fields)

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """Pool, score, take the cost and reduce the statistics of a batch, (B, C), or pooled ones, (C,), to a 0-d loss.

        For reduction="none" return the costs of `classes`, (C,) or (B, C), nan for a class that is left out; an index
        over all classes gives (1,) or (B, 1). counted: (C,) bool, False leaves a class out of the mean; None for all.
        """
        if self.pooling == "batch":
            stats = stats.pool()
        if self.classes is not None:
            stats = stats.select(self.classes)
            counted = None if counted is None else columns(counted, self.classes)
        present = counted  # which classes enter, bool; None for all
        if self.absent == "skip":
            present = stats.labelled > 0 if counted is None else counted & (stats.labelled > 0)
        if present is not None:
            stats = stats.fill(~present, 1.0)  # finite numbers for the classes left out: a nan would reach the gradient
        weight = self.class_weight
        if self.over_classes:  # the index weighs the classes and gives one score for all, so `reduce` gets no weight
            if weight is not None:  # it is on the CPU if the loss was not moved to the device
                weight = moved(weight, getattr(stats, stats.fields[0]))
            if present is not None:
                weight = present.float() if weight is None else weight * present
                present = (weight > 0).any(-1, keepdim=True)
                stats = stats.fill(~present, 1.0)  # a class of weight 0 is present still: as above, for all classes
            cost, weight = self.cost(self.index(stats, class_weight=weight)), None
        else:
            cost = self.cost(self.index(stats))
        present = present if present is None else present.expand_as(cost)
        return reductions.reduce(cost, class_weight=weight, present=present, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Return the settings that differ from their defaults, as name=value, for `repr`."""
        numbers = self.index.keywords if isinstance(self.index, partial) else {}
        names = [name for name in DEFAULTS if name != "validate"]
        values = {name: getattr(self, name) if hasattr(self, name) else getattr(self.settings, name) for name in names}
        values["cost"] = next((word for word, cost in costs.NAMED.items() if cost is self.cost), "custom")
        if self.class_weight is not None and not self.class_weight.is_meta:
            values["class_weight"] = self.class_weight.tolist()
        shown = {"num_classes": self.num_classes, **numbers, **values}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value != DEFAULTS.get(name, ...))


class _Probe(OverlapStatistics):
    """Statistics, (num_classes,) each, that are all 1 and record in `names_read` which of them an index reads."""

    def __init__(self, num_classes: int, names_read: dict[str, None] | None = None) -> None:
        self._fields = NAMES
        self.names_read: dict[str, None] = {} if names_read is None else names_read  # an ordered set
        self.num_classes = num_classes

    def __getattr__(self, name: str) -> Tensor:
        if name not in NAMES:
            return super().__getattr__(name)
        self.names_read[name] = None
        return torch.ones(self.num_classes)

    @property
    def pooled(self) -> bool:
        return True

    def select(self, classes: Sequence[int]) -> OverlapStatistics:
        return _Probe(len(tuple(classes)), self.names_read)


def fields_read(index: Index, num_classes: int) -> tuple[str, ...]:
    """Return the names of the statistics that a user's index reads, by calling it with statistics (num_classes,) of 1.

    Raise TypeError if it returns no tensor. Raise ValueError if it reads no statistic, or if its result is not
    (num_classes,), or (1,) for an index over all classes.
    """
    probe = _Probe(num_classes)
    score = index(probe)
    if not isinstance(score, Tensor):
        validation.fail("index to return a Tensor", type(score).__name__, "Return a score per class.", TypeError)
    if not probe.names_read:
        validation.fail("index to read a statistic", "none read", "Use stats.intersection and its siblings.")
    length = 1 if _over_classes(index) else num_classes
    if tuple(score.shape) != (length,):
        advice = "Return one score per class; or take the keyword class_weight and return one score over all classes."
        validation.fail(f"index to return a score of shape ({length},)", tuple(score.shape), advice)
    return tuple(probe.names_read)


def _over_classes(index: Index) -> bool:
    """Return whether an index couples the classes; such an index takes their weights as `class_weight`."""
    return "class_weight" in inspect.signature(index).parameters
