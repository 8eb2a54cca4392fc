"""Every index against a plain formula on loops over voxels. A new index is its function and its row in INDICES."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import softdice

EPS = 0.3  # large enough that a wrong place of it shows
Voxels = list[tuple[float, float]]
"""(p, y) of one class at every voxel."""


def per_class(formula: Callable[[Voxels], float]) -> Callable[[list[Voxels]], list[float]]:
    """Return an index that applies a formula class by class."""
    return lambda classes: [formula(voxels) for voxels in classes]


def dice(voxels: Voxels) -> float:
    return (2 * sum(p * y for p, y in voxels) + EPS) / (sum(p + y for p, y in voxels) + EPS)


def jaccard(voxels: Voxels) -> float:
    return (sum(p * y for p, y in voxels) + EPS) / (sum(p + y - p * y for p, y in voxels) + EPS)


def tversky(voxels: Voxels) -> float:
    true = sum(p * y for p, y in voxels)
    return (true + EPS) / (true + sum(0.2 * p * (1 - y) + 0.9 * (1 - p) * y for p, y in voxels) + EPS)


def squared_dice(voxels: Voxels) -> float:
    return (2 * sum(p * y for p, y in voxels) + EPS) / (sum(p * p + y * y for p, y in voxels) + EPS)


def generalized_dice(power: int) -> Callable[[list[Voxels]], list[float]]:
    def score(classes: list[Voxels]) -> list[float]:
        sizes = [sum(y for _, y in voxels) for voxels in classes]
        rarest = min((size for size in sizes if size), default=1.0)
        weights = [1 / (size or rarest) ** power if any(sizes) else 1.0 for size in sizes]
        weights = [weight / sum(weights) for weight in weights]
        pairs = list(zip(weights, classes, strict=True))
        overlap = sum(weight * p * y for weight, voxels in pairs for p, y in voxels)
        extent = sum(weight * (p + y) for weight, voxels in pairs for p, y in voxels)
        return [(2 * overlap + EPS) / (extent + EPS)]

    return score


def mcc(voxels: Voxels) -> float:
    """Return Pearson's correlation of p and y, with the variance of a variable that is 0 or 1 for both."""
    n = len(voxels)
    p, t = sum(p for p, _ in voxels) / n, sum(y for _, y in voxels) / n
    covariance = sum((value - p) * (y - t) for value, y in voxels) / n
    agreement = sum(1 - 2 * (value + y - 2 * value * y) for value, y in voxels) / n
    return (covariance + agreement * EPS / n) / math.sqrt((p * (1 - p) + EPS / n) * (t * (1 - t) + EPS / n))


def dice_semimetric(voxels: Voxels) -> float:
    return 1 - sum(abs(p - y) for p, y in voxels) / (sum(p + y for p, y in voxels) + EPS)


def dice_semimetric_product(voxels: Voxels) -> float:
    difference = sum(abs(p - y) for p, y in voxels)
    return 1 - difference / (2 * sum(p * y for p, y in voxels) + difference + EPS)


def jaccard_metric(voxels: Voxels) -> float:
    return 1 - sum(abs(p - y) for p, y in voxels) / (sum(max(p, y) for p, y in voxels) + EPS / 2)


def jaccard_metric_product(voxels: Voxels) -> float:
    return 1 - sum(abs(p - y) for p, y in voxels) / (sum(p * y + abs(p - y) for p, y in voxels) + EPS)


def noise_robust_dice(voxels: Voxels) -> float:
    return 1 - sum(abs(p - y) ** 1.5 for p, y in voxels) / (sum(p * p + y * y for p, y in voxels) + EPS)


def entropy(gamma: float) -> Callable[[list[Voxels]], list[float]]:
    def cost(classes: list[Voxels]) -> list[float]:
        cells = [cell for voxels in classes for cell in voxels]
        total = sum(y * (1 - p) ** gamma * -math.log(p) for p, y in cells)
        return [total / (sum(y for _, y in cells) or 1)]

    return cost


def binary_entropy(gamma: float) -> Callable[[list[Voxels]], list[float]]:
    def cost(classes: list[Voxels]) -> list[float]:
        cells = [cell for voxels in classes for cell in voxels]
        right = [(p if y else 1 - p) for p, y in cells]
        return [sum((1 - q) ** gamma * -math.log(q) for q in right) / len(cells)]

    return cost


# name of the index, its keywords, the formula
INDICES: list[tuple[str, dict[str, Any], Callable[[list[Voxels]], list[float]]]] = [
    ("dice", {"eps": EPS}, per_class(dice)),
    ("jaccard", {"eps": EPS}, per_class(jaccard)),
    ("tversky", {"alpha": 0.2, "beta": 0.9, "eps": EPS}, per_class(tversky)),
    ("squared_dice", {"eps": EPS}, per_class(squared_dice)),
    ("generalized_dice", {"eps": EPS}, generalized_dice(2)),
    ("generalized_dice", {"weighting": "simple", "eps": EPS}, generalized_dice(1)),
    ("generalized_dice", {"weighting": "uniform", "eps": EPS}, generalized_dice(0)),
    ("mcc", {"eps": EPS}, per_class(mcc)),
    ("dice_semimetric", {"eps": EPS}, per_class(dice_semimetric)),
    ("dice_semimetric", {"form": "product", "eps": EPS}, per_class(dice_semimetric_product)),
    ("jaccard_metric", {"eps": EPS}, per_class(jaccard_metric)),
    ("jaccard_metric", {"form": "product", "eps": EPS}, per_class(jaccard_metric_product)),
    ("noise_robust_dice", {"eps": EPS}, per_class(noise_robust_dice)),
    ("cross_entropy", {}, entropy(0)),
    ("cross_entropy", {"binary": True}, binary_entropy(0)),
    ("focal_entropy", {}, entropy(2)),
    ("focal_entropy", {"binary": True}, binary_entropy(2)),
]


@pytest.mark.parametrize(("name", "keywords", "formula"), INDICES)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 2), classes=st.integers(1, 4), count=st.integers(1, 9))
def test_an_index_is_its_formula_on_loops_over_voxels(
    name: str, keywords: dict[str, Any], formula: Any, seed: int, samples: int, classes: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, count, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(classes, 2), (samples, count), generator=generator)
    binary = keywords.get("binary", False)
    p = logits.sigmoid() if binary or classes == 1 else logits.softmax(1)
    first = 1 if classes == 1 else 0  # the one class is the mask of ones
    cells = [
        [[(p[b, c, v].item(), float(labels[b, v] == first + c)) for v in range(count)] for c in range(classes)]
        for b in range(samples)
    ]
    input, activation = (logits, "sigmoid") if binary else (p, "none")
    stats = softdice.overlap_statistics(input, labels, activation=activation, power=power_of(name))
    index = getattr(softdice.indices, name)
    each = [formula(sample) for sample in cells]
    torch.testing.assert_close(index(stats, **keywords), torch.tensor(each, dtype=torch.float64))
    pooled = formula([[cell for sample in cells for cell in sample[c]] for c in range(classes)])
    torch.testing.assert_close(index(stats.pool(), **keywords), torch.tensor(pooled, dtype=torch.float64))


def power_of(name: str) -> float:
    return 1.5 if name == "noise_robust_dice" else 1.0


def test_every_index_has_its_row() -> None:
    public = {
        name
        for name, value in vars(softdice.indices).items()
        if inspect.isfunction(value) and value.__module__ == "softdice.indices" and not name.startswith("_")
    }
    of_maps = {"boundary", "skeleton_recall"}  # by hand in tests/test_maps.py
    assert public - of_maps == {row[0] for row in INDICES}
