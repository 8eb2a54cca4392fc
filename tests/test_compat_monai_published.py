"""softdice.compat.monai on the values that MONAI's own tests publish, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from softdice.compat import monai as ours

pytestmark = pytest.mark.filterwarnings("ignore:No mask value")


def log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, 1)


# MONAI's published values (tests/losses of its repository), as a table: the pairs of tensors, then one row per value.
# Three rows of MaskedDiceLoss were published when the mask came before the sigmoid; here they are by hand, in the order
# that MONAI 1.6.1 has.
SQUARE = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
SQUARE_TRUTH = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
TWO_SQUARES = SQUARE.repeat(2, 1, 1, 1)
TWO_SQUARES_TRUTH = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[1.0, 0.0], [1.0, 0.0]]]])
FLAT = TWO_SQUARES.clone()
FLAT[0, 0, 0, 1] = -0.0
SOFT = torch.tensor([[[[0.3, 0.4], [0.7, 0.9]]], [[[1.0, 0.1], [0.5, 0.3]]]])
LINE = torch.tensor([[[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
LINE_TRUTH = torch.tensor([[[1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]]])
EXACT = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
EXACT_TRUTH = torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]])
SURE = EXACT.clone()
SURE[0, 0, :2] = 100
FIELD = torch.tensor([[1.0, 1.0], [0.5, 0.0]]).expand(1, 3, 2, 2)
FIELD_TRUTH = torch.tensor([[[[0, 1], [2, 0]]]])

Q = 1 / (1 + math.e)  # sigmoid(-1)
S4 = {"smooth_nr": 1e-4, "smooth_dr": 1e-4}
S6 = {"smooth_nr": 1e-6, "smooth_dr": 1e-6}
S0 = {"smooth_nr": 0, "smooth_dr": 0}
HOT = {"to_onehot_y": True}

PUBLISHED: list[tuple[str, dict[str, Any], tuple[Tensor, ...], Any]] = [
    *[
        (name, {"sigmoid": True, **S6}, (SQUARE, SQUARE_TRUTH), 0.307576)
        for name in ("DiceLoss", "GeneralizedDiceLoss")
    ],
    ("TverskyLoss", {"sigmoid": True, **S6}, (SQUARE, SQUARE_TRUTH), 0.307576),
    ("TverskyLoss", {"sigmoid": True, "alpha": 0.3, "beta": 0.7, **S6}, (SQUARE, SQUARE_TRUTH), 0.3589),
    ("TverskyLoss", {"sigmoid": True, "alpha": 0.7, "beta": 0.3, **S6}, (SQUARE, SQUARE_TRUTH), 0.247366),
    ("DiceLoss", {"sigmoid": True, **S4}, (TWO_SQUARES, TWO_SQUARES_TRUTH), 0.416657),
    ("TverskyLoss", {"sigmoid": True, **S4}, (TWO_SQUARES, TWO_SQUARES_TRUTH), 0.416657),
    ("GeneralizedDiceLoss", {"sigmoid": True, **S4}, (TWO_SQUARES, TWO_SQUARES_TRUTH), 0.416597),
    *[
        (name, {"soft_label": True, **S4}, (SOFT, SOFT), 0.0)
        for name in ("DiceLoss", "GeneralizedDiceLoss", "TverskyLoss")
    ],
    ("DiceLoss", S4, (SOFT, SOFT), 0.307773),
    ("TverskyLoss", S4, (SOFT, SOFT), 0.307773),
    ("GeneralizedDiceLoss", S4, (SOFT, SOFT), 0.307748),
    *[
        (name, {"include_background": False, **HOT, **S0}, (EXACT, EXACT_TRUTH), 0.0)
        for name in ("DiceLoss", "GeneralizedDiceLoss", "TverskyLoss")
    ],
    (
        "TverskyLoss",
        {"include_background": False, **HOT, "smooth_nr": 0, "smooth_dr": 1e-3},
        (EXACT, EXACT_TRUTH),
        0.000999,
    ),
    (
        "GeneralizedDiceLoss",
        {"include_background": False, **HOT, "smooth_nr": 1e-8, "smooth_dr": 1e-8},
        (EXACT, 0 * EXACT_TRUTH),
        0.0,
    ),
    ("DiceLoss", {**HOT, "sigmoid": True, **S4}, (LINE, LINE_TRUTH), 0.435050),
    ("TverskyLoss", {**HOT, "sigmoid": True, **S4}, (LINE, LINE_TRUTH), 0.435050),
    ("TverskyLoss", {**HOT, "sigmoid": True, "batch": True}, (LINE, LINE_TRUTH), 0.422979),
    ("TverskyLoss", {**HOT, "sigmoid": True, "reduction": "sum", **S4}, (LINE, LINE_TRUTH), 1.74013),
    ("GeneralizedDiceLoss", {**HOT, "sigmoid": True, **S4}, (LINE, LINE_TRUTH), 0.469964),
    (
        "DiceLoss",
        {**HOT, "sigmoid": True, "reduction": "none", **S4},
        (LINE, LINE_TRUTH),
        [[[0.296529], [0.415136]], [[0.599976], [0.428559]]],
    ),
    ("DiceLoss", {**HOT, "softmax": True, **S4}, (LINE, LINE_TRUTH), 0.383713),
    ("TverskyLoss", {**HOT, "softmax": True, **S4}, (LINE, LINE_TRUTH), 0.383713),
    ("GeneralizedDiceLoss", {**HOT, "softmax": True, **S4}, (LINE, LINE_TRUTH), 0.414507),
    ("DiceLoss", {**HOT, "softmax": True, "reduction": "sum", **S4}, (LINE, LINE_TRUTH), 1.534853),
    ("GeneralizedDiceLoss", {**HOT, "softmax": True, "reduction": "sum", **S4}, (LINE, LINE_TRUTH), 0.829015),
    (
        "GeneralizedDiceLoss",
        {**HOT, "softmax": True, "reduction": "none", **S4},
        (LINE, LINE_TRUTH),
        [[[0.273476]], [[0.555539]]],
    ),
    (
        "TverskyLoss",
        {**HOT, "softmax": True, "reduction": "none", **S4},
        (LINE, LINE_TRUTH),
        [[0.210961, 0.295339], [0.599952, 0.428547]],
    ),
    (
        "GeneralizedDiceLoss",
        {**HOT, "softmax": True, "w_type": "simple", **S0},
        (torch.tensor([[[0.0, 10.0, 10.0, 10.0], [10.0, 0.0, 0.0, 0.0]]]), torch.tensor([[[1, 1, 0, 0]]])),
        0.250023,
    ),
    ("DiceLoss", {"sigmoid": True, "squared_pred": True}, (SQUARE, SQUARE_TRUTH), 0.178337),
    ("DiceLoss", {"sigmoid": True, "jaccard": True}, (SQUARE, SQUARE_TRUTH), 0.470451),
    ("DiceLoss", {"other_act": torch.tanh, **S4}, (TWO_SQUARES, TWO_SQUARES_TRUTH), 0.999963),
    ("TverskyLoss", {"other_act": torch.tanh, **S4}, (TWO_SQUARES, TWO_SQUARES_TRUTH), 0.999963),
    ("GeneralizedDiceLoss", {"other_act": torch.tanh, **S4}, (TWO_SQUARES, TWO_SQUARES_TRUTH), 0.99970),
    (
        "TverskyLoss",
        {"other_act": torch.tanh, "smooth_nr": 0, "smooth_dr": 1e-3, "batch": True},
        (TWO_SQUARES, TWO_SQUARES_TRUTH),
        0.999963,
    ),
    ("DiceLoss", {**HOT, "other_act": log_softmax, **S4}, (LINE, LINE_TRUTH), -8.522593),
    ("TverskyLoss", {**HOT, "other_act": log_softmax, **S4}, (LINE, LINE_TRUTH), -8.533317),
    ("GeneralizedDiceLoss", {**HOT, "other_act": log_softmax, **S4}, (LINE, LINE_TRUTH), -0.097833),
    ("DiceLoss", {**HOT, "other_act": log_softmax, "weight": (0, 1), **S4}, (LINE, LINE_TRUTH), -8.268515),
    ("DiceLoss", {"other_act": torch.tanh, "batch": True, **S4}, (FLAT, TWO_SQUARES_TRUTH), 0.774718),
    (
        "DiceLoss",
        {"other_act": torch.tanh, "batch": True, "smooth_nr": 0, "smooth_dr": 1e-4},
        (FLAT, TWO_SQUARES_TRUTH),
        0.774733,
    ),
    ("DiceLoss", {"other_act": torch.tanh, "smooth_nr": 0, "smooth_dr": 1e-4}, (FLAT, TWO_SQUARES_TRUTH), 0.840058),
    (
        "MaskedDiceLoss",
        {"sigmoid": True, **S6},
        (SQUARE, SQUARE_TRUTH, torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])),
        1 / 3,
    ),
    (
        "MaskedDiceLoss",
        {"sigmoid": True, **S4},
        (TWO_SQUARES, TWO_SQUARES_TRUTH, torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[1.0, 1.0], [0.0, 0.0]]]])),
        (1 / 3 + 1 - 1 / (1 + math.exp(-1))) / 2,
    ),
    (
        "MaskedDiceLoss",
        {"include_background": False, **HOT, **S0},
        (EXACT, EXACT_TRUTH, torch.tensor([[[1.0, 1.0, 1.0]], [[0.0, 1.0, 0.0]]])),
        0.0,
    ),
    (
        "MaskedDiceLoss",
        {**HOT, "sigmoid": True, **S4},
        (LINE, LINE_TRUTH, torch.tensor([[[1.0, 1.0, 0.0]]])),
        (1 - 1 / (2.5 + Q) + 1 - 2 * (1 - Q) / (2.5 - Q) + 1 + 1 / 3) / 4,
    ),
    ("MaskedDiceLoss", {**HOT, "softmax": True, **S4}, (LINE, LINE_TRUTH), 0.383713),
    ("MaskedDiceLoss", {"sigmoid": True, "jaccard": True}, (SQUARE, SQUARE_TRUTH), 0.470451),
    ("DiceCELoss", HOT, (EXACT, EXACT_TRUTH), 0.313262),
    ("DiceCELoss", {}, (EXACT, EXACT), 0.313262),
    ("DiceCELoss", {}, (EXACT, EXACT.to(torch.uint8)), 0.313262),
    ("DiceCELoss", {"include_background": False, **HOT, "weight": torch.ones(2)}, (SURE, EXACT_TRUTH), 0.2088),
    (
        "DiceCELoss",
        {"include_background": False, **HOT, "weight": torch.ones(2), "lambda_ce": 2.0},
        (SURE, EXACT_TRUTH),
        0.4176,
    ),
    (
        "DiceCELoss",
        {"include_background": False, **HOT, "weight": torch.tensor([0.0, 1.0])},
        (SURE, EXACT_TRUTH),
        0.3133,
    ),
    (
        "DiceCELoss",
        {"weight": torch.tensor([0.5]), "sigmoid": True},
        (torch.tensor([[[0.8, 0.6, 0.0]], [[0.0, 0.0, 0.9]]]), EXACT_TRUTH),
        1.445239,
    ),
    ("FocalLoss", HOT, (FIELD, FIELD_TRUTH), 0.34959),
    ("FocalLoss", {}, (FIELD, (torch.arange(3).view(1, 3, 1, 1) == FIELD_TRUTH).long()), 0.34959),
    ("FocalLoss", {**HOT, "include_background": False}, (FIELD, FIELD_TRUTH), 0.36498),
    ("FocalLoss", {**HOT, "alpha": 0.8}, (FIELD, FIELD_TRUTH), 0.08423),
    (
        "FocalLoss",
        {**HOT, "reduction": "none"},
        (FIELD, FIELD_TRUTH),
        [
            [
                [[0.02266, 0.70187], [0.37741, 0.17329]],
                [[0.70187, 0.02266], [0.37741, 0.17329]],
                [[0.70187, 0.70187], [0.06757, 0.17329]],
            ]
        ],
    ),
    (
        "FocalLoss",
        {**HOT, "weight": torch.tensor([0.5, 0.1, 0.2]), "reduction": "none"},
        (FIELD, FIELD_TRUTH),
        [
            [
                [[0.01133, 0.35093], [0.18871, 0.08664]],
                [[0.07019, 0.00227], [0.03774, 0.01733]],
                [[0.14037, 0.14037], [0.01352, 0.03466]],
            ]
        ],
    ),
    ("FocalLoss", {**HOT, "use_softmax": True}, (FIELD, FIELD_TRUTH), 0.16276),
    ("FocalLoss", {**HOT, "alpha": 0.8, "use_softmax": True}, (FIELD, FIELD_TRUTH), 0.08138),
]


@pytest.mark.parametrize(("name", "options", "tensors", "value"), PUBLISHED)
def test_published_values(name: str, options: dict[str, Any], tensors: tuple[Tensor, ...], value: Any) -> None:
    loss = getattr(ours, name)(**options)(*tensors)
    rough = (
        1e-4 if name in ("TverskyLoss", "DiceCELoss", "FocalLoss", "MaskedDiceLoss") else 1e-5
    )  # the tolerance that MONAI states
    torch.testing.assert_close(loss, torch.tensor(value), rtol=rough, atol=1e-6 if rough == 1e-5 else 1e-4)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 1.0, 2.0]), (3, 2.0, 1)])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_dice_focal_is_the_sum_of_its_parts(weight: Any, reduction: str, alpha: float | None) -> None:
    torch.manual_seed(0)
    label, logits = torch.randint(0, 2, (3, 3, 5, 5)), torch.randn(3, 3, 5, 5)
    common = {"reduction": reduction, "weight": weight}
    both = ours.DiceFocalLoss(gamma=1.0, lambda_focal=0.5, alpha=alpha, **common)(logits, label)
    parts = ours.DiceLoss(**common)(logits, label) + 0.5 * ours.FocalLoss(gamma=1.0, alpha=alpha, **common)(
        logits, label
    )
    torch.testing.assert_close(both, parts)


@pytest.mark.parametrize(
    ("make", "tensors", "error", "words"),
    [
        (
            lambda: ours.DiceLoss(sigmoid=True, softmax=True),
            (),
            ValueError,
            "at most one of sigmoid, softmax, other_act",
        ),
        (lambda: ours.DiceLoss(reduction="unknown"), (), ValueError, "reduction to be one of"),
        (lambda: ours.DiceLoss(reduction=None), (), ValueError, "reduction to be one of"),
        (lambda: ours.DiceLoss(other_act=3), (), TypeError, "other_act to be callable"),
        (
            lambda: ours.DiceLoss(),
            (torch.ones(1, 2, 3), torch.ones(4, 5, 6)),
            AssertionError,
            r"target of shape \(1, 2, 3\)",
        ),
        (
            lambda: ours.DiceLoss(to_onehot_y=True),
            (torch.ones(1, 2, 3), torch.full((1, 1, 3), 7)),
            ValueError,
            r"labels in \[0, 2\)",
        ),
        (
            lambda: ours.DiceLoss(soft_label=True),
            (3 * torch.ones(1, 2, 3), torch.ones(1, 2, 3)),
            ValueError,
            "probabilities in",
        ),
        (
            lambda: ours.DiceLoss(weight=[1.0]),
            (torch.ones(1, 2, 3), torch.ones(1, 2, 3)),
            ValueError,
            "2 weights, one per class",
        ),
        (
            lambda: ours.DiceLoss(weight=[1.0, -1.0]),
            (torch.ones(1, 2, 3), torch.ones(1, 2, 3)),
            ValueError,
            "weight >= 0",
        ),
        (lambda: ours.GeneralizedDiceLoss(w_type="cube"), (), ValueError, "w_type to be one of"),
        (
            lambda: ours.MaskedDiceLoss(),
            (torch.ones(1, 1, 3), torch.ones(1, 1, 3), torch.full((1, 1, 3), 0.5)),
            ValueError,
            "mask of zeros and ones",
        ),
        (
            lambda: ours.MaskedDiceLoss(),
            (torch.ones(1, 1, 3), torch.ones(1, 1, 3), torch.ones(1, 2, 3)),
            ValueError,
            "mask of shape",
        ),
        (lambda: ours.DiceCELoss(reduction="none"), (), ValueError, "reduction to be one of 'mean', 'sum'"),
        (lambda: ours.DiceCELoss(), (torch.ones(1, 2, 3), torch.ones(1, 1, 2, 3)), ValueError, "target of shape"),
        (lambda: ours.DiceCELoss(), (torch.ones(1, 3, 4, 4), torch.ones(1, 2, 4, 4)), ValueError, "target of shape"),
        (lambda: ours.DiceCELoss(), (torch.ones(1, 2, 3), torch.ones(1, 2, 5)), AssertionError, "target of shape"),
        (lambda: ours.DiceFocalLoss(lambda_dice=-1.0), (), ValueError, "lambda_dice >= 0"),
        (lambda: ours.FocalLoss(), (torch.ones(1, 2, 3), torch.ones(1, 3)), ValueError, r"target of shape \(1, 2, 3\)"),
        (
            lambda: ours.DiceFocalLoss(),
            (torch.ones(1, 2, 3), torch.full((1, 2, 3), 0.5)),
            ValueError,
            "a target of zeros and ones",
        ),
        (
            lambda: ours.FocalLoss(weight=(1.0, 1.0, 2.0)),
            (torch.ones(1, 4, 3), torch.ones(1, 4, 3)),
            ValueError,
            "4 weights",
        ),
    ],
)
def test_what_cannot_be_had_raises(make: Any, tensors: tuple[Tensor, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()(*tensors)


def test_warnings_for_a_single_channel() -> None:
    one = torch.ones(1, 1, 3)
    for option in ({"include_background": False}, {"softmax": True}, {"to_onehot_y": True}):
        with pytest.warns(UserWarning, match="single channel prediction"):
            ours.DiceLoss(**option)(one, one)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_a_focal_loss_of_a_classification(gamma: float) -> None:
    """For gamma = 0 the binary cross-entropy, for other gammas not."""
    torch.manual_seed(0)
    scores, labels = torch.rand(128, 10), torch.randint(0, 10, (128, 1))
    hot = torch.nn.functional.one_hot(labels[:, 0], 10).float()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(scores, hot)
    loss = ours.FocalLoss(to_onehot_y=True, gamma=gamma)(scores, labels)
    assert (abs(loss - entropy).item() < 1e-6) == (gamma == 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["DiceLoss", "FocalLoss", "DiceCELoss", "GeneralizedDiceFocalLoss", "MaskedLoss"])
def test_scripting_is_refused(name: str) -> None:
    loss = getattr(ours, name)(*([ours.DiceLoss()] if name == "MaskedLoss" else []))
    with pytest.raises(RuntimeError, match=rf"{name}: expected torch.compile or torch.export, got torch.jit"):
        torch.jit.script(loss)
