"""The soft confusion matrix, and the losses that are functions of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import GeneralizedWassersteinDiceLoss
from torch import Tensor

import softdice
from softdice.statistics import check, sliced
from softdice.statistics.api import confusion_pass
from softdice.statistics.request import Pass

ROOT = Path(__file__).parents[1]
NEAR = [[0.0, 2.0, 2.0, 2.0], [2.0, 0.0, 1.0, 0.5], [2.0, 1.0, 0.0, 1.5], [2.0, 0.5, 1.5, 0.0]]


def problem(classes: int = 4, shape: tuple[int, ...] = (2, 9, 11, 13), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (B, C, *S) and labels (B, *S); the last class has no voxel."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator)
    return logits, torch.randint(0, classes - 1, shape, generator=generator)


def definition(
    input: Tensor, target: Tensor, activation: str, weight: Tensor | None = None, ignore: int | None = None
) -> Tensor:
    """Return K[b, l, c], computed label by label in float64."""
    p = input.double().softmax(1) if activation == "softmax" else input.double()
    w = torch.ones_like(target, dtype=torch.float64) if weight is None else weight.double()
    w = w if ignore is None else w * (target != ignore)
    rows = [((w * (target == label)).unsqueeze(1) * p).flatten(2).sum(-1) for label in range(input.shape[1])]
    return torch.stack(rows, 1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    distance = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(distance) <= tolerance


def test_by_hand(backend: str) -> None:
    """Label 0: 0.75 + 0.5 of class 0 and 0.25 + 0.5 of class 1; label 1: the voxel of certainty."""
    p = torch.tensor([[[0.75, 0.5, 0.0], [0.25, 0.5, 1.0]]])
    found = softdice.soft_confusion(p, torch.tensor([[0, 0, 1]]))
    assert found.tolist() == [[[1.25, 0.75], [0.0, 1.0]]]


@pytest.mark.parametrize(
    ("activation", "classes", "case"),
    [("none", 2, "ignored"), ("softmax", 3, "ignored"), ("softmax", 14, "weighted"), ("softmax", 4, "half")],
)
def test_value_and_gradient(backend: str, activation: str, classes: int, case: str) -> None:
    logits, labels = problem(classes)
    if activation == "none":
        logits = logits.softmax(1)
    weight, ignore = None, None
    if case == "ignored":
        labels[0, 2:5], ignore = 255, 255
    elif case == "weighted":
        weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).sub(0.3).clamp_min(0)
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    elif case == "half":
        logits = logits.bfloat16()
    settings: Any = {"activation": activation, "voxel_weight": weight, "ignore_index": ignore}
    mix = torch.randn(2, classes, classes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wide = logits.double().requires_grad_()
    expected = definition(wide, labels, activation, weight, ignore)
    (expected_gradient,) = torch.autograd.grad((mix * expected).sum(), wide)
    if ignore is not None:
        logits[0, :, 2:5] = torch.nan  # of voxels that do not count
    logits.requires_grad_()
    found = softdice.soft_confusion(logits, labels, **settings)
    (gradient,) = torch.autograd.grad((mix * found).sum(), logits)
    close(found, expected, 1e-6)
    close(gradient, expected_gradient, 4e-3 if case == "half" else 1e-6)  # half: the gradient's own dtype
    if ignore is not None:
        assert not gradient[0, :, 2:5].any()


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel the definition serves in slices; the last one is smaller."""
    monkeypatch.setattr(sliced, "ELEMENTS", 4 * 2 * 100)
    logits, labels = problem()
    settings = confusion_pass(Pass("softmax"))
    request = check.request(logits, labels, None, settings)
    close(sliced.forward(request).transpose(0, 1), definition(logits, labels, "softmax"), 1e-6)
    wide = logits.double().requires_grad_()
    mix = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad((definition(wide, labels, "softmax").transpose(0, 1) * mix).sum(), wide)
    close(sliced.gradient(mix, request).view_as(logits), expected, 1e-6)


def test_derivatives(backend: str) -> None:
    logits, labels = problem(3, (2, 5))
    wide = logits.double().requires_grad_()

    def pass_(x: Tensor) -> Tensor:
        return softdice.soft_confusion(x, labels, activation="softmax")

    assert torch.autograd.gradcheck(pass_, wide)
    assert torch.autograd.gradgradcheck(pass_, wide)


def test_function_transforms() -> None:
    logits, labels = problem(3, (4, 5))

    def total(x: Tensor, y: Tensor) -> Tensor:
        return softdice.WassersteinDiceLoss(3, activation="softmax")(x.unsqueeze(0), y.unsqueeze(0))

    each = torch.func.vmap(torch.func.grad(total))(logits, labels)
    alone = torch.func.grad(total)(logits[1], labels[1])
    torch.testing.assert_close(each[1], alone)


def test_it_compiles() -> None:
    logits, labels = problem()
    loss = softdice.WassersteinDiceLoss(4, NEAR, activation="softmax")
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, labels)
    torch.testing.assert_close(found, loss(logits, labels))


def test_threads_change_no_bit() -> None:
    logits, labels = problem(5, (2, 40, 40, 40))
    threads = torch.get_num_threads()
    found = []
    with softdice.use_backend("cpu"):
        for count in (1, 3):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            value = softdice.soft_confusion(x, labels, activation="softmax")
            found.append((value, *torch.autograd.grad((value**2).sum(), x)))
    torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize(("ours", "mode"), [("foreground", "default"), ("volume", "GDL")])
def test_wasserstein_equals_monai(backend: str, ours: Any, mode: str) -> None:
    logits, labels = problem()
    wide = logits.double().requires_grad_()
    expected = GeneralizedWassersteinDiceLoss(torch.tensor(NEAR).double(), mode, reduction="none")(wide, labels)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), wide)
    settings: Any = {"weighting": ours, "activation": "softmax", "pooling": "sample"}
    logits.requires_grad_()
    found = softdice.WassersteinDiceLoss(4, NEAR, reduction="none", **settings)(logits, labels)
    close(found, expected.unsqueeze(1))
    (gradient,) = torch.autograd.grad(softdice.WassersteinDiceLoss(4, NEAR, **settings)(logits, labels), logits)
    close(gradient, expected_gradient)


def wasserstein(input: Tensor, target: Tensor, distance: Tensor) -> Tensor:
    """Return the loss by Fidon et al., eqs. 6 to 9, over one batch: a is 0 for the background and 1 elsewhere."""
    w = (distance[target] * input.softmax(1).movedim(1, -1)).sum(-1)
    right = ((target > 0) * (1 - w)).sum()
    return 1 - 2 * right / (2 * right + w.sum())


def test_wasserstein_is_the_papers() -> None:
    logits, labels = problem()
    labels[1] = labels[1].clamp_max(1)
    wide = logits.double().requires_grad_()
    expected = wasserstein(wide, labels, torch.tensor(NEAR).double() / 2)
    x = logits.requires_grad_()
    found = softdice.WassersteinDiceLoss(4, torch.tensor(NEAR), activation="softmax")(x, labels)
    close(found, expected)
    close(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, wide)[0])


def test_wasserstein_by_hand() -> None:
    """A voxel of 1 taken for 2, at distance 1/2: A = 1/2, and the errors are 1/2: 1 - 1 / (1 + 1/2)."""
    near = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]
    p = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]])
    found = softdice.WassersteinDiceLoss(3, near, eps=0.0)(p, torch.tensor([[1, 0]]))
    assert float(found) == pytest.approx(1 / 3)


def test_mcc_is_gorodkins() -> None:
    """Covariances of indicators, eqs. 5 to 8; one class is absent, one voxel in seven is ignored."""
    logits, labels = problem()
    labels[:, ::7] = -1
    wide = logits.double().requires_grad_()
    keep = labels >= 0
    y = torch.nn.functional.one_hot(labels[keep], 4).double()
    p = wide.softmax(1).movedim(1, -1)[keep]
    n = len(y)

    def covariance(a: Tensor, b: Tensor, joint: Tensor) -> Tensor:  # of soft assignments what is joint is counted
        return joint / n - (a.mean(0) * b.mean(0)).sum()

    expected = 1 - covariance(p, y, (p * y).sum()) / (
        covariance(p, p, p.sum()).sqrt() * covariance(y, y, y.sum()).sqrt()
    )
    x = logits.requires_grad_()
    found = softdice.MultiClassMCCLoss(4, eps=0.0, activation="softmax", ignore_index=-1)(x, labels)
    close(found, expected)
    close(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, wide)[0])


def test_mcc_of_two_classes_is_that_of_one() -> None:
    logits, labels = problem(2, (2, 7, 5))
    labels[:, 3:] = 1
    settings: Any = {"eps": 0.0, "activation": "softmax"}
    torch.testing.assert_close(
        softdice.MultiClassMCCLoss(2, **settings)(logits, labels), softdice.MCCLoss(2, **settings)(logits, labels)
    )


def test_mcc_beside_a_large_background() -> None:
    """1 - sum p^2 is 4e-5 here; float32 alone would keep three digits of it."""
    labels = torch.zeros(1, 100_000, dtype=torch.long)
    labels[0, :2] = 1
    p = torch.nn.functional.one_hot(labels.roll(1, 1), 2).movedim(-1, 1).float()
    # true and predicted 1 twice each, once together: (1 - 4/N) / (2 - 4/N), about a half
    n = 100_000
    expected = 1 - (1 - 4 / n) / (2 - 4 / n)
    assert float(softdice.MultiClassMCCLoss(2, eps=0.0)(p, labels)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [softdice.MultiClassMCCLoss, softdice.WassersteinDiceLoss])
def test_edges(loss: Any) -> None:
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    nothing = loss(3, activation="softmax", ignore_index=0)(logits, torch.zeros(2, 5, dtype=torch.long))
    assert nothing.detach() == 0
    assert not torch.autograd.grad(nothing, logits)[0].any()
    empty = torch.zeros(0, 3, 5, requires_grad=True)
    for pooling in ("batch", "sample"):
        value = loss(3, activation="softmax", pooling=pooling)(empty, torch.zeros(0, 5, dtype=torch.long))
        assert value.detach() == 0
        value.backward()
    perfect = torch.eye(3).unsqueeze(0)
    assert float(loss(3, eps=0.0)(perfect, torch.arange(3).unsqueeze(0))) == pytest.approx(0, abs=1e-6)


def test_sums_and_functions() -> None:
    logits, labels = problem()
    dice, apart = softdice.SoftDiceLoss(4, activation="softmax"), softdice.WassersteinDiceLoss(4, activation="softmax")
    both = dice + 0.5 * apart
    torch.testing.assert_close(both(logits, labels), dice(logits, labels) + 0.5 * apart(logits, labels))
    found = softdice.functional.wasserstein_dice_loss(logits, labels, activation="softmax", distance=NEAR)
    assert torch.equal(found, softdice.WassersteinDiceLoss(4, NEAR, activation="softmax")(logits, labels))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: softdice.WassersteinDiceLoss(3, NEAR), "WassersteinDiceLoss: expected distance of shape (3, 3)"),
        (lambda: softdice.WassersteinDiceLoss(2, [[0, 1], [1, 1]]), "distance finite, >= 0, 0 on the diagonal"),
        (lambda: softdice.WassersteinDiceLoss(2, weighting="GDL"), "weighting to be one of 'foreground', 'volume'"),  # type: ignore[arg-type]
        (lambda: softdice.WassersteinDiceLoss(2, activation="sigmoid"), "activation to be one of 'none', 'softmax'"),  # type: ignore[arg-type]
        (lambda: softdice.MultiClassMCCLoss(1), "MultiClassMCCLoss: expected num_classes >= 2, got 1"),
        (lambda: softdice.MultiClassMCCLoss(2, cost="neg_log"), "a cost of a score that may be negative"),
        (lambda: softdice.MultiClassMCCLoss(2)(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), "a label map"),
        (lambda: softdice.soft_confusion(torch.zeros(1, 1, 3), torch.zeros(1, 3)), "input of at least two classes"),
        (lambda: softdice.soft_confusion(torch.zeros(1, 2, 3), torch.full((1, 3), 2)), "labels in [0, 2)"),
        (lambda: softdice.soft_confusion(torch.full((1, 2, 3), 2.0), torch.zeros(1, 3)), "probabilities in [0, 1]"),
    ],
)
def test_mistakes(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        make()


def test_memory() -> None:
    """Beside the gradient neither pass holds a map of a class, of probabilities or one-hot."""
    code = """
import torch, softdice
from benchmarks import measure
measure.prepare_memory()
logits = torch.randn(2, 14, 64, 64, 64, requires_grad=True)
labels = torch.randint(0, 14, (2, 64, 64, 64), dtype=torch.uint8)
used = measure.memory(softdice.WassersteinDiceLoss(14, activation="softmax"), logits, labels)
one = 4 * labels.numel()
print(used.forward / one, used.backward / one - 14)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    forward, backward = map(float, run.stdout.split())
    assert forward < 1
    assert backward < 1
