"""Mistakes in the making of a loss, each with its message."""

from __future__ import annotations

import pytest
import torch

import softdice


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
