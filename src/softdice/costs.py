"""Costs: functions from a score to what is minimised; lower is better."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from softdice import validation

Cost = Callable[[Tensor], Tensor]


def neg_log(score: Tensor) -> Tensor:
    """score -> -ln score: 0 at a score of 1, infinite at 0 (a smoothed index never gets there).

    Example:
        >>> neg_log(torch.tensor([1.0, 0.5]))
        tensor([-0.0000, 0.6931])

    Source: the notebook from which this package began; K. C. L. Wong et al., "3D Segmentation with Exponential
    Logarithmic Loss for Highly Unbalanced Object Sizes", MICCAI 2018, eq. 2 with exponent 1.
    """
    return -score.log()


def one_minus(score: Tensor) -> Tensor:
    """score -> 1 - score.

    Example:
        >>> one_minus(torch.tensor([1.0, 0.25]))
        tensor([0.0000, 0.7500])
    """
    return 1 - score


def log_cosh(score: Tensor) -> Tensor:
    """score -> ln cosh(1 - score), flat near a perfect score.

    Example:
        >>> log_cosh(torch.tensor([1.0, 0.0]))
        tensor([0.0000, 0.4338])

    Source: S. Jadon, "A survey of loss functions for semantic segmentation", CIBCB 2020, section II-I.
    """
    return (1 - score).cosh().log()


@validation.public_as("costs.focal")
def focal(gamma: float) -> Cost:
    """exponent -> the cost (1 - score)^gamma, taken per class, before any mean.

    Args:
        gamma: exponent > 0. Below 1 it presses on classes that are nearly right, above 1 on those that are wrong.
            The focal Tversky paper writes it 1 / gamma, with gamma = 4/3.

    Example:
        >>> focal(0.5)(torch.tensor([0.75, 0.0]))
        tensor([0.5000, 1.0000])

    Source: N. Abraham, N. M. Khan, "A novel focal Tversky loss function with improved attention U-Net for lesion
    segmentation", ISBI 2019, eq. 4.
    """
    validation.exponent("gamma", gamma)
    return partial(_focal, gamma=gamma)  # a partial, unlike a closure, can be pickled


def _focal(score: Tensor, gamma: float) -> Tensor:
    """Return (1 - score)^gamma, its base kept above 0: at 0 a power below 1 has an infinite slope."""
    return (1 - score).clamp_min(torch.finfo(score.dtype).tiny) ** gamma


@validation.public_as("costs.log_power")
def log_power(gamma: float) -> Cost:
    """exponent -> the cost (-ln score)^gamma, taken per class, before any mean.

    Args:
        gamma: exponent > 0; 1 is `neg_log`, below 1 the gradient is larger near a perfect score and smaller far off.

    Example:
        >>> log_power(0.5)(torch.tensor([1.0, 0.5]))
        tensor([1.0842e-19, 8.3255e-01])

    Source: K. C. L. Wong et al., "3D segmentation with exponential logarithmic loss for highly unbalanced object
    sizes", MICCAI 2018, eq. 2.
    """
    validation.exponent("gamma", gamma)
    return partial(_log_power, gamma=gamma)


def _log_power(score: Tensor, gamma: float) -> Tensor:
    """Return (-ln score)^gamma, its base kept above 0, as in `_focal`."""
    return (-score.log()).clamp_min(torch.finfo(score.dtype).tiny) ** gamma


def identity(value: Tensor) -> Tensor:
    """value -> itself: for an index that is a cost already, such as a cross-entropy.

    Example:
        >>> identity(torch.tensor([0.25]))
        tensor([0.2500])
    """
    return value


NAMED: dict[str, Cost] = {"neg_log": neg_log, "one_minus": one_minus, "log_cosh": log_cosh}
"""The costs that a loss takes by name; any callable is taken as it is."""


def resolve(cost: str | Cost) -> Cost:
    """Return the cost with a name of NAMED, or a callable as it is; raise ValueError for another name."""
    if callable(cost):
        return cost
    validation.choice("cost", cost, NAMED)
    return NAMED[cost]


def refuse_logarithm(cost: str | Cost) -> None:
    """Raise ValueError if a user's cost is neg_log; for losses whose index may be below 0."""
    if cost in ("neg_log", neg_log):
        validation.fail("a cost of a score that may be negative", "'neg_log'", "Use 'one_minus'.")
