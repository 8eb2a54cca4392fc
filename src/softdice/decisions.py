"""Probabilities without a reference: how sure a mask is, and where to cut for the largest expected Dice coefficient.

Shape suffixes: B sample, C class, V voxel, R row (a class of a sample).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice import validation
from softdice.backends.route import compiled_loops
from softdice.internals import untraced
from softdice.parallel.threads import ALONE_NUMEL, for_each
from softdice.statistics import check, reference, sliced
from softdice.statistics.request import Pass, result_dtype

STEPS = 64
"""Most steps of the iteration. On a GPU all are made, since a test for the end would wait; networks need seven."""
TINY = 1e-300
"""In the place of a denominator of 0."""


@validation.public
def dice_confidence(input: Tensor, mask: Tensor, *, activation: str = "none", floor: float = 0.1) -> Tensor:
    """logits or probabilities, their own mask -> how sure the mask is, in [0, 1]: the soft Dice of both.

        confidence = 2 sum p m / (sum p + sum m),    p counted where p > floor

    It ranks: of a set of cases, those with the lowest confidence are worth a look first. It does not estimate the Dice
    coefficient, from which it may be off by 0.2. Without the floor (`floor=0`, as published) the many tiny p of a large
    background swell the sum of p, and images with small objects, or with haze, are ranked wrongly.

    Args:
        input: (B, C, *S) float: logits, or probabilities with `activation="none"`.
        mask: what was decided: labels (B, *S) or (B, 1, *S) in [0, C), such as `input.argmax(1)`, or masks (B, C, *S)
            of zeros and ones. With C = 1 the label 1 is in the class.
        activation: "none", "softmax" or "sigmoid".
        floor: probabilities up to here count as 0, in [0, 1).

    Returns:
        (B, C), float32, or float64 for such an input; without a graph. nan for a class with no voxel in the mask and no
        probability above the floor: nothing is there to be sure of.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit; values out of range.

    Example:
        >>> probabilities = torch.tensor([[[0.9, 0.8, 0.05, 0.05], [0.1, 0.2, 0.95, 0.95]]])
        >>> dice_confidence(probabilities, probabilities.argmax(1))  # 2 x 1.7 / (1.7 + 2), 2 x 1.9 / (2.1 + 2)
        tensor([[0.9189, 0.9268]])

    Source: B. L. C. Borges, B. M. Pacheco and D. Silva, "Soft Dice confidence: a near-optimal confidence estimator for
    selective prediction in semantic segmentation", arXiv:2402.10665, 2024, there without the floor.
    """
    validation.number("floor", floor, 0, 1, below=True)
    fields = ("intersection", "prediction", "target")
    settings = check.pass_settings(Pass(fields=fields, activation=activation))
    with torch.no_grad():
        request = check.request(input, mask, None, settings)
        sums = request.input.new_zeros((2, *request.input.shape[:2]), dtype=result_dtype(input.dtype))
        for voxels in sliced.slices(request.input):
            part = request.cut(sliced.ALL, voxels)
            check.values(part)
            # without regions and logarithms
            prob_BCV, _, _ = reference.probabilities(part.input.to(sums.dtype), None, activation, False)
            prob_BCV = torch.where(prob_BCV > floor, prob_BCV, 0.0)
            mask_BCV = reference.true_values(part.target, prob_BCV.shape[1], sums.dtype)
            if mask.ndim == input.ndim and mask.shape[1] == input.shape[1]:
                check.hard(mask_BCV, "mask", "Cut the probabilities first: mask = probabilities > 0.5.")
            sums += torch.stack([2 * (prob_BCV * mask_BCV).sum(-1), (prob_BCV + mask_BCV).sum(-1)])
        return sums[0] / sums[1]


@validation.public
def dice_threshold(probabilities: Tensor, *, present: Tensor | bool | None = None) -> Tensor:
    """probabilities -> where to cut each class for the largest expected Dice coefficient: `mask = p > threshold`.

    The expected coefficient of a mask is taken as

        E = 2 sum_(v in mask) p_v / (number of voxels in mask + sum_v p_v)

    and is largest for the mask of all p > E / 2. That holds for the Jaccard index, too, which grows with it. The
    threshold lies at 0.5 or below: a class that a network is unsure of gets more voxels than by p > 0.5.

    Both sums are right if voxels err independently. Borders move as a whole, and there the best threshold lies nearer
    to 0.5: measure on cases with a reference before you use it.

    Args:
        probabilities: (B, C, *S) float, in [0, 1]. Each class is cut by itself: of a softmax a voxel may get several
            classes, or none.
        present: which classes are known to be there, (B, C) or (C,) bool, or True for all. Any other class stays empty
            where no p is above 0.5: its threshold is 1.

    Returns:
        (B, C), of the dtype of the probabilities, rounded down, which changes no mask; without a graph.

    Raises:
        TypeError, ValueError: not (B, C, *S) of floats in [0, 1]; `present` of another shape or dtype.

    Example:
        >>> p = torch.tensor([[[0.9, 0.4, 0.3, 0.0]]])  # E = 1.8 / 2.6, 2.6 / 3.6 or 3.2 / 4.6: two voxels
        >>> dice_threshold(p)
        tensor([[0.3611]])
        >>> dice_threshold(0.5 * p), dice_threshold(0.5 * p, present=True)
        (tensor([[1.]]), tensor([[0.2500]]))

    Source: B. Dai and C. Li, "RankSEG: a consistent ranking-based framework for segmentation", JMLR 24, 2023; the rule
    here has the mean of the number of voxels of the class in the place of that number. The iteration is W. Dinkelbach,
    "On nonlinear fractional programming", Management Science 13, 1967.
    """
    validation.are_tensors(probabilities=probabilities)
    if probabilities.dtype not in check.INPUT_DTYPES or probabilities.ndim < 3:
        got = f"{tuple(probabilities.shape)} of {probabilities.dtype}"
        advice = "Add the missing dimension with unsqueeze, and apply softmax or sigmoid to logits."
        validation.fail("probabilities (B, C, *S) of a floating dtype", got, advice)
    if 0 in probabilities.shape[2:]:
        validation.fail("probabilities of at least one voxel", tuple(probabilities.shape), "Leave empty images out.")
    prob_BCV = probabilities.detach().flatten(2)
    present_BC = _present(present, prob_BCV)
    return _rounded_down(_cut(prob_BCV, present_BC), probabilities.dtype)


def _present(present: Tensor | bool | None, prob_BCV: Tensor) -> Tensor:
    """Return which classes are known to be there, (B, C) bool, for `present` as a user passed it.

    Raise TypeError if it is neither a Tensor nor a bool, ValueError for another shape or dtype.
    """
    B, C, _ = prob_BCV.shape
    if present is None or isinstance(present, bool):
        return torch.full((B, C), bool(present), device=prob_BCV.device)
    validation.are_tensors(present=present)
    if present.dtype != torch.bool or tuple(present.shape) not in ((C,), (B, C)):
        got, advice = f"{tuple(present.shape)} of {present.dtype}", "Pass True for all classes, or a mask of them."
        validation.fail(f"present of shape {(B, C)} or {(C,)}, bool", got, advice)
    return present.to(prob_BCV.device).expand(B, C)


@untraced
def _cut(prob_BCV: Tensor, present_BC: Tensor) -> Tensor:
    """Return the thresholds (B, C), float64, of `dice_threshold`; raise ValueError for a probability outside [0, 1].

    present_BC: bool, whether a class is known to be there.
    """
    loops = compiled_loops("softdice.decisions_kernel") if prob_BCV.device.type == "cpu" else None
    return _by_torch(prob_BCV, present_BC) if loops is None else _by_loops(prob_BCV, present_BC, loops)


def _check_range(prob_BCV: Tensor) -> None:
    """Raise ValueError for a probability outside [0, 1] or nan; on a GPU leave an assertion."""
    check.check(~((prob_BCV >= 0) & (prob_BCV <= 1)), None, prob_BCV, check.probabilities_error)


def _by_torch(prob_BCV: Tensor, present_BC: Tensor) -> Tensor:
    """Return the thresholds of `_cut`, (B, C) float64, by torch operations on all probabilities; never wait for a GPU.

    Dinkelbach's iteration: the next cut is E / 2, half the expected Dice of the mask p > cut. Cuts grow up to the best
    one, where they stay the same.
    """
    _check_range(prob_BCV)
    total_BC, most_BC = prob_BCV.sum(-1, dtype=torch.float64), prob_BCV.amax(-1).double()

    def half_expected(cut_BC: Tensor) -> Tensor:
        """Return E / 2 = sum_(p > cut) p / (number of p > cut + sum p), (B, C) float64."""
        above = prob_BCV > cut_BC.unsqueeze(-1)
        sum_BC = torch.where(above, prob_BCV, 0.0).sum(-1, dtype=torch.float64)
        return sum_BC / (above.sum(-1) + total_BC).clamp_min(TINY)

    # first cut: the larger E / 2 of two masks, which are the voxel with the largest p alone, and all p > 0.5
    cut_BC = torch.maximum(most_BC / (1 + total_BC), half_expected(torch.full_like(total_BC, 0.5)))
    for _ in range(STEPS):
        last_BC, cut_BC = cut_BC, torch.maximum(cut_BC, half_expected(cut_BC))
        if cut_BC.device.type == "cpu" and torch.equal(last_BC, cut_BC):
            break
    return cut_BC.masked_fill((most_BC <= 0.5) & ~present_BC, 1.0)


def _by_loops(prob_BCV: Tensor, present_BC: Tensor, loops: Any) -> Tensor:
    """Return the thresholds, (B, C) float64, of `_cut`, by compiled loops over one row at a time, on several threads.

    Args:
        prob_BCV: floating, on the CPU, without a graph. present_BC: bool, whether a class is known to be there.
        loops: the module `softdice.decisions_kernel`.

    Raise ValueError for a probability outside [0, 1], or nan.
    """
    B, C, V = prob_BCV.shape
    cut_BC, is_present_BC = np.empty((B, C)), present_BC.numpy()

    def cut_row(row: tuple[int, int]) -> None:
        """Write the threshold of a row, (sample, class), to `cut_BC`."""
        prob_V = prob_BCV[row].to(result_dtype(prob_BCV.dtype)).contiguous().numpy()
        bits_V = prob_V.view(f"i{prob_V.itemsize}")  # as integers: floats >= 0 keep their order, others are < 0
        scratch = np.empty(V + 1, prob_V.dtype)
        cut_BC[row], least, most = loops.cut(prob_V, bits_V, is_present_BC[row], scratch)  # and the range of the bits
        if least < 0 or most > np.ones(1, prob_V.dtype).view(bits_V.dtype)[0]:  # the bits of 1.0
            _check_range(prob_BCV)  # does not raise for a -0, whose bits are below 0

    threads = torch.get_num_threads() if prob_BCV.numel() > ALONE_NUMEL else 1
    for_each(cut_row, product(range(B), range(C)), threads)
    return torch.from_numpy(cut_BC)


def _rounded_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 numbers >= 0 rounded down to a dtype: `p > value` stays as it was for every p of that dtype."""
    rounded = values.to(dtype)
    bits = rounded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    was_rounded_up = rounded.double() > values
    return (bits - was_rounded_up.to(bits.dtype)).view(dtype)  # one less in the bits is the float below
