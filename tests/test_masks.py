"""Losses of single masks, and costs of a matcher: by hand, by the papers' formulas, and as transformers has them."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as entropy

from softdice.functional import (
    mask_dice_loss,
    mask_focal_loss,
    pairwise_mask_dice_loss,
    pairwise_mask_focal_loss,
)

SHAPES = [(5, 7), (4, 3, 6), (2, 3, 4, 5)]
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def problem(*shape: int, masks: int | None = None) -> tuple[Tensor, Tensor]:
    """Return logits, and masks of which the last is empty."""
    generator = torch.Generator().manual_seed(len(shape))
    logits = 3 * torch.randn(shape, generator=generator)
    target = (torch.rand((masks or shape[0], *shape[1:]), generator=generator) > 0.6).float()
    target[-1] = 0
    return logits, target


# --- the papers' formulas, written out


def dice(x: Tensor, y: Tensor) -> Tensor:
    """Return the Dice loss of each mask, (N,), by Carion et al., 2020."""
    p, y = x.sigmoid().flatten(1), y.flatten(1)
    return 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)


def focal(x: Tensor, y: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of each mask, (N,), by Lin et al., 2017, eq. 5."""
    right = torch.where(y == 1, x.sigmoid(), 1 - x.sigmoid())
    price = 1.0 if alpha is None else torch.where(y == 1, alpha, 1 - alpha)
    return (price * (1 - right) ** gamma * entropy(x, y.to(x.dtype), reduction="none")).flatten(1).mean(1)


def pairs(loss: Callable[..., Tensor], x: Tensor, y: Tensor, **keywords: Any) -> Tensor:
    """Return the loss of every pair, (N, M), from a loss of single masks."""
    return torch.stack([loss(x, mask.expand_as(x), **keywords) for mask in y], 1)


def same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """Assert values within 1e-5, and gradients within 1e-5 of their maximum."""
    gradients = []
    values = []
    for call in (ours, theirs):
        x = logits.clone().requires_grad_()
        values.append(call(x))
        (values[-1] * torch.linspace(1, 2, values[-1].numel()).view_as(values[-1])).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * gradients[1].abs().max().item())


def test_dice_by_hand(backend: str) -> None:
    p = 1 / (1 + math.exp(-2.0))
    logits, masks = torch.tensor([[2.0, -2.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 0]])
    expected = [1 - (2 * p + 1) / (1 + 1 + 1), 1 - 1 / 2]  # p + (1 - p) = 1 voxel predicted, and one of two
    torch.testing.assert_close(mask_dice_loss(logits, masks, reduction="none"), torch.tensor(expected))
    assert mask_dice_loss(logits, masks, 4).item() == pytest.approx(sum(expected) / 4)
    assert mask_dice_loss(logits, masks).item() == pytest.approx(sum(expected) / 2)


def test_focal_by_hand(backend: str) -> None:
    # p = 1/2: half of the voxels in the mask; alpha 1/4, (1 - p)^2 = 1/4, ln 2
    value = mask_focal_loss(torch.zeros(3, 4), torch.tensor([[1, 1, 0, 0]] * 3), 6)
    assert value.item() == pytest.approx(3 * (0.25 + 0.75) / 2 * 0.25 * math.log(2) / 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_is_the_papers(backend: str, shape: tuple[int, ...]) -> None:
    logits, masks = problem(*shape)
    same(lambda x: mask_dice_loss(x, masks, 3), lambda x: dice(x, masks).sum() / 3, logits)
    soft = masks * 0.7 + 0.1
    same(lambda x: mask_dice_loss(x, soft, reduction="none"), lambda x: dice(x, soft), logits)
    for dtype in (torch.uint8, torch.int64, torch.bool):
        assert torch.equal(mask_dice_loss(logits, masks.to(dtype)), mask_dice_loss(logits, masks))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keywords", [{}, {"alpha": None}, {"alpha": 0.7, "gamma": 1.5}, {"alpha": None, "gamma": 0.0}])
def test_focal_is_the_papers(backend: str, shape: tuple[int, ...], keywords: dict[str, Any]) -> None:
    logits, masks = problem(*shape)
    same(lambda x: mask_focal_loss(x, masks, 3, **keywords), lambda x: focal(x, masks, **keywords).sum() / 3, logits)
    each = mask_focal_loss(logits, masks.bool(), reduction="none", **keywords)
    torch.testing.assert_close(each, focal(logits, masks, **keywords), rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_soft_masks(backend: str) -> None:
    logits, masks = problem(4, 12)
    soft = masks * 0.7 + 0.1
    expected = entropy(logits, soft, reduction="none").mean(1).sum() / 4
    torch.testing.assert_close(mask_focal_loss(logits, soft, alpha=None, gamma=0.0), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_are_the_losses_of_single_masks(shape: tuple[int, ...]) -> None:
    logits, masks = problem(*shape, masks=3)
    same(lambda x: pairwise_mask_dice_loss(x, masks), lambda x: pairs(dice, x, masks), logits)
    same(lambda x: pairwise_mask_dice_loss(x, masks.bool()), lambda x: pairs(mask_dice_each, x, masks), logits)
    for keywords in ({}, {"alpha": 0.6, "gamma": 1.5}, {"alpha": None, "gamma": 0.0}):
        same(
            lambda x, keywords=keywords: pairwise_mask_focal_loss(x, masks.to(torch.uint8), **keywords),
            lambda x, keywords=keywords: pairs(focal, x, masks, **keywords),
            logits,
        )


def mask_dice_each(x: Tensor, y: Tensor) -> Tensor:
    return mask_dice_loss(x, y, reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inside_autocast_the_sums_are_float32(dtype: torch.dtype) -> None:
    logits, masks = torch.full((2, 70_001), 9.0, dtype=dtype), torch.ones(3, 70_001)  # more than float16 can hold
    masks[1, 35_000:] = 0
    with torch.autocast("cpu", dtype):
        matrices = pairwise_mask_dice_loss(logits, masks), pairwise_mask_focal_loss(logits, masks)
        single = mask_dice_loss(logits, masks[:2], reduction="none")
    for got, expected in zip((*matrices, single), (
        pairs(dice, logits.double(), masks), pairs(focal, logits.double(), masks), dice(logits.double(), masks[:2])
    ), strict=True):  # fmt: skip
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_the_best_of_several_proposals() -> None:
    """As SAM is trained: the loss of each of 3 proposals per object, of which the least counts."""
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(4, 3, 5, 6, generator=generator), torch.rand(4, 1, 5, 6, generator=generator) > 0.5
    both = logits.flatten(0, 1), masks.expand_as(logits).flatten(0, 1)
    each = (20 * mask_focal_loss(*both, reduction="none") + mask_dice_loss(*both, reduction="none")).view(4, 3)
    expected = [
        [20 * focal(logits[n, m][None], masks[n].float()) + dice(logits[n, m][None], masks[n]) for m in range(3)]
        for n in range(4)
    ]
    torch.testing.assert_close(each.min(1).values, torch.tensor([min(row) for row in expected]))


def test_no_masks_cost_nothing(backend: str) -> None:
    for loss in (mask_dice_loss, mask_focal_loss):
        x = torch.zeros(0, 4, 5, requires_grad=True)
        value = loss(x, torch.zeros(0, 4, 5))
        value.backward()
        assert value.item() == 0
        assert x.grad is not None
    for pairwise in (pairwise_mask_dice_loss, pairwise_mask_focal_loss):
        assert pairwise(torch.zeros(3, 4, 5), torch.zeros(0, 4, 5)).shape == (3, 0)
        assert pairwise(torch.zeros(3, 4, device="meta"), torch.zeros(2, 4, device="meta")).shape == (3, 2)


@pytest.mark.parametrize(
    "function", [mask_dice_loss, mask_focal_loss, pairwise_mask_dice_loss, pairwise_mask_focal_loss]
)
def test_compiles_whole(function: Callable[..., Tensor]) -> None:
    logits, masks = problem(4, 3, 5)
    torch.testing.assert_close(
        torch.compile(function, fullgraph=True, backend="eager")(logits, masks), function(logits, masks)
    )


X, Y = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mask_dice_loss(X, Y[:, :3]), ValueError, r"mask_dice_loss: expected input of shape \(N, \*S\)"),
        (lambda: mask_dice_loss(X, Y[0]), ValueError, r"got \(2, 4, 5\) and \(4, 5\)"),
        (lambda: mask_dice_loss([X], Y), TypeError, "mask_dice_loss: expected input to be a Tensor, got list"),
        (lambda: mask_dice_loss(Y.long(), X), TypeError, "expected input of dtype float16"),
        (lambda: mask_dice_loss(X, Y + 2.0), ValueError, r"per-class values in \[0, 1\]"),
        (lambda: mask_dice_loss(X, Y.long() + 2), ValueError, "mask_dice_loss: expected a target of zeros and ones"),
        (lambda: mask_dice_loss(X, Y, 0), ValueError, "expected num_masks >= 1, got 0"),
        (lambda: mask_dice_loss(X, Y, torch.ones(2)), ValueError, "num_masks of one element"),
        (lambda: mask_dice_loss(X, Y, 2, reduction="none"), ValueError, "no num_masks with reduction='none'"),
        (lambda: mask_dice_loss(X, Y, reduction="sum"), ValueError, "reduction to be one of 'mean', 'none'"),
        (lambda: mask_dice_loss(X, Y, eps=-1.0), ValueError, "eps >= 0"),
        (lambda: mask_focal_loss(X, Y + 0.5), ValueError, "mask_focal_loss: expected a target of zeros and ones"),
        (lambda: mask_focal_loss(X, Y, alpha=1.5), ValueError, r"alpha in \[0, 1\]"),
        (lambda: mask_focal_loss(X, Y, gamma=-1.0), ValueError, "gamma >= 0"),
        (lambda: pairwise_mask_dice_loss(X, Y[..., :3]), ValueError, "pairwise_mask_dice_loss: expected input of"),
        (lambda: pairwise_mask_dice_loss(X, Y + 2), ValueError, r"values in \[0, 1\]"),
        (lambda: pairwise_mask_dice_loss(X, Y.int() + 2), ValueError, "a target of zeros and ones"),
        (lambda: pairwise_mask_focal_loss(X, [Y]), TypeError, "expected target to be a Tensor, got list"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_raises(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.skipif(
    not HAS_TRANSFORMERS and "SOFTDICE_REQUIRE_PIPELINES" not in os.environ,
    reason="transformers is not installed: make test-pipelines brings it",
)
class TestTransformers:
    """The functions that transformers' models are trained with, where it is installed."""

    @pytest.mark.parametrize("shape", [(5, 7), (4, 31)])
    def test_losses(self, shape: tuple[int, ...]) -> None:
        from transformers.loss import loss_for_object_detection as detr
        from transformers.models.mask2former import modeling_mask2former as mask2former
        from transformers.models.maskformer import modeling_maskformer as maskformer

        logits, masks = problem(*shape)
        for module in (detr, mask2former, maskformer):
            same(lambda x: mask_dice_loss(x, masks, 3), lambda x, m=module: m.dice_loss(x, masks, 3), logits)
        for module in (detr, maskformer):
            for alpha, gamma in ((0.25, 2), (0.7, 1.5), (-1, 2)):
                ours = {"alpha": None if alpha < 0 else alpha, "gamma": float(gamma)}
                same(
                    lambda x, ours=ours: mask_focal_loss(x, masks.bool(), 3, **ours),
                    lambda x, m=module, a=alpha, g=gamma: m.sigmoid_focal_loss(x, masks, 3, a, g),
                    logits,
                )
        soft = masks * 0.8 + 0.1
        same(
            lambda x: mask_focal_loss(x, soft, 3, alpha=None, gamma=0.0),
            lambda x: mask2former.sigmoid_cross_entropy_loss(x, soft, 3),
            logits,
        )

    def test_pairs(self) -> None:
        from transformers.models.mask2former import modeling_mask2former as mask2former
        from transformers.models.maskformer import modeling_maskformer as maskformer

        logits, masks = problem(6, 31, masks=4)
        for module in (mask2former, maskformer):
            same(
                lambda x: pairwise_mask_dice_loss(x, masks),
                lambda x, m=module: m.pair_wise_dice_loss(x, masks),
                logits,
            )
        same(
            lambda x: pairwise_mask_focal_loss(x, masks),
            lambda x: maskformer.pair_wise_sigmoid_focal_loss(x, masks),
            logits,
        )
        same(
            lambda x: pairwise_mask_focal_loss(x, masks, alpha=None, gamma=0.0),
            lambda x: mask2former.pair_wise_sigmoid_cross_entropy_loss(x, masks),
            logits,
        )

    def test_a_loss_of_theirs_with_our_functions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former import modeling_mask2former as mask2former

        def run() -> tuple[Tensor, Tensor]:
            weights = {"loss_cross_entropy": 1.0, "loss_mask": 5.0, "loss_dice": 5.0}
            loss = mask2former.Mask2FormerLoss(Mask2FormerConfig(num_labels=3, train_num_points=50), weights)
            torch.manual_seed(0)
            x, classes = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(2, 6, 4)
            masks = [(torch.rand(count, 32, 32) > 0.5).float() for count in (2, 3)]
            value = sum(loss(x, classes, masks, [torch.arange(2), torch.arange(3)]).values())
            value.backward()
            assert x.grad is not None
            return value.detach(), x.grad

        expected = run()
        monkeypatch.setattr(mask2former, "dice_loss", mask_dice_loss)
        monkeypatch.setattr(mask2former, "pair_wise_dice_loss", pairwise_mask_dice_loss)
        for got, wanted in zip(run(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_masks_of_0_and_255_are_told_what_to_do(backend: str) -> None:
    """There is no ignore_index or num_classes here that could be set."""
    logits, masks = torch.randn(2, 40), (torch.arange(80).reshape(2, 40) % 3 == 0).to(torch.uint8) * 255
    for loss in (mask_dice_loss, mask_focal_loss, pairwise_mask_dice_loss, pairwise_mask_focal_loss):
        name = loss.__name__
        with pytest.raises(ValueError, match=f"{name}: expected a target of zeros and ones, got 255. Pass target > 0"):
            loss(logits, masks)
        assert torch.equal(loss(logits, masks > 0), loss(logits, masks // 255))


def test_gradients_of_sure_pairs_are_finite() -> None:
    """A power below 1 has an infinite slope at 0; for single masks it was finite."""
    logits, masks = torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([[1, 0, 1]])
    slopes = []
    for loss in (pairwise_mask_focal_loss, mask_focal_loss):
        x = logits.clone().requires_grad_()
        loss(x, masks, gamma=0.5).sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(slopes[0], slopes[1])
