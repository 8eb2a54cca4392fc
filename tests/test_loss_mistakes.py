"""Mistakes in the making of a loss, each with its message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import softdice
from softdice.losses import MAPPED

OPTIONS: dict[str, dict[str, Any]] = {
    "TopKCrossEntropyLoss": {"k": 0.1},
    "WassersteinDiceLoss": {"distance": [[0, 1, 1], [1, 0, 0.3], [1, 0.3, 0]]},
    "OverlapLoss": {"index": softdice.indices.dice},
}
LOSSES = [getattr(softdice, name) for name in softdice.__all__ if name.endswith("Loss") and name != "StatisticsLoss"]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_what_every_loss_says_of_what_it_cannot_take(loss: Any, backend: str) -> None:
    """Lists, nothing, labels that are no class; and a NaN is never lost."""
    name = loss.__name__
    made = loss(num_classes=3, activation="softmax", **OPTIONS.get(name, {}))
    logits, labels = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 8, 9).long()
    more = {"voxel_map": torch.ones(2, 3, 8, 9)} if loss in MAPPED else {}
    for given, what in (((logits.tolist(), labels), "input"), ((logits, None), "target"), ((None, labels), "input")):
        with pytest.raises(TypeError, match=f"{name}: expected {what} to be a Tensor, got (list|NoneType)"):
            made(*given, **more)
    with pytest.raises(ValueError, match=rf"{name}: expected target with labels in \[0, 3\), got 7 \(144 voxels\)"):
        made(logits, labels + 7, **more)
    assert made(logits, labels, **more).isfinite()
    logits[1, 2, 3, 4] = torch.nan
    assert made(logits, labels, **more).isnan()


def test_an_index_may_pool_and_select() -> None:
    loss = softdice.OverlapLoss(lambda s: s.pool().select([1]).intersection.expand(2) / s.target.sum(), 2)
    assert loss.settings.fields == ("intersection", "target")
    value = loss(torch.tensor([[[0.5, 0.0], [0.5, 1.0]]]), torch.tensor([[0, 1]]))
    assert value.item() == pytest.approx(0.5)


def test_regions_without_the_comma() -> None:
    expected = r"expected regions to be tuples of class numbers, got \(1, 2\)\. Write a single region with a comma"
    with pytest.raises(TypeError, match=f"SoftDiceLoss: {expected}"):
        softdice.SoftDiceLoss(3, regions=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"overlap_statistics: {expected}"):
        softdice.overlap_statistics(torch.zeros(1, 3, 2), torch.zeros(1, 2).long(), regions=(1, 2))  # type: ignore[arg-type]


def test_a_softmax_over_one_channel_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"SoftDiceLoss: expected activation 'sigmoid' or 'none' for one class"):
        softdice.SoftDiceLoss(1, activation="softmax")


def test_a_factor_is_finite() -> None:
    with pytest.raises(ValueError, match="SumLoss: expected a finite factor, got nan"):
        float("nan") * softdice.SoftDiceLoss(2)
