"""The losses that are no sums, against exacta's, value and gradient in float64 and on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import exacta.losses as theirs
import pytest
import torch
from torch import Tensor

import softdice

Loss = Callable[[Tensor], Tensor]


def problem(*shape: int) -> tuple[Tensor, Tensor]:
    """Return logits, and labels in blocks of which 255 is no class."""
    generator = torch.Generator().manual_seed(len(shape))
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[1], (shape[0], *[-(-size // 3) for size in shape[2:]]), generator=generator)
    for axis, size in enumerate(shape[2:], 1):
        labels = labels.repeat_interleave(3, axis).narrow(axis, 0, size)
    return logits, labels


def same(ours: Loss, other: Loss, logits: Tensor) -> None:
    found = []
    for loss in (ours, other):
        x = logits.clone().requires_grad_()
        value = loss(x)
        found.append((value.detach().double(), *torch.autograd.grad(value, x)))
    (value, gradient), (expected, slope) = found
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert ((gradient - slope).abs().max() / slope.abs().max()).item() < 1e-6


@pytest.mark.parametrize("ignored", [None, 255])
@pytest.mark.parametrize(("absent", "classes"), [("skip", "present"), ("count", "all")])
@pytest.mark.parametrize(("pooling", "per_image"), [("batch", False), ("sample", True)])
def test_lovasz(backend: str, pooling: Any, per_image: bool, absent: Any, classes: Any, ignored: int | None) -> None:
    logits, labels = problem(2, 4, 11, 13)
    labels[labels == 3] = 0 if ignored is None else ignored
    ours = softdice.LovaszLoss(4, activation="softmax", absent=absent, ignore_index=ignored, pooling=pooling)
    other = theirs.LovaszSoftmaxLoss(classes=classes, per_image=per_image, ignore_index=ignored)
    if per_image and absent == "skip":  # theirs is the mean over images of the mean over their classes
        ours = softdice.LovaszLoss(
            4, activation="softmax", absent=absent, ignore_index=ignored, pooling=pooling, reduction="none"
        )
        same(lambda x: ours(x, labels).nanmean(1).mean(), lambda x: other(x, labels), logits)
        return
    same(lambda x: ours(x, labels), lambda x: other(x, labels), logits)


@pytest.mark.parametrize(("pooling", "per_image"), [("batch", False), ("sample", True)])
def test_lovasz_hinge(backend: str, pooling: Any, per_image: bool) -> None:
    logits, labels = problem(3, 2, 9, 14)
    ours = softdice.LovaszLoss(1, activation="sigmoid", pooling=pooling)
    other = theirs.LovaszHingeLoss(per_image=per_image)
    same(lambda x: ours(x, labels), lambda x: other(x, labels), logits[:, :1])


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_top_k(backend: str, share: float) -> None:
    """The fractions give whole numbers of the 200 voxels; others are rounded up by exacta."""
    logits, labels = problem(2, 5, 10, 10)
    ours = softdice.TopKCrossEntropyLoss(5, share, activation="softmax")
    other = theirs.TopKCELoss(fraction=share)
    same(lambda x: ours(x, labels), lambda x: other(x, labels), logits)


@pytest.mark.parametrize("weighting", ["foreground", "volume"])
def test_wasserstein(backend: str, weighting: Any) -> None:
    logits, labels = problem(2, 4, 9, 8)
    distance = torch.tensor([[0, 1, 1, 1], [1, 0, 0.4, 0.7], [1, 0.4, 0, 0.2], [1, 0.7, 0.2, 0]])
    ours = softdice.WassersteinDiceLoss(4, distance, weighting=weighting, pooling="sample", activation="softmax")
    mode: Any = "GDL" if weighting == "volume" else "default"
    other = theirs.GeneralizedWassersteinDiceLoss(distance, weighting_mode=mode)
    same(lambda x: ours(x, labels), lambda x: other(x, labels), logits)


@pytest.mark.parametrize("shape", [(2, 3, 17, 21), (1, 3, 9, 11, 10)])
def test_cl_dice(backend: str, shape: tuple[int, ...]) -> None:
    """Theirs is the mean of the classes' clDice, ours, as the authors', that of their sums: so class by class."""
    logits, labels = problem(*shape)
    settings: dict[str, Any] = {"activation": "softmax", "pooling": "sample", "floor": 0.0}
    each = [softdice.ClDiceLoss(3, 3, classes=(c,), **settings) for c in range(3)]
    other = theirs.SoftClDiceLoss(iterations=3, include_background=True)
    same(lambda x: torch.stack([loss(x, labels) for loss in each]).mean(), lambda x: other(x, labels), logits)
