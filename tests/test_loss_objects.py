"""Losses as objects: sums that share a pass, indices of one's own, copies, transforms, compilation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import softdice
from softdice import OverlapLoss, SoftDiceLoss, costs, indices
from softdice.functional import soft_dice_loss
from softdice.statistics import reference

# Two classes, three voxels
PROBABILITY = torch.tensor([[[0.9, 0.2, 0.5], [0.1, 0.8, 0.5]]], dtype=torch.float64)
LABELS = torch.tensor([[0, 1, 1]])


def value(loss: torch.nn.Module, *tensors: Tensor) -> float:
    return float(loss(*tensors))


def test_functional_equals_module(backend: str) -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    keywords: dict[str, Any] = {"activation": "softmax", "classes": (1, 2), "absent": "skip", "cost": "one_minus"}
    module = SoftDiceLoss(3, 0.5, **keywords)(logits, labels, voxel_weight=weight)
    assert torch.equal(soft_dice_loss(logits, labels, eps=0.5, voxel_weight=weight, **keywords), module)


def test_an_index_of_ones_own() -> None:
    recall = OverlapLoss(lambda s: (s.intersection + 1) / (s.target + 1), 2)
    assert recall.settings.fields == ("intersection", "target")  # and no other statistic is computed
    # I + 1 = (1.9, 2.3), T + 1 = (2, 3), cost one_minus by default
    assert value(recall, PROBABILITY, LABELS) == pytest.approx(1 - (1.9 / 2 + 2.3 / 3) / 2)


def test_overlap_loss_of_dice_is_soft_dice_loss() -> None:
    ours = OverlapLoss(lambda s: indices.dice(s, eps=1.0), 2, cost="neg_log")
    assert value(ours, PROBABILITY, LABELS) == value(SoftDiceLoss(2, 1.0), PROBABILITY, LABELS)


def test_the_exponents_reach_the_pass() -> None:
    squared = OverlapLoss(lambda s: s.difference, 2, power=2.0, cost=costs.identity, reduction="none")
    assert squared(PROBABILITY, LABELS).tolist() == pytest.approx([0.3, 0.3])
    focal = OverlapLoss(lambda s: s.focal, 2, gamma=1.0, cost=costs.identity, reduction="none")
    assert focal(PROBABILITY, LABELS)[0].item() == pytest.approx(0.1 * 0.1053605157)


def test_sums_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[str, ...]] = []
    run = reference.statistics

    def counted(*args: Any) -> Tensor:
        passes.append(args[0].settings.fields)
        return run(*args)

    monkeypatch.setattr(reference, "statistics", counted)
    a = SoftDiceLoss(2, 1.0)
    b = OverlapLoss(lambda s: s.difference / s.voxels, 2, cost="one_minus")
    c = SoftDiceLoss(2, 1.0, pooling="sample", absent="skip")
    separate = value(a, PROBABILITY, LABELS) + 0.5 * value(b, PROBABILITY, LABELS) - 2 * value(c, PROBABILITY, LABELS)
    passes.clear()
    for total in (a + 0.5 * b + (-2) * c, sum([a, 0.5 * b, c * -2]), 0.5 * (2 * a + b) + -2.0 * c):
        assert value(total, PROBABILITY, LABELS) == pytest.approx(separate)
    assert passes == [("intersection", "prediction", "target", "difference", "voxels", "labelled")] * 3


def test_sums_take_an_exponent_from_the_one_that_uses_it() -> None:
    dice = SoftDiceLoss(2, 1.0)
    focal = OverlapLoss(lambda s: s.focal, 2, gamma=1.0, cost=costs.identity)
    expected = value(dice, PROBABILITY, LABELS) + value(focal, PROBABILITY, LABELS)
    assert value(dice + focal, PROBABILITY, LABELS) == pytest.approx(expected)
    assert value(focal + dice, PROBABILITY, LABELS) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, other, ours, theirs",
    [
        ("activation", SoftDiceLoss(2), "'softmax'", "'none'"),
        ("ignore_index", SoftDiceLoss(2, activation="softmax", ignore_index=255), "None", "255"),
        ("label_smoothing", SoftDiceLoss(2, activation="softmax", label_smoothing=0.1), "0.0", "0.1"),
        ("regions", SoftDiceLoss(2, activation="softmax", regions=((0, 1),)), "None", "((0, 1),)"),
        ("validate", SoftDiceLoss(2, activation="softmax", validate=False), "True", "False"),
        ("num_classes", SoftDiceLoss(3, activation="softmax"), "2", "3"),
    ],
)
def test_sums_of_losses_that_differ(name: str, other: SoftDiceLoss, ours: str, theirs: str) -> None:
    with pytest.raises(ValueError) as error:
        SoftDiceLoss(2, activation="softmax") + other
    assert str(error.value) == (
        f"SumLoss: expected losses that agree on {name}, since they share one pass, got {ours} and {theirs}. "
        f"Give both the same {name}, or call the losses one by one and add the results."
    )


def test_sums_of_two_exponents() -> None:
    a, b = (OverlapLoss(lambda s: s.focal, 2, gamma=gamma, cost=costs.identity) for gamma in (1.0, 2.0))
    with pytest.raises(ValueError, match=r"agree on gamma, since they share one pass, got 1\.0 and 2\.0\."):
        a + b


@pytest.mark.parametrize("other", [1, 0.5, torch.nn.CrossEntropyLoss(), None])
def test_a_loss_adds_only_to_losses(other: Any) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        SoftDiceLoss(2) + other
    with pytest.raises(TypeError):
        SoftDiceLoss(2) * SoftDiceLoss(2)


def test_modules_copy_move_and_describe_themselves() -> None:
    loss = SoftDiceLoss(2, 1.0, class_weight=[3.0, 1.0], cost=costs.focal(2.0)) + 0.5 * SoftDiceLoss(2, 1.0)
    expected = value(loss, PROBABILITY, LABELS)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
        assert value(twin, PROBABILITY, LABELS) == pytest.approx(expected, rel=1e-12)
    assert loss.state_dict() == {}  # settings, not weights: a checkpoint does not change with the loss
    assert list(loss.parameters()) == []
    assert repr(SoftDiceLoss(3, activation="softmax", classes=(1, 2), class_weight=[1.0, 2.0, 3.0])) == (
        "SoftDiceLoss(num_classes=3, eps=1e-05, activation='softmax', cost='neg_log', classes=(1, 2), "
        "class_weight=[2.0, 3.0])"
    )


def test_metatensor_input(backend: str) -> None:
    from monai.data import MetaTensor

    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 1, 6, 6), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    loss = SoftDiceLoss(3, activation="softmax", ignore_index=255)
    plain, meta = logits.clone().requires_grad_(), MetaTensor(logits.clone()).requires_grad_()
    expected, got = loss(plain, labels, weight), loss(meta, MetaTensor(labels), MetaTensor(weight))
    assert torch.equal(got.as_subclass(Tensor), expected)
    expected.backward()
    got.backward()
    assert torch.equal(meta.grad.as_subclass(Tensor), plain.grad)


def test_function_transforms() -> None:
    loss = SoftDiceLoss(
        3, activation="softmax", absent="skip", class_weight=[1.0, 2.0, 3.0], regions=((1, 2), (0,), (2,))
    )
    logits = torch.randn(4, 1, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (4, 1, 7), generator=torch.Generator().manual_seed(1))
    leaf = logits[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, labels[0]), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits[0], labels[0]), gradient)
    each = torch.stack([loss(x, y) for x, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(logits, labels), each)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # in torch's inductor
def test_compiles_without_a_graph_break() -> None:
    loss = SoftDiceLoss(3, activation="softmax", ignore_index=255, regions=((1, 2), (0,)), absent="skip")
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(1))
    with softdice.use_backend("reference"):
        eager = loss(logits, labels)
        compiled = torch.compile(loss, fullgraph=True)(logits, labels)
    torch.testing.assert_close(compiled, eager)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (compiled, eager))
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
