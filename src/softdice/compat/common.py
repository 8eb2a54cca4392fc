"""Parts of the drop-in classes, in the order in which a class uses them: declaration, tensors, pass, terms.

A drop-in class is `declared`: its annotations are the arguments of the original's constructor, `__post_init__` checks
them, and `forward` checks the tensors, asks `sums` (or `balanced`) for statistics and puts the terms together.

Shape suffixes: B sample, C class, *S space.
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
    """Make a module of a class whose annotations are the arguments of the original's constructor, in its order.

    It is a dataclass, and its errors begin with the name of the class.
    """
    module: Any = dataclass(eq=False, repr=False)(cls)
    for field in fields(module):  # a default left on the class would hide a submodule or buffer of that name
        if field.init and field.name in vars(module):
            delattr(module, field.name)
    module.__init__ = validation.public(module.__init__, module.__name__)
    if "forward" in vars(module):
        module.forward = validation.public(module.forward)
    return module


class DropIn(_Loss):
    """Base of the `declared` classes: a loss of torch's, initialised before the dataclass sets its fields."""

    def __new__(cls, *_: object, **__: object) -> Self:
        module = super().__new__(cls)
        _Loss.__init__(module)
        return module

    def hold(self, name: str, values: Any, persistent: bool = True) -> Tensor | None:
        """Keep a tensor, numbers (as float32) or None as the buffer of that name, and return it."""
        if name in vars(self):
            delattr(self, name)
        is_tensor = values is None or isinstance(values, Tensor)
        buffer = values if is_tensor else torch.as_tensor(values, dtype=torch.float32)
        self.register_buffer(name, buffer, persistent)
        return buffer

    @validation.public
    def __prepare_scriptable__(self) -> Self:
        """Raise: torch.jit.script calls this before anything else, and could not compile the pass."""
        advice = "Use torch.compile(loss, fullgraph=True), or torch.export of a module that calls it."
        got = "torch.jit.script, which torch has deprecated"
        validation.fail("torch.compile or torch.export", got, advice, RuntimeError)

    def options(self, group: type[DropIn]) -> dict[str, Any]:
        """Return the arguments that a group of options declares, for a part of this loss that takes them, too."""
        return {field.name: getattr(self, field.name) for field in fields(group)}  # type: ignore[arg-type]


# --- its parts: a user may put another loss in the place of one


def part(module: Any, *ours: type[nn.Module]) -> Any:
    """Return a part of a loss, without torch.compile around it, if a pass can stand in for it; else None.

    It cannot for another class, or one with hooks or a forward of its own: such a part has to be called.
    """
    module = getattr(module, "_orig_mod", module)
    if type(module) not in ours or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return None
    return module


# --- its tensors


def tensors(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a call, the target in a signed dtype; raise TypeError for anything else."""
    advice = "Outputs of several resolutions go through softdice.DeepSupervision."
    validation.are_tensors(advice, input=input, target=target)
    return input, signed(target)


def flat_pair(input: Tensor, target: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors with one dimension of space, for `parts` of a loss that make a pass each.

    Both passes then have one view of the input, in which autograd adds their gradients in place. With a view each, both
    gradients and their sum would be in memory. The tensors stay as they are where a part is another library's, or has a
    callable for an activation.
    """
    ours = all(part is not None and getattr(part, "other_act", None) is None for part in parts)
    if not ours or input.shape[2:] != target.shape[2:]:
        return input, target
    return input.flatten(2), target.flatten(2)


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """Return labels (B, 1, *S) as (B, C, *S) bool; a label outside [0, C) is False everywhere."""
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
    """Return the statistics that `fields` names, (B, C), from one pass; `settings` are further fields of `Pass`.

    Labels, per-class values and weights are always checked. Without an activation the libraries take any number for a
    probability, and so does this, unless `probabilities` asks for the check because a formula holds only in [0, 1].
    """
    check = activation != "none" or probabilities
    names = tuple(dict.fromkeys(fields))
    one_pass = checks.pass_settings(Pass(activation=activation, validate=check, fields=names, **settings))
    if not check:  # all but the probabilities: with a softmax any number is an input
        checks.values(checks.tensors(input, target, weight, None, one_pass.but(activation="softmax", validate=True)))
    return measure(input, target, weight, one_pass)


def one_by_one(input: Tensor, target: Tensor, weight: Tensor | None, **settings: Any) -> OverlapStatistics:
    """Return the statistics of `sums` for a weight (B, C, *S), in which every channel has a mask of its own.

    Each channel goes through the pass as a sample of one class.
    """
    shape = (input.shape[:2].numel(), 1, input.shape[2:].numel())
    channels = [None if x is None else x.expand(input.shape).reshape(shape) for x in (input, target, weight)]
    stats = sums(*channels, **settings)  # type: ignore[arg-type]
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
    """Return positive E+ + negative E-, (B, C): the two sides of a sigmoid's cross-entropy or focal loss, weighted.

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
    mask_per_channel = weight is not None and weight.shape[1] == input.shape[1] > 1
    if mask_per_channel and target.shape != input.shape:
        target = one_hot(target, input.shape[1])
    fields = (f"positive_{field}", f"negative_{field}")
    run = one_by_one if mask_per_channel else sums
    stats = run(input, target, weight, fields=fields, activation="sigmoid", gamma=gamma)
    plus, minus = (getattr(stats, name) for name in fields)
    return torch.as_tensor(positive).to(plus) * plus + torch.as_tensor(negative).to(minus) * minus


def add_over_ranks(stats: OverlapStatistics) -> OverlapStatistics:
    """Return the sum of all ranks' pooled statistics, differentiable; without ranks the statistics themselves."""
    return stats.all_reduce("world") if groups.has_ranks() else stats


# --- its terms


def extent_fields(squared: bool = False, soft: bool = False) -> tuple[str, ...]:
    """Return the names of the statistics that `extents` reads."""
    if squared:
        return ("intersection", "prediction_squared", "target_squared")
    return ("difference" if soft else "intersection", "prediction", "target")


def extents(stats: OverlapStatistics, squared: bool = False, soft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return tp, tp + fp and tp + fn, as the libraries define them for probabilities.

    By default tp = I, tp + fp = P, tp + fn = T. squared: tp + fp = Q and tp + fn = R. soft: tp = (P + T - D) / 2, which
    is right for soft labels.
    """
    prediction = stats.prediction_squared if squared else stats.prediction
    target = stats.target_squared if squared else stats.target
    tp = (prediction + target - stats.difference) / 2 if soft else stats.intersection
    return tp, prediction, target


def tversky(
    tp: Tensor,
    prediction: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    smooth: float,
    smooth_dr: float,
    least: float = 0.0,
) -> Tensor:
    """Return (tp + smooth) / (tp + alpha fp + beta fn + smooth_dr) for the three results of `extents`.

    Dice is alpha = beta = 1/2 (with half of its smoothing), Jaccard alpha = beta = 1. least: lower bound of the
    denominator, if not 0.
    """
    denominator = alpha * (prediction + target) if alpha == beta else alpha * prediction + beta * target
    denominator = (denominator if alpha + beta == 1 else denominator + (1 - alpha - beta) * tp) + smooth_dr
    return (tp + smooth) / (denominator.clamp_min(least) if least else denominator)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, computed by a pass; labels may be (B, 1, *S) and floats, too.

    reduction="none" gives a map, by `softdice.voxel_cross_entropy`. With a weight and label_smoothing, or a weight and
    per-class values, torch makes the map, with some tensors of the size of input.
    """

    reads = ("cross_entropy", "labelled")
    """The statistics that `from_statistics` reads."""
    guard = False
    """Whether the loss of a batch of ignored voxels alone is 0, where torch's is nan."""

    def shares(self, ignore_index: int | None = None) -> bool:
        """Return whether a pass with that ignore_index, and otherwise default settings, gives this loss."""
        # torch's default of -100 leaves nothing out: the check of the labels would refuse a label of -100
        return self.reduction != "none" and self.label_smoothing == 0 and self.ignore_index in (ignore_index, -100)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, C, *S) for labels or per-class values."""
        dense = target.shape == input.shape
        settings: dict[str, Any] = {"label_smoothing": self.label_smoothing}
        settings["ignore_index"] = None if dense else self.ignore_index
        if self.reduction == "none":
            target = target[:, 0] if target.ndim == input.ndim and not dense else target
            if self.weight is None:
                return voxel_cross_entropy(input, target, activation="softmax", **settings)
            if dense or self.label_smoothing:
                return super().forward(input, target.to(input.dtype) if dense else target.long())
            entropy_BS = voxel_cross_entropy(input, target, activation="softmax", **settings)
            labels_BS = target.long()
            return entropy_BS * self.weight.to(entropy_BS)[torch.where(labels_BS == self.ignore_index, 0, labels_BS)]
        stats = sums(input, target, fields=self.reads, activation="softmax", **settings)
        return self.from_statistics(stats, input, target)

    def from_statistics(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss for statistics (B, C); of the tensors only the shapes are read."""
        stats = stats.pool()
        weight = torch.ones_like(stats.labelled) if self.weight is None else self.weight.to(stats.labelled)
        total = (weight * stats.cross_entropy).sum()
        if self.reduction == "sum":
            return total
        if target.shape == input.shape:  # for per-class values torch divides by the voxels, not by their weights
            return total / max(input.numel() // input.shape[1], 1)
        amount = (weight * stats.labelled).sum()
        return total / (torch.where(stats.labelled.sum() > 0, amount, 1.0) if self.guard else amount)


class BinaryCrossEntropyLoss(nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss, computed by a pass; with reduction="none", or `weight`, computed by torch."""

    reads = ("cross_entropy",)
    """The statistics that `from_statistics` reads."""

    def shares(self, ignore_index: int | None = None) -> bool:
        """Return whether a pass with that ignore_index, and otherwise default settings, gives this loss."""
        return self.reduction != "none" and self.pos_weight is None and self.weight is None and ignore_index is None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, C, *S) for values of that shape."""
        if self.reduction == "none" or self.weight is not None:
            return super().forward(input, target.to(input.dtype))
        return self.from_statistics(self.statistics(input, target), input, target)

    def statistics(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> OverlapStatistics:
        """Return the cross-entropy, (B, C), with its positive side times pos_weight. mask: (B, 1, *S) or (B, C, *S)."""
        if self.pos_weight is None:
            mask_per_channel = mask is not None and mask.shape[1] == input.shape[1] > 1
            run = one_by_one if mask_per_channel else sums
            return run(input, target, mask, fields=self.reads, activation="sigmoid")
        expected = (input.shape[1], *[1] * (input.ndim - 2))
        if self.pos_weight.numel() > 1 and tuple(self.pos_weight.shape) not in (expected, (1, *expected)):
            advice = "BCEWithLogitsLoss broadcasts it against (C, *S): give it as many dimensions."
            validation.fail(f"pos_weight of shape {expected}", tuple(self.pos_weight.shape), advice)
        sides = {"field": "cross_entropy", "positive": self.pos_weight.flatten()}
        return OverlapStatistics({"cross_entropy": balanced(input, target, mask, **sides)})  # type: ignore[arg-type]

    def from_statistics(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss for statistics (B, C); of the tensors only the shapes are read."""
        return stats.cross_entropy.sum() / (max(input.numel(), 1) if self.reduction == "mean" else 1)
