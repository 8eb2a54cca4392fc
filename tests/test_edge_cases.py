"""The statistics where something is empty, ignored, extreme or single; their container; torch.func."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_statistics import made, sums_and_gradient
from torch import Tensor

import softdice


def test_ignored_voxels_may_hold_anything(backend: str) -> None:
    input, labels = made("softmax", 2, 3, 30)
    labels[:, ::3] = 255
    dirty = input.clone()
    dirty[:, :, ::9], dirty[:, :, 3::9], dirty[:, :, 6::9] = torch.nan, torch.inf, -torch.inf
    for activation in ("softmax", "sigmoid"):
        expected = sums_and_gradient(input, labels, activation=activation, ignore_index=255)
        got = sums_and_gradient(dirty, labels, activation=activation, ignore_index=255)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert torch.count_nonzero(got[1][:, :, ::3]) == 0  # exactly 0
        assert torch.count_nonzero(got[1][:, :, 1::3]) == got[1][:, :, 1::3].numel()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_voxel_of_weight_zero_may_hold_logits_whose_difference_overflows(backend: str, activation: str) -> None:
    input, labels = made("softmax", 1, 3, 40)
    weight = torch.ones(1, 40)
    weight[:, ::5] = 0
    dirty = input.float()
    expected = sums_and_gradient(dirty, labels, activation=activation, voxel_weight=weight)
    dirty = dirty.clone()
    dirty[:, 0, ::5], dirty[:, 1:, ::5] = 3e38, -3e38  # their own class among them
    got = sums_and_gradient(dirty, labels, activation=activation, voxel_weight=weight)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dense", [False, True])
def test_a_voxel_of_weight_zero_may_hold_anything(backend: str, dense: bool) -> None:
    input, labels = made("softmax", 1, 3, 8)
    target = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() if dense else labels
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.5, 1.0, 0.0, 1.0]])
    expected = sums_and_gradient(input, target, activation="softmax", voxel_weight=weight)
    dirty, target = input.clone(), target.clone()
    dirty[..., weight[0] == 0] = torch.nan
    target[..., weight[0] == 0] = torch.nan if dense else 77
    got = sums_and_gradient(dirty, target, activation="softmax", voxel_weight=weight)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("C", [2, 3, 4, 6, 14])
def test_a_logit_of_minus_infinity_switches_a_class_off(backend: str, C: int) -> None:
    generator = torch.Generator().manual_seed(C)
    logits = torch.randn(2, C, 30, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, C, (2, 30), generator=generator)
    logits[0, 0] = -torch.inf
    logits.requires_grad_()
    found = softdice.CrossEntropyLoss(C, activation="softmax", pooling="batch")(logits, labels)
    dice = softdice.SoftDiceLoss(C, activation="softmax")(logits, labels)
    (found + dice).backward()
    expected = torch.nn.functional.cross_entropy(logits.detach(), labels, reduction="none").sum()
    sums = softdice.overlap_statistics(logits.detach(), labels, activation="softmax", fields=("cross_entropy",))
    torch.testing.assert_close(sums.cross_entropy.sum(), expected, rtol=1e-12, atol=0)
    assert torch.isfinite(found)
    assert torch.isfinite(dice)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.count_nonzero(logits.grad[0, 0]) == 0
    assert torch.count_nonzero(logits.grad[1]) > 0


def test_nan_logits_give_nan(backend: str) -> None:
    input, labels = made("softmax", 1, 3, 8)
    input[0, 1, 2] = torch.nan
    stats = softdice.overlap_statistics(input, labels, activation="softmax")
    assert stats.intersection.isnan().any()
    assert stats.prediction.isnan().all()


def test_everything_ignored(backend: str) -> None:
    input, labels = made("softmax", 2, 3, 8)
    sums, gradient = sums_and_gradient(input, torch.full_like(labels, 255), activation="softmax", ignore_index=255)
    assert torch.count_nonzero(sums) == 0
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 3, 0), (0, 2, 4, 4)])
def test_no_voxels(backend: str, shape: tuple[int, ...]) -> None:
    input = torch.zeros(shape, requires_grad=True)
    stats = softdice.overlap_statistics(input, torch.zeros(shape[0], *shape[2:], dtype=torch.int64))
    assert stats.prediction.shape == shape[:2]
    assert torch.count_nonzero(stats.prediction) == 0
    assert stats.pool().prediction.tolist() == [0.0] * shape[1]
    stats.prediction.sum().backward()


def test_extreme_logits_stay_finite(backend: str) -> None:
    input = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]])
    for activation in ("softmax", "sigmoid"):
        sums, gradient = sums_and_gradient(input, torch.tensor([[0, 0, 1]]), activation=activation)
        assert sums.isfinite().all()
        assert gradient.isfinite().all()


def test_second_derivative_where_prediction_equals_target() -> None:
    input = torch.tensor([[[0.25, 0.5]]], dtype=torch.float64, requires_grad=True)
    target = input.detach().clone()
    for power, curvature in ((1.0, 0.0), (1.5, 0.0), (2.0, 2.0), (3.0, 0.0)):  # 1.5 has none: 0 and not nan
        stats = softdice.overlap_statistics(input, target, power=power, fields=("difference",))
        (first,) = torch.autograd.grad(stats.difference.sum(), input, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), input)
        assert first.tolist() == [[[0.0, 0.0]]]
        assert (second + torch.zeros(1, 1, 2)).tolist() == [
            [[curvature, curvature]]
        ]  # abs gives a zero without storage


def test_soft_mask_of_one_class(backend: str) -> None:
    input = torch.tensor([[[0.9, 0.2]]], dtype=torch.float64)
    for target in (torch.tensor([[0.5, 0.25]]), torch.tensor([[[0.5, 0.25]]])):
        stats = softdice.overlap_statistics(input, target)
        assert stats.intersection.item() == pytest.approx(0.45 + 0.05)
        assert stats.target.item() == pytest.approx(0.75)


def test_regions_after_inference_mode(backend: str) -> None:
    input, labels = made("softmax", 1, 3, 8)
    keywords: dict[str, Any] = {"activation": "softmax", "regions": ((1, 2), (2,))}
    with torch.inference_mode():
        softdice.overlap_statistics(input, labels, **keywords)
    _, gradient = sums_and_gradient(input, labels, **keywords)
    assert gradient.isfinite().all()


# The container


def test_container() -> None:
    input, labels = made("softmax", 2, 3, 8)
    stats = softdice.overlap_statistics(input, labels, activation="softmax", fields=("intersection", "target"))
    assert not stats.pooled
    assert stats.pool().pooled
    assert stats.pool().pool().target.shape == (3,)
    assert torch.equal(stats.select((2, 0)).target, stats.target[:, [2, 0]])
    filled = stats.fill(stats.target > stats.target.mean(), 7.0)
    assert torch.equal(filled.target, torch.where(stats.target > stats.target.mean(), 7.0, stats.target))
    assert repr(stats).startswith("OverlapStatistics(\n  intersection=tensor(")
    for twin in (copy.copy(stats), copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert torch.equal(twin.target, stats.target)


def test_container_errors() -> None:
    input, labels = made("softmax", 1, 2, 8)
    a = softdice.overlap_statistics(input, labels, activation="softmax", fields=("target",))
    b = softdice.overlap_statistics(input, labels, activation="softmax", fields=("prediction", "target"))
    with pytest.raises(AttributeError) as missing:
        a.prediction  # noqa: B018 - the attribute access is what raises
    assert str(missing.value) == (
        "OverlapStatistics: expected a field among target, got 'prediction'. "
        "The pass was not asked for it: name it in fields."
    )
    with pytest.raises(AttributeError, match=r"got 'predictions'\. Correct the spelling\."):
        a.predictions  # noqa: B018
    with pytest.raises(ValueError) as different:
        a + b
    assert str(different.value) == (
        "OverlapStatistics.__add__: expected the fields target, got prediction, target. "
        "Ask both passes for the same fields."
    )
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 1


def test_statistics_of_batches_of_other_sizes_are_not_broadcast() -> None:
    """The last batch of an epoch, of one sample, was added to each sample of the one before."""
    input, labels = made("softmax", 3, 2, 8)
    whole, last = (softdice.overlap_statistics(input[b], labels[b], activation="softmax") for b in (slice(3), slice(1)))
    for one, other, shapes in (
        (whole, last, r"\(3, 2\), got \(1, 2\)"), (whole, last.pool(), r"\(3, 2\), got \(2,\)"),
        (whole.pool(), whole.pool().select([1]), r"\(2,\), got \(1,\)"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"__add__: expected statistics of shape {shapes}\. Add the samples of each"
        ):
            one + other
    twice = (whole.pool() + last.pool()).prediction
    torch.testing.assert_close(twice, whole.prediction.sum(0) + whole.prediction[0])


# The reference under torch.func


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp uses it
def test_function_transforms() -> None:
    input, labels = made("softmax", 1, 3, 8, dtype=torch.float64)
    labels3 = torch.stack([labels, labels.roll(1, 1), labels.roll(2, 1)])
    inputs3 = torch.stack([input, 2 * input, -input])

    def score(x: Tensor, y: Tensor) -> Tensor:
        stats = softdice.overlap_statistics(x, y, activation="softmax")
        return (stats.intersection / stats.prediction).sum()

    leaf = input.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf, labels), leaf)
    torch.testing.assert_close(torch.func.grad(score)(input, labels), gradient)
    direction = torch.randn(input.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, slope = torch.func.jvp(lambda x: score(x, labels), (input,), (direction,))
    torch.testing.assert_close(slope, (gradient * direction).sum())
    one_by_one = torch.stack([score(x, y) for x, y in zip(inputs3, labels3, strict=True)])
    torch.testing.assert_close(torch.func.vmap(score)(inputs3, labels3), one_by_one)
    per_sample = torch.func.vmap(torch.func.grad(score))(inputs3, labels3)
    torch.testing.assert_close(per_sample[0], gradient)
    hessian = torch.func.hessian(lambda x: score(x, labels))(input).reshape(24, 24)
    torch.testing.assert_close(hessian, hessian.T)
    labels3[1, 0, 0] = 9
    with pytest.raises(ValueError, match=r"labels in \[0, 3\), got values outside \(some voxels\)"):
        torch.func.vmap(score)(inputs3, labels3)


def test_float_labels_under_vmap() -> None:
    """Their fractions are looked for without a look at a single value, which vmap forbids."""

    def voxels(x: Tensor, y: Tensor) -> Tensor:
        return softdice.overlap_statistics(x, y, activation="softmax").labelled[0]

    logits, labels = torch.zeros(2, 1, 3, 4), torch.tensor([[[0.0, 1.0, 2.0, 0.0]], [[2.0, 2.0, 0.0, 1.0]]])
    expected = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    torch.testing.assert_close(torch.func.vmap(voxels)(logits, labels), expected)
    labels[1, 0, 0] = 0.5
    with pytest.raises(ValueError, match=r"expected whole labels in target, got values outside\. A float label map"):
        torch.func.vmap(voxels)(logits, labels)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pooling", ["batch", "sample"])
def test_an_empty_batch_is_a_loss_of_0(pooling: str, reduction: str) -> None:
    logits = torch.zeros(0, 3, 8, requires_grad=True)
    loss = softdice.JaccardLoss(3, activation="softmax", pooling=pooling, reduction=reduction)
    value = loss(logits, torch.zeros(0, 8, dtype=torch.int64))
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 3, 8)
