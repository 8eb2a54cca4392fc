"""Every loss of the family by hand, merge, regions, sums, deep supervision."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softdice
from softdice.backends import op
from softdice.losses.supervision import at_resolution

# Two voxels, labels 0 and 1. Class 0: I 3/4, P 5/4, T 1, Q 13/16, R 1, D 3/4. Class 1: I 1/2, P 3/4, T 1, Q 5/16, R 1,
# D 3/4.
PROBABILITY = torch.tensor([[[0.75, 0.5], [0.25, 0.5]]])
LABELS = torch.tensor([[0, 1]])
POWERED = 0.25**1.5 + 0.5**1.5

BY_HAND = [
    (softdice.JaccardLoss, {"eps": 0.0}, (1 / 2, 3 / 5)),
    (softdice.TverskyLoss, {"eps": 0.0}, (13 / 43, 17 / 37)),
    (softdice.TverskyLoss, {"alpha": 0.5, "beta": 0.5, "eps": 0.0}, (1 / 3, 3 / 7)),
    (softdice.TverskyLoss, {"alpha": 1, "beta": 0, "eps": 0.0}, (1 - 0.75 / 1.25, 1 - 0.5 / 0.75)),
    (softdice.FocalTverskyLoss, {"eps": 0.0}, ((13 / 43) ** 0.75, (17 / 37) ** 0.75)),
    (softdice.SquaredDiceLoss, {"eps": 0.0}, (5 / 29, 5 / 21)),
    (softdice.MCCLoss, {"eps": 0.0}, (1 - 1 / math.sqrt(15), 1 - 1 / math.sqrt(15))),
    (softdice.DiceSemimetricLoss, {"eps": 0.0}, (1 / 3, 3 / 7)),
    (softdice.DiceSemimetricLoss, {"form": "product", "eps": 0.0}, (1 / 3, 3 / 7)),
    (softdice.JaccardMetricLoss, {"eps": 0.0}, (1 / 2, 3 / 5)),
    (softdice.JaccardMetricLoss, {"form": "product", "eps": 0.0}, (1 / 2, 3 / 5)),
    (softdice.NoiseRobustDiceLoss, {"eps": 0.0}, (POWERED / 1.8125, POWERED / 1.3125)),
    (softdice.ExponentialLogarithmicLoss, {"eps": 0.0}, (math.log(1.5) ** 0.3, math.log(1.75) ** 0.3)),
    (softdice.SoftDiceLoss, {"eps": 0.0, "cost": "log_cosh"}, (math.log(math.cosh(1 / 3)), math.log(math.cosh(3 / 7)))),
    (softdice.GeneralizedDiceLoss, {"eps": 0.0}, (3 / 8,)),
    (softdice.CrossEntropyLoss, {}, ((math.log(4 / 3) + math.log(2)) / 2,)),
    (softdice.FocalLoss, {}, ((math.log(4 / 3) / 16 + math.log(2) / 4) / 2,)),
    (softdice.FocalLoss, {"gamma": 0.0}, ((math.log(4 / 3) + math.log(2)) / 2,)),
]


@pytest.mark.parametrize(("loss", "settings", "costs"), BY_HAND)
def test_by_hand(backend: str, loss: Any, settings: dict[str, Any], costs: tuple[float, ...]) -> None:
    each = loss(2, reduction="none", **settings)(PROBABILITY, LABELS)
    torch.testing.assert_close(each, torch.tensor(costs), rtol=1e-6, atol=1e-7)
    mean = loss(2, **settings)(PROBABILITY, LABELS)
    torch.testing.assert_close(mean, torch.tensor(sum(costs) / len(costs)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("weighting", "power"), [("square", 2), ("simple", 1), ("uniform", 0)])
def test_generalized_dice_by_hand(weighting: Any, power: int) -> None:
    probability, labels = torch.tensor([[[0.5, 1.0, 1.0], [0.5, 0.0, 0.0]]]), torch.tensor([[1, 0, 0]])
    w0, w1 = 1 / 2**power, 1.0  # I = (2, 1/2), P + T = (4 1/2, 1 1/2)
    by_hand = 1 - 2 * (w0 * 2 + w1 * 0.5) / (w0 * 4.5 + w1 * 1.5)
    assert softdice.GeneralizedDiceLoss(2, weighting, eps=0.0)(probability, labels).item() == pytest.approx(by_hand)
    weighted = 1 - 2 * (3 * w0 * 2 + w1 * 0.5) / (3 * w0 * 4.5 + w1 * 1.5)
    loss = softdice.GeneralizedDiceLoss(2, weighting, eps=0.0, class_weight=[3.0, 1.0])
    assert loss(probability, labels).item() == pytest.approx(weighted)


@pytest.mark.parametrize("weighting", ["square", "simple", "uniform"])
def test_generalized_dice_of_absent_classes(weighting: Any) -> None:
    loss = softdice.GeneralizedDiceLoss(3, weighting, classes=(1, 2))
    background = torch.zeros(1, 3, 4)
    background[:, 0] = 1
    assert loss(background, torch.zeros(1, 4, dtype=torch.int64)).item() == 0
    predicted = torch.full((1, 3, 4), 1 / 3, requires_grad=True)
    cost = loss(predicted, torch.zeros(1, 4, dtype=torch.int64))  # an empty foreground still costs, with a gradient
    assert cost.item() == pytest.approx(1, abs=1e-5)
    cost.backward()
    assert predicted.grad is not None
    assert bool((predicted.grad[:, 1:] > 0).all())
    # an absent class takes the weight of the rarest present one, here that of class 1 with two voxels
    stats = softdice.overlap_statistics(torch.full((1, 3, 4), 1 / 3), torch.tensor([[0, 0, 1, 1]])).pool()
    expected = 1 - 2 * (2 / 3 + 2 / 3) / (2 * (4 / 3 + 2) + 4 / 3)
    assert 1 - softdice.indices.generalized_dice(stats, weighting=weighting, eps=0.0).item() == pytest.approx(expected)


def test_generalized_dice_does_not_depend_on_scale() -> None:
    torch.manual_seed(0)
    probability, labels = torch.rand(1, 3, 50).softmax(1), torch.randint(0, 3, (1, 50))
    stats = softdice.overlap_statistics(probability, labels).pool()
    many = softdice.OverlapStatistics({name: 1e6 * getattr(stats, name) for name in stats.fields})
    score = softdice.indices.generalized_dice
    torch.testing.assert_close(score(stats), score(many), rtol=1e-5, atol=0)


def test_mcc_of_a_large_volume_does_not_overflow() -> None:
    voxels = 1e9
    sums = {"intersection": 1e8, "prediction": 2e8, "target": 1.5e8, "voxels": voxels}
    stats = softdice.OverlapStatistics({name: torch.tensor([value]) for name, value in sums.items()})
    tp, fp, fn = 1e8, 1e8, 0.5e8
    tn = voxels - tp - fp - fn
    exact = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert softdice.indices.mcc(stats).item() == pytest.approx(exact, rel=1e-5)


def test_mcc_is_symmetric_in_the_two_classes_and_zero_for_chance() -> None:
    loss = softdice.MCCLoss(2, reduction="none")
    a, b = loss(PROBABILITY, LABELS)
    assert a.item() == pytest.approx(b.item())
    chance = softdice.MCCLoss(2)(torch.full((1, 2, 4), 0.5), torch.tensor([[0, 0, 1, 1]]))
    assert chance.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("full", [1.0, 0.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
def test_mcc_of_a_patch_of_one_class(full: float, eps: float) -> None:
    """With p right in all N voxels: e a / e = 1; wrong in all: -1; at p = 1/2 there is no agreement to add."""
    target = torch.full((1, 1, 40), full)
    loss = softdice.MCCLoss(1, eps=eps)
    losses = [loss(torch.full((1, 1, 40), right if full else 1 - right), target).item() for right in SHARES]
    assert losses == sorted(losses, reverse=True)
    assert len({*losses}) == len(losses)
    assert [losses[0], losses[SHARES.index(0.5)], losses[-1]] == pytest.approx([2, 1, 0], abs=1e-6)
    p = torch.full((1, 1, 40), 0.25, requires_grad=True)
    loss(p, target).backward()
    assert (p.grad.sign() == (-1 if full else 1)).all()


SHARES = [0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0]


def test_only_a_perfect_prediction_has_no_mcc_loss() -> None:
    """Every hard prediction of three voxels, against every target: 0 where they are equal, 2 where all are opposite."""
    maps = list(itertools.product((0.0, 1.0), repeat=3))
    for t, p in itertools.product(maps, maps):
        loss = softdice.MCCLoss(1)(torch.tensor([[p]]), torch.tensor([[t]])).item()
        wrong = sum(a != b for a, b in zip(p, t, strict=True))
        assert (loss < 1e-6) == (wrong == 0)
        assert (loss > 2 - 1e-6) == (wrong == 3)


def logits_and_labels(classes: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, classes, 5, 3, dtype=torch.float64), torch.randint(0, classes, (2, 5, 3))


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy_is_torchs(backend: str, weight: list[float] | None, smoothing: float, ignore_index: int) -> None:
    logits, labels = logits_and_labels()
    theirs = torch.nn.CrossEntropyLoss(
        None if weight is None else torch.tensor(weight, dtype=torch.float64),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )
    ours = softdice.CrossEntropyLoss(
        4, activation="softmax", class_weight=weight, ignore_index=ignore_index, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))


def test_binary_cross_entropy_is_torchs(backend: str) -> None:
    logits, _ = logits_and_labels()
    target = (torch.rand_like(logits) > 0.5).double()
    ours = softdice.CrossEntropyLoss(4, activation="sigmoid")
    torch.testing.assert_close(ours(logits, target), torch.nn.BCEWithLogitsLoss()(logits, target))
    one = softdice.CrossEntropyLoss(1, activation="sigmoid")
    expected = torch.nn.BCEWithLogitsLoss()(logits[:, :1], target[:, :1])
    torch.testing.assert_close(one(logits[:, :1], target[:, 0].bool()), expected)


def test_per_sample_entropy_is_the_mean_of_each(backend: str) -> None:
    logits, labels = logits_and_labels()
    each = softdice.CrossEntropyLoss(4, activation="softmax", pooling="sample", reduction="none")(logits, labels)
    assert each.shape == (2, 1)
    torch.testing.assert_close(each[1, 0], torch.nn.functional.cross_entropy(logits[1:], labels[1:]))


def test_absent_skip_of_an_index_over_classes(backend: str) -> None:
    logits, labels = logits_and_labels()
    labels = labels % 3  # class 3 is absent
    for make in (softdice.GeneralizedDiceLoss, softdice.CrossEntropyLoss):
        skipped = make(4, activation="softmax", absent="skip")(logits, labels)
        chosen = make(4, activation="softmax", classes=(0, 1, 2))(logits, labels)
        torch.testing.assert_close(skipped, chosen)
        logits.requires_grad_()
        nothing = make(4, activation="softmax", absent="skip", ignore_index=0)(logits, labels * 0)
        nothing.backward()
        assert nothing.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()
        logits = logits.detach()


def test_sum_of_three_is_one_pass(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = op.run

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return run(*args)

    monkeypatch.setattr(op, "run", counted)
    logits, labels = logits_and_labels()
    parts = [
        softdice.SoftDiceLoss(4, activation="softmax"),
        softdice.CrossEntropyLoss(4, activation="softmax"),
        softdice.FocalLoss(4, gamma=1.5, activation="softmax"),
    ]
    both = (parts[0] + 0.5 * parts[1] + 2 * parts[2])(logits, labels)
    assert len(calls) == 1
    expected = parts[0](logits, labels) + 0.5 * parts[1](logits, labels) + 2 * parts[2](logits, labels)
    torch.testing.assert_close(both, expected)


def test_merge_is_the_loss_of_the_merged_problem(backend: str) -> None:
    logits, labels = logits_and_labels()
    probability = logits.softmax(1)
    small = torch.stack([probability[:, [0, 2, 3]].sum(1), probability[:, 1]], 1)
    merged = (labels == 1).long()
    dice = softdice.SoftDiceLoss(4, activation="softmax", cost="one_minus")
    entropy = softdice.CrossEntropyLoss(4, activation="softmax", class_weight=[1.0, 2.0, 5.0, 5.0])
    merge = {0: (2, 3)}
    expected = softdice.SoftDiceLoss(2, cost="one_minus")(small, merged)
    torch.testing.assert_close(dice(logits, labels, merge=merge), expected)
    torch.testing.assert_close(dice(logits, merged, merge=merge), expected)  # what the annotator left as background
    expected_entropy = softdice.CrossEntropyLoss(2, class_weight=[1.0, 2.0])(small, merged)
    torch.testing.assert_close(entropy(logits, labels, merge=merge), expected_entropy)
    torch.testing.assert_close((dice + 0.5 * entropy)(logits, labels, merge=merge), expected + 0.5 * expected_entropy)
    each = softdice.SoftDiceLoss(4, activation="softmax", classes=(1, 2), reduction="none")
    costs = each(logits, labels, merge=merge)
    assert costs.isnan().tolist() == [False, True]


def test_merge_gradient_is_that_of_the_union(backend: str) -> None:
    logits, labels = logits_and_labels()
    assert torch.autograd.gradcheck(
        lambda x: softdice.SoftDiceLoss(4, activation="softmax")(x, labels, merge={0: (2, 3)}),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize(
    ("settings", "merge", "words"),
    [
        ({}, {0: (4,)}, r"expected merge to be distinct class numbers in \[0, 4\), got 4"),
        ({}, {0: (1,), 1: (2,)}, "expected merge to be distinct class numbers"),
        ({"activation": "sigmoid"}, {0: (1,)}, "classes that exclude each other, with merge, got activation='sigmoid'"),
        ({"regions": ((0, 1), (2, 3))}, {0: (1,)}, "classes that exclude each other, with merge, got regions"),
    ],
)
def test_merge_errors(settings: dict[str, Any], merge: dict[int, tuple[int, ...]], words: str) -> None:
    logits, labels = logits_and_labels()
    with pytest.raises(ValueError, match=words):
        softdice.SoftDiceLoss(4, **{"activation": "softmax", **settings})(logits, labels, merge=merge)


def test_entropy_of_regions_that_partition_the_classes(backend: str) -> None:
    logits, labels = logits_and_labels()
    probability = logits.softmax(1)
    coarse = torch.stack([probability[:, :2].sum(1), probability[:, 2:].sum(1)], 1)
    ours = softdice.CrossEntropyLoss(4, activation="softmax", regions=((0, 1), (2, 3)))(logits, labels)
    torch.testing.assert_close(ours, softdice.CrossEntropyLoss(2)(coarse, labels // 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: softdice.CrossEntropyLoss(1), "expected activation='sigmoid' for a single class, got 'none'"),
        (lambda: softdice.FocalLoss(3, regions=((1, 2), (2,))), "expected regions that hold each class once"),
        (lambda: softdice.CrossEntropyLoss(2, cost="neg_log"), "expected no cost, which is the entropy itself here"),
        (lambda: softdice.FocalTverskyLoss(2, cost="neg_log"), "expected no cost"),
        (lambda: softdice.FocalTverskyLoss(2, gamma=0), "expected gamma > 0, got 0"),
        (
            lambda: softdice.costs.focal(0),
            r"costs\.focal: expected gamma > 0, got 0. With 0 the loss would be constant",
        ),
        (lambda: softdice.costs.log_power(0.0), r"costs\.log_power: expected gamma > 0, got 0"),
        (lambda: softdice.TverskyLoss(2, alpha=0, beta=0), "expected alpha or beta above 0"),
        (lambda: softdice.TverskyLoss(2, alpha=-1), "expected alpha >= 0, got -1"),
        (lambda: softdice.MCCLoss(2, cost="neg_log"), "expected a cost of a score that may be negative"),
        (lambda: softdice.NoiseRobustDiceLoss(2, power=3), r"expected power in \[1, 2\], got 3"),
        (lambda: softdice.GeneralizedDiceLoss(2, "cube"), "expected weighting to be one of 'square', 'simple'"),
        (lambda: softdice.JaccardMetricLoss(2, form="norm"), "expected form to be one of 'sum', 'product'"),
        (lambda: softdice.JaccardLoss(2, eps=-1), "expected eps >= 0"),
        (
            lambda: softdice.OverlapLoss(lambda s: s.intersection.sum(-1, keepdim=True), 3),
            r"expected index to return a score of shape \(3,\), got \(1,\)",
        ),
    ],
)
def test_settings_that_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_deep_supervision_by_hand() -> None:
    torch.manual_seed(0)
    loss = softdice.SoftDiceLoss(3, activation="softmax")
    outputs = [torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 2, 2)]
    labels = torch.randint(0, 3, (2, 1, 8, 6))
    theirs = [torch.nn.functional.interpolate(labels.float(), size=o.shape[2:], mode="nearest-exact") for o in outputs]
    weights = (1.0, 0.5, 0.25)
    expected = sum(w * loss(o, t) for w, o, t in zip(weights, outputs, theirs, strict=True)) / 1.75
    torch.testing.assert_close(softdice.DeepSupervision(loss, weights)(outputs, labels), expected)
    voxel_weight = torch.rand(2, 8, 6)
    small = at_resolution(voxel_weight, outputs[1], labels=True)
    assert small is not None
    assert small.shape == (2, 4, 3)
    assert set(small.flatten().tolist()) <= set(voxel_weight.flatten().tolist())


def test_deep_supervision_without_weights_halves_them_from_output_to_output() -> None:
    """Outputs 1, 3 and 6 everywhere, target 0: squared errors 1, 9 and 36 with weights 4/7, 2/7 and 1/7, 58 / 7."""
    loss = softdice.DeepSupervision(torch.nn.MSELoss())
    outputs = [torch.full((1, 1, n), value) for n, value in ((8, 1.0), (4, 3.0), (2, 6.0))]
    assert loss(outputs, torch.zeros(1, 1, 8)).item() == pytest.approx(58 / 7)
    assert loss(outputs[:2], torch.zeros(1, 1, 8)).item() == pytest.approx((2 * 1 + 9) / 3)  # as many as there are
    assert repr(loss).startswith("DeepSupervision(\n  weights=None")
    with pytest.raises(ValueError, match="expected 3 targets, got 2"):
        loss(outputs, [torch.zeros(1, 1, 8)] * 2)
    for nothing in ([], torch.zeros(1, 1, 8)):
        with pytest.raises(ValueError, match=r"^DeepSupervision: expected a list of outputs, got"):
            loss(nothing, torch.zeros(1, 1, 8))


def test_deep_supervision_of_soft_targets_keeps_proportions() -> None:
    soft = torch.rand(1, 2, 4, 4).softmax(1)
    small = at_resolution(soft, torch.zeros(1, 2, 2, 2))
    assert small is not None
    torch.testing.assert_close(small.mean((2, 3)), soft.mean((2, 3)))
    assert at_resolution(soft, torch.zeros(1, 2, 4, 4)) is soft


def test_deep_supervision_of_a_float_mask_with_an_ignored_label() -> None:
    mask = torch.tensor([[[0.0, 0.0, 1.0, 255.0]]])
    loss = softdice.DeepSupervision(softdice.SoftDiceLoss(1, activation="sigmoid", ignore_index=255), (1.0, 1.0))
    outputs = [torch.zeros(1, 1, 4), torch.zeros(1, 1, 2)]
    assert torch.isfinite(loss(outputs, mask))


def test_deep_supervision_skips_an_output_of_weight_zero() -> None:
    loss = softdice.DeepSupervision(softdice.SoftDiceLoss(2, activation="softmax"), (1.0, 0.0))
    outputs = [torch.zeros(1, 2, 4), torch.full((1, 2, 2), torch.nan)]
    assert torch.isfinite(loss(outputs, torch.tensor([[0, 1, 1, 0]])))


def test_deep_supervision_with_a_target_for_each_output() -> None:
    torch.manual_seed(0)
    loss = softdice.JaccardLoss(3, activation="softmax")
    outputs = [torch.randn(2, 3, 6, 8), torch.randn(2, 3, 3, 4)]
    targets = [torch.randint(0, 3, (2, 6, 8)), torch.randint(0, 3, (2, 3, 4))]
    heavy = [torch.rand(2, 6, 8), torch.rand(2, 3, 4)]
    both = softdice.DeepSupervision(loss, (2.0, 1.0))
    expected = (2 * loss(outputs[0], targets[0]) + loss(outputs[1], targets[1])) / 3
    torch.testing.assert_close(both(outputs, tuple(targets)), expected)
    weighted = (2 * loss(outputs[0], targets[0], heavy[0]) + loss(outputs[1], targets[1], heavy[1])) / 3
    torch.testing.assert_close(both(outputs, targets, heavy), weighted)
    with pytest.raises(ValueError, match="expected 2 targets, got 1"):
        both(outputs, targets[:1])


def test_deep_supervision_of_a_callable_that_takes_two_tensors() -> None:
    outputs, target = [torch.randn(1, 2, 4), torch.randn(1, 2, 2)], torch.rand(1, 2, 4)
    loss = softdice.DeepSupervision(torch.nn.MSELoss(), (1.0, 3.0))
    means = target.view(1, 2, 2, 2).mean(-1)
    expected = ((outputs[0] - target) ** 2).mean() / 4 + 3 * ((outputs[1] - means) ** 2).mean() / 4
    torch.testing.assert_close(loss(outputs, target), expected)


def test_mcc_where_nothing_counts_costs_nothing(backend: str) -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss = softdice.MCCLoss(4, activation="sigmoid")
    for value in (loss(logits, torch.ones(2, 4, 5), torch.zeros(2, 5)), loss(logits[:0], torch.ones(0, 4, 5))):
        assert value.item() == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("weights", "outputs", "words"),
    [
        ((1.0, 1.0), [torch.zeros(1, 2, 4)], "expected 2 outputs, got 1"),
        ((1.0,), torch.zeros(1, 2, 4), "expected 1 outputs, got a single tensor"),
        ((1.0,), [torch.zeros(1, 2, 8)], "expected outputs no larger than target"),
        ((0.0,), [torch.zeros(1, 2, 4)], "expected weights that are not all 0"),
        ((-1.0,), [torch.zeros(1, 2, 4)], r"expected weights\[0\] >= 0"),
    ],
)
def test_deep_supervision_errors(weights: tuple[float, ...], outputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        softdice.DeepSupervision(softdice.SoftDiceLoss(2), weights)(outputs, torch.zeros(1, 4, dtype=torch.int64))


def test_every_loss_has_its_row_in_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
    rows = {line.split("`")[1].split("(")[0] for line in page.splitlines() if line.startswith("| `")}
    assert rows == {name for name in softdice.__all__ if name.endswith("Loss")}
