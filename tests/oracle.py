"""The definitions once more, in words as different as possible: Python loops over voxels, and the seed's formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor


def statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    ignore_index: int | None = None,
    voxel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    regions: Sequence[Sequence[int]] | None = None,
    gamma: float = 2.0,
    power: float = 1.0,
    voxel_map: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Return every statistic, (B, R), of an input (B, C, V), voxel by voxel in float64.

    target: (B, V) or (B, C, V). weight: (B, V). map: (B, 1 or R, V); without it no statistics that read one.
    """
    x = input.detach().double().numpy()
    t = target.detach().double().numpy()
    samples, channels, voxels = x.shape
    groups = [list(region) for region in regions] if regions is not None else [[c] for c in range(channels)]
    sums: dict[str, np.ndarray] = {
        name: np.zeros((samples, len(groups))) for name in _terms(0.5, 0.5, 1, 1, m=voxel_map)
    }
    for b in range(samples):
        for v in range(voxels):
            w = 1.0 if voxel_weight is None else float(voxel_weight[b, v])
            if w == 0 or (ignore_index is not None and t.ndim == 2 and t[b, v] == ignore_index):
                continue
            p_all = _probabilities(x[b, :, v], activation)
            y_all = [
                float(t[b, c, v]) if t.ndim == 3 else float(t[b, v] == _label(c, channels)) for c in range(channels)
            ]
            for g, members in enumerate(groups):
                p = math.fsum(p_all[c] for c in members)
                hard = max(y_all[c] for c in members)
                parts = 2 if activation == "sigmoid" or channels == 1 else channels
                y = (1 - label_smoothing) * hard + label_smoothing / parts
                m = None if voxel_map is None else float(voxel_map[b, g % voxel_map.shape[1], v])
                for name, value in _terms(p, 1 - p, y, hard, activation == "sigmoid", gamma, power, m=m).items():
                    sums[name][b, g] += w * value
    return sums


def _terms(
    p: Any,
    q: Any,
    y: float,
    hard: float,
    binary: bool = False,
    gamma: float = 2.0,
    power: float = 1.0,
    log: Any = math.log,
    m: Any = None,
) -> dict[str, Any]:
    """Return the term of every statistic for one voxel of one class.

    p: the probability, and q = 1 - p. y: the target after label smoothing, hard: before. m: the value of the map.

    The one place beside the package that knows a statistic: a new one has its line here, and is compared from then on.
    """
    entropy = -y * log(p) if y else 0 * p
    other = -(1 - y) * log(q) if binary and y < 1 else 0 * p
    focal, other_focal = entropy * _raised(q, gamma), other * _raised(p, gamma)
    return {
        "intersection": p * y,
        "prediction": p,
        "target": y,
        "prediction_squared": p * p,
        "target_squared": y * y,
        "difference": abs(p - y) ** power,
        "cross_entropy": entropy + other,
        "focal": focal + other_focal,
        "positive_cross_entropy": entropy,
        "negative_cross_entropy": other,
        "positive_focal": focal,
        "negative_focal": other_focal,
        "voxels": 1.0,
        "labelled": hard,
        **({} if m is None else _mapped(p, y, m)),
    }


def _mapped(p: Any, y: float, m: Any) -> dict[str, Any]:
    return {
        "mapped_prediction": m * p,
        "mapped_intersection": m * p * y,
        "mapped_target": m * y,
    }


def _raised(base: Any, exponent: float) -> Any:
    return max(base, 0 * base) ** exponent if exponent else 1.0


def _label(c: int, channels: int) -> int:
    return 1 if channels == 1 else c


def _probabilities(x: np.ndarray, activation: str) -> list[float]:
    if activation == "none":
        return [float(value) for value in x]
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in x]
    powers = [math.exp(value - max(x)) for value in x]
    return [value / math.fsum(powers) for value in powers]


def seed_loss(probabilities: Tensor, labels: Tensor, classes: int, eps: float) -> Tensor:
    """Return what the seed document computes: the mean over classes of minus the logarithm of Dice.

    eps stands once above and once below the line, as in the document's code (its printed formula has it in the sum).
    """
    costs = []
    for number in range(classes):
        mask = (labels == number).to(probabilities.dtype)
        overlap = torch.sum(probabilities.select(1, number) * mask)
        size = torch.sum(probabilities.select(1, number)) + torch.sum(mask)
        costs.append(-torch.log((overlap + overlap + eps) / (size + eps)))
    return torch.stack(costs).sum() / classes


def eager_statistics(input: Tensor, target: Tensor, activation: str) -> dict[str, Tensor]:
    """Return the statistics in the dtype of the input, as eager code computes them; for bounds of the error."""
    prob = {"none": lambda x: x, "softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid}[activation](input)
    true = torch.nn.functional.one_hot(target.long(), input.shape[1]).movedim(-1, 1).to(input.dtype)
    axes = tuple(range(2, input.ndim))
    return {
        "intersection": (prob * true).sum(axes),
        "prediction": prob.sum(axes),
        "target": true.sum(axes),
        "prediction_squared": (prob * prob).sum(axes),
        "difference": (prob - true).abs().sum(axes),
        "cross_entropy": -(true * prob.clamp_min(torch.finfo(prob.dtype).tiny).log()).sum(axes),
    }


def precise(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "none",
    regions: Sequence[Sequence[int]] | None = None,
    gamma: float = 2.0,
    power: float = 1.0,
    digits: int = 360,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return every statistic, (R,), of an input (C, V), and the gradient, (C, V), of the sum of each over R.

    Computed with so many digits that no exponential underflows, no sum rounds, and a difference of two values is a
    derivative. The terms are those of `statistics`; for p > 1, (1 - p)^gamma is 0, or 1 for gamma = 0.
    """
    x, t = input.detach().double().tolist(), target.detach().double().tolist()
    C, V = len(x), len(x[0])
    groups = [list(region) for region in regions] if regions is not None else [[c] for c in range(C)]
    names = tuple(_terms(0.5, 0.5, 1, 1))
    binary = activation == "sigmoid"

    def rows(logits: list[mpmath.mpf], y_all: list[float]) -> np.ndarray:
        """Return the statistics of one voxel, by region."""
        powers = [mpmath.exp(value) for value in logits] if activation != "none" else logits
        if binary:
            p_all, q_all = [e / (1 + e) for e in powers], [1 / (1 + e) for e in powers]
        else:
            total = mpmath.fsum(powers) if activation == "softmax" else mpmath.mpf(1)
            p_all = [value / total for value in powers]
            q_all = [1 - p for p in p_all]
        each = []
        for members in groups:
            p, y = mpmath.fsum(p_all[c] for c in members), max(y_all[c] for c in members)
            q = q_all[members[0]] if len(members) == 1 else 1 - p
            each.append(list(_terms(p, q, y, y, binary, gamma, power, mpmath.log).values()))
        return np.array(each, object).T

    with mpmath.workdps(digits):
        step = mpmath.mpf(10) ** (-digits // 3)
        values = np.zeros((len(names), len(groups)), object)
        gradients = np.zeros((len(names), C, V))
        for v in range(V):
            logits = [mpmath.mpf(x[c][v]) for c in range(C)]
            y_all = [t[c][v] if isinstance(t[0], list) else float(t[v] == _label(c, C)) for c in range(C)]
            values += rows(logits, y_all)
            for c in range(C):
                if not mpmath.isinf(logits[c]):
                    up, down = (
                        rows([*logits[:c], logits[c] + h, *logits[c + 1 :]], y_all).sum(1) for h in (step, -step)
                    )
                    gradients[:, c, v] = (up - down) / (2 * step)
        return (
            dict(zip(names, values.astype(np.float64), strict=True)),
            dict(zip(names, gradients, strict=True)),
        )
