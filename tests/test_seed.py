"""The seed document's check, run as it stands there against softdice's names, and where softdice differs on purpose."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import oracle
import pytest
import torch

import softdice

DOCUMENT = """
import torch
from softdice import SoftDiceLoss, SystemConfig, setup_system

# apply system settings
setup_system({config})

# generate input data
ground_truth = torch.zeros(1, 224, 224)
ground_truth[:, :50, :50] = 1
ground_truth[:, 50:100, 50:100] = 2

# generate random predictions and use softmax to get probabilities
prediction = torch.zeros(1, 3, 224, 224).uniform_().softmax(dim=1)

# create an instance of a SoftDiceLoss class
soft_dice_loss = SoftDiceLoss(num_classes=3)

# get the loss value
loss = soft_dice_loss(prediction, ground_truth)

print('Loss: {{}}'.format(loss{item}))
"""
SEED_LOSS = 1.8738912343978882
EXACT_LOSS = 1.873891106797835


def run_document(config: str = "SystemConfig", item: str = ".item()") -> tuple[str, dict[str, torch.Tensor]]:
    """Run the document's check; return what it prints, and its variables."""
    variables: dict[str, torch.Tensor] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(DOCUMENT.format(config=config, item=item), variables)
    return printed.getvalue(), variables


@pytest.mark.parametrize("config", ["SystemConfig", "SystemConfig()", "SystemConfig(seed=42)"])
def test_the_document_prints_its_number(config: str) -> None:
    with softdice.use_backend("reference"):
        printed, _ = run_document(config)
    assert printed == "Loss: 1.8738912343978882\n"


def test_the_loss_is_a_tensor_on_the_graph() -> None:
    printed, variables = run_document(item="")
    assert printed.startswith("Loss: 1.87389")  # str.format of a 0-d tensor prints its value
    prediction = variables["prediction"].requires_grad_()
    loss = softdice.SoftDiceLoss(num_classes=3)(prediction, variables["ground_truth"])
    loss.backward()
    assert isinstance(loss, torch.Tensor)
    assert prediction.grad is not None
    assert prediction.grad.abs().max() > 0


def test_every_backend_on_the_seed(backend: str) -> None:
    _, variables = run_document()
    prediction, ground_truth = variables["prediction"], variables["ground_truth"]
    loss = softdice.SoftDiceLoss(num_classes=3)
    exact = loss(prediction.double(), ground_truth).item()
    assert abs(exact - EXACT_LOSS) <= 1e-14
    assert abs(loss(prediction, ground_truth).item() - EXACT_LOSS) <= 2.4e-7
    assert exact == pytest.approx(oracle.seed_loss(prediction.double(), ground_truth, 3, 1e-5).item(), rel=1e-14)
    logits = prediction.log()
    assert abs(softdice.SoftDiceLoss(3, activation="softmax")(logits, ground_truth).item() - EXACT_LOSS) <= 4e-7


def test_the_reference_has_the_seeds_bits() -> None:
    _, variables = run_document()
    prediction, ground_truth = variables["prediction"], variables["ground_truth"]
    with softdice.use_backend("reference"):
        ours = softdice.SoftDiceLoss(num_classes=3)(prediction, ground_truth)
    assert ours.item() == SEED_LOSS == oracle.seed_loss(prediction, ground_truth, 3, 1e-5).item()


def test_eps_stands_once_above_and_once_below_the_line() -> None:
    # I = 1, P = 2, T = 1, one class. Its code: (2 I + e) / (P + T + e). Its formula: 2 (I + e) over e in each sum.
    p, y = torch.tensor([[[1.0, 1.0]]], dtype=torch.float64), torch.tensor([[1, 0]])
    loss = softdice.SoftDiceLoss(1, eps=0.5)(p, y).exp().reciprocal().item()
    assert loss == pytest.approx(2.5 / 3.5)
    assert loss != pytest.approx(2 * 1.5 / 3.5)
    assert softdice.SoftDiceLoss(1).eps == 1e-5


def test_the_generators_stand_where_the_document_puts_them() -> None:
    softdice.setup_system(softdice.SystemConfig)
    ours = torch.rand(2).tolist(), np.random.rand(), random.random()  # noqa: NPY002 - the generator that is seeded
    torch.manual_seed(42)
    np.random.seed(42)  # noqa: NPY002
    random.seed(42)
    assert ours == (torch.rand(2).tolist(), np.random.rand(), random.random())  # noqa: NPY002
