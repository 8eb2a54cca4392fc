"""The definition of the statistics, held to numbers worked out by hand and to loops over voxels."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import softdice
from softdice.statistics.declared import FIELDS

# Three voxels, two classes:          voxel   0    1    2
PROBABILITY = torch.tensor([[[0.9, 0.2, 0.5],  # class 0
                             [0.1, 0.8, 0.5]]], dtype=torch.float64)  # class 1  # fmt: skip
LABELS = torch.tensor([[0, 1, 1]])
LN9, LN8, LN5 = -math.log(0.9), -math.log(0.8), -math.log(0.5)
LN2, LN1 = -math.log(0.2), -math.log(0.1)


def as_input(probability: Tensor, activation: str) -> Tensor:
    """Return an input of which the activation makes these probabilities."""
    return {"none": probability, "softmax": probability.log(), "sigmoid": probability.logit()}[activation]


def expect(stats: softdice.OverlapStatistics, **fields: tuple[float, float]) -> None:
    for name, value in fields.items():
        torch.testing.assert_close(
            getattr(stats, name), torch.tensor([value], dtype=torch.float64), rtol=1e-12, atol=1e-12, msg=name
        )


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
def test_sums_by_hand(backend: str, activation: str) -> None:
    stats = softdice.overlap_statistics(as_input(PROBABILITY, activation), LABELS, activation=activation)
    expect(
        stats,
        intersection=(0.9, 0.8 + 0.5),
        prediction=(0.9 + 0.2 + 0.5, 0.1 + 0.8 + 0.5),
        target=(1, 2),
        prediction_squared=(0.81 + 0.04 + 0.25, 0.01 + 0.64 + 0.25),
        target_squared=(1, 2),
        difference=(0.1 + 0.2 + 0.5, 0.1 + 0.2 + 0.5),
        voxels=(3, 3),
        labelled=(1, 2),
    )
    if activation == "sigmoid":  # both outcomes of each class: y (-ln p) + (1 - y) (-ln(1 - p))
        entropy = (LN9 + LN8 + LN5, LN9 + LN8 + LN5)  # 1 - 0.2 = 0.8 and 1 - 0.1 = 0.9
        focal = (0.01 * LN9 + 0.04 * LN8 + 0.25 * LN5,) * 2
    else:
        entropy = (LN9, LN8 + LN5)
        focal = (0.01 * LN9, 0.04 * LN8 + 0.25 * LN5)
    expect(stats, cross_entropy=entropy, focal=focal)


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
def test_voxel_weight_by_hand(backend: str, activation: str) -> None:
    weight = torch.tensor([[2.0, 0.0, 1.0]])
    stats = softdice.overlap_statistics(
        as_input(PROBABILITY, activation), LABELS, activation=activation, voxel_weight=weight
    )
    expect(
        stats,
        intersection=(2 * 0.9, 0.5),
        prediction=(2 * 0.9 + 0.5, 2 * 0.1 + 0.5),
        target=(2, 1),
        prediction_squared=(2 * 0.81 + 0.25, 2 * 0.01 + 0.25),
        target_squared=(2, 1),
        difference=(2 * 0.1 + 0.5, 2 * 0.1 + 0.5),
        voxels=(3, 3),
        labelled=(2, 1),
    )


def test_ignore_index_by_hand(backend: str) -> None:
    stats = softdice.overlap_statistics(PROBABILITY, torch.tensor([[0, 255, 1]]), ignore_index=255)
    expect(
        stats,
        intersection=(0.9, 0.5),
        prediction=(1.4, 0.6),
        target=(1, 1),
        prediction_squared=(0.81 + 0.25, 0.01 + 0.25),
        difference=(0.1 + 0.5, 0.1 + 0.5),
        cross_entropy=(LN9, LN5),
        voxels=(2, 2),
        labelled=(1, 1),
    )


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
def test_label_smoothing_by_hand(backend: str, activation: str) -> None:
    # e = 0.2 over two outcomes: y' = 0.8 y + 0.1, so 0.9 and 0.1
    stats = softdice.overlap_statistics(
        as_input(PROBABILITY, activation), LABELS, activation=activation, label_smoothing=0.2
    )
    expect(
        stats,
        intersection=(0.9 * 0.9 + 0.1 * 0.2 + 0.1 * 0.5, 0.1 * 0.1 + 0.9 * 0.8 + 0.9 * 0.5),
        prediction=(1.6, 1.4),
        target=(1.1, 1.9),
        target_squared=(0.81 + 0.01 + 0.01, 0.01 + 0.81 + 0.81),
        difference=(0.0 + 0.1 + 0.4, 0.0 + 0.1 + 0.4),
        labelled=(1, 2),
    )
    if activation != "sigmoid":
        expect(stats, cross_entropy=(0.9 * LN9 + 0.1 * LN2 + 0.1 * LN5, 0.1 * LN1 + 0.9 * LN8 + 0.9 * LN5))


def test_label_smoothing_of_a_softmax_spreads_over_the_classes(backend: str) -> None:
    # four classes, e = 0.4: y' = 0.6 y + 0.1; T of the labelled class 0.7, of each other 0.1
    stats = softdice.overlap_statistics(
        torch.zeros(1, 4, 1), torch.tensor([[2]]), activation="softmax", label_smoothing=0.4
    )
    torch.testing.assert_close(stats.target, torch.tensor([[0.1, 0.1, 0.7, 0.1]]))


def test_label_smoothing_of_one_class_has_two_outcomes(backend: str) -> None:
    stats = softdice.overlap_statistics(
        torch.zeros(1, 1, 2), torch.tensor([[1, 0]]), activation="sigmoid", label_smoothing=0.4
    )
    torch.testing.assert_close(stats.target, torch.tensor([[0.8 + 0.2]]))  # 0.6 + 0.2 and 0.2
    torch.testing.assert_close(stats.labelled, torch.tensor([[1.0]]))


def test_exponents_by_hand(backend: str) -> None:
    stats = softdice.overlap_statistics(PROBABILITY, LABELS, gamma=1.0, power=2.0)
    expect(
        stats,
        focal=(0.1 * LN9, 0.2 * LN8 + 0.5 * LN5),
        difference=(0.01 + 0.04 + 0.25, 0.01 + 0.04 + 0.25),
    )
    expect(softdice.overlap_statistics(PROBABILITY, LABELS, gamma=0.0), focal=(LN9, LN8 + LN5))


def test_soft_labels_by_hand(backend: str) -> None:
    soft = torch.tensor([[[0.7, 0.0, 0.5], [0.3, 1.0, 0.5]]], dtype=torch.float64)
    stats = softdice.overlap_statistics(PROBABILITY, soft)
    expect(
        stats,
        intersection=(0.63 + 0.0 + 0.25, 0.03 + 0.8 + 0.25),
        target=(1.2, 1.8),
        target_squared=(0.49 + 0.25, 0.09 + 1 + 0.25),
        difference=(0.2 + 0.2 + 0.0, 0.2 + 0.2 + 0.0),
        cross_entropy=(0.7 * LN9 + 0.5 * LN5, 0.3 * LN1 + LN8 + 0.5 * LN5),
        labelled=(1.2, 1.8),
    )


def test_regions_by_hand(backend: str) -> None:
    # three classes, two voxels labelled 1 and 2; the regions {1, 2} and {2}
    probability = torch.tensor([[[0.5, 0.25], [0.25, 0.25], [0.25, 0.5]]], dtype=torch.float64)
    stats = softdice.overlap_statistics(probability, torch.tensor([[1, 2]]), regions=((1, 2), (2,)))
    expect(
        stats,
        intersection=(0.5 + 0.75, 0.5),
        prediction=(1.25, 0.75),
        target=(2, 1),
        difference=(0.5 + 0.25, 0.25 + 0.5),
        cross_entropy=(-math.log(0.5) - math.log(0.75), -math.log(0.5)),
        labelled=(2, 1),
    )


@pytest.mark.parametrize("where", ["single class", "many classes"])
def test_a_mask_and_a_label_map_are_told_apart(backend: str, where: str) -> None:
    if where == "single class":  # 1 is in the class; the notebook would compare with class number 0
        stats = softdice.overlap_statistics(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[1, 0]]))
        torch.testing.assert_close(stats.intersection, torch.tensor([[0.9]]))
    else:
        stats = softdice.overlap_statistics(torch.tensor([[[0.9, 0.2], [0.1, 0.8]]]), torch.tensor([[1, 0]]))
        torch.testing.assert_close(stats.intersection, torch.tensor([[0.2, 0.1]]))


EXPONENTS = [(2.0, 1.0), (2.0, 1.0), (0.0, 1.5), (0.5, 2.0), (1.0, 1.5), (3.0, 3.0)]
"""gamma and power: the usual ones, which a kernel is compiled for, and others, for which it is compiled once."""


class Case:
    """A draw of every keyword of `overlap_statistics`, with tensors that fit."""

    def __init__(self, draw: st.DrawFn) -> None:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        B, C, V = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
        self.activation = draw(st.sampled_from(["none", "softmax", "sigmoid"]))
        p = torch.rand(B, C, V, dtype=torch.float64, generator=generator) * 0.9 + 0.05
        self.input = p if self.activation == "none" else 4 * p - 2
        self.dense = draw(st.booleans())
        if self.dense:
            self.target = torch.rand(B, C, V, dtype=torch.float64, generator=generator)
        else:
            self.target = torch.randint(0, max(C, 2), (B, V), generator=generator)
        gamma, power = draw(st.sampled_from(EXPONENTS))
        self.keywords: dict[str, object] = {
            "activation": self.activation,
            "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
            "gamma": gamma,
            "power": power,
        }
        if not self.dense and draw(st.booleans()):
            self.keywords["ignore_index"] = 255
            self.target[torch.rand(B, V, generator=generator) < 0.4] = 255
        if draw(st.booleans()):
            weight = torch.rand(B, V, dtype=torch.float64, generator=generator)
            self.keywords["voxel_weight"] = torch.where(weight < 0.3, 0.0, 2 * weight)
        if self.activation != "sigmoid" and C >= 3 and draw(st.booleans()):
            if self.activation == "none":
                self.input = self.input / C  # so that the sum of a region stays a probability
            self.keywords["regions"] = ((1, 2), (0,), (0, 2))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(draw)


@given(case=cases())
@settings(max_examples=100)
def test_agrees_with_loops_over_voxels(backend: str, case: Case) -> None:
    stats = softdice.overlap_statistics(case.input, case.target, **case.keywords)
    for name, expected in oracle.statistics(case.input, case.target, **case.keywords).items():
        torch.testing.assert_close(getattr(stats, name), torch.from_numpy(expected), rtol=1e-10, atol=1e-12, msg=name)


def mixed(stats: softdice.OverlapStatistics) -> Tensor:
    """Return one number with a gradient of all fields: each field, sample and class has a factor of its own."""
    fields_FBC = torch.stack([getattr(stats, name) for name in FIELDS[:8]])
    factor = torch.arange(1.0, fields_FBC.numel() + 1, dtype=fields_FBC.dtype).mul(2.4).sin()
    return (fields_FBC.flatten() * factor).sum()


@given(case=cases())
@settings(max_examples=60)
def test_gradcheck(backend: str, case: Case) -> None:
    def score(input: Tensor) -> Tensor:
        return mixed(softdice.overlap_statistics(input, case.target, **case.keywords))

    assert torch.autograd.gradcheck(score, (case.input.requires_grad_(),), check_undefined_grad=False)


@given(case=cases())
@settings(max_examples=20)
def test_gradgradcheck_of_the_reference(case: Case) -> None:
    def score(input: Tensor) -> Tensor:
        return mixed(softdice.overlap_statistics(input, case.target, **case.keywords))

    with softdice.use_backend("reference"):
        assert torch.autograd.gradgradcheck(score, (case.input.requires_grad_(),), check_undefined_grad=False)


def test_target_and_weight_may_need_a_gradient_on_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    target = torch.rand(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = (torch.rand(2, 4, dtype=torch.float64, generator=generator) + 0.5).requires_grad_()

    def total(target: Tensor, weight: Tensor) -> Tensor:
        stats = softdice.overlap_statistics(input, target, activation="softmax", voxel_weight=weight)
        return sum(getattr(stats, name).sum() for name in FIELDS[:8])

    assert torch.autograd.gradcheck(total, (target, weight))
