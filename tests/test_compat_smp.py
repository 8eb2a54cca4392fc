"""softdice.compat.smp against the installed segmentation_models_pytorch, on random configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peers import Case, agree, cases, configurations, smp_losses
from torch import Tensor

from softdice.compat import smp as ours

theirs = smp_losses()
flags = st.booleans()
MODES = ("binary", "multiclass", "multilabel")


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, Tensor, Tensor, Case]:
    """Yield mode, logits, target and case, without an ignored label."""
    mode = draw(st.sampled_from(MODES))
    case = draw(cases(least=1, most=1) if mode == "binary" else cases(least=2 if mode == "multiclass" else 1))
    if mode == "multiclass":
        return mode, case.logits, case.labels[:, 0], case
    soft = draw(st.sampled_from(["whole", "integer", "soft"]))
    target = {"whole": case.one_hot, "integer": case.one_hot.long(), "soft": case.soft}[soft]
    return mode, case.logits, target[:, 0] if mode == "binary" and draw(flags) else target, case


def ignoring(draw: Any, mode: str, target: Tensor, case: Case, label: int) -> Tensor:
    """Return the target with the label at the voxels outside of the case's mask (for multilabel, at some channels)."""
    outside = case.mask.bool().logical_not().expand(target.shape if target.ndim == case.mask.ndim else case.mask.shape)
    if mode == "multilabel":
        outside = outside & (torch.arange(target.shape[1]).view(1, -1, *[1] * (target.ndim - 2)) < 2)
    return torch.where(outside.reshape(target.shape), label, target)


def settings_of(draw: Any, mode: str, channels: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {"from_logits": draw(st.sampled_from([True, True, False]))}
    if mode != "binary":
        chosen["class_weights"] = draw(st.sampled_from([None, [0.5, 1.0, 2.0, 3.0][:channels]]))
    return chosen


def overlap(draw: Any, name: str, problem: tuple[str, Tensor, Tensor, Case], **more: Any) -> None:
    mode, logits, target, case = problem
    channels = logits.shape[1]
    keywords = settings_of(draw, mode, channels) | more
    keywords["log_loss"] = draw(flags)
    keywords["smooth"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if mode != "binary":
        keywords["classes"] = draw(st.sampled_from([None, [0], list(range(channels))[-2:]]))
    ignored = draw(st.sampled_from([None, 255, -1]))
    keywords["ignore_index"] = ignored
    if ignored is not None:
        target = ignoring(draw, mode, target, case, ignored)
    scores = logits
    if not keywords["from_logits"]:
        scores = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
    agree(
        getattr(ours, name)(mode, **keywords),
        getattr(theirs, _module(name)).__dict__[name](mode, **keywords),
        scores,
        target,
    )


def _module(name: str) -> str:
    return {"DiceLoss": "dice", "JaccardLoss": "jaccard", "TverskyLoss": "tversky"}[name]


@configurations
@given(problem=problems(), data=st.data())
def test_dice(problem: tuple[str, Tensor, Tensor, Case], data: st.DataObject) -> None:
    overlap(data.draw, "DiceLoss", problem)


@configurations
@given(problem=problems(), data=st.data())
def test_jaccard(problem: tuple[str, Tensor, Tensor, Case], data: st.DataObject) -> None:
    overlap(data.draw, "JaccardLoss", problem)


@configurations
@given(
    problem=problems(),
    data=st.data(),
    alpha=st.floats(0.1, 1),
    beta=st.floats(0.1, 1),
    gamma=st.sampled_from([1.0, 2.0]),
)
def test_tversky(
    problem: tuple[str, Tensor, Tensor, Case], data: st.DataObject, alpha: float, beta: float, gamma: float
) -> None:
    overlap(data.draw, "TverskyLoss", problem, alpha=alpha, beta=beta, gamma=gamma)


@configurations
@given(problem=problems(), data=st.data())
def test_focal(problem: tuple[str, Tensor, Tensor, Case], data: st.DataObject) -> None:
    mode, logits, target, case = problem
    assume(not target.is_floating_point() or bool(((target == 0) | (target == 1)).all()))
    keywords = settings_of(data.draw, mode, logits.shape[1]) | {
        "alpha": data.draw(st.sampled_from([None, 0.25])),
        "gamma": data.draw(st.sampled_from([1.0, 2.0, 3.0])),
        "reduction": data.draw(st.sampled_from(["mean", "sum"])),
        "normalized": data.draw(flags),
    }
    if mode != "multilabel" and data.draw(flags):
        keywords["ignore_index"] = 255
        target = ignoring(data.draw, mode, target, case, 255)
        assume(bool((target != 255).any()))
    scores = logits
    if not keywords["from_logits"]:
        scores = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
    agree(ours.FocalLoss(mode, **keywords), theirs.focal.FocalLoss(mode, **keywords), scores, target)


@configurations
@given(
    case=cases(least=2),
    reduction=st.sampled_from(["mean", "sum"]),
    smooth=st.sampled_from([0.0, 0.1, 0.5]),
    ignored=st.sampled_from([-100, 1, 255, None]),
    channel=flags,
)
def test_soft_cross_entropy(case: Case, reduction: str, smooth: float, ignored: int | None, channel: bool) -> None:
    labels = case.labels if ignored is None else torch.where(case.mask.bool(), case.labels, ignored)
    keywords: dict[str, Any] = {"reduction": reduction, "smooth_factor": smooth, "ignore_index": ignored}
    agree(
        ours.SoftCrossEntropyLoss(**keywords),
        theirs.soft_ce.SoftCrossEntropyLoss(**keywords),
        case.logits,
        labels if channel else labels[:, 0],
    )


def test_classes_in_another_dimension() -> None:
    logits, labels = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    last = ours.SoftCrossEntropyLoss(dim=2)(logits, labels)
    torch.testing.assert_close(last, torch.nn.functional.cross_entropy(logits.movedim(2, 1), labels))


SAMPLES = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
"""Logits of single values: (N, C), or (V,)."""
LABELS = torch.tensor([0, 1, 2, 3, 4, 4])


def test_logits_without_space() -> None:
    """The values that smp's own tests have for its losses, and random ones."""
    hard = 18 * torch.eye(4) - 9
    found = [
        ours.SoftBCEWithLogitsLoss(smooth_factor=0.1)(
            torch.tensor([-9.0, 9, 1, 9, -9]), torch.tensor([0, 1, -100, 1, 0])
        ),
        ours.SoftCrossEntropyLoss(smooth_factor=0.1)(hard, torch.tensor([0, 1, -100, 3])),
    ]
    assert found == pytest.approx([0.7201, 1.0125], abs=1e-4)
    labels = torch.tensor([0, 1, -100, 3, 4, 4])
    for keywords in ({"smooth_factor": 0.0}, {"smooth_factor": 0.2, "reduction": "sum"}):
        agree(ours.SoftCrossEntropyLoss(**keywords), theirs.soft_ce.SoftCrossEntropyLoss(**keywords), SAMPLES, labels)
    for per_image in (False, True):
        one, other = (module.LovaszLoss("multiclass", per_image=per_image) for module in (ours, theirs.lovasz))
        torch.testing.assert_close(one(SAMPLES.float(), LABELS), other(SAMPLES.float(), LABELS))
    values, mask = SAMPLES[:, 0], torch.tensor([0.0, 1, -100, 1, 0, 1])
    for weight in (None, torch.tensor([2.5]), torch.arange(1.0, 7)):
        pair = (module.SoftBCEWithLogitsLoss(pos_weight=weight) for module in (ours, theirs.soft_bce))
        agree(*pair, values, mask)
    one, other = (module.LovaszLoss("binary") for module in (ours, theirs.lovasz))
    torch.testing.assert_close(one(values.float(), mask.clamp_min(0)), other(values.float(), mask.clamp_min(0)))


def test_smooth_factor_none_is_zero_where_smp_fails() -> None:
    logits, labels = torch.randn(2, 4, 5), torch.randint(0, 4, (2, 5))
    with pytest.raises(TypeError):
        theirs.soft_ce.SoftCrossEntropyLoss()(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(ours.SoftCrossEntropyLoss()(logits, labels), expected)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ours.DiceLoss("multi"), ValueError, "mode to be one of 'binary', 'multiclass', 'multilabel'"),
        (lambda: ours.DiceLoss("binary", classes=[0]), AssertionError, "no classes with mode='binary'"),
        (lambda: ours.JaccardLoss("binary", class_weights=[1.0]), ValueError, "no class_weights with mode='binary'"),
        (lambda: ours.FocalLoss("binary", reduced_threshold=0.5), ValueError, "no reduced_threshold"),
        (lambda: ours.FocalLoss("binary", reduction="none"), ValueError, "reduction to be one of 'mean', 'sum'"),
        (lambda: ours.FocalLoss("multilabel", ignore_index=255), ValueError, "no ignore_index with mode='multilabel'"),
        (lambda: ours.FocalLoss("binary", gamma=0.5, normalized=True), ValueError, "gamma >= 1"),
        (
            lambda: ours.FocalLoss("multilabel")(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 0.5)),
            ValueError,
            "a target of zeros and ones",
        ),
        (lambda: ours.SoftCrossEntropyLoss(reduction="none"), ValueError, "reduction to be one of"),
        (
            lambda: ours.DiceLoss("multiclass")(torch.zeros(1, 1, 3), torch.zeros(1, 3)),
            ValueError,
            "two channels or more",
        ),
        (
            lambda: ours.DiceLoss("multiclass")(torch.zeros(1, 2, 3), torch.zeros(1, 4)),
            ValueError,
            "target of 3 values",
        ),
        (
            lambda: ours.DiceLoss("multiclass")(torch.zeros(1, 2, 3), torch.full((1, 3), 5)),
            ValueError,
            r"labels in \[0, 2\)",
        ),
    ],
)
def test_what_cannot_be_had_raises(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
