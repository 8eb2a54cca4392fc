"""The losses as functions: the same numbers as the classes, nothing kept alive, types that agree."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from functional_stub import STUB, declarations
from torch import Tensor

import softdice
from softdice import functional, losses
from softdice.losses import BEYOND, FAMILY, MAPPED, OverlapLoss, masks

LOSSES = Path(__file__).parent.parent / "docs" / "losses.md"
OWN: dict[str, Any] = {
    "alpha": 0.25, "beta": 0.5, "gamma": 1.5, "power": 1.25, "eps": 0.5, "weighting": "simple", "form": "product"
}  # fmt: skip
"""A value that is not the default for each keyword of a loss's own."""


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 5), torch.randint(0, 3, (2, 3, 5)), torch.rand(2, 3, 5)


@pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: loss.__name__)
def test_a_function_is_its_class(loss: type[OverlapLoss]) -> None:
    words = "_".join(re.findall(r"MCC|[A-Z][a-z]+", loss.__name__)).lower()
    function = getattr(functional, words)
    logits, labels, weight = problem()
    _, *parameters, _ = inspect.signature(loss).parameters.values()
    own = {parameter.name: OWN[parameter.name] for parameter in parameters}
    assert all(parameter.default != OWN[parameter.name] for parameter in parameters)
    shared: dict[str, Any] = {"activation": "softmax", "class_weight": [1.0, 2.0, 3.0, 4.0], "absent": "skip"}
    for keywords in ({"activation": "softmax"}, shared, own | shared):
        expected = loss(4, **keywords)
        assert torch.equal(function(logits, labels, **keywords), expected(logits, labels))
        assert torch.equal(function(logits, labels, voxel_weight=weight, **keywords), expected(logits, labels, weight))
    assert function.__module__ == "softdice.functional"
    assert f"softdice.{loss.__name__}" in str(function.__doc__)
    with pytest.raises(TypeError, match=f"^{words}: expected input to be a Tensor, got list"):
        function([1.0], labels)


def test_a_loss_is_public_and_in_the_table() -> None:
    assert set(functional.__all__) == {*functional.FUNCTIONS, *masks.__all__}
    for loss in (*FAMILY, *MAPPED, *BEYOND):
        assert loss.__name__ in softdice.__all__
        assert getattr(softdice, loss.__name__) is loss
        assert f"\n| `{loss.__name__}` |" in LOSSES.read_text(), f"give {loss.__name__} a row in docs/losses.md"
    assert len(set(FAMILY)) >= 13


def test_the_types_agree_with_the_classes() -> None:
    assert STUB.read_text() == declarations(), "run `make format`, which writes functional.pyi"


def test_settings_are_checked_at_every_call() -> None:
    """1 and True are equal, and a loss that was made for the one must not serve for the other."""
    logits, labels, _ = problem()
    functional.soft_dice_loss(logits, labels, activation="softmax", eps=1)
    with pytest.raises(TypeError, match="expected eps to be a number"):
        functional.soft_dice_loss(logits, labels, activation="softmax", eps=True)


def test_no_tensor_is_kept_alive() -> None:
    logits, labels, _ = problem()
    scale, class_weight = torch.ones(()), torch.ones(4)
    keywords: dict[str, Any] = {"class_weight": class_weight, "cost": partial(torch.sub, scale)}
    functional.soft_dice_loss(logits, labels, activation="softmax", **keywords)
    functional.soft_dice_loss(logits, labels, activation="softmax")
    seen = [weakref.ref(tensor) for tensor in (logits, scale, class_weight)]
    del logits, scale, class_weight, keywords
    gc.collect()
    assert [reference() for reference in seen] == [None, None, None]


def test_class_weights_of_inference_serve_in_training() -> None:
    logits, labels, _ = problem()
    keywords: dict[str, Any] = {"activation": "softmax", "class_weight": (1.0, 1.0, 1.0, 2.0)}
    with torch.inference_mode():
        expected = functional.generalized_dice_loss(logits, labels, **keywords)
    value = functional.generalized_dice_loss(logits.requires_grad_(), labels, **keywords)
    value.backward()
    assert value.item() == expected.item()


def test_many_threads_have_one_value() -> None:
    logits, labels, _ = problem()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(functional.mcc_loss, logits, labels, activation="softmax") for _ in range(64)]
        values = {call.result().item() for call in calls}
    assert values == {softdice.MCCLoss(4, activation="softmax")(logits, labels).item()}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_functions_compile_into_one_graph() -> None:
    logits, labels, _ = problem()

    def loss(input: Tensor) -> Tensor:
        return functional.tversky_loss(input, labels, alpha=0.25, activation="softmax")

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(logits), loss(logits))


@pytest.mark.parametrize(
    "call",
    [
        partial(functional.soft_dice_loss, class_weight=[1.0, 2.0, 0.0, 4.0]),
        partial(functional.focal_loss, class_weight=[1.0, 2.0], regions=((0, 1, 2), (3,))),
        lambda input, target, activation: losses.MCCLoss(4, activation=activation)(input, target, merge={0: (2,)}),
        lambda input, target, activation: (
            losses.SoftDiceLoss(4, activation=activation) + 0.5 * losses.FocalLoss(4, activation=activation)
        )(input, target),
    ],
)  # fmt: skip
def test_what_makes_a_loss_compiles_into_one_graph(call: Callable[..., Tensor]) -> None:
    logits, labels, _ = problem()
    expected = call(logits, labels, activation="softmax")
    whole = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(logits, labels, activation="softmax"), expected)


def test_compiled_code_asserts_class_weights() -> None:
    logits, labels, _ = problem()
    whole = torch.compile(functional.soft_dice_loss, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="expected class_weight finite, >= 0 and not all 0, got values outside"):
        whole(logits, labels, activation="softmax", class_weight=[1.0, -2.0, 0.0, 4.0])


def test_the_number_of_classes_is_read_off_the_input() -> None:
    logits, labels = torch.zeros(1, 3, 4), torch.zeros(1, 4).long()
    with pytest.raises(TypeError, match="jaccard_loss: expected no num_classes, which is the number of channels"):
        softdice.functional.jaccard_loss(logits, labels, num_classes=3)  # type: ignore[call-arg]
