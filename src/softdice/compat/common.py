"""input, target as other libraries take them -> statistics and terms: what the three places share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Self, dataclass_transform

from softdice import validation
from softdice.settings import Pass
from softdice.statistics import OverlapStatistics, measure

# --- how a class of another library is declared

Class = TypeVar("Class", bound=type)


@dataclass_transform(eq_default=False)
def declared(cls: Class) -> Class:
    """A class whose annotations are the arguments of the original's constructor, in its order -> that module."""
    made = dataclass(eq=False, repr=False)(cls)
    for name in made.__dataclass_fields__:  # a default left on the class would hide a submodule or buffer of its name
        if name in vars(made):
            delattr(made, name)
    return made


class DropIn(_Loss):
    """What `declared` classes derive from: one of torch's losses, with `reduction`, ready before its fields are set."""

    def __new__(cls, *_: object, **__: object) -> Self:
        module = super().__new__(cls)
        nn.Module.__init__(module)
        module.reduction = "mean"
        return module

    def hold(self, name: str, values: Any, persistent: bool = True) -> None:
        """A tensor, numbers or None -> the buffer of that name."""
        if name in vars(self):
            delattr(self, name)
        self.register_buffer(name, as_weight(values), persistent)

    def hand_on(self, options: type[DropIn]) -> dict[str, Any]:
        """The values of the fields of `options`, which from here on belong to the part of the loss that takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(options)}  # type: ignore[arg-type]
        for name in values:
            delattr(self, name)
        return values


def as_weight(values: Any) -> Tensor | None:
    """A tensor as it is, numbers as float32, None."""
    return values if values is None or isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float32)


def taken(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors of a call, the target in a dtype that torch computes with; an error for lists of tensors."""
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            advice = "Outputs of several resolutions go through softdice.DeepSupervision."
            validation.fail(f"{name} to be a Tensor", type(value).__name__, advice, TypeError)
    return input, validation.signed(target)


# --- what is there is what is used: parts that were replaced are called, not assumed


def part(module: nn.Module, *classes: type[nn.Module]) -> Any:
    """A part of a loss -> itself, without torch.compile around it, if the pass may stand for it; else None."""
    module = getattr(module, "_orig_mod", module)
    hooked = module._forward_hooks or module._forward_pre_hooks if isinstance(module, nn.Module) else False
    return module if type(module) in classes and "forward" not in vars(module) and not hooked else None


def as_made(loss: nn.Module, cls: type[nn.Module], method: str) -> bool:
    """Whether a method is the one that the class has, neither overridden in a subclass nor set on the object."""
    return getattr(type(loss), method) is getattr(cls, method) and method not in vars(loss)


def say_apart(loss: nn.Module, what: str) -> None:
    """Say (once, by Python's rule for warnings) that a part is called by itself."""
    warnings.warn(f"{type(loss).__name__}: {what} was replaced: it is called as it is, outside the pass.", stacklevel=4)


# --- statistics


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
    settled = validation.pass_settings(Pass(activation=activation, validate=check, fields=wanted, **settings))
    if not check:
        flat = validation.tensors(input, target, weight, None, settled.ignore_index, True)
        validation.values(*flat, "softmax", settled.ignore_index)
    return measure(input, target, weight, settled)


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """labels (B, 1, *S) -> (B, C, *S) bool; a label that is no class is in none."""
    return labels == torch.arange(channels, device=labels.device).view(1, -1, *[1] * (labels.ndim - 2))


def one_by_one(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, fields: Sequence[str], **settings: Any
) -> OverlapStatistics:
    """`sums` of input (B, C, *S) with a weight (B, C, *S): every channel a sample of one class, a mask per channel."""
    samples = input.shape[0] * input.shape[1]
    flat = [None if x is None else x.expand(input.shape).reshape(samples, 1, -1) for x in (input, target, weight)]
    stats = sums(*flat, fields=fields, **settings)  # type: ignore[arg-type]
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
    truth = target if target.shape == input.shape else one_hot(target, input.shape[1])
    total: Any = 0.0
    for factor, inside in ((positive, True), (negative, False)):
        share = truth if inside else ~truth if truth.dtype == torch.bool else 1 - truth
        every = torch.full_like(input, inside, dtype=torch.bool)
        share = share if weight is None else share * weight
        stats = one_by_one(input, every, share, fields=(field,), activation="sigmoid", gamma=gamma)
        value = getattr(stats, field)
        total = total + torch.as_tensor(factor).to(value) * value
    return torch.as_tensor(total)


def per_channel(name: str, weight: Tensor, input: Tensor) -> Tensor:
    """A weight that torch broadcasts against input (B, C, *S): one number or (C, 1, ..., 1) -> (1,) or (C,)."""
    expected = (input.shape[1], *[1] * (input.ndim - 2))
    if weight.numel() > 1 and tuple(weight.shape) not in (expected, (1, *expected)):
        advice = "BCEWithLogitsLoss broadcasts it against (C, *S): give it as many dimensions."
        validation.fail(f"{name} of shape {expected}", tuple(weight.shape), advice)
    return weight.flatten()


# --- terms


def cross_entropy(
    settings: nn.CrossEntropyLoss, stats: OverlapStatistics, voxels: int | None = None, guard: bool = False
) -> Tensor:
    """statistics with cross_entropy and labelled -> torch's loss with those settings.

    `voxels` divides in the place of the weights of the labels (as torch has it for per-class targets); with `guard` a
    batch of nothing but ignored voxels is 0, not nan.
    """
    stats = stats.pool()
    weight = torch.ones_like(stats.labelled) if settings.weight is None else settings.weight.to(stats.labelled)
    total = (weight * stats.cross_entropy).sum()
    if settings.reduction == "sum":
        return total
    amount = (weight * stats.labelled).sum() if voxels is None else voxels
    return total / (torch.where(stats.labelled.sum() > 0, amount, 1.0) if guard else amount)


def overlap_score(
    tp: Tensor, fp: Tensor, fn: Tensor, alpha: float, beta: float, smooth: float, smooth_dr: float | None = None
) -> tuple[Tensor, Tensor]:
    """tp, fp, fn -> numerator tp + smooth and denominator tp + alpha fp + beta fn + smooth_dr of a Tversky index.

    Dice is alpha = beta = 1/2 (with half of its smoothing), Jaccard alpha = beta = 1.
    """
    return tp + smooth, tp + alpha * fp + beta * fn + (smooth if smooth_dr is None else smooth_dr)


def from_norms(stats: OverlapStatistics) -> Tensor:
    """statistics with prediction, target and difference -> tp that is right for soft labels."""
    return (stats.prediction + stats.target - stats.difference) / 2


def add_over_ranks(stats: OverlapStatistics) -> OverlapStatistics:
    """this rank's pooled statistics -> the sum over all ranks, differentiable; alone, the statistics as they are."""
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return stats if alone else stats.all_reduce("world")


def voxels_of(input: Tensor) -> int:
    """input (B, C, *S) -> voxels of one sample."""
    return input.shape[2:].numel() if input.shape[0] else 0


# --- values that cannot be had


def hard(target: Tensor) -> None:
    """Refuse per-class values between 0 and 1 where the other library's formula for them is no sum over voxels."""
    if target.is_floating_point():
        advice = "Round it, or use softdice.FocalLoss."
        error = partial(_between, "a target of zeros and ones", "values such as ", advice)
        validation.check((target != 0) & (target != 1), None, target, error)


def binary_mask(mask: Tensor) -> Tensor:
    """A mask of zeros and ones -> bool; an error for anything between."""
    advice = "Fractional masks enter the libraries' sums squared; pass voxel_weight to a softdice loss."
    validation.check((mask != 0) & (mask != 1), None, mask, partial(_between, "a mask of zeros and ones", "", advice))
    return mask != 0


def _between(
    expected: str, such: str, advice: str, value: object = validation.UNSEEN, count: object = validation.SOME
) -> str:
    return validation.message(expected, f"{such}{value:g}" if isinstance(value, float) else f"{value}", advice)
