"""SoftDiceLoss, OverlapLoss and sums: each shared keyword and edge case by hand, and the gradient of all of them."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import softdice
from softdice import SoftDiceLoss, costs, reductions
from softdice.functional import soft_dice_loss

# Two classes, three voxels; I = (0.9, 1.3), P = (1.6, 1.4), T = (1, 2), so with eps = 1
# Dice = (2.8 / 3.6, 3.6 / 4.4) = (7/9, 9/11).
PROBABILITY = torch.tensor([[[0.9, 0.2, 0.5], [0.1, 0.8, 0.5]]], dtype=torch.float64)
LABELS = torch.tensor([[0, 1, 1]])
DICE = (7 / 9, 9 / 11)
COST = (-math.log(7 / 9), -math.log(9 / 11))


def value(loss: torch.nn.Module, *tensors: Tensor) -> float:
    return float(loss(*tensors))


def test_minus_log_dice_by_hand(backend: str) -> None:
    loss = SoftDiceLoss(2, eps=1.0)(PROBABILITY, LABELS)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(sum(COST) / 2)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_equal_their_probabilities(backend: str, activation: str) -> None:
    logits = PROBABILITY.log() if activation == "softmax" else PROBABILITY.logit()
    assert value(SoftDiceLoss(2, 1.0, activation=activation), logits, LABELS) == pytest.approx(sum(COST) / 2)


@pytest.mark.parametrize(
    "cost, by_hand",
    [
        ("neg_log", [-math.log(s) for s in DICE]),
        ("one_minus", [1 - s for s in DICE]),
        ("log_cosh", [math.log(math.cosh(1 - s)) for s in DICE]),
        (costs.focal(2.0), [(1 - s) ** 2 for s in DICE]),
        (lambda score: 3 * score, [3 * s for s in DICE]),
    ],
)
def test_cost(cost: Any, by_hand: list[float]) -> None:
    per_class = SoftDiceLoss(2, 1.0, cost=cost, reduction="none")(PROBABILITY, LABELS)
    assert per_class.tolist() == pytest.approx(by_hand)


def test_identity_cost_returns_what_it_is_given() -> None:
    score = torch.tensor([0.25])
    assert costs.identity(score) is score


def test_reductions_and_weights() -> None:
    assert SoftDiceLoss(2, 1.0, reduction="none")(PROBABILITY, LABELS).tolist() == pytest.approx(list(COST))
    assert value(SoftDiceLoss(2, 1.0, reduction="sum"), PROBABILITY, LABELS) == pytest.approx(sum(COST))
    weighted = SoftDiceLoss(2, 1.0, class_weight=[3.0, 1.0])
    assert value(weighted, PROBABILITY, LABELS) == pytest.approx((3 * COST[0] + COST[1]) / 4)
    summed = SoftDiceLoss(2, 1.0, class_weight=torch.tensor([3, 1]), reduction="sum")
    assert value(summed, PROBABILITY, LABELS) == pytest.approx(3 * COST[0] + COST[1])
    none = SoftDiceLoss(2, 1.0, class_weight=(3, 1), reduction="none")
    assert none(PROBABILITY, LABELS).tolist() == pytest.approx([3 * COST[0], COST[1]])


def test_classes_leave_the_others_out() -> None:
    assert value(SoftDiceLoss(2, 1.0, classes=[1]), PROBABILITY, LABELS) == pytest.approx(COST[1])
    assert value(SoftDiceLoss(2, 1.0, classes=range(1, 2)), PROBABILITY, LABELS) == pytest.approx(COST[1])
    both = SoftDiceLoss(2, 1.0, classes=(1, 0), class_weight=[3.0, 1.0], reduction="none")(PROBABILITY, LABELS)
    assert both.tolist() == pytest.approx([COST[1], 3 * COST[0]])  # in the order named, each with its own weight


def test_pooling_by_hand(backend: str) -> None:
    # a second sample, all of class 1 and predicted without a doubt: I = (0, 3), P = (0, 3), T = (0, 3)
    sure = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]], dtype=torch.float64)
    input, labels = torch.cat([PROBABILITY, sure]), torch.cat([LABELS, torch.ones(1, 3, dtype=torch.int64)])
    batch = SoftDiceLoss(2, 1.0, reduction="none", cost="one_minus")(input, labels)
    assert (1 - batch).tolist() == pytest.approx([7 / 9, (2 * 4.3 + 1) / (4.4 + 5 + 1)])
    sample = SoftDiceLoss(2, 1.0, reduction="none", cost="one_minus", pooling="sample")(input, labels)
    assert sample.shape == (2, 2)
    assert (1 - sample).flatten().tolist() == pytest.approx([7 / 9, 9 / 11, 1, 1])
    mean = SoftDiceLoss(2, 1.0, cost="one_minus", pooling="sample", class_weight=[3.0, 1.0])(input, labels)
    assert float(mean) == pytest.approx((3 * (2 / 9) + 2 / 11) / 8)


def test_absent_class(backend: str) -> None:
    # class 2 is predicted on 0.6 voxels and present on none: Dice (0 + 1) / (0.6 + 0 + 1)
    input = torch.tensor([[[0.7, 0.1], [0.2, 0.4], [0.1, 0.5]]], dtype=torch.float64)
    labels = torch.tensor([[0, 1]])
    dice = [(1.4 + 1) / (0.8 + 1 + 1), (0.8 + 1) / (0.6 + 1 + 1), 1 / 1.6]
    counted = SoftDiceLoss(3, 1.0, cost="one_minus", reduction="none")(input, labels)
    assert (1 - counted).tolist() == pytest.approx(dice)
    skipped = SoftDiceLoss(3, 1.0, cost="one_minus", absent="skip")
    assert value(skipped, input, labels) == pytest.approx(1 - (dice[0] + dice[1]) / 2)
    weighted = SoftDiceLoss(3, 1.0, cost="one_minus", absent="skip", class_weight=[3, 1, 5])
    assert value(weighted, input, labels) == pytest.approx((3 * (1 - dice[0]) + 1 - dice[1]) / 4)
    none = SoftDiceLoss(3, 1.0, cost="one_minus", absent="skip", reduction="none")(input, labels)
    assert none.isnan().tolist() == [False, False, True]
    assert value(SoftDiceLoss(3, 1.0, cost="one_minus", absent="skip", reduction="sum"), input, labels) == (
        pytest.approx(2 - dice[0] - dice[1])
    )


def test_absent_means_absent_from_the_pool() -> None:
    input = torch.full((2, 2, 2), 0.5)
    labels = torch.tensor([[0, 0], [1, 1]])  # each class in one sample only
    batch = SoftDiceLoss(2, absent="skip", reduction="none")(input, labels)
    sample = SoftDiceLoss(2, absent="skip", reduction="none", pooling="sample")(input, labels)
    assert not batch.isnan().any()
    assert sample.isnan().tolist() == [[False, True], [True, False]]


def test_label_smoothing_makes_no_class_present() -> None:
    input = torch.full((1, 3, 4), 1 / 3)
    skipped = SoftDiceLoss(3, absent="skip", label_smoothing=0.3, reduction="none")(input, torch.tensor([[0, 1, 1, 0]]))
    assert skipped.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_absent(backend: str, reduction: str) -> None:
    input = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.full((1, 4), 255)
    loss = SoftDiceLoss(2, eps=0.0, absent="skip", ignore_index=255, reduction=reduction)(input, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(input.grad) == 0


def test_everything_ignored_and_counted(backend: str) -> None:
    input = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = SoftDiceLoss(2, ignore_index=255)(input, torch.full((1, 4), 255))
    loss.backward()
    assert loss.item() == 0  # eps / eps = 1, whose logarithm is 0
    assert torch.count_nonzero(input.grad) == 0


def test_empty_target_and_empty_prediction(backend: str) -> None:
    p, empty = torch.tensor([[[0.0, 0.0, 0.0, 0.0]]]), torch.zeros(1, 4, dtype=torch.int64)
    loss = SoftDiceLoss(1, eps=0.5)
    assert value(loss, p, empty) == 0  # neither predicted nor present: 0.5 / 0.5
    assert value(loss, p + 1, empty) == pytest.approx(-math.log(0.5 / 4.5))  # predicted everywhere, present nowhere
    assert value(loss, p, empty + 1) == pytest.approx(-math.log(0.5 / 4.5))  # present everywhere, not predicted
    assert value(loss, p + 1, empty + 1) == 0  # perfect


@pytest.mark.parametrize("target", [torch.tensor([[1, 0]]), torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]])])
@pytest.mark.parametrize("channel", [False, True])
def test_one_class_is_a_mask(backend: str, target: Tensor, channel: bool) -> None:
    p = torch.tensor([[[0.9, 0.2]]], dtype=torch.float64)  # I = 0.9, P = 1.1, T = 1
    loss = value(SoftDiceLoss(1, 1.0), p, target.unsqueeze(1) if channel else target)
    assert loss == pytest.approx(-math.log(2.8 / 3.1))


def test_one_class_soft_mask(backend: str) -> None:
    p, soft = torch.tensor([[[0.9, 0.2]]], dtype=torch.float64), torch.tensor([[0.5, 0.25]])
    # I = 0.45 + 0.05, P = 1.1, T = 0.75
    assert value(SoftDiceLoss(1, 1.0), p, soft) == pytest.approx(-math.log(2 / 2.85))
    assert value(SoftDiceLoss(1, 1.0), p, soft.unsqueeze(1)) == pytest.approx(-math.log(2 / 2.85))


def test_one_voxel(backend: str) -> None:
    p = torch.tensor([[[0.75], [0.25]]], dtype=torch.float64)  # Dice (1.5 + 1) / (0.75 + 1 + 1) and 1 / 1.25
    expected = -(math.log(2.5 / 2.75) + math.log(1 / 1.25)) / 2
    assert value(SoftDiceLoss(2, 1.0), p, torch.tensor([[0]])) == pytest.approx(expected)
    assert value(SoftDiceLoss(2, 1.0), p[..., None, None], torch.tensor([[[[0]]]])) == pytest.approx(expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_labels_with_a_channel_dimension(backend: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    p = torch.rand(batch, 3, 6, 5, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(0, 3, (batch, 6, 5), generator=generator)
    plain, channel = (soft_dice_loss(p, y) for y in (labels, labels.unsqueeze(1)))
    assert torch.equal(plain, channel)
    torch.testing.assert_close(plain, oracle.seed_loss(p, labels, 3, 1e-5))
    # the seed's code broadcasts a (B, 1, H, W) mask against (B, H, W) probabilities to (B, B, H, W)
    broadcast = oracle.seed_loss(p, labels.unsqueeze(1), 3, 1e-5)
    assert (abs(broadcast - plain) < 1e-12) == (batch == 1)


def test_voxel_weight_by_hand(backend: str) -> None:
    # weights (2, 0, 1): I = (1.8, 0.5), P = (2.3, 0.7), T = (2, 1)
    expected = -(math.log(4.6 / 5.3) + math.log(2 / 2.7)) / 2
    for weight in (torch.tensor([[2, 0, 1]]), torch.tensor([[[2.0, 0.0, 1.0]]])):
        assert value(SoftDiceLoss(2, 1.0), PROBABILITY, LABELS, weight) == pytest.approx(expected)
        assert float(SoftDiceLoss(2, 1.0)(PROBABILITY, LABELS, voxel_weight=weight)) == pytest.approx(expected)
    keep = torch.tensor([[True, False, True]])
    ignored = value(SoftDiceLoss(2, 1.0, ignore_index=255), PROBABILITY, torch.tensor([[0, 255, 1]]))
    assert value(SoftDiceLoss(2, 1.0), PROBABILITY, LABELS, keep) == pytest.approx(ignored)


def test_ignored_voxels_get_a_gradient_of_zero(backend: str) -> None:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, 255, 1, 0, 255, 2, 2, 1]]).repeat(2, 1)
    logits[:, :, 3] = torch.nan
    logits.requires_grad_()
    loss = SoftDiceLoss(3, activation="softmax", ignore_index=255)(logits, labels)
    loss.backward()
    kept = labels[0] != 255
    clean = SoftDiceLoss(3, activation="softmax")(logits.detach()[:, :, kept], labels[:, kept])
    torch.testing.assert_close(loss.detach(), clean)
    assert torch.count_nonzero(logits.grad[:, :, ~kept]) == 0
    assert torch.count_nonzero(logits.grad[:, :, kept]) == logits.grad[:, :, kept].numel()


def test_label_smoothing_by_hand(backend: str) -> None:
    # e = 0.2: I = (0.88, 1.18), P = (1.6, 1.4), T = (1.1, 1.9), as in test_reference.py
    expected = -(math.log(2.76 / 3.7) + math.log(3.36 / 4.3)) / 2
    assert value(SoftDiceLoss(2, 1.0, label_smoothing=0.2), PROBABILITY, LABELS) == pytest.approx(expected)


def test_regions_by_hand(backend: str) -> None:
    p = torch.tensor([[[0.5, 0.25], [0.25, 0.25], [0.25, 0.5]]], dtype=torch.float64)
    loss = SoftDiceLoss(3, 1.0, cost="one_minus", regions=((1, 2), (2,)), reduction="none")(p, torch.tensor([[1, 2]]))
    # {1, 2}: I = 1.25, P = 1.25, T = 2;  {2}: I = 0.5, P = 0.75, T = 1
    assert (1 - loss).tolist() == pytest.approx([3.5 / 4.25, 2 / 2.75])
    one = SoftDiceLoss(3, 1.0, cost="one_minus", regions=((1, 2), (2,)), classes=[1], class_weight=[9.0, 1.0])
    assert value(one, p, torch.tensor([[1, 2]])) == pytest.approx(1 - 2 / 2.75)


def test_reduce_alone() -> None:
    cost = torch.tensor([[1.0, 3.0], [5.0, torch.inf]])
    present = torch.tensor([[True, True], [True, False]])
    assert reductions.reduce(cost, present=present).item() == 3
    weight = torch.tensor([2.0, 1.0])
    assert reductions.reduce(cost, class_weight=weight, present=present).item() == (2 + 3 + 10) / 5
    assert reductions.reduce(cost, present=present & False).item() == 0


# Gradients over every keyword of a loss


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    B, C, V = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    activation = draw(st.sampled_from(["none", "sigmoid", "softmax"] if C > 1 else ["none", "sigmoid"]))
    p = torch.rand(B, C, V, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    input = p / C if activation == "none" else 4 * p - 2
    dense = draw(st.booleans())
    keywords: dict[str, Any] = {
        "activation": activation,
        "cost": draw(st.sampled_from(["neg_log", "one_minus", "log_cosh", costs.focal(1.5)])),
        "pooling": draw(st.sampled_from(["batch", "sample"])),
        "absent": draw(st.sampled_from(["count", "skip"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "validate": draw(st.booleans()),
    }
    columns = C
    if activation != "sigmoid" and C == 3 and draw(st.booleans()):
        keywords["regions"], columns = ((1, 2), (0,)), 2
    if draw(st.booleans()):
        keywords["class_weight"] = [0.5, 2.0, 1.0][:columns]
    if columns > 1 and draw(st.booleans()):
        keywords["classes"] = [columns - 1, 0]
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(B, V, dtype=torch.float64, generator=generator)
        weight = torch.where(weight < 0.3, 0.0, weight)
    if dense:
        target = torch.rand(B, C, V, dtype=torch.float64, generator=generator)
    else:
        target = torch.randint(0, max(C, 2), (B, V), generator=generator)
        if draw(st.booleans()):
            keywords["ignore_index"] = -1
            target[torch.rand(B, V, generator=generator) < 0.3] = -1
    return SoftDiceLoss(C, draw(st.sampled_from([1e-2, 1.0])), **keywords), input, target, weight


@given(problem=problems())
@settings(max_examples=80)
def test_gradcheck(backend: str, problem: tuple[torch.nn.Module, Tensor, Tensor, Tensor | None]) -> None:
    loss, input, target, weight = problem
    leaf = input.clone().requires_grad_()

    def mixed(x: Tensor) -> Tensor:  # a class that is left out of reduction="none" is nan by contract, its gradient 0
        per_class = loss(x, target, weight).nan_to_num(0.0).flatten()
        return (per_class * torch.arange(1.0, per_class.numel() + 1)).sum()

    assert torch.autograd.gradcheck(
        lambda x: loss(x, target, weight).nan_to_num(0.0), (leaf,), check_undefined_grad=False
    )


@given(problem=problems())
@settings(max_examples=20)
def test_gradgradcheck_of_the_reference(problem: tuple[torch.nn.Module, Tensor, Tensor, Tensor | None]) -> None:
    loss, input, target, weight = problem
    leaf = input.clone().requires_grad_()
    with softdice.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: loss(x, target, weight).nan_to_num(0.0).sum(), (leaf,))


def test_gradient_of_the_seed_against_its_own_formula(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 20, 20, generator=generator).softmax(1).double().requires_grad_()
    labels = torch.randint(0, 3, (2, 20, 20), generator=generator)
    (ours,) = torch.autograd.grad(SoftDiceLoss(3)(p, labels), p)
    (theirs,) = torch.autograd.grad(oracle.seed_loss(p, labels, 3, 1e-5), p)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_loss_trains(backend: str) -> None:
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
    labels = torch.randint(0, 3, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    loss = SoftDiceLoss(3, activation="softmax")
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        loss(logits, labels).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), labels)
