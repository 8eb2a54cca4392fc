"""What the drop-in classes share, in the order in which one uses it: its declaration, its tensors, its pass, its terms.

A drop-in class is `declared`: its annotations are the arguments of the original's constructor, `__post_init__` checks
them, `forward` takes the tensors, asks `sums` (or `balanced`) for statistics and puts the terms together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Self, dataclass_transform

from softdice import validation
from softdice.parallel import groups
from softdice.statistics import OverlapStatistics, voxel_cross_entropy
from softdice.statistics import check as checks
from softdice.statistics.api import measure
from softdice.statistics.request import Pass, signed

# --- the declaration of a class

Class = TypeVar("Class", bound=type)


@dataclass_transform(eq_default=False)
def declared(cls: Class) -> Class:
    """A class whose annotations are the arguments of the original's constructor, in its order -> that module.

    It is a dataclass, whose errors begin with the name of the class.
    """
    made: Any = dataclass(eq=False, repr=False)(cls)
    for field in fields(made):  # a default left on the class would hide a submodule or buffer of its name
        if field.init and field.name in vars(made):
            delattr(made, field.name)
    made.__init__ = validation.public(made.__init__, made.__name__)
    if "forward" in vars(made):
        made.forward = validation.public(made.forward)
    return made


class DropIn(_Loss):
    """What `declared` classes derive from: one of torch's losses, ready to be given its fields."""

    def __new__(cls, *_: object, **__: object) -> Self:
        module = super().__new__(cls)
        _Loss.__init__(module)
        return module

    def hold(self, name: str, values: Any, persistent: bool = True) -> Tensor | None:
        """A tensor, numbers (which become float32) or None -> the buffer of that name."""
        if name in vars(self):
            delattr(self, name)
        made = values if values is None or isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float32)
        self.register_buffer(name, made, persistent)
        return made

    @validation.public
    def __prepare_scriptable__(self) -> Self:
        """What torch.jit.script asks for first."""
        advice = "Use torch.compile(loss, fullgraph=True), or torch.export of a module that calls it."
        got = "torch.jit.script, which torch has deprecated"
        validation.fail("torch.compile or torch.export", got, advice, RuntimeError)

    def options(self, group: type[DropIn]) -> dict[str, Any]:
        """The arguments that a group of options declares, to hand on to a part of this loss."""
        return {field.name: getattr(self, field.name) for field in fields(group)}  # type: ignore[arg-type]


# --- its parts: what stands there is what is used, be it ours or not


def part(module: Any, *ours: type[nn.Module]) -> Any:
    """A part of a loss -> itself, without torch.compile around it, if a pass may stand for it; else None."""
    module = getattr(module, "_orig_mod", module)
    if type(module) not in ours or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return None
    return module


# --- its tensors


def taken(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors of a call, the target in a dtype that torch computes with; an error for lists of tensors."""
    advice = "Outputs of several resolutions go through softdice.DeepSupervision."
    validation.are_tensors(advice, input=input, target=target)
    return input, signed(target)


def flat(input: Tensor, target: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    """The two tensors, for `parts` of a loss that each need a pass -> the same with one dimension of space.

    The gradients of two passes then meet in one view of the input, where autograd adds the second in the place of the
    first; two views would each keep theirs, and their sum would be a third. Left alone where a part is not ours, or has
    an activation of its own.
    """
    ours = all(part is not None and getattr(part, "other_act", None) is None for part in parts)
    if not ours or input.shape[2:] != target.shape[2:]:
        return input, target
    return input.flatten(2), target.flatten(2)


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """labels (B, 1, *S) -> (B, C, *S) bool; a label that is no class is in none."""
    return labels == torch.arange(channels, device=labels.device).view(1, -1, *[1] * (labels.ndim - 2))


# --- its pass


def sums(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    fields: Sequence[str],
    activation: str = "none",
    probabilities: bool = False,
    **settings: Any,
) -> OverlapStatistics:
    """input, target -> the statistics named, from one pass; `settings` are those of `Pass`.

    Labels, per-class values and weights are checked always. Without an activation the libraries take any number for a
    probability, and so does this, unless `probabilities` asks for the check because a formula holds only in [0, 1].
    """
    check = activation != "none" or probabilities
    wanted = tuple(dict.fromkeys(fields))
    settled = checks.pass_settings(Pass(activation=activation, validate=check, fields=wanted, **settings))
    if not check:
        checks.values(checks.tensors(input, target, weight, None, settled.but(activation="softmax", validate=True)))
    return measure(input, target, weight, settled)


def one_by_one(input: Tensor, target: Tensor, weight: Tensor | None, **settings: Any) -> OverlapStatistics:
    """`sums` of input (B, C, *S) with a weight (B, C, *S): every channel a sample of one class, a mask per channel."""
    shape = (input.shape[:2].numel(), 1, input.shape[2:].numel())
    flat = [None if x is None else x.expand(input.shape).reshape(shape) for x in (input, target, weight)]
    stats = sums(*flat, **settings)  # type: ignore[arg-type]
    return OverlapStatistics({name: getattr(stats, name).view(input.shape[:2]) for name in stats.fields})


def balanced(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    field: str,
    positive: Tensor | float,
    negative: Tensor | float = 1.0,
    gamma: float = 2.0,
) -> Tensor:
    """logits, target -> positive E+ + negative E-, (B, C): the parts of a sigmoid's cross-entropy or focal loss.

        E+ = sum w y (1 - p)^gamma (-ln p)        E- = sum w (1 - y) p^gamma (-ln(1 - p))

    That is the focal loss's alpha (alpha E+ + (1 - alpha) E-) and the cross-entropy's pos_weight (pos_weight E+ + E-).

    Args:
        target: labels (B, 1, *S) or per-class values (B, C, *S), soft ones too. weight: (B, 1, *S) or (B, C, *S).
        field: "cross_entropy" or "focal". positive, negative: a number, or (C,).

    Example:
        >>> logits, labels = torch.zeros(1, 2, 3), torch.tensor([[[0, 1, 1]]])
        >>> balanced(logits, labels, field="cross_entropy", positive=3.0)
        tensor([[3.4657, 4.8520]])
    """
    each = weight is not None and weight.shape[1] == input.shape[1] > 1
    if each and target.shape != input.shape:
        target = one_hot(target, input.shape[1])
    fields = (f"positive_{field}", f"negative_{field}")
    stats = (one_by_one if each else sums)(input, target, weight, fields=fields, activation="sigmoid", gamma=gamma)
    parts = [getattr(stats, name) for name in fields]
    return torch.as_tensor(positive).to(parts[0]) * parts[0] + torch.as_tensor(negative).to(parts[1]) * parts[1]


def add_over_ranks(stats: OverlapStatistics) -> OverlapStatistics:
    """this rank's pooled statistics -> the sum over all ranks, differentiable; alone, the statistics as they are."""
    return stats.all_reduce("world") if groups.has_ranks() else stats


# --- its terms


def extent_fields(squared: bool = False, soft: bool = False) -> tuple[str, ...]:
    """The statistics that `extents` reads."""
    if squared:
        return ("intersection", "prediction_squared", "target_squared")
    return ("difference" if soft else "intersection", "prediction", "target")


def extents(stats: OverlapStatistics, squared: bool = False, soft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """statistics -> tp, tp + fp, tp + fn: from products, squares, or norms, which are right for soft labels."""
    predicted = stats.prediction_squared if squared else stats.prediction
    truth = stats.target_squared if squared else stats.target
    tp = (predicted + truth - stats.difference) / 2 if soft else stats.intersection
    return tp, predicted, truth


def tversky(
    tp: Tensor,
    predicted: Tensor,
    truth: Tensor,
    alpha: float,
    beta: float,
    smooth: float,
    smooth_dr: float,
    least: float = 0.0,
) -> Tensor:
    """`extents` -> (tp + smooth) / (tp + alpha fp + beta fn + smooth_dr), the denominator at least `least` if not 0.

    Dice is alpha = beta = 1/2 (with half of its smoothing), Jaccard alpha = beta = 1.
    """
    extent = alpha * (predicted + truth) if alpha == beta else alpha * predicted + beta * truth
    extent = (extent if alpha + beta == 1 else extent + (1 - alpha - beta) * tp) + smooth_dr
    return (tp + smooth) / (extent.clamp_min(least) if least else extent)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch's cross-entropy from a pass; labels (B, 1, *S) and floats, too.

    A map (reduction "none") is `softdice.voxel_cross_entropy`; torch's own with a weight and label_smoothing or
    per-class values, at the price of some tensors of the size of input.
    """

    reads = ("cross_entropy", "labelled")
    guard = False
    """Whether a batch of nothing but ignored voxels is 0, where torch says nan."""

    def shares(self, ignore_index: int | None = None) -> bool:
        """Whether a pass that leaves out those labels, and has no other settings, gives this loss."""
        # An ignore_index of -100 that no label has concerns nobody: the check of the labels would refuse one.
        return self.reduction != "none" and self.label_smoothing == 0 and self.ignore_index in (ignore_index, -100)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), labels or per-class values -> loss."""
        dense = target.shape == input.shape
        settings: dict[str, Any] = {"label_smoothing": self.label_smoothing}
        settings["ignore_index"] = None if dense else self.ignore_index
        if self.reduction == "none":
            target = target[:, 0] if target.ndim == input.ndim and not dense else target
            if self.weight is None:
                return voxel_cross_entropy(input, target, activation="softmax", **settings)
            if dense or self.label_smoothing:
                return super().forward(input, target.to(input.dtype) if dense else target.long())
            entropy = voxel_cross_entropy(input, target, activation="softmax", **settings)
            labels = target.long()
            return entropy * self.weight.to(entropy)[torch.where(labels == self.ignore_index, 0, labels)]
        stats = sums(input, target, fields=self.reads, activation="softmax", **settings)
        return self.from_statistics(stats, input, target)

    def from_statistics(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        """statistics, and the tensors for their shapes -> loss."""
        stats = stats.pool()
        weight = torch.ones_like(stats.labelled) if self.weight is None else self.weight.to(stats.labelled)
        total = (weight * stats.cross_entropy).sum()
        if self.reduction == "sum":
            return total
        if target.shape == input.shape:  # torch divides by the voxels then, not by the weights of their labels
            return total / max(input.numel() // input.shape[1], 1)
        amount = (weight * stats.labelled).sum()
        return total / (torch.where(stats.labelled.sum() > 0, amount, 1.0) if self.guard else amount)


class BinaryCrossEntropyLoss(nn.BCEWithLogitsLoss):
    """torch's binary cross-entropy from a pass; a map (reduction "none") and one with `weight` are torch's own."""

    reads = ("cross_entropy",)

    def shares(self, ignore_index: int | None = None) -> bool:
        """Whether a pass that leaves out those labels, and has no other settings, gives this loss."""
        return self.reduction != "none" and self.pos_weight is None and self.weight is None and ignore_index is None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *S), values of that shape -> loss."""
        if self.reduction == "none" or self.weight is not None:
            return super().forward(input, target.to(input.dtype))
        return self.from_statistics(self.statistics(input, target), input, target)

    def statistics(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> OverlapStatistics:
        """logits, target, mask (B, 1, *S) or (B, C, *S) -> cross-entropy (B, C), its positive part times pos_weight."""
        if self.pos_weight is None:
            each = mask is not None and mask.shape[1] == input.shape[1] > 1
            return (one_by_one if each else sums)(input, target, mask, fields=self.reads, activation="sigmoid")
        expected = (input.shape[1], *[1] * (input.ndim - 2))
        if self.pos_weight.numel() > 1 and tuple(self.pos_weight.shape) not in (expected, (1, *expected)):
            advice = "BCEWithLogitsLoss broadcasts it against (C, *S): give it as many dimensions."
            validation.fail(f"pos_weight of shape {expected}", tuple(self.pos_weight.shape), advice)
        sides = {"field": "cross_entropy", "positive": self.pos_weight.flatten()}
        return OverlapStatistics({"cross_entropy": balanced(input, target, mask, **sides)})  # type: ignore[arg-type]

    def from_statistics(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        """statistics, and the tensors for their shapes -> loss."""
        return stats.cross_entropy.sum() / (max(input.numel(), 1) if self.reduction == "mean" else 1)
