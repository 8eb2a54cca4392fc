"""Mistakes in the making of a loss, each with its message."""

from __future__ import annotations

from typing import Any

import numpy as np
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


@pytest.mark.parametrize("loss", [softdice.GeneralizedDiceLoss, softdice.SoftDiceLoss, softdice.LovaszLoss])
def test_weights_of_the_classes_that_count_are_not_all_0(loss: Any) -> None:
    expected = r"expected class_weight finite, >= 0 and not all 0 for classes \(2, 0\), got \[0\.0, 1\.0, 0\.0\]"
    with pytest.raises(ValueError, match=f"{loss.__name__}: {expected}"):
        loss(3, classes=(2, 0), class_weight=[0, 1, 0])


@pytest.mark.parametrize("mask", [[False, True], (True,), torch.tensor([True, False]), np.array([False, True])])
def test_a_mask_of_classes_is_not_taken_for_their_numbers(mask: Any) -> None:
    with pytest.raises(TypeError, match="SoftDiceLoss: expected classes to be a sequence of ints"):
        softdice.SoftDiceLoss(2, classes=mask)
    with pytest.raises(TypeError, match="expected regions to be a sequence of ints"):
        softdice.overlap_statistics(torch.full((1, 2, 4), 0.5), torch.zeros(1, 4).long(), regions=[mask])


@pytest.mark.parametrize("loss", [softdice.CrossEntropyLoss, softdice.FocalLoss, softdice.SoftDiceLoss])
def test_regions_of_every_loss_are_checked_alike(loss: Any) -> None:
    with pytest.raises(TypeError, match=f"{loss.__name__}: expected regions to be tuples of class numbers, got"):
        loss(3, regions=(0, 1, 2))
    assert loss(3, activation="softmax", regions=iter([iter([0, 2]), (1,)])).settings.regions == ((0, 2), (1,))


@pytest.mark.parametrize("merge", [{0: 2}, [(0, 2)], {0: (2,), 1: None}])
def test_a_merge_maps_a_class_to_classes(merge: Any) -> None:
    loss = softdice.SoftDiceLoss(3, activation="softmax")
    with pytest.raises(
        TypeError, match=r"SoftDiceLoss: expected merge to map a class to classes, got .*\{0: \(2, 3\)\}"
    ):
        loss(torch.zeros(1, 3, 4), torch.zeros(1, 4).long(), merge=merge)


def test_a_merge_may_be_of_what_can_be_read_once() -> None:
    logits, labels = torch.randn(2, 4, 9), torch.randint(0, 4, (2, 9))
    loss = softdice.SoftDiceLoss(4, activation="softmax")
    assert torch.equal(loss(logits, labels, merge={0: iter((2, 3))}), loss(logits, labels, merge={0: (2, 3)}))


def test_a_single_tensor_is_no_list() -> None:
    for classes in (torch.tensor(1), np.int64(1)):
        with pytest.raises(TypeError, match=r"SoftDiceLoss: expected classes to be a sequence of ints, got"):
            softdice.SoftDiceLoss(3, classes=classes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SoftDiceLoss: expected merge to map a class to classes, got"):
        softdice.SoftDiceLoss(3, activation="softmax")(
            torch.zeros(1, 3, 4), torch.zeros(1, 4).long(), merge={0: torch.tensor(2)}
        )
    with pytest.raises(TypeError, match=r"DeepSupervision: expected weights\[0\] to be a number"):
        softdice.DeepSupervision(softdice.SoftDiceLoss(3), [torch.tensor([1.0, 2.0])])  # type: ignore[list-item]


def test_deep_supervision_of_the_values_of_a_dictionary() -> None:
    loss, target = softdice.SoftDiceLoss(3, activation="softmax"), torch.zeros(1, 8).long()
    outputs = {"fine": torch.randn(1, 3, 8), "coarse": torch.randn(1, 3, 4)}
    deep = softdice.DeepSupervision(loss)
    assert torch.equal(deep(outputs.values(), target), deep([*outputs.values()], target))  # type: ignore[arg-type]


def test_the_semimetric_of_whole_numbers() -> None:
    counts = {"intersection": [2, 0], "prediction": [3, 1], "target": [3, 2], "difference": [2, 3]}
    stats = softdice.OverlapStatistics({name: torch.tensor(values) for name, values in counts.items()})
    torch.testing.assert_close(softdice.indices.dice_semimetric(stats, eps=0.0), torch.tensor([2 / 3, 0.0]))


def test_a_merge_of_nothing_changes_nothing() -> None:
    loss, logits, labels = (
        softdice.SoftDiceLoss(3, activation="softmax"),
        torch.randn(2, 3, 9),
        torch.zeros(2, 9).long(),
    )
    assert torch.equal(loss(logits, labels, merge={}), loss(logits, labels))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_voxel_weights_of_unsigned_integers(dtype: torch.dtype, backend: str) -> None:
    logits, labels = torch.randn(2, 3, 40, requires_grad=True), torch.arange(80).reshape(2, 40) % 3
    weight = torch.arange(80).reshape(2, 40) * 800 % 60_001
    loss = softdice.SoftDiceLoss(3, activation="softmax")
    values = [loss(logits, labels, w) for w in (weight.to(dtype), weight)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


def test_weights_of_resolutions_are_numbers_of_any_library() -> None:
    outputs, labels = [torch.randn(1, 3, 8), torch.randn(1, 3, 4)], torch.arange(8).reshape(1, 8) % 3
    loss = softdice.SoftDiceLoss(3, activation="softmax")
    right = softdice.DeepSupervision(loss, (0.75, 0.25))(outputs, labels)
    for weights in (np.array([0.75, 0.25], np.float32), torch.tensor([0.75, 0.25]), [np.float32(0.75), 0.25]):
        torch.testing.assert_close(softdice.DeepSupervision(loss, weights)(outputs, labels), right)  # type: ignore[arg-type]
    for wrong, name in (
        ({"out": outputs[0]}, "dict"),
        (iter(outputs), "list_iterator"),
        (outputs[0], "a single tensor"),
    ):
        with pytest.raises(ValueError, match=f"DeepSupervision: expected 2 outputs, got {name}"):
            softdice.DeepSupervision(loss, (1, 1))(wrong, labels)  # type: ignore[arg-type]
