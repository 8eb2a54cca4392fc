"""Parts of the drop-in classes, in the order in which a class uses them: declaration, tensors, pass, terms.

A drop-in class is `declared`: its annotations are the arguments of the original's constructor, `__post_init__` checks
them, and `forward` checks the tensors, asks `sums` (or `balanced`) for statistics and puts the terms together.

Shape suffixes: B sample, C class, S space (any number of axes, *S in a shape). Where nothing else is said, input is
(B, C, *S) and floating, target labels (B, 1, *S) or (B, *S), or values (B, C, *S), and stats are (B, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
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
from softdice.statistics.request import Pass, equals, signed

# --- the declaration of a class

Class = TypeVar("Class", bound=type)


@dataclass_transform(eq_default=False)
def declared(cls: Class) -> Class:
    """Make a dataclass of a subclass of `DropIn`, whose annotations are the arguments of the original's constructor.

    The errors of its constructor and of its forward begin with the name of the class.
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
        """Register a buffer, in the place of the argument of that name, and return it.

        values: a tensor, kept as it is; a number or a sequence of numbers, which become float32; or None. persistent:
        whether the state dict has it.
        """
        if name in vars(self):
            delattr(self, name)
        is_tensor = values is None or isinstance(values, Tensor)
        buffer = values if is_tensor else torch.as_tensor(values, dtype=torch.float32)
        self.register_buffer(name, buffer, persistent)
        return buffer

    @validation.public
    def __prepare_scriptable__(self) -> Self:
        """Raise RuntimeError: torch.jit.script calls this before anything else, and could not compile the pass."""
        advice = "Use torch.compile(loss, fullgraph=True), or torch.export of a module that calls it."
        got = "torch.jit.script, which torch has deprecated"
        validation.fail("torch.compile or torch.export", got, advice, RuntimeError)

    def options(self, base: type[DropIn]) -> dict[str, Any]:
        """Return the values, by name, of the constructor's arguments that the base class `base` declares.

        A compound loss makes its terms with them, which have the same base.
        """
        return {field.name: getattr(self, field.name) for field in fields(base)}  # type: ignore[arg-type]


# --- its parts, the terms of a compound loss: a user may put another loss in the place of one


def part(module: Any, *classes: type[nn.Module]) -> Any:
    """Return a part of a loss, without torch.compile around it, if the loss may compute it from statistics; else None.

    module: the part, any callable. It qualifies if its class is one of `classes`, not a subclass, and if it has neither
    hooks nor a forward set on the object. Any other part has to be called.
    """
    module = getattr(module, "_orig_mod", module)
    replaced = type(module) not in classes or "forward" in module.__dict__
    return None if replaced or module._forward_hooks or module._forward_pre_hooks else module


# --- its tensors


def tensors(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and target of a call as a user passed them, a uint16, uint32 or uint64 target in a signed dtype.

    torch cannot compare those three. Raise TypeError unless both are strided tensors.
    """
    advice = "Outputs of several resolutions go through softdice.DeepSupervision."
    validation.are_tensors(advice, input=input, target=target)
    return input, signed(target)


def flat_pair(input: Tensor, target: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors as (B, C, V) and (B, 1 or C, V), for parts of a loss that make a pass each.

    Both passes then have one view of the input, in which autograd adds their gradients in place. With a view each, both
    gradients and their sum would be in memory.

    parts: the parts, None for one that has to be called. If one is None, or has a callable for an activation
    (other_act), which may depend on the shape, the tensors stay as they are.
    """
    in_passes = all(part is not None and getattr(part, "other_act", None) is None for part in parts)
    if not in_passes or input.shape[2:] != target.shape[2:]:
        return input, target
    return input.flatten(2), target.flatten(2)


def one_hot(labels: Tensor, channels: int, ignore_index: int | None = None, weight: Tensor | None = None) -> Tensor:
    """Return labels (B, 1, *S) as (B, C, *S) bool; ignore_index is False everywhere, unless it is a class.

    Raise ValueError for another label outside [0, C), but where all weights (B, C, *S) are 0.
    """
    hot = labels == torch.arange(channels, device=labels.device).view(1, -1, *[1] * (labels.ndim - 2))
    known = hot.any(1, keepdim=True)
    known = known if ignore_index is None else known | ~unlike(labels, ignore_index)
    known = known if weight is None else known | ~(weight > 0).any(1, keepdim=True)
    checks.check(~known, None, labels, partial(checks.labels_error, channels, ignore_index))
    return hot


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
    """Return the statistics that `fields` names, (B, C), from one pass.

    Without an activation the libraries accept any number as a probability, and so does this.

    Args:
        activation: "none", "softmax" or "sigmoid".
        weight: a factor >= 0 of each voxel, or a mask; (B, 1, *S) or (B, *S), without a softmax (B, C, *S), too.
        probabilities: for the activation "none", whether to check that input is in [0, 1]: some formulas hold only
            there.
        settings: of the pass beside these, such as ignore_index, label_smoothing or gamma.

    Raises:
        TypeError, ValueError: settings, shapes, dtypes, labels, per-class values or weights that do not fit.
    """
    names = tuple(dict.fromkeys(fields))  # two terms may read the same one
    by_channel = weight is not None and weight.ndim == input.ndim and weight.shape[1] == input.shape[1] > 1
    # a pass has one weight for all classes of a voxel: make each channel a sample of one class, (B C, 1, V)
    if weight is not None and by_channel and activation != "softmax":
        shape, V = input.shape, input.shape[2:].numel()
        if target.shape != shape:
            labels = target if target.ndim == input.ndim else target.unsqueeze(1)
            target = one_hot(labels, shape[1], weight=weight)
        channels = (tensor.expand(shape).reshape(-1, 1, V) for tensor in (input, target, weight))
        stats = sums(*channels, fields=names, activation=activation, probabilities=probabilities, **settings)
        return OverlapStatistics({name: getattr(stats, name).view(shape[:2]) for name in names})
    validate = activation != "none" or probabilities
    one_pass = checks.pass_settings(Pass(activation=activation, validate=validate, fields=names, **settings))
    if not validate:  # check all but the probabilities, as for logits: the libraries accept any number as one
        checks.values(checks.tensors(input, target, weight, None, one_pass.but(activation="softmax", validate=True)))
    return measure(input, target, weight, one_pass)


def balanced(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    field: str,
    positive: Tensor | float,
    negative: Tensor | float = 1.0,
    others: Sequence[str] = (),
    **settings: Any,
) -> OverlapStatistics:
    """Return the statistic `field` as positive * E+ + negative * E-, and `others`, (B, C), from one pass of a sigmoid.

        E+ = sum w y (1 - p)^gamma (-ln p)        E- = sum w (1 - y) p^gamma (-ln(1 - p))

    That is the focal loss's alpha (alpha E+ + (1 - alpha) E-) and the cross-entropy's pos_weight (pos_weight E+ + E-).

    Args:
        input: logits. target: labels or values in [0, 1]. weight: w, (B, 1, *S) or (B, C, *S), or None for 1.
        field: "cross_entropy" (without the powers) or "focal". positive, negative: factors, a number or (C,).
        others: names of further statistics. settings: of the pass, such as gamma and ignore_index.
    """
    sides = (f"positive_{field}", f"negative_{field}")
    stats = sums(input, target, weight, fields=(*sides, *others), activation="sigmoid", **settings)
    plus, minus = (getattr(stats, name) for name in sides)
    value = torch.as_tensor(positive).to(plus) * plus + torch.as_tensor(negative).to(minus) * minus
    return OverlapStatistics({field: value, **{name: getattr(stats, name) for name in others}})


def add_over_ranks(stats: OverlapStatistics) -> OverlapStatistics:
    """Return the sum of pooled statistics, (C,), over all ranks, differentiable; without ranks the same."""
    return stats.all_reduce("world") if groups.has_ranks() else stats


# --- its terms


def extent_fields(squared: bool = False, soft: bool = False) -> tuple[str, ...]:
    """Return the names of the statistics that `extents` reads for the same options."""
    if squared:
        return ("intersection", "prediction_squared", "target_squared")
    return ("difference" if soft else "intersection", "prediction", "target")


def extents(stats: OverlapStatistics, squared: bool = False, soft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return tp, tp + fp and tp + fn, shaped as the statistics, as the libraries define them for probabilities.

    With prediction p and target y, tp = sum p y, tp + fp = sum p and tp + fn = sum y. squared: tp + fp = sum p^2 and
    tp + fn = sum y^2. soft: tp = (sum p + sum y - sum abs(p - y)) / 2, which is right for soft labels.
    """
    prediction = stats.prediction_squared if squared else stats.prediction
    target = stats.target_squared if squared else stats.target
    tp = (prediction + target - stats.difference) / 2 if soft else stats.intersection
    return tp, prediction, target


def unlike(target: Tensor, ignore_index: int) -> Tensor:
    """Return where a target, labels or values, is not ignore_index: bool, in its shape.

    A number that its dtype cannot hold is none of its values: torch compares them wrapped round, uint8 156 with -100.
    """
    return target != ignore_index if target.is_floating_point() else ~equals(target, ignore_index)


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
    """Return (tp + smooth) / (tp + alpha fp + beta fn + smooth_dr), (B, C) or (C,).

    Dice is alpha = beta = 1/2 (with half of its smoothing), Jaccard alpha = beta = 1.

    Args:
        tp, prediction, target: tp, tp + fp and tp + fn of each class.
        alpha, beta: factors of fp and fn. smooth, smooth_dr: smoothing of the numerator and of the denominator, >= 0.
        least: lower bound of the denominator; 0 for no bound.
    """
    # few operations, since starting them costs more than their arithmetic:
    # alpha fp + beta fn + tp = alpha (tp + fp) + beta (tp + fn) + (1 - alpha - beta) tp
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
    """Whether the loss is 0, and not nan as torch's, for a batch in which every voxel is ignored."""

    def shares(self, ignore_index: int | None = None) -> bool:
        """Return whether the pass of a Dice term with a softmax and this ignore_index gives this loss, too."""
        # the pass refuses a label of -100, so that torch's default leaves nothing out
        return self.reduction != "none" and self.label_smoothing == 0 and self.ignore_index in (ignore_index, -100)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, C, *S) for labels or values; its map (B, *S) for reduction="none"."""
        dense = target.shape == input.shape
        settings: dict[str, Any] = {"activation": "softmax", "label_smoothing": self.label_smoothing}
        settings["ignore_index"] = None if dense else self.ignore_index
        if self.reduction != "none":
            return self.from_statistics(sums(input, target, fields=self.reads, **settings), input, target)
        target = target[:, 0] if target.ndim == input.ndim and not dense else target
        if self.weight is not None and (dense or self.label_smoothing):
            return super().forward(input, target.to(input.dtype) if dense else target.long())
        entropy_BS = voxel_cross_entropy(input, target, **settings)
        if self.weight is None:
            return entropy_BS
        labels_BS = target.long()
        return entropy_BS * self.weight.to(entropy_BS)[torch.where(labels_BS == self.ignore_index, 0, labels_BS)]

    def from_statistics(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss, 0-d, for the statistics cross_entropy and labelled (voxels of each label), (B, C).

        Only the shapes of input and target are read.
        """
        stats = stats.pool()
        weight = torch.ones_like(stats.labelled) if self.weight is None else self.weight.to(stats.labelled)
        total = (weight * stats.cross_entropy).sum()
        if self.reduction == "sum":
            return total
        if target.shape == input.shape:  # for per-class values torch divides by the voxels, not by their weights
            return total / max(input.numel() // input.shape[1], 1)
        amount = (weight * stats.labelled).sum()  # 0 where all is ignored: nan then, as torch's, or 0 with `guard`
        return total / (torch.where(stats.labelled.sum() > 0, amount, 1.0) if self.guard else amount)


class BinaryCrossEntropyLoss(nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss, computed by a pass; with reduction="none", or `weight`, computed by torch."""

    reads = ("cross_entropy",)
    """The statistics that `from_statistics` reads."""

    def shares(self, ignore_index: int | None = None) -> bool:
        """Return whether a pass with a sigmoid and that ignore_index, all else at defaults, computes this loss."""
        return self.reduction != "none" and self.pos_weight is None and self.weight is None and ignore_index is None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits for values in [0, 1], (B, C, *S) both: 0-d, or (B, C, *S) for reduction="none"."""
        if self.reduction == "none" or self.weight is not None:
            return super().forward(input, target.to(input.dtype))
        return self.from_statistics(self.statistics(input, target), input, target)

    def statistics(
        self, input: Tensor, target: Tensor, mask: Tensor | None = None, others: Sequence[str] = ()
    ) -> OverlapStatistics:
        """Return the statistic cross_entropy, whose part where the target is 1 is weighted by pos_weight, and `others`.

        Both are (B, C). input, target: logits and values (B, C, *S). mask: the voxels that count, (B, 1, *S) or
        (B, C, *S). others: names of statistics. Raise ValueError unless pos_weight is None, one number, or
        (C, 1, ..., 1) with a 1 for each axis of *S.
        """
        if self.pos_weight is None:
            return sums(input, target, mask, fields=(*self.reads, *others), activation="sigmoid")
        expected = (input.shape[1], *[1] * (input.ndim - 2))
        if self.pos_weight.numel() > 1 and tuple(self.pos_weight.shape) not in (expected, (1, *expected)):
            advice = "BCEWithLogitsLoss broadcasts it against (C, *S): give it as many dimensions."
            validation.fail(f"pos_weight of shape {expected}", tuple(self.pos_weight.shape), advice)
        return balanced(input, target, mask, field="cross_entropy", positive=self.pos_weight.flatten(), others=others)

    def from_statistics(self, stats: OverlapStatistics, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss, 0-d, for the statistic cross_entropy (B, C); of input only the number of logits is read."""
        return stats.cross_entropy.sum() / (max(input.numel(), 1) if self.reduction == "mean" else 1)
