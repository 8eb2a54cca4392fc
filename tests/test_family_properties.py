"""What holds for every loss of the family, on random problems."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import BACKENDS, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import softdice
from softdice.statistics.api import measure

INFINITE = float("inf")

# name: class, settings, upper bound of the cost
FAMILY: dict[str, tuple[Any, dict[str, Any], float]] = {
    "dice": (softdice.SoftDiceLoss, {}, INFINITE),
    "dice one minus": (softdice.SoftDiceLoss, {"cost": "one_minus"}, 1),
    "dice log cosh": (softdice.SoftDiceLoss, {"cost": "log_cosh"}, 0.4338),
    "jaccard": (softdice.JaccardLoss, {}, 1),
    "tversky": (softdice.TverskyLoss, {}, 1),
    "focal tversky": (softdice.FocalTverskyLoss, {}, 1),
    "generalized dice": (softdice.GeneralizedDiceLoss, {}, 1),
    "generalized dice simple": (softdice.GeneralizedDiceLoss, {"weighting": "simple"}, 1),
    "mcc": (softdice.MCCLoss, {}, 2),
    "squared dice": (softdice.SquaredDiceLoss, {}, 1),
    "dice semimetric": (softdice.DiceSemimetricLoss, {}, 1),
    "dice semimetric product": (softdice.DiceSemimetricLoss, {"form": "product"}, 1),
    "jaccard metric": (softdice.JaccardMetricLoss, {}, 1),
    "jaccard metric product": (softdice.JaccardMetricLoss, {"form": "product"}, 1),
    "noise robust dice": (softdice.NoiseRobustDiceLoss, {}, INFINITE),
    "exponential logarithmic": (softdice.ExponentialLogarithmicLoss, {}, INFINITE),
    "cross-entropy": (softdice.CrossEntropyLoss, {}, INFINITE),
    "focal": (softdice.FocalLoss, {}, INFINITE),
}
RIGHT_FOR_SOFT = [
    "squared dice",
    "dice semimetric",
    "dice semimetric product",
    "jaccard metric",
    "jaccard metric product",
    "noise robust dice",
    "cross-entropy",
]
WITHOUT_A_VALUE_OF_ZERO = {"cross-entropy"}
COUPLED = {"generalized dice", "generalized dice simple", "cross-entropy", "focal"}

names = pytest.mark.parametrize("name", FAMILY)
every = settings(max_examples=7)


def test_every_loss_has_a_row() -> None:
    assert {loss for loss, _, _ in FAMILY.values()} == set(softdice.losses.FAMILY)


def build(name: str, count: int, /, **extra: Any) -> softdice.OverlapLoss:
    make, own, _ = FAMILY[name]
    return make(count, **{**own, **extra})


def scores(generator: torch.Generator, samples: int, classes: int, voxels: int) -> Tensor:
    return 2 * torch.randn(samples, classes, voxels, dtype=torch.float64, generator=generator)


@st.composite
def problems(draw: st.DrawFn, least_classes: int = 2) -> tuple[Tensor, Tensor]:
    """Draw logits (B, C, V) and labels (B, V), with some classes absent."""
    samples, classes = draw(st.integers(1, 2)), draw(st.integers(least_classes, 4))
    voxels = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    labels = torch.randint(0, draw(st.integers(1, classes)), (samples, voxels), generator=generator)
    return scores(generator, samples, classes, voxels), labels


@names
@every
@given(problem=problems(), activation=st.sampled_from(["softmax", "sigmoid"]))
def test_bounds(name: str, problem: tuple[Tensor, Tensor], activation: str) -> None:
    logits, labels = problem
    for pooling in ("batch", "sample"):
        costs = build(name, logits.shape[1], activation=activation, pooling=pooling, reduction="none")(logits, labels)
        assert bool((costs >= -1e-12).all())
        assert bool((costs <= FAMILY[name][2] + 1e-9).all())


@names
@every
@given(problem=problems(), seed=st.integers(0, 1000))
def test_order_does_not_matter(name: str, problem: tuple[Tensor, Tensor], seed: int) -> None:
    logits, labels = problem
    loss = build(name, logits.shape[1], activation="softmax")
    generator = torch.Generator().manual_seed(seed)
    voxels = torch.randperm(labels.shape[1], generator=generator)
    torch.testing.assert_close(loss(logits[..., voxels], labels[:, voxels]), loss(logits, labels))
    classes = torch.randperm(logits.shape[1], generator=generator)
    renamed = classes.argsort()[labels]
    torch.testing.assert_close(loss(logits[:, classes], renamed), loss(logits, labels))


@names
@every
@given(problem=problems(), cut=st.integers(0, 7))
def test_parts_add_up_to_the_whole(name: str, problem: tuple[Tensor, Tensor], cut: int) -> None:
    logits, labels = problem
    cut = min(cut, labels.shape[1])
    loss = build(name, logits.shape[1], activation="softmax")
    left = measure(logits[..., :cut], labels[:, :cut], None, loss.settings)
    parts = left + measure(logits[..., cut:], labels[:, cut:], None, loss.settings)
    torch.testing.assert_close(loss.from_statistics(parts), loss(logits, labels))
    torch.testing.assert_close(loss.from_statistics(parts.pool()), loss(logits, labels))


@names
@settings(max_examples=3)
@given(
    problem=problems(), activation=st.sampled_from(["softmax", "sigmoid"]), pooling=st.sampled_from(["batch", "sample"])
)
def test_gradcheck(backend: str, name: str, problem: tuple[Tensor, Tensor], activation: str, pooling: str) -> None:
    logits, labels = problem
    loss = build(name, logits.shape[1], activation=activation, pooling=pooling)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.clone().requires_grad_(), fast_mode=True)


@names
@every
@given(problem=problems())
def test_the_truth_is_the_minimum(name: str, problem: tuple[Tensor, Tensor]) -> None:
    logits, labels = problem
    classes = logits.shape[1]
    truth = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).double()
    loss = build(name, classes)
    best = loss(truth, labels)
    assert best.item() == pytest.approx(0, abs=1e-6)
    assert bool(loss(logits.softmax(1), labels) >= best)


@pytest.mark.parametrize("name", RIGHT_FOR_SOFT)
@settings(max_examples=15)
@given(problem=problems(), towards=st.floats(0.05, 1))
def test_the_truth_is_the_minimum_for_soft_labels(name: str, problem: tuple[Tensor, Tensor], towards: float) -> None:
    logits, _ = problem
    truth, other = logits.softmax(1), (-0.7 * logits).softmax(1)
    loss = build(name, logits.shape[1])
    best = loss(truth, truth)
    if name not in WITHOUT_A_VALUE_OF_ZERO:
        assert best.item() == pytest.approx(0, abs=1e-12)
    assert bool(loss(torch.lerp(truth, other, towards), truth) > best)


@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky"])
def test_the_truth_is_not_the_minimum_of_the_others(name: str) -> None:
    truth = torch.tensor([[[0.6, 0.6], [0.4, 0.4]]])
    hard = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    loss = build(name, 2, classes=(0,))
    assert bool(loss(hard, truth) < loss(truth, truth))


@names
@every
@given(problem=problems())
def test_absent_classes_may_be_left_out(name: str, problem: tuple[Tensor, Tensor]) -> None:
    logits, labels = problem
    present = sorted(set(labels.flatten().tolist()))
    skipped = build(name, logits.shape[1], activation="softmax", absent="skip")
    chosen = build(name, logits.shape[1], activation="softmax", classes=present)
    torch.testing.assert_close(skipped(logits, labels), chosen(logits, labels))
    if name not in COUPLED:
        costs = build(name, logits.shape[1], activation="softmax", absent="skip", reduction="none")(logits, labels)
        assert costs.isnan().tolist() == [c not in present for c in range(logits.shape[1])]


@names
@every
@given(problem=problems(), ignored=st.integers(1, 5))
def test_ignored_voxels_are_as_if_cut_out(name: str, problem: tuple[Tensor, Tensor], ignored: int) -> None:
    logits, labels = problem
    more = torch.cat([logits, 9 * torch.ones_like(logits[..., :1]).expand(*logits.shape[:2], ignored)], -1)
    label = torch.cat([labels, torch.full((labels.shape[0], ignored), 255)], -1)
    loss = build(name, logits.shape[1], activation="softmax", ignore_index=255)
    more.requires_grad_()
    value = loss(more, label)
    torch.testing.assert_close(value, loss(logits, labels))
    value.backward()
    assert more.grad is not None
    assert not more.grad[..., labels.shape[1] :].any()
    everything = loss(more, torch.full_like(label, 255))
    if name != "mcc":  # of no voxels at all there is no correlation
        assert everything.item() == pytest.approx(0, abs=1e-12)


@names
@every
@given(problem=problems(), activation=st.sampled_from(["softmax", "sigmoid"]), smoothing=st.sampled_from([0.0, 0.2]))
def test_backends_agree(name: str, problem: tuple[Tensor, Tensor], activation: str, smoothing: float) -> None:
    """The definition whole and in slices. That the kernels agree on every statistic is shown in test_agreement.py."""
    logits, labels = (tensor.clone() for tensor in problem)
    loss = build(name, logits.shape[1], activation=activation, label_smoothing=smoothing)
    results = []
    for which in BACKENDS:
        x = logits.clone().requires_grad_()
        with serving(which):
            value = loss(x, labels)
            value.backward()
        results.append((value.detach(), x.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "extent"), [(name, 2 if name == "jaccard metric" else 1) for name in RIGHT_FOR_SOFT[1:5]]
)
def test_minus_the_logarithm_of_an_absent_class(name: str, extent: int, backend: str) -> None:
    """1 - D / (D + eps) rounds to 0; eps / (extent D + eps) does not, with D = 2500 of 5000 voxels at p = 1/2."""
    logits = torch.zeros(1, 1, 5000, requires_grad=True)
    loss = build(name, 1, activation="sigmoid", cost="neg_log")(logits, torch.zeros(1, 5000).long())
    torch.testing.assert_close(loss.item(), math.log(extent * 2500 / 1e-5), rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 0.25 / 2500))  # d ln P / dx = p (1 - p) / P


@pytest.mark.parametrize("weighting", ["square", "simple", "uniform"])
def test_a_class_of_weight_0_beside_absent_ones(weighting: str, backend: str) -> None:
    """A sample in which no class with a weight is present is left out, of the gradient too (nan before)."""
    logits, labels = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 50).long()
    labels[1, :20] = 2
    how: dict[str, Any] = {"weighting": weighting, "class_weight": (0, 1, 2), "absent": "skip", "pooling": "sample"}
    loss = softdice.GeneralizedDiceLoss(3, activation="softmax", **how)
    both, one = logits.clone().requires_grad_(), logits[1:].clone().requires_grad_()
    values = loss(both, labels), loss(one, labels[1:])
    torch.testing.assert_close(*values)
    sum(values).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(both.grad, torch.cat([torch.zeros(1, 3, 50), one.grad]))  # type: ignore[list-item]
