"""softdice.compat.monai against the installed MONAI, on random configurations."""

from __future__ import annotations

from typing import Any

import monai.losses
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import Case, agree, cases, configurations
from torch import Tensor

from softdice.compat import monai as ours

pytestmark = pytest.mark.filterwarnings(
    "ignore:single channel prediction", "ignore:No mask value", "ignore:`include_background=False`, scalar"
)
flags = st.booleans()
smoothing = st.sampled_from([1e-5, 0.1, 1.0])


def log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, 1)


@st.composite
def shared(draw: st.DrawFn, reductions: tuple[str, ...] = ("mean", "sum", "none")) -> dict[str, Any]:
    """Draw the options that all of MONAI's overlap losses have."""
    activation = draw(st.sampled_from(["sigmoid", "softmax", "other_act", None, "softmax", "sigmoid"]))
    act: dict[str, Any] = {}
    if activation == "other_act":
        act = {"other_act": draw(st.sampled_from([torch.tanh, log_softmax]))}
    elif activation:
        act = {activation: True}
    return {
        "include_background": draw(flags),
        "to_onehot_y": draw(flags),
        "reduction": draw(st.sampled_from(reductions)),
        "smooth_nr": draw(smoothing),
        "smooth_dr": draw(smoothing),
        "batch": draw(flags),
        **act,
    }


def target_of(case: Case, options: dict[str, Any], soft: bool = False) -> Tensor:
    if options["to_onehot_y"] and case.channels > 1:
        return case.labels
    return case.soft if soft else case.one_hot


def bounded(case: Case, options: dict[str, Any]) -> Tensor:
    """Return logits, or probabilities where no option makes probabilities of logits."""
    activated = options.get("sigmoid") or (options.get("softmax") and case.channels > 1)
    return case.logits if activated else case.logits.sigmoid()


@st.composite
def dice_options(draw: st.DrawFn, **keywords: Any) -> dict[str, Any]:
    return {**draw(shared(**keywords)), "squared_pred": draw(flags), "jaccard": draw(flags)}


def weight_of(draw: Any, case: Case, options: dict[str, Any]) -> Any:
    counted = case.channels - (not options["include_background"] and case.channels > 1)
    per_class = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=counted, max_size=counted))
    return draw(st.sampled_from([None, 2.0, per_class if counted > 1 else 2.0]))  # MONAI's focal loss refuses [w]


@configurations
@given(case=cases(), options=dice_options(), soft_label=flags, data=st.data())
def test_dice(case: Case, options: dict[str, Any], soft_label: bool, data: st.DataObject) -> None:
    if options.get("other_act"):
        soft_label = False
    options |= {"soft_label": soft_label, "weight": weight_of(data.draw, case, options)}
    target = target_of(case, options, soft=data.draw(flags))
    agree(ours.DiceLoss(**options), monai.losses.DiceLoss(**options), bounded(case, options), target)


@pytest.mark.peers
@settings(max_examples=60)
@given(case=cases(), options=dice_options(), ignored=st.sampled_from([0, 1, 2, 255, -1]), tversky=flags)
def test_ignore_index(case: Case, options: dict[str, Any], ignored: int, tversky: bool) -> None:
    labels = target_of(case, options)
    if options["to_onehot_y"] and case.channels > 1:
        labels = torch.where(case.mask.bool(), labels, ignored)
    if tversky:
        options = {name: value for name, value in options.items() if name not in ("squared_pred", "jaccard")}
    which = "TverskyLoss" if tversky else "DiceLoss"
    agree(
        getattr(ours, which)(**options, ignore_index=ignored),
        getattr(monai.losses, which)(**options, ignore_index=ignored),
        case.logits,
        labels,
    )


@configurations
@given(
    case=cases(), options=dice_options(), soft_label=flags, with_mask=st.sampled_from([True, True, False]), one=flags
)
def test_masked_dice(case: Case, options: dict[str, Any], soft_label: bool, with_mask: bool, one: bool) -> None:
    options["soft_label"] = soft_label and not options.get("other_act")
    mask = {"mask": case.mask[:1] if one else case.mask} if with_mask else {}
    agree(
        ours.MaskedDiceLoss(**options),
        monai.losses.MaskedDiceLoss(**options),
        bounded(case, options),
        target_of(case, options),
        **mask,
    )


@configurations
@given(
    case=cases(),
    options=shared(),
    soft_label=flags,
    w_type=st.sampled_from(["square", "simple", "uniform"]),
    soft=flags,
)
def test_generalized_dice(case: Case, options: dict[str, Any], soft_label: bool, w_type: str, soft: bool) -> None:
    options |= {"soft_label": soft_label and not options.get("other_act"), "w_type": w_type}
    target = target_of(case, options, soft)
    agree(
        ours.GeneralizedDiceLoss(**options),
        monai.losses.GeneralizedDiceLoss(**options),
        bounded(case, options),
        target,
    )


@configurations
@given(case=cases(), options=shared(), soft_label=flags, soft=flags, alpha=st.floats(0.1, 1), beta=st.floats(0.1, 1))
def test_tversky(case: Case, options: dict[str, Any], soft_label: bool, soft: bool, alpha: float, beta: float) -> None:
    options |= {"soft_label": soft_label and not options.get("other_act"), "alpha": alpha, "beta": beta}
    agree(
        ours.TverskyLoss(**options),
        monai.losses.TverskyLoss(**options),
        bounded(case, options),
        target_of(case, options, soft),
    )


@configurations
@given(
    case=cases(),
    options=dice_options(reductions=("mean", "sum")),
    soft=flags,
    smooth=st.sampled_from([0.0, 0.2]),
    data=st.data(),
)
def test_dice_ce(case: Case, options: dict[str, Any], soft: bool, smooth: float, data: st.DataObject) -> None:
    weight = data.draw(st.sampled_from([None, [0.5, 1.0, 2.0, 3.0]]))
    options |= {"label_smoothing": smooth, "lambda_dice": 0.7, "lambda_ce": data.draw(st.sampled_from([0.0, 1.0, 2.0]))}
    if weight is not None:
        options["weight"] = torch.tensor(weight[: case.channels], dtype=torch.float64)
    target = target_of(case, options, soft)
    agree(ours.DiceCELoss(**options), monai.losses.DiceCELoss(**options), case.logits, target)


@configurations
@given(
    case=cases(),
    options=dice_options(),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 3.5]),
    data=st.data(),
)
def test_dice_focal(case: Case, options: dict[str, Any], gamma: float, data: st.DataObject) -> None:
    weight = weight_of(data.draw, case, options)
    options |= {
        "gamma": gamma,
        "weight": weight,
        "lambda_dice": 0.7,
        "lambda_focal": data.draw(st.sampled_from([0.0, 1.0, 2.0])),
        "alpha": data.draw(st.sampled_from([None, None, 0.25])),
    }
    agree(ours.DiceFocalLoss(**options), monai.losses.DiceFocalLoss(**options), case.logits, target_of(case, options))


@configurations
@given(
    case=cases(),
    options=shared(),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 3.5]),
    data=st.data(),
)
def test_generalized_dice_focal(case: Case, options: dict[str, Any], gamma: float, data: st.DataObject) -> None:
    weight = weight_of(data.draw, case, options)
    options |= {
        "gamma": gamma,
        "weight": weight,
        "w_type": data.draw(st.sampled_from(["square", "simple", "uniform"])),
        "lambda_gdl": 0.7,
        "lambda_focal": data.draw(st.sampled_from([0.0, 1.0, 2.0])),
    }
    agree(
        ours.GeneralizedDiceFocalLoss(**options),
        monai.losses.GeneralizedDiceFocalLoss(**options),
        case.logits,
        target_of(case, options),
    )


@configurations
@given(case=cases(least=2), data=st.data(), use_softmax=flags, background=flags, onehot=flags)
def test_focal(case: Case, data: st.DataObject, use_softmax: bool, background: bool, onehot: bool) -> None:
    counted = case.channels - (not background)
    options = {
        "include_background": background,
        "to_onehot_y": onehot,
        "use_softmax": use_softmax,
        "gamma": data.draw(st.sampled_from([0.0, 1.0, 2.0])),
        "alpha": data.draw(st.sampled_from([None, 0.3, [0.2, 0.5, 0.9, 0.4][:counted]])),
        "weight": data.draw(st.sampled_from([None, 2.0, [1.0, 0.5, 2.0, 0.0][:counted] if counted > 1 else 2.0])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "ignore_index": data.draw(st.sampled_from([None, None, 1, 255])),
    }
    soft = options["reduction"] == "none" and options["ignore_index"] is None and data.draw(flags)
    target = case.labels if onehot else case.soft if soft else case.one_hot
    if onehot and options["ignore_index"] is not None:
        target = torch.where(case.mask.bool(), target, options["ignore_index"])
    agree(ours.FocalLoss(**options), monai.losses.FocalLoss(**options), case.logits, target)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FocalLoss", {}), ("FocalLoss", {"use_softmax": True}), ("FocalLoss", {"reduction": "none", "alpha": 0.3}),
        ("DiceLoss", {"softmax": True, "batch": True}), ("DiceLoss", {"batch": True, "reduction": "none"}),
        ("TverskyLoss", {"softmax": True, "batch": True}), ("DiceCELoss", {"softmax": True, "batch": True}),
        ("DiceCELoss", {"sigmoid": True, "batch": True, "reduction": "sum"}),
        ("DiceFocalLoss", {"sigmoid": True, "batch": True}), ("DiceFocalLoss", {"softmax": True, "batch": True}),
    ],
)  # fmt: skip
def test_without_space(name: str, options: dict[str, Any]) -> None:
    """(B, C) tensors, as a classification has them, get MONAI's number."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    logits = logits if "sigmoid" in options or "softmax" in options or "Focal" in name else logits.sigmoid()
    labels = torch.randint(0, 3, (6, 1), generator=generator)
    options = {"to_onehot_y": True, **options}
    agree(getattr(ours, name)(**options), getattr(monai.losses, name)(**options), logits, labels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FocalLoss", {"reduction": "sum"}), ("DiceLoss", {}), ("GeneralizedDiceLoss", {"batch": True}),
        ("DiceCELoss", {}), ("DiceFocalLoss", {"batch": True, "reduction": "sum"}),
    ],
)  # fmt: skip
def test_without_space_where_monai_means_something_else(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected input of shape \(B, C, \*S\), got \(6, 3\)"):
        getattr(ours, name)(**options)(torch.zeros(6, 3), torch.zeros(6, 3))
