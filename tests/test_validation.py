"""Every error of the core: the kind, and the whole text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import softdice
from softdice import OverlapLoss, SoftDiceLoss, costs, overlap_statistics, validation
from softdice.backends import route
from softdice.compat import monai, nnunet, smp
from softdice.metrics import hausdorff_distance
from softdice.statistics import check
from softdice.statistics.declared import NAMES
from softdice.statistics.request import Request

X = torch.full((2, 3, 4, 4), 1 / 3)
Y = torch.zeros(2, 4, 4, dtype=torch.int64)
SOFT = torch.full((2, 3, 4, 4), 0.5)


def stats(input: Any = X, target: Any = Y, **keywords: Any) -> object:
    return overlap_statistics(input, target, **keywords)


def changed(tensor: Tensor, *values: float) -> Tensor:
    """Return the tensor with these values in its first places."""
    copy = tensor.clone()
    copy.view(-1)[: len(values)] = torch.tensor(values, dtype=tensor.dtype)
    return copy


PASS = "overlap_statistics: "
LOSS = "SoftDiceLoss: "
FIELD_NAMES = ", ".join(NAMES)
TARGET_SHAPES = PASS + "expected target of shape (2, 4, 4), (2, 1, 4, 4) or (2, 3, 4, 4) for input (2, 3, 4, 4), got "
TARGET_ADVICE = "Labels have no channel dimension, per-class values have one channel per class."
IN_RANGE = "Raise num_classes, remap the labels, or set ignore_index."

CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    # tensors: kind, dtype, shape
    (lambda: stats([1.0]), TypeError, PASS + "expected input to be a Tensor, got list. Wrap input in torch.as_tensor."),
    (lambda: stats(target=X.numpy()), TypeError,
     PASS + "expected target to be a Tensor, got ndarray. Wrap target in torch.as_tensor."),
    (lambda: stats(voxel_weight=2.0), TypeError,
     PASS + "expected voxel_weight to be a Tensor, got float. Wrap voxel_weight in torch.as_tensor."),
    (lambda: stats(Y.unsqueeze(1)), TypeError,
     PASS + "expected input of dtype float16, bfloat16, float32 or float64, got torch.int64. "
     "Pass logits or probabilities first, labels second."),
    (lambda: stats(X[0, 0]), ValueError,
     PASS + "expected input of shape (B, C, *S), got (4, 4). Add the missing dimension with unsqueeze."),
    (lambda: SoftDiceLoss(4)(X, Y), ValueError,
     LOSS + "expected input of shape (B, 4, *S) for num_classes=4, got (2, 3, 4, 4). "
     "Make num_classes the number of channels, which stand second."),
    (lambda: stats(target=Y.to("meta")), ValueError,
     PASS + "expected target on cpu like input, got meta. Move it: target.to(input.device)."),
    (lambda: stats(voxel_weight=Y.to("meta")), ValueError,
     PASS + "expected voxel_weight on cpu like input, got meta. Move it: voxel_weight.to(input.device)."),
    (lambda: stats(target=Y[:1]), ValueError, TARGET_SHAPES + f"(1, 4, 4). {TARGET_ADVICE}"),
    (lambda: stats(target=SOFT[:, :2]), ValueError, TARGET_SHAPES + f"(2, 2, 4, 4). {TARGET_ADVICE}"),
    (lambda: stats(target=Y.unsqueeze(-1)), ValueError, TARGET_SHAPES + f"(2, 4, 4, 1). {TARGET_ADVICE}"),
    (lambda: stats(target=Y.to(torch.complex64)), TypeError,
     PASS + "expected target of an integer, bool or floating dtype, got torch.complex64. Convert it."),
    (lambda: stats(target=SOFT, ignore_index=255), ValueError,
     PASS + "expected no ignore_index with per-class values, got ignore_index=255 and target (2, 3, 4, 4). "
     "Pass voxel_weight with 0 at the voxels to leave out."),
    (lambda: stats(voxel_weight=X), ValueError,
     PASS + "expected voxel_weight of shape (2, 4, 4) or (2, 1, 4, 4), got (2, 3, 4, 4). "
     "One weight per voxel; expand it where it is the same for all."),
    (lambda: stats(voxel_weight=Y.to(torch.complex64)), TypeError,
     PASS + "expected voxel_weight of an integer, bool or floating dtype, got torch.complex64. Convert it."),
    # values
    (lambda: stats(target=changed(Y, 3, 7)), ValueError,
     PASS + f"expected target with labels in [0, 3), got 3 (2 voxels). {IN_RANGE}"),
    (lambda: stats(target=changed(Y, -1), ignore_index=255), ValueError,
     PASS + f"expected target with labels in [0, 3) or 255, got -1 (1 voxels). {IN_RANGE}"),
    (lambda: stats(X[:, :1], changed(Y, 255)), ValueError,
     PASS + "expected target with labels in [0, 2) (1 is in the only class), got 255 (1 voxels). If 255 marks the "
     "class, pass target // 255; if it marks voxels to leave out, set ignore_index=255."),
    (lambda: stats(target=changed(Y.float(), 0.5, 0.25)), ValueError,
     PASS + "expected whole labels in target, got 0.5 (2 of 32 voxels are not whole). "
     "A float label map must hold whole values; per-class values have shape (B, C, *S)."),
    (lambda: stats(target=changed(Y.float(), torch.nan)), ValueError,
     PASS + "expected whole labels in target, got nan (1 of 32 voxels are not whole). "
     "A float label map must hold whole values; per-class values have shape (B, C, *S)."),
    (lambda: stats(target=changed(SOFT, 1.5, -1)), ValueError,
     PASS + "expected per-class values in [0, 1] in target, got 1.5 (2 values). Scale target to [0, 1]."),
    (lambda: stats(changed(X, 2.0, -3.0)), ValueError,
     PASS + "expected probabilities in [0, 1] in input (activation='none'), got 2.0 (2 values). "
     "For logits pass activation='softmax' or activation='sigmoid'."),
    (lambda: stats(voxel_weight=changed(Y.float(), -1, -1, -1)), ValueError,
     PASS + "expected voxel_weight >= 0, got -1.0 (3 voxels). Use 0 for a voxel that should not count."),
    (lambda: stats(voxel_weight=changed(Y.float(), torch.nan)), ValueError,
     PASS + "expected voxel_weight >= 0, got nan (1 voxels). Use 0 for a voxel that should not count."),
    # settings of the pass
    (lambda: stats(activation="Softmax"), ValueError,
     PASS + "expected activation to be one of 'none', 'softmax', 'sigmoid', got 'Softmax'. "
     "Correct the spelling or pick another."),
    (lambda: stats(label_smoothing=1.0), ValueError,
     PASS + "expected label_smoothing in [0, 1), got 1.0. Choose label_smoothing in that range."),
    (lambda: stats(label_smoothing="0.1"), TypeError,
     PASS + "expected label_smoothing to be a number in [0, 1), got '0.1'. Pass a float for label_smoothing."),
    (lambda: stats(gamma=-1), ValueError, PASS + "expected gamma >= 0, got -1. Choose gamma in that range."),
    (lambda: stats(gamma=float("nan")), ValueError, PASS + "expected gamma >= 0, got nan. Choose gamma in that range."),
    (lambda: stats(power=0.5), ValueError, PASS + "expected power >= 1, got 0.5. Choose power in that range."),
    (lambda: stats(power=float("inf")), ValueError, PASS + "expected power >= 1, got inf. Choose power in that range."),
    (lambda: stats(ignore_index=1.0), TypeError,
     PASS + "expected ignore_index to be an int or None, got 1.0. Pass the label to leave out."),
    (lambda: stats(fields=("dice",)), ValueError,
     PASS + "expected fields to be one of " + ", ".join(f"'{name}'" for name in FIELD_NAMES.split(", "))
     + ", got 'dice'. Correct the spelling or pick another."),
    (lambda: stats(fields=()), ValueError,
     PASS + f"expected at least one name in fields, got none. The names are {FIELD_NAMES}."),
    (lambda: stats(activation="sigmoid", regions=((1,),)), ValueError,
     PASS + "expected activation 'softmax' or 'none' with regions, got 'sigmoid'. "
     "With a sigmoid each channel is a region already: pass per-class targets."),
    (lambda: stats(regions=((1,), ())), ValueError,
     PASS + "expected every region to name a class, got ((1,), ()). Pass tuples of class numbers."),
    (lambda: stats(regions=((1, 3),)), ValueError,
     PASS + "expected regions to be distinct class numbers in [0, 3), got 3. There are 3 classes."),
    (lambda: stats(regions=((1, 1),)), ValueError,
     PASS + "expected regions to be distinct class numbers in [0, 3), got (1, 1). There are 3 classes."),
    # settings of a loss
    (lambda: SoftDiceLoss(0), ValueError,
     LOSS + "expected num_classes >= 1, got 0. Pass the number of channels of input."),
    (lambda: SoftDiceLoss(2.0), TypeError,
     LOSS + "expected num_classes to be an int, got 2.0. Pass the number of channels of input."),
    (lambda: SoftDiceLoss(2, eps=-1e-5), ValueError, LOSS + "expected eps >= 0, got -1e-05. Choose eps in that range."),
    (lambda: SoftDiceLoss(2, eps=True), TypeError,
     LOSS + "expected eps to be a number >= 0, got True. Pass a float for eps."),
    (lambda: SoftDiceLoss(2, cost="dice"), ValueError,
     LOSS + "expected cost to be one of 'neg_log', 'one_minus', 'log_cosh', got 'dice'. "
     "Correct the spelling or pick another."),
    (lambda: SoftDiceLoss(2, pooling="class"), ValueError,
     LOSS + "expected pooling to be one of 'batch', 'sample', got 'class'. Correct the spelling or pick another."),
    (lambda: SoftDiceLoss(2, absent=None), ValueError,
     LOSS + "expected absent to be one of 'count', 'skip', got None. Correct the spelling or pick another."),
    (lambda: SoftDiceLoss(2, reduction="avg"), ValueError,
     LOSS + "expected reduction to be one of 'mean', 'sum', 'none', got 'avg'. Correct the spelling or pick another."),
    (lambda: SoftDiceLoss(2, classes=(0, 2)), ValueError,
     LOSS + "expected classes to be distinct class numbers in [0, 2), got 2. There are 2 classes."),
    (lambda: SoftDiceLoss(2, classes=()), ValueError,
     LOSS + "expected classes to be distinct class numbers in [0, 2), got (). There are 2 classes."),
    (lambda: SoftDiceLoss(2, classes=1), TypeError,
     LOSS + "expected classes to be a sequence of ints, got 1. Pass class numbers, for example (1, 2)."),
    (lambda: SoftDiceLoss(2, classes=(0.5,)), TypeError,
     LOSS + "expected classes to be a sequence of ints, got (0.5,). Pass class numbers, for example (1, 2)."),
    (lambda: SoftDiceLoss(2, class_weight=[1.0]), ValueError,
     LOSS + "expected class_weight of shape (2,), got (1,). Pass one weight per class."),
    (lambda: SoftDiceLoss(2, class_weight=[1.0, -1.0]), ValueError,
     LOSS + "expected class_weight finite, >= 0 and not all 0, got [1.0, -1.0]. Pass other weights."),
    (lambda: SoftDiceLoss(2, class_weight=[0, 0]), ValueError,
     LOSS + "expected class_weight finite, >= 0 and not all 0, got [0.0, 0.0]. Pass other weights."),
    (lambda: SoftDiceLoss(2, class_weight="ab"), TypeError,
     LOSS + "expected class_weight to be numbers, got 'ab'. Pass one weight per class."),
    (lambda: costs.focal(-1.0), ValueError, "costs.focal: expected gamma >= 0, got -1.0. Choose gamma in that range."),
    (lambda: OverlapLoss(lambda s: 1.0, 2), TypeError,
     "OverlapLoss: expected index to return a Tensor, got float. Return a score per class."),
    (lambda: OverlapLoss(lambda s: torch.ones(2), 2), ValueError,
     "OverlapLoss: expected index to read a statistic, got none read. Use stats.intersection and its siblings."),
    # functions and backends
    (lambda: softdice.functional.soft_dice_loss([1.0], Y), TypeError,
     "soft_dice_loss: expected input to be a Tensor, got list. Wrap input in torch.as_tensor."),
    (lambda: softdice.functional.soft_dice_loss(X[0, 0, 0], Y), ValueError,
     "soft_dice_loss: expected input of shape (B, C, *S), got (4,). Add the missing dimension with unsqueeze."),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", CASES, ids=[message[:70] for _, _, message in CASES])
def test_message(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with softdice.use_backend("reference"), pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert str(error.value) == message


VALUE_CASES = [case for case in CASES if "voxels)" in case[2] or "values)" in case[2]]


@pytest.mark.parametrize("call, kind, message", VALUE_CASES, ids=[message[:70] for _, _, message in VALUE_CASES])
def test_every_backend_finds_values_out_of_range(
    backend: str, call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match=r"^SoftDiceLoss: expected the keywords activation, .*, got dims, smooth\."):
        SoftDiceLoss(2, smooth=1.0, dims=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'smooth'"):
        stats(smooth=1.0)
    with pytest.raises(TypeError, match="positional argument"):
        SoftDiceLoss(2, 1e-5, "softmax")


def test_without_validation_values_are_not_looked_at(backend: str) -> None:
    assert float(SoftDiceLoss(3, validate=False)(changed(X, 2.0), Y)) > 0
    stats(validate=False, voxel_weight=changed(Y.float() + 1, 0.5))
    with pytest.raises(ValueError, match="expected target of shape"):  # shapes are checked always
        stats(target=Y[:1], validate=False)


def test_rounding_is_no_error(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ones = torch.full((1, 2, 4), 1 + torch.finfo(dtype).eps, dtype=dtype)
        overlap_statistics(ones, Y[:1, 0])


def test_labels_that_are_ignored_may_be_anything(backend: str) -> None:
    for ignored in (255, -1, -100, 1000, 2**40):
        stats(target=changed(Y, ignored), ignore_index=ignored)
    stats(target=changed(Y.float(), 255), ignore_index=255)


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = ", ".join(repr(name) for name in route.NAMES)
    advice = "Correct the spelling or pick another."
    with pytest.raises(ValueError) as error, softdice.use_backend("gpu"):
        pass
    assert str(error.value) == f"use_backend: expected name to be one of {allowed}, got 'gpu'. {advice}"
    monkeypatch.setenv("SOFTDICE_BACKEND", "reference")
    assert route.asked() == "reference"
    with softdice.use_backend("auto"):
        assert route.asked() == "auto"
    monkeypatch.setenv("SOFTDICE_BACKEND", "fast")
    with pytest.raises(ValueError) as error:
        route.asked()
    assert str(error.value) == f"SOFTDICE_BACKEND: expected the variable to be one of {allowed}, got 'fast'. {advice}"


def test_a_named_backend_never_falls_back() -> None:
    target = torch.rand(1, 2, 8, requires_grad=True)
    with softdice.use_backend("cpu"), pytest.raises(RuntimeError) as error:
        overlap_statistics(torch.rand(1, 2, 8), target)
    assert str(error.value) == (
        "use_backend: expected tensors that the 'cpu' backend serves, got a case that it does not: "
        "target, voxel_weight or voxel_map requires a gradient. Use 'auto' or 'reference'."
    )
    with softdice.use_backend("auto"):
        assert route.choose(Request(torch.zeros(1, 2, 2**14), target)) == "reference"
    with softdice.use_backend("cpu"), pytest.raises(RuntimeError, match="input is float64, which the definition"):
        overlap_statistics(torch.rand(1, 2, 8, dtype=torch.float64), target.detach())


def test_an_assertion_text_needs_no_value() -> None:
    assert check.weights_error().startswith("softdice: expected voxel_weight >= 0, got values outside (some")


class Boundary:
    """A class with `public` on its methods."""

    @validation.public
    def __init__(self, value: float = 1.0) -> None:
        """Docstring."""
        validation.number("value", value, 0)

    @validation.public
    def forward(self, inner: Callable[[], object]) -> object:
        return inner()

    @validation.public
    def other(self, inner: Callable[[], object]) -> object:
        return inner()


class Special(Boundary):
    """A subclass, whose name an error has to say."""


def wrong() -> None:
    validation.fail("a", "b", "Do.", KeyError)


@validation.public
def outer(inner: Callable[[], object]) -> object:
    return inner()


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Special(-1.0), "Special: expected value >= 0, got -1.0. Choose value in that range."),
        (lambda: Special().forward(wrong), "Special: expected a, got b. Do."),
        (lambda: Special().other(wrong), "Special.other: expected a, got b. Do."),
        (lambda: outer(wrong), "outer: expected a, got b. Do."),
        (lambda: outer(lambda: Special().other(wrong)), "Special.other: expected a, got b. Do."),
        (lambda: validation.public_as("a.b")(wrong)(), "a.b: expected a, got b. Do."),
        (lambda: outer(lambda: raise_(OSError("softdice and more"))), "softdice and more"),
    ],
)
def test_the_innermost_boundary_says_whose_an_error_is(call: Callable[[], object], text: str) -> None:
    with pytest.raises(Exception) as error:
        call()
    assert error.value.args == (text,)


def test_a_boundary_keeps_signature_and_docstring() -> None:
    assert str(inspect.signature(Boundary)) == "(value: 'float' = 1.0) -> 'None'"
    assert Boundary.__init__.__doc__ == "Docstring."
    assert list(inspect.signature(softdice.SoftDiceLoss).parameters) == ["num_classes", "eps", "settings"]


def test_a_loss_of_ones_own_says_its_name() -> None:
    class MyLoss(OverlapLoss):
        def __init__(self, num_classes: int, eps: float) -> None:
            validation.number("eps", eps, 0)
            super().__init__(lambda s: s.intersection + eps, num_classes)

    with pytest.raises(ValueError, match=r"^MyLoss: expected eps >= 0, got -1"):
        MyLoss(2, -1)
    with pytest.raises(ValueError, match=r"^MyLoss: expected num_classes >= 1, got 0"):
        MyLoss(0, 1)


def test_an_input_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"^SoftDiceLoss: expected input to be a Tensor, got list\."):
        SoftDiceLoss(3)([1.0], Y)


def jagged(value: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(value), layout=torch.jagged)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "jagged": (jagged, "nested"),
    "nested": (lambda value: torch.nested.nested_tensor(list(value)), "nested"),
    "sparse_coo": (Tensor.to_sparse, "sparse_coo"),
    "sparse_csr": (lambda value: value.flatten(1).to_sparse_csr(), "sparse_csr"),
}
"""Tensors whose elements do not lie at strides, and the word for each."""
LOGITS, SOFTMAX = torch.randn(2, 3, 4, 5), {"activation": "softmax"}
LABELS = torch.ones(2, 4, 5, dtype=torch.int64)
TAKE_TENSORS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "SoftDiceLoss": SoftDiceLoss(3, **SOFTMAX),
    "SumLoss": SoftDiceLoss(3, **SOFTMAX) + softdice.CrossEntropyLoss(3, **SOFTMAX),
    "ClDiceLoss": softdice.ClDiceLoss(3, **SOFTMAX),
    "LovaszLoss": softdice.LovaszLoss(3, **SOFTMAX),
    "TopKCrossEntropyLoss": softdice.TopKCrossEntropyLoss(3, **SOFTMAX),
    "OHEMCrossEntropyLoss": softdice.OHEMCrossEntropyLoss(3, **SOFTMAX),
    "WassersteinDiceLoss": softdice.WassersteinDiceLoss(3, **SOFTMAX),
    "DeepSupervision": lambda input, target: softdice.DeepSupervision(SoftDiceLoss(3, **SOFTMAX))([input], target),
    "Upsampled": softdice.Upsampled(SoftDiceLoss(3, **SOFTMAX)),
    "FusedHead": softdice.FusedHead(torch.nn.Conv2d(3, 3, 1), SoftDiceLoss(3, **SOFTMAX)),
    "dice_loss of functional": partial(softdice.functional.soft_dice_loss, **SOFTMAX),
    "mask_dice_loss": softdice.functional.mask_dice_loss,
    "pairwise_mask_focal_loss": softdice.functional.pairwise_mask_focal_loss,
    "overlap_statistics": partial(softdice.overlap_statistics, **SOFTMAX),
    "soft_confusion": partial(softdice.soft_confusion, **SOFTMAX),
    "voxel_cross_entropy": partial(softdice.voxel_cross_entropy, **SOFTMAX),
    "monai DiceCELoss": monai.DiceCELoss(softmax=True),
    "monai FocalLoss": monai.FocalLoss(),
    "nnunet DC_and_CE_loss": nnunet.DC_and_CE_loss({}, {}),
    "smp DiceLoss": smp.DiceLoss("multiclass"),
    "dice_score": lambda input, target: softdice.dice_score(input, target, num_classes=3),
    "DiceScore": lambda input, target: softdice.DiceScore(num_classes=3).update(input, target),
    "hausdorff_distance": lambda input, target: hausdorff_distance(input, target, num_classes=3),
    "lesion_dice": lambda input, target: softdice.metrics.lesion_dice(input, target, num_classes=3),
}
LABELS_FIRST = ("dice_score", "DiceScore", "hausdorff_distance", "lesion_dice")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TAKE_TENSORS)
def test_a_tensor_of_another_layout_is_refused_by_name(name: str, layout: str) -> None:
    convert, word = LAYOUTS[layout]
    first, second = (LABELS if name in LABELS_FIRST else LOGITS), LABELS
    what = {"pairwise_mask_focal_loss": LABELS.float(), "mask_dice_loss": LOGITS}.get(name, second)
    for tensors in ((convert(first), what), (first, convert(what))):
        with pytest.raises(TypeError, match=rf"expected a strided tensor for \w+, got a {word} one\. ") as error:
            TAKE_TENSORS[name](*tensors)
        assert ("to_padded_tensor" in str(error.value)) == (word == "nested")
        assert ("to_dense()" in str(error.value)) == (word != "nested")
        assert not str(error.value).startswith("softdice:")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_the_advice_for_a_nested_tensor_leads_to_the_number_of_its_parts() -> None:
    """Two images of 4 and 6 voxels: padded to 6, with the padding left out, they have the statistics of each alone."""
    parts = [torch.randn(3, 4), torch.randn(3, 6)]
    labels = [torch.randint(0, 3, (4,)), torch.randint(0, 3, (6,))]
    with pytest.raises(TypeError, match=r"torch\.nested\.to_padded_tensor\(input, 0\).*ignore_index"):
        softdice.overlap_statistics(torch.nested.nested_tensor(parts), labels[0], **SOFTMAX)
    input, target = (
        torch.nested.to_padded_tensor(torch.nested.nested_tensor(values), padding)
        for values, padding in ((parts, 0), (labels, 255))
    )
    padded = softdice.overlap_statistics(input, target, ignore_index=255, **SOFTMAX)
    alone = [softdice.overlap_statistics(x[None], y[None], **SOFTMAX) for x, y in zip(parts, labels, strict=True)]
    torch.testing.assert_close(padded.intersection, torch.cat([stats.intersection for stats in alone]))
    torch.testing.assert_close(padded.prediction, torch.cat([stats.prediction for stats in alone]))


def test_a_value_is_checked_whether_its_class_is_in_a_region_or_not(backend: str) -> None:
    input = torch.full((1, 3, 9000), 0.3)
    labels = torch.zeros(1, 9000, dtype=torch.int64)
    for channel in range(3):
        wrong = input.clone()
        wrong[0, channel, 8999] = 1.5
        with pytest.raises(ValueError, match=r"got 1\.5 "):
            softdice.overlap_statistics(wrong, labels, regions=((0, 1),))
        for activation in ("none", "softmax"):
            with pytest.raises(ValueError, match=r"got 1\.5 "):
                softdice.overlap_statistics(input, wrong, regions=((0, 1),), activation=activation)
    softdice.overlap_statistics(input, labels, regions=((0, 1),))


@pytest.mark.parametrize(
    ("input", "target", "advice"),
    [
        (torch.zeros(2, 5, 6, 4), torch.zeros(2, 5, 6), "The classes stand last: pass input.movedim(-1, 1)."),
        (torch.zeros(2, 9, 4), torch.zeros(2, 9), "The classes stand last: pass input.movedim(-1, 1)."),
        (torch.zeros(4, 5, 6), torch.zeros(5, 6), "The batch axis is missing: pass input[None] and target[None]."),
        (torch.zeros(4, 5, 6, 7), torch.zeros(1, 5, 6, 7), "The batch axis is missing: pass input[None] and target."),
        (torch.zeros(2, 3, 6), torch.zeros(2, 6), "Make num_classes the number of channels, which stand second."),
        ({"aux": 1, "logits": torch.zeros(2, 4, 6)}, torch.zeros(2, 6), "for example input['logits']."),
    ],
)
def test_advice_leads_to_a_call_that_works(input: Any, target: torch.Tensor, advice: str) -> None:
    loss = SoftDiceLoss(4, activation="softmax")
    with pytest.raises((TypeError, ValueError)) as error:
        loss(input, target)
    assert str(error.value).endswith(advice)
    call = advice.rpartition("pass ")[2].removesuffix(".")
    if "pass " in advice:
        right = call.partition(" and ")
        loss(eval(right[0], {"input": input}), eval(right[2] or "target", {"target": target}))


def test_a_mask_of_0_and_255_is_told_both_ways() -> None:
    with pytest.raises(ValueError, match=r"pass target // 255; if it marks voxels to leave out, set ignore_index=255"):
        SoftDiceLoss(2, activation="softmax")(torch.zeros(1, 2, 4), torch.tensor([[0, 255, 255, 0]]))


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ({"smooth": 1.0}, "smooth is called eps here."),
        ({"include_background": False}, "include_background=False is classes=range(1, num_classes)."),
        ({"softmax": True, "weight": None}, "softmax=True is activation='softmax'; weight is class_weight"),
        ({"activaton": "softmax"}, "Correct the spelling."),
    ],
)
def test_keywords_of_others_are_translated(keyword: dict[str, Any], advice: str) -> None:
    with pytest.raises(TypeError) as error:
        SoftDiceLoss(3, **keyword)
    assert advice in str(error.value)


def test_a_keyword_of_other_losses_is_no_spelling_mistake() -> None:
    with pytest.raises(TypeError, match=r"got group\. this loss has no use for group: leave it out\.$"):
        softdice.LovaszLoss(3, group="world")
    with pytest.raises(TypeError, match=r"got batch, regions\. batch=True is .*; this loss has no use for regions: "):
        softdice.ClDiceLoss(3, batch=True, regions=((0, 1),))
