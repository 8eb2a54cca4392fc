"""clDice: its soft skeletons, their gradient tile by tile, and what it says of ignored voxels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import SoftclDiceLoss, SoftDiceclDiceLoss
from torch import Tensor
from torch.nn.functional import max_pool2d, max_pool3d, one_hot, relu

import softdice

ROOT = Path(__file__).parents[1]


def problem(shape: tuple[int, ...], classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (2, C, *S) and labels (2, *S) in blobs; the last class has no voxel."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, *shape, generator=generator)
    labels = torch.randint(0, max(classes - 1, 2), (2, 1, *shape), generator=generator).float()
    pool = max_pool3d if len(shape) == 3 else max_pool2d
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.02, labels, 0)
    return logits, pool(labels, 5, 1, 2)[:, 0].long()


# --- the authors' definition, in float64: S. Shit et al., CVPR 2021, algorithm 2


def erosion(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return torch.min(-max_pool2d(-x, (3, 1), 1, (1, 0)), -max_pool2d(-x, (1, 3), 1, (0, 1)))
    z = -max_pool3d(-x, (3, 1, 1), 1, (1, 0, 0))
    y = -max_pool3d(-x, (1, 3, 1), 1, (0, 1, 0))
    return torch.min(torch.min(z, y), -max_pool3d(-x, (1, 1, 3), 1, (0, 0, 1)))


def opening(x: Tensor) -> Tensor:
    return max_pool2d(erosion(x), 3, 1, 1) if x.ndim == 4 else max_pool3d(erosion(x), 3, 1, 1)


def skeleton(x: Tensor, iterations: int) -> Tensor:
    found = relu(x - opening(x))
    for _ in range(iterations):
        x = erosion(x)
        rest = relu(x - opening(x))
        found = found + relu(rest - found * rest)
    return found


def definition(p: Tensor, y: Tensor, iterations: int, eps: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
    """Return 1 - clDice of one batch, over all classes together."""
    of_p, of_y = skeleton(p, iterations) * weight, skeleton(y, iterations) * weight
    precision = ((of_p * y).sum() + eps) / (of_p.sum() + eps)
    sensitivity = ((of_y * p).sum() + eps) / (of_y.sum() + eps)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def dense(labels: Tensor, classes: int) -> Tensor:
    if classes == 1:
        return (labels == 1).double().unsqueeze(1)
    return one_hot(labels.clamp_min(0), classes).movedim(-1, 1).double() * (labels >= 0).unsqueeze(1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found.double() - expected).abs().max() / expected.abs().max()) <= tolerance


# --- value and gradient


@pytest.mark.parametrize(
    ("shape", "classes", "activation", "iterations"),
    [
        ((21, 37, 19), 3, "softmax", 3),  # two tiles in y, whose surroundings overlap
        ((37, 70), 3, "softmax", 2),  # three by two, in a plane
        ((18, 17, 66), 1, "sigmoid", 1),  # the last tiles are one or two voxels wide
        ((3, 1, 5), 2, "softmax", 9),  # less than the halo
    ],
)
def test_value_and_gradient(
    backend: str, shape: tuple[int, ...], classes: int, activation: Any, iterations: int
) -> None:
    logits, labels = problem(shape, classes)
    wide = logits.double().requires_grad_()
    p = wide.softmax(1) if activation == "softmax" else wide.sigmoid()
    expected = definition(p, dense(labels, classes), iterations)
    logits.requires_grad_()
    found = softdice.ClDiceLoss(classes, iterations, floor=0.0, activation=activation)(logits, labels)
    close(found, expected)
    close(torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, wide)[0])


@pytest.mark.parametrize("shape", [(20, 9, 11), (21, 34)])
def test_ties_take_the_authors_subgradient(backend: str, shape: tuple[int, ...]) -> None:
    """Probabilities in eighths: hardly a neighbourhood without a tie."""
    p, labels = problem(shape, 2)
    p = (p.double().softmax(1) * 8).round() / 8
    p.requires_grad_()
    expected = definition(p, dense(labels, 2), 3)
    found = softdice.ClDiceLoss(2, 3, floor=0.0)(p, labels)
    close(found, expected, 1e-13)
    close(torch.autograd.grad(found, p)[0], torch.autograd.grad(expected, p)[0], 1e-13)


@pytest.mark.parametrize("shape", [(19, 12, 13), (20, 21)])
def test_monai(backend: str, shape: tuple[int, ...]) -> None:
    logits, labels = problem(shape)
    wide = logits.double().requires_grad_()
    monai: Any = {"iter_": 2, "softmax": True, "to_onehot_y": True, "reduction": "none"}
    expected = SoftclDiceLoss(**monai)(wide, labels.unsqueeze(1))
    ours: Any = {"activation": "softmax", "pooling": "sample"}
    close(softdice.ClDiceLoss(3, 2, reduction="none", **ours)(logits, labels), expected.unsqueeze(1))
    both = SoftDiceclDiceLoss(**{**monai, "reduction": "mean"}, alpha=0.3)(wide, labels.unsqueeze(1))
    logits.requires_grad_()
    mine = 0.7 * softdice.SoftDiceLoss(3, eps=1.0, cost="one_minus", **ours) + 0.3 * softdice.ClDiceLoss(3, 2, **ours)
    found = mine(logits, labels)
    close(found, both)
    close(torch.autograd.grad(found, logits)[0], torch.autograd.grad(both, wide)[0])


def test_by_hand(backend: str) -> None:
    """A line of five is its own skeleton. Of its voxels the prediction has three at 1: precision and sensitivity are
    (3 + 1) / (3 + 1) and (3 + 1) / (5 + 1): 1 - 2 (2/3) / (5/3)."""
    line = torch.zeros(1, 1, 5, 5)
    line[..., 2, :] = 1
    prediction = line.clone()
    prediction[..., 3:] = 0
    found = softdice.ClDiceLoss(1, floor=0.0)(prediction, line.long())
    assert float(found) == pytest.approx(0.2)


def test_ignored_voxels_and_weights(backend: str) -> None:
    """As if they were of no class, with p = 0, whatever stands there; other weights weigh the terms."""
    logits, labels = problem((18, 20))
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).add(0.5)
    weight[:, ::5] = 0
    labels[:, :, 3:5] = -1
    keep = ((weight > 0) & (labels >= 0)).unsqueeze(1)
    wide = logits.double().requires_grad_()
    expected = definition(
        wide.softmax(1) * keep, dense(labels, 3) * keep, 2, weight=weight.double().unsqueeze(1) * keep
    )
    logits = torch.where(keep, logits, torch.nan).requires_grad_()
    loss = softdice.ClDiceLoss(3, 2, floor=0.0, activation="softmax", ignore_index=-1)
    found = loss(logits, labels, weight)
    (gradient,) = torch.autograd.grad(found, logits)
    close(found, expected)
    close(gradient, torch.autograd.grad(expected, wide)[0])
    assert not gradient[(~keep).expand_as(gradient)].any()


@pytest.mark.parametrize("layout", ["channels last", "a part", "half"])
def test_layouts(layout: str) -> None:
    logits, labels = problem((34, 36))
    exact = logits.double().requires_grad_()
    loss = softdice.ClDiceLoss(3, 2, activation="softmax")
    (expected,) = torch.autograd.grad(loss(exact, labels), exact)
    if layout == "channels last":
        given = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "a part":
        given = torch.cat((logits, logits), dim=1)[:, :3]
    else:
        given = logits.bfloat16()
        exact = given.double().requires_grad_()
        (expected,) = torch.autograd.grad(loss(exact, labels), exact)
    given = given.detach().requires_grad_()
    with softdice.use_backend("cpu"):
        (found,) = torch.autograd.grad(loss(given, labels), given)
    close(found, expected, 4e-3 if layout == "half" else 1e-5)


def test_class_by_class() -> None:
    """Per-class values, for which there is no kernel, equal the labels that they stand for."""
    logits, labels = problem((18, 20, 20))
    logits.requires_grad_()
    loss = softdice.ClDiceLoss(3, 2, activation="softmax")
    value, other = loss(logits, labels), loss(logits, dense(labels, 3).float())
    close(other, value)
    close(torch.autograd.grad(other, logits)[0], torch.autograd.grad(value, logits)[0])


def test_not_a_number_is_seen(backend: str) -> None:
    logits, labels = problem((18, 20))
    logits[0, 1, 4, 5] = torch.nan
    assert softdice.ClDiceLoss(3, activation="softmax")(logits, labels).isnan()


# --- the rest


def test_derivatives(backend: str) -> None:
    logits, labels = problem((5, 6), 2)
    wide = logits.double().requires_grad_()
    loss = softdice.ClDiceLoss(2, 1, activation="softmax")
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), wide)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels), wide)


def test_it_compiles() -> None:
    logits, labels = problem((34, 36))
    loss = softdice.ClDiceLoss(3, activation="softmax")
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, labels)
    torch.testing.assert_close(found, loss(logits, labels))


def test_threads_change_no_bit() -> None:
    logits, labels = problem((40, 36, 70))
    threads = torch.get_num_threads()
    found = []
    with softdice.use_backend("cpu"):
        for count in (1, 3):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            value = softdice.ClDiceLoss(3, activation="softmax")(x, labels)
            found.append((value, *torch.autograd.grad(value, x)))
    torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_classes_and_absent_ones() -> None:
    """The last class has no voxel: its skeleton only lowers the precision. Without it and the background, one class."""
    logits, labels = problem((20, 24))
    p, y = logits.double().softmax(1), dense(labels, 3)
    assert not y[:, 2].any()
    for classes in (None, (1,), (1, 2)):
        chosen = list(classes or range(3))
        found = softdice.ClDiceLoss(3, 2, floor=0.0, activation="softmax", classes=classes)(logits, labels)
        close(found, definition(p[:, chosen], y[:, chosen], 2))


def test_empty_batch() -> None:
    for pooling in ("batch", "sample"):
        empty = torch.zeros(0, 2, 5, 5, requires_grad=True)
        value = softdice.ClDiceLoss(2, pooling=pooling, activation="softmax")(empty, torch.zeros(0, 5, 5))  # type: ignore[arg-type]
        assert value.detach() < 1e-4
        value.backward()
        assert empty.grad is not None


def test_memory() -> None:
    """Beside the inputs and the gradient, three maps of a class at most."""
    code = """
import torch, softdice
from benchmarks import measure
measure.prepare_memory()
torch.set_num_threads(2)
logits = torch.randn(2, 4, 96, 96, 96, requires_grad=True)
labels = torch.randint(0, 4, (2, 96, 96, 96), dtype=torch.uint8)
used = measure.memory(softdice.ClDiceLoss(4, activation="softmax"), logits, labels)
one = 4 * labels.numel()
print(used.forward / one, used.backward / one - 4)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    forward, backward = map(float, run.stdout.split())
    assert forward < 3
    assert backward < 3


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: softdice.ClDiceLoss(2, -1), "ClDiceLoss: expected iterations to be an int >= 0, got -1"),
        (lambda: softdice.ClDiceLoss(2, 1.5), "ClDiceLoss: expected iterations to be an int >= 0, got 1.5"),  # type: ignore[arg-type]
        (lambda: softdice.ClDiceLoss(2, eps=-1), "ClDiceLoss: expected eps >= 0, got -1"),
        (lambda: softdice.ClDiceLoss(2)(torch.zeros(1, 2, 3), torch.zeros(1, 3)), "(B, C, H, W) or (B, C, D, H, W)"),
        (lambda: softdice.ClDiceLoss(2)(torch.ones(1, 2, 3, 3), torch.full((1, 3, 3), 2)), "labels in [0, 2)"),
        (lambda: softdice.ClDiceLoss(2)(torch.full((1, 2, 3, 3), 2.0), torch.zeros(1, 3, 3)), "probabilities in"),
    ],
)
def test_mistakes(make: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert text in str(error.value)
