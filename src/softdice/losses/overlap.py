"""input, target -> loss of any index: the chain statistics, pool, index, cost, reduce, and its settings.

No arithmetic lives here: an index is a function in `softdice.indices`, a cost one in `softdice.costs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from softdice import costs, reductions, validation
from softdice.costs import Cost
from softdice.losses.base import StatisticsLoss
from softdice.parallel import groups
from softdice.statistics import OverlapStatistics, check
from softdice.statistics.declared import NAMES
from softdice.statistics.request import Pass

if TYPE_CHECKING:
    from typing_extensions import Unpack

Index = Callable[..., Tensor]


class LossSettings(TypedDict, total=False):
    """Keywords that every loss shares::

    ================= ============================================ ====================================================
    keyword           values (default first)                       meaning
    ================= ============================================ ====================================================
    activation        "none", "softmax", "sigmoid"                 what turns input into probabilities, in the pass
    cost              "neg_log" for SoftDiceLoss, else             score -> cost
                      "one_minus"; "log_cosh"; a callable
    pooling           "batch", "sample"                            add over the batch before the index, or not
    classes           None = all; a sequence of ints               the classes that enter the mean
    class_weight      None; (C,)                                   weighted mean: sum(w cost) / sum(w)
    absent            "count", "skip"                              a class with no target voxel in the pool: counted
                                                                   like any other, or left out
    ignore_index      None; int                                    voxels with this label enter no sum
    label_smoothing   0.0; [0, 1)                                  y' = (1 - e) y + e / K
    regions           None; tuples of class numbers                unions of classes in the place of the classes
    reduction         "mean", "sum", "none"                        "none": (C,) or, pooled per sample, (B, C)
    group             None; "world"; a ProcessGroup                the sums of all ranks together, before the index
    validate          True, False                                  check the ranges of labels and probabilities
    ================= ============================================ ====================================================
    """

    activation: Literal["none", "softmax", "sigmoid"]
    cost: str | Cost
    pooling: Literal["batch", "sample"]
    classes: Sequence[int] | None
    class_weight: Tensor | Sequence[float] | None
    absent: Literal["count", "skip"]
    ignore_index: int | None
    label_smoothing: float
    regions: Sequence[Sequence[int]] | None
    reduction: Literal["mean", "sum", "none"]
    group: Any
    validate: bool


class OverlapLoss(StatisticsLoss):
    """input, target -> loss of any index: statistics, pool, index, cost, reduce.

    Args:
        index: statistics -> score per class, for example `softdice.indices.dice` or a function of your own. It is
            called once when the loss is made, to see which statistics it reads: the pass computes those and no others.
            An index over all classes, with a last dimension of 1, takes the keyword `class_weight`: the loss's weights
            with 0 for a class that is left out, or None.
        num_classes: channels of `input`.
        gamma: exponent of the focal statistic. power: exponent of the difference statistic.
        settings: the keywords of `LossSettings`.

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

    class_weight: Tensor | None

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
        if unknown := set(settings) - set(_DEFAULTS):
            got = ", ".join(sorted(unknown))
            validation.fail(f"the keywords {', '.join(_DEFAULTS)}", got, "Correct the spelling.", TypeError)
        chosen: dict[str, Any] = {**_DEFAULTS, **settings}
        words = {"pooling": reductions.POOLINGS, "absent": reductions.ABSENT, "reduction": reductions.REDUCTIONS}
        for name, allowed in words.items():
            validation.choice(name, chosen[name], allowed)
        groups.check_group(chosen["group"], chosen["pooling"])
        self.num_classes = validation.num_classes(num_classes)
        if num_classes == 1 and chosen["activation"] == "softmax":
            advice = "A softmax over one channel is 1 everywhere and cannot be trained: use 'sigmoid'."
            validation.fail("activation 'sigmoid' or 'none' for one class", "'softmax'", advice)
        regions = validation.frozen_regions(chosen["regions"])
        columns = num_classes if regions is None else len(regions)
        self.index = index
        self.cost = costs.resolve(chosen["cost"])
        self.pooling, self.absent, self.reduction = chosen["pooling"], chosen["absent"], chosen["reduction"]
        self.group = chosen["group"]
        self.classes = None
        if chosen["classes"] is not None:
            self.classes = validation.class_numbers("classes", chosen["classes"], columns)
        class_weight = chosen["class_weight"]
        if class_weight is not None:
            class_weight = validation.class_weights(class_weight, columns)
            class_weight = class_weight if self.classes is None else class_weight[list(self.classes)]
        self.over_classes = _over_classes(index)
        self.register_buffer("class_weight", class_weight, persistent=False)
        extra = ("labelled",) if self.absent == "skip" else ()
        settings_of_pass = Pass(
            activation=chosen["activation"],
            ignore_index=chosen["ignore_index"],
            label_smoothing=chosen["label_smoothing"],
            regions=regions,
            validate=bool(chosen["validate"]),
            gamma=gamma,
            power=power,
            fields=fields_read(index, columns if self.classes is None else len(self.classes)) + extra,
        )
        self.settings = check.pass_settings(settings_of_pass)

    def from_statistics(self, stats: OverlapStatistics, counted: Tensor | None = None) -> Tensor:
        """statistics of one batch, (B, C) or pooled (C,) -> loss. counted: (C,) bool, False leaves a class out."""
        if self.pooling == "batch":
            stats = stats.pool()
        if self.classes is not None:
            stats = stats.select(self.classes)
            counted = None if counted is None else counted[list(self.classes)]
        present = counted
        if self.absent == "skip":
            present = stats.labelled > 0 if counted is None else counted & (stats.labelled > 0)
        if present is not None:
            stats = stats.fill(~present, 1.0)  # a score that no class has, so that no nan or inf reaches the gradient
        weight = self.class_weight
        if self.over_classes:
            if weight is not None:  # as reductions.reduce does: a loss that was not moved has its weights on the CPU
                weight = weight.to(getattr(stats, stats.fields[0]))
            if present is not None:
                weight = present.float() if weight is None else weight * present
                present = (weight > 0).any(-1, keepdim=True)
            cost, weight = self.cost(self.index(stats, class_weight=weight)), None
        else:
            cost = self.cost(self.index(stats))
        present = present if present is None else present.expand_as(cost)
        return reductions.reduce(cost, class_weight=weight, present=present, reduction=self.reduction)

    def extra_repr(self) -> str:
        weight = self.class_weight
        shown = {
            "num_classes": self.num_classes,
            **(self.index.keywords if isinstance(self.index, partial) else {}),
            "activation": self.settings.activation,
            "cost": next((word for word, cost in costs.NAMED.items() if cost is self.cost), "custom"),
            "pooling": self.pooling,
            "classes": self.classes,
            "class_weight": weight if weight is None or weight.is_meta else weight.tolist(),
            "absent": self.absent,
            "ignore_index": self.settings.ignore_index,
            "label_smoothing": self.settings.label_smoothing,
            "regions": self.settings.regions,
            "reduction": self.reduction,
            "group": self.group,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value != _DEFAULTS.get(name, ...))


_DEFAULTS: dict[str, Any] = {
    "activation": "none",
    "cost": "one_minus",
    "pooling": "batch",
    "classes": None,
    "class_weight": None,
    "absent": "count",
    "ignore_index": None,
    "label_smoothing": 0.0,
    "regions": None,
    "reduction": "mean",
    "group": None,
    "validate": True,
}


class _Probe(OverlapStatistics):
    """Statistics of ones that remember which of their fields were read."""

    def __init__(self, num_classes: int, seen: dict[str, None] | None = None) -> None:
        self._fields = NAMES
        self.seen: dict[str, None] = {} if seen is None else seen
        self.num_classes = num_classes

    def __getattr__(self, name: str) -> Tensor:
        if name not in NAMES:
            return super().__getattr__(name)
        self.seen[name] = None
        return torch.ones(self.num_classes)

    @property
    def pooled(self) -> bool:
        return True

    def select(self, classes: Sequence[int]) -> OverlapStatistics:
        return _Probe(len(tuple(classes)), self.seen)


def fields_read(index: Index, num_classes: int) -> tuple[str, ...]:
    """index -> names of the statistics that it reads."""
    probe = _Probe(num_classes)
    score = index(probe)
    if not isinstance(score, Tensor):
        validation.fail("index to return a Tensor", type(score).__name__, "Return a score per class.", TypeError)
    if not probe.seen:
        validation.fail("index to read a statistic", "none read", "Use stats.intersection and its siblings.")
    length = 1 if _over_classes(index) else num_classes
    if tuple(score.shape) != (length,):
        advice = "Return one score per class; or take the keyword class_weight and return one score over all classes."
        validation.fail(f"index to return a score of shape ({length},)", tuple(score.shape), advice)
    return tuple(probe.seen)


def _over_classes(index: Index) -> bool:
    """Whether an index couples the classes: then it takes their weights."""
    return "class_weight" in inspect.signature(index).parameters
