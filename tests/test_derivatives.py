"""Derivatives of every loss, functional form and drop-in class: first, second, and under torch.func.

First derivatives come from each backend's own backward pass, second ones from the definition whichever it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_family_properties import FAMILY, build
from torch import Tensor

import softdice
from softdice.compat import monai, nnunet, smp
from softdice.losses import BEYOND, MAPPED

Loss = Callable[[Tensor], Tensor]


def problem(classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """logits (1, C, 4), labels with every class, and the same one-hot."""
    generator = torch.Generator().manual_seed(5)
    logits = 1.5 * torch.randn(1, classes, 4, dtype=torch.float64, generator=generator)
    labels = torch.tensor([[0, 2, 1, 2]])
    return logits, labels, torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).double()


def assert_differentiable(loss: Loss, logits: Tensor) -> None:
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf)
    assert torch.autograd.gradgradcheck(loss, leaf)


def assert_same_under_torch_func(loss: Loss, logits: Tensor) -> None:
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits), gradient)
    assert gradient.abs().max() > 1e-6


# --- the losses and their functional forms ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", FAMILY)
def test_a_loss_twice(backend: str, name: str, activation: str) -> None:
    logits, labels, _ = problem()
    loss = build(name, 3, activation=activation, label_smoothing=0.1)
    assert_differentiable(lambda x: loss(x, labels), logits)


@pytest.mark.parametrize("name", FAMILY)
def test_a_loss_of_probabilities_and_soft_labels_twice(backend: str, name: str) -> None:
    logits, _, _ = problem()
    soft = logits.flip(2).softmax(1)
    loss = build(name, 3)
    assert_differentiable(lambda x: loss(x, soft), logits.softmax(1))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", FAMILY)
def test_a_loss_under_torch_func(name: str, activation: str) -> None:
    logits, labels, _ = problem()
    loss = build(name, 3, activation=activation)
    assert_same_under_torch_func(lambda x: loss(x, labels), logits)


ELSEWHERE = {"boundary_loss", "skeleton_recall_loss", "cl_dice_loss"}
"""What needs a map, or two dimensions: tests/test_maps.py and tests/test_losses_centreline.py differentiate them."""
FUNCTIONS = sorted({*softdice.functional.FUNCTIONS} - ELSEWHERE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_twice(backend: str, name: str) -> None:
    logits, labels, _ = problem()
    assert_differentiable(lambda x: getattr(softdice.functional, name)(x, labels, activation="softmax"), logits)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_under_torch_func(name: str) -> None:
    logits, labels, _ = problem()
    assert_same_under_torch_func(lambda x: getattr(softdice.functional, name)(x, labels, activation="softmax"), logits)


@pytest.mark.parametrize("name", softdice.losses.masks.__all__)
def test_a_function_of_masks_twice(backend: str, name: str) -> None:
    logits, _, one_hot = problem()
    assert_differentiable(partial(getattr(softdice.functional, name), target=one_hot[0]), logits[0])


@pytest.mark.parametrize("name", softdice.losses.masks.__all__)
def test_a_function_of_masks_under_torch_func(name: str) -> None:
    logits, _, one_hot = problem()
    function = partial(getattr(softdice.functional, name), target=one_hot[0])
    assert_same_under_torch_func(lambda x: function(x).sum(), logits[0])


def test_every_named_loss_and_every_function_is_differentiated() -> None:
    losses = {name for name in softdice.__all__ if name.endswith("Loss")} - {"OverlapLoss"}
    assert losses == {make.__name__ for make, _, _ in FAMILY.values()} | {loss.__name__ for loss in (*MAPPED, *BEYOND)}
    apart = r"(?<=[a-z])(?=[A-Z])|(?<=MCC)|(?<=OHEM)|(?<=TopK)"
    assert {*softdice.functional.__all__} == {*FUNCTIONS, *ELSEWHERE, *softdice.losses.masks.__all__}
    assert {*FUNCTIONS, *ELSEWHERE} == {re.sub(apart, "_", name).lower() for name in losses}


# --- the drop-in classes ------------------------------------------------------------------------------------------


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, 1)


DROP_IN: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (monai.DiceLoss, (), {"sigmoid": True}, "one-hot"),
    (monai.DiceLoss, (), {"softmax": True, "squared_pred": True}, "one-hot"),
    (monai.MaskedDiceLoss, (), {"softmax": True}, "one-hot"),
    (monai.GeneralizedDiceLoss, (), {"softmax": True}, "one-hot"),
    (monai.TverskyLoss, (), {"sigmoid": True}, "one-hot"),
    (monai.MCCLoss, (), {"softmax": True}, "one-hot"),
    (monai.FocalLoss, (), {}, "one-hot"),
    (monai.FocalLoss, (), {"use_softmax": True, "gamma": 1.5}, "one-hot"),
    (monai.DiceCELoss, (), {"softmax": True}, "one-hot"),
    (monai.DiceCELoss, (), {"sigmoid": True}, "one-hot"),
    (monai.DiceFocalLoss, (), {"sigmoid": True}, "one-hot"),
    (monai.GeneralizedDiceFocalLoss, (), {"softmax": True}, "one-hot"),
    (monai.DeepSupervisionLoss, (monai.DiceLoss(sigmoid=True),), {}, "one-hot"),
    (monai.MaskedLoss, (monai.DiceLoss,), {"sigmoid": True}, "one-hot"),
    (nnunet.SoftDiceLoss, (), {"apply_nonlin": softmax}, "labels"),
    (nnunet.MemoryEfficientSoftDiceLoss, (), {"apply_nonlin": softmax}, "labels"),
    (nnunet.DC_and_CE_loss, ({"smooth": 1e-5}, {}), {}, "labels"),
    (nnunet.DC_and_topk_loss, ({"smooth": 1e-5}, {"k": 60}), {}, "labels"),
    (nnunet.TopKLoss, (), {"k": 60}, "labels"),
    (nnunet.RobustCrossEntropyLoss, (), {"ignore_index": 1}, "labels"),
    (nnunet.DeepSupervisionWrapper, (nnunet.RobustCrossEntropyLoss(),), {}, "labels"),
    (nnunet.DC_and_BCE_loss, ({}, {"smooth": 1e-5}), {}, "one-hot"),
    (smp.DiceLoss, ("multiclass",), {}, "labels"),
    (smp.DiceLoss, ("multilabel",), {"log_loss": True}, "one-hot"),
    (smp.JaccardLoss, ("multiclass",), {}, "labels"),
    (smp.TverskyLoss, ("multilabel",), {"gamma": 1.5}, "one-hot"),
    (smp.FocalLoss, ("multiclass",), {}, "labels"),
    (smp.FocalLoss, ("multilabel",), {}, "one-hot"),
    (smp.SoftCrossEntropyLoss, (), {"smooth_factor": 0.1}, "labels"),
    (smp.SoftBCEWithLogitsLoss, (), {"smooth_factor": 0.1}, "one-hot"),
    (smp.MCCLoss, (), {}, "one-hot"),
    (smp.LovaszLoss, ("multiclass",), {}, "labels"),
    (smp.LovaszLoss, ("multilabel",), {}, "one-hot"),
]
"""Class, its arguments, and which target it takes."""


def drop_in(make: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], kind: str) -> tuple[Loss, Tensor]:
    logits, labels, one_hot = problem()
    target = one_hot if kind == "one-hot" else labels if "smp" in make.__module__ else labels.unsqueeze(1)
    masked = make in (monai.MaskedDiceLoss, monai.MaskedLoss)
    more = (torch.tensor([[[1.0, 0.0, 1.0, 1.0]]]),) if masked else ()
    module = make(*arguments, **keywords)
    if make is nnunet.DeepSupervisionWrapper:
        return lambda x: module([x], [target]), logits
    if make is smp.MCCLoss:  # of probabilities
        return lambda x: module(x.sigmoid(), target), logits
    return lambda x: module(x, target, *more), logits


every_drop_in = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=f"{row[0].__module__.split('.')[2]}-{row[0].__name__}-{n}") for n, row in enumerate(DROP_IN)],
)


@every_drop_in
def test_a_drop_in_class_twice(backend: str, row: Any) -> None:
    assert_differentiable(*drop_in(*row))


@every_drop_in
def test_a_drop_in_class_under_torch_func(row: Any) -> None:
    assert_same_under_torch_func(*drop_in(*row))


@every_drop_in
def test_a_type_checker_lets_a_drop_in_class_be_made(row: Any) -> None:
    missing = [name for name in dir(row[0]) if getattr(getattr(row[0], name), "__isabstractmethod__", False)]
    assert missing == []


def test_every_drop_in_class_is_differentiated() -> None:
    classes = {
        value
        for module in (monai, nnunet, smp)
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__.startswith("softdice.compat") and not name.startswith("_")
    }
    assert {value for value in classes if "forward" in dir(value)} - {row[0] for row in DROP_IN} == set()
