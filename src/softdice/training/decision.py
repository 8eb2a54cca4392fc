"""Where to cut each class: thresholds tuned on held-out cases, and what they gain over the argmax.

A class of threshold t takes a voxel where p > t, if only it and the background compete there. In general the labels are
the argmax of p (1 - t) / t over the classes. With t = 0.5 for every class that is the argmax of p. The background's
threshold stays 0.5.

Shape suffixes: N case, C class, G threshold of the grid, V voxel; *S are the spatial axes of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softdice.metrics import formulas

ARGMAX = 0.5
GRID = np.round(np.arange(0.1, 0.91, 0.05), 2)
"""Thresholds that are tried, in order; `ARGMAX` is one of them."""
FROM_ARGMAX = np.argsort(np.abs(GRID - ARGMAX), kind="stable")
"""Positions in `GRID`, those nearest to the argmax first: of equally good ones the first is taken."""
AT_ARGMAX = FROM_ARGMAX[0]
"""Position of `ARGMAX` in `GRID`."""
SLICE = 1 << 20
"""Voxels that are counted at a time, so that memory beside the logits does not grow with the image."""
LEAST_CASES = 4
"""With fewer cases a standard error says little, and nothing is tuned."""


@dataclass(frozen=True)
class Decision:
    """A threshold for each of the C classes, and what it gains in mean Dice over the argmax, with standard error.

    `gains` are cross-validated, leave one out: each case is cut at the threshold that is best for all other cases. They
    are measured with the other classes at the argmax. `errors` are their standard errors.
    """

    thresholds: list[float]
    gains: list[float]
    errors: list[float]

    def text(self, class_names: Sequence[str]) -> str:
        """Return a sentence for people that names the classes away from the argmax, with their gains."""
        rows = zip(class_names, self.thresholds, self.gains, self.errors, strict=True)
        moved = [f"{name} {t:g} (mean Dice {gain:+.4f} +- {error:.4f})" for name, t, gain, error in rows if t != ARGMAX]
        if moved:
            return "tuned thresholds: " + ", ".join(moved)
        return "argmax: no threshold gains more on the held-out cases than its standard error"


def cut(logits: Tensor, thresholds: Sequence[float] | None = None) -> Tensor:
    """Return class numbers (*S) int64 of logits (C, *S), with C thresholds in (0, 1); None: the argmax."""
    if thresholds is None or {*thresholds} == {ARGMAX}:
        return logits.argmax(0)
    lift_C = [math.log((1 - t) / t) for t in thresholds]  # argmax of p (1 - t) / t, in logarithms
    best, labels = logits[0].float() + lift_C[0], torch.zeros_like(logits[0], dtype=torch.int64)
    for c in range(1, len(logits)):  # class by class: no second set of logits
        value = logits[c].float() + lift_C[c]
        labels = torch.where(value > best, c, labels)
        best = torch.maximum(value, best)
    return labels


def dice_of(counts: Tensor) -> Tensor:
    """Return the mean Dice (...) over the classes but the first of counts (3, ..., C): voxels in both, predicted, true.

    A class that is neither there nor predicted counts as 1: to invent one costs as much as to miss one.
    """
    return formulas.dice(counts)[..., 1:].nan_to_num(1.0).mean(-1)


def dice_by_threshold(logits: Tensor, true: Tensor, ignore_index: int | None = None) -> np.ndarray:
    """Return the mean Dice of a case over the classes but the first, 1 for a class that is nowhere, (C, G) float.

    At [c, g] class c has threshold g of `GRID`, and all other classes the argmax's.

    Args:
        logits: (C, *S) of the case. true: (*S) its class numbers, where voxels of `ignore_index` do not count.
    """
    true_V, logits_CV = true.flatten(), logits.flatten(1)
    C, G = len(logits_CV), len(GRID)
    true_C = logits.new_zeros(C, dtype=torch.int64)
    both_CGC, prediction_CGC = true_C.new_zeros(2, C, G, C)  # [c, g, k]: voxels of class k where c has threshold g
    for part_V, part_CV in zip(true_V.split(SLICE), logits_CV.split(SLICE, 1), strict=True):
        counted_V = slice(None) if ignore_index is None else part_V != ignore_index
        true_C += _add_counts(part_CV[:, counted_V].float(), part_V[counted_V], both_CGC, prediction_CGC)
    dice_CG = dice_of(torch.stack([both_CGC, prediction_CGC, true_C.expand(C, G, C)]))
    dice_CG[0] = dice_CG[1, AT_ARGMAX]  # the background stays with the argmax
    return dice_CG.cpu().numpy()


def _add_counts(logits_CV: Tensor, true_V: Tensor, both_CGC: Tensor, prediction_CGC: Tensor) -> Tensor:
    """Count a slice of voxels, and return how many are truly of each class, (C,) int64.

    With threshold t class c takes a voxel if its logit exceeds that of its rival, the best other class, by more than
    ln(t / (1 - t)); otherwise the voxel is the rival's. So one sorting of the voxels serves all thresholds.

    Args:
        logits_CV: float32. true_V: class numbers below C.
        both_CGC, prediction_CGC: int64 sums to add to, at [c, g, k]: with threshold g for class c, and the argmax's for
            all others, the voxels of class k that are predicted as k, and all that are predicted as k.
    """
    C, V = logits_CV.shape
    margins_G = torch.from_numpy(np.log(GRID / (1 - GRID))).to(logits_CV)
    best_V, second_V = logits_CV.topk(2, 0).indices
    true_C = torch.bincount(true_V, minlength=C)
    for c in range(1, C):
        rival_V = torch.where(best_V == c, second_V, best_V)  # the class that gets the voxel if c does not
        margin_V = logits_CV[c] - logits_CV.gather(0, rival_V[None])[0]
        taken_V = torch.bucketize(margin_V, margins_G)  # c gets the voxel at so many thresholds, the lowest ones
        # in both maps: voxels of class k that their right rival keeps; of class c those that c takes
        right_V, of_c_V = rival_V == true_V, true_V == c
        both_GC = _not_taken(taken_V[right_V], rival_V[right_V], C)
        both_GC[:, c] = true_C[c] - _not_taken(taken_V[of_c_V], true_V[of_c_V], C)[:, c]
        prediction_GC = _not_taken(taken_V, rival_V, C)
        prediction_GC[:, c] = V - prediction_GC.sum(1)
        both_CGC[c] += both_GC
        prediction_CGC[c] += prediction_GC
    return true_C


def _not_taken(taken_V: Tensor, class_V: Tensor, C: int) -> Tensor:
    """Return, for each threshold of a class c, the voxels of each class k that c does not take, (G, C) int64.

    Args:
        taken_V: at how many thresholds c takes a voxel, 0 to G; they are the lowest ones. class_V: k of the voxel.
    """
    taken_counts = len(GRID) + 1
    counts = torch.bincount(taken_V * C + class_V, minlength=taken_counts * C).view(taken_counts, C)
    return counts.cumsum(0)[:-1]  # at threshold g those that are taken at no more than g


def tuned(dice_NCG: np.ndarray, dice_of_all: Callable[[Sequence[float]], Sequence[float]]) -> Decision:
    """Return the decision for N cases, class by class; the argmax with fewer than `LEAST_CASES`.

    The gain of a case is measured at the threshold that is best for all other cases. A class with a mean gain within
    its standard error stays at the argmax. Where several gain, they are tried together; if that gains no more than its
    standard error, only the best class keeps its threshold.

    Args:
        dice_NCG: mean Dice of each case; at [n, c, g] class c has threshold g of `GRID`, all others the argmax's.
        dice_of_all: returns the mean Dice of each case, (N,), cut with these C thresholds at once.
    """
    N, C, _ = dice_NCG.shape
    if N < LEAST_CASES:
        return Decision([ARGMAX] * C, [0.0] * C, [0.0] * C)
    gain_NCG = (dice_NCG - dice_NCG[..., [AT_ARGMAX]])[..., FROM_ARGMAX]  # G sorted by the distance from the argmax
    best_of_others_NC = (gain_NCG.sum(0) - gain_NCG).argmax(-1)
    gain_NC = np.take_along_axis(gain_NCG, best_of_others_NC[..., None], -1)[..., 0]
    gain_C, error_C = gain_NC.mean(0), standard_error(gain_NC)
    best_C = GRID[FROM_ARGMAX][gain_NCG.sum(0).argmax(-1)]
    threshold_C = np.where(gain_C > error_C, best_C, ARGMAX)
    if (threshold_C != ARGMAX).sum() > 1:
        together_N = np.array(dice_of_all(threshold_C.tolist())) - dice_NCG[:, 0, AT_ARGMAX]
        if not together_N.mean() > standard_error(together_N):
            moved_C = threshold_C != ARGMAX
            best_class = np.where(moved_C, gain_C, -np.inf).argmax()
            threshold_C[np.arange(C) != best_class] = ARGMAX
    return Decision(threshold_C.tolist(), gain_C.tolist(), error_C.tolist())


def standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the first axis, (N, ...) to (...)."""
    return np.asarray(values.std(0, ddof=1) / math.sqrt(len(values)))
