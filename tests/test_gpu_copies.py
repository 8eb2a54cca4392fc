"""A step copies nothing from the host to the device, which would wait for it and keep it out of a CUDA graph.

The meta device plays a GPU: a dispatch mode sees each operation that takes a tensor of the host beside one of the
device. Numbers without dimensions are part of a launch, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import softdice
from softdice.losses.base import Loss
from softdice.statistics.request import columns, constant, moved

META = torch.device("meta")


class Copies(TorchFunctionMode):
    """Names of the calls that take numbers of the host to the device."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.operations = Operations(self.names)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in self.MAKERS and result.device == META  # torch shows a dispatch mode nothing of these two
        listed = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META
        if made or (listed and any(isinstance(leaf, list) for leaf in (args[1], *_parts(args[1])))):
            self.names.append(str(func))
        return result

    def __enter__(self) -> Copies:
        self.operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *reasons: Any) -> None:
        super().__exit__(*reasons)
        self.operations.__exit__(*reasons)


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else ()


class Operations(TorchDispatchMode):
    """Names of the operations that take a host's tensor beside one of the device."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(t.device == META for t in tensors) and any(t.device.type == "cpu" and t.ndim > 0 for t in tensors):
            self.names.append(str(func))
        return result


def copies(loss: Loss, C: int, **call: Any) -> list[str]:
    """Return the copies of the second step of a loss that was made on the host and never moved."""
    input = torch.empty(2, C, 8, 9, device=META, requires_grad=True)
    target = torch.empty(2, 8, 9, dtype=torch.int64, device=META)
    loss(input, target, **call).sum().backward()
    with Copies() as seen:
        loss(input, target, **call).sum().backward()
    return seen.names


def test_a_copy_is_seen() -> None:
    values = torch.empty(4, 3, device=META)
    with Copies() as seen:
        values[..., [0, 2]]
        torch.tensor([1, 2], device=META)
        torch.ones(3).to(META)
        values[torch.tensor([0, 1])]
        values + 1.0
    assert len(seen.names) == 4


@pytest.mark.parametrize("absent", ["count", "skip"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"classes": range(1, 5)},
        {"classes": (3, 0, 1)},
        {"class_weight": (1.0, 2.0, 3.0, 4.0, 0.0)},
        {"class_weight": torch.ones(5), "classes": (2, 4), "pooling": "sample"},
        {"regions": ((0, 1), (2,), (3, 4))},
        {"regions": ((0, 1), (2,), (3, 4)), "classes": (0, 2), "class_weight": (1, 2, 3), "ignore_index": 255},
        {"reduction": "none", "class_weight": (1, 2, 3, 4, 5)},
    ],
)
def test_no_keyword_copies_in_every_call(settings: dict[str, Any], absent: Any) -> None:
    options = {"activation": "softmax", "absent": absent, **settings}
    dice, cross_entropy = softdice.SoftDiceLoss(5, **options), softdice.CrossEntropyLoss(5, **options)
    for loss in (dice, cross_entropy, dice + 0.5 * cross_entropy, softdice.MCCLoss(5, **options)):
        assert copies(loss, 5) == []


def test_merge_copies_nothing() -> None:
    loss = softdice.SoftDiceLoss(5, activation="softmax", classes=(1, 2, 4), class_weight=(1, 1, 2, 1, 2))
    assert copies(loss, 5, merge={0: (2, 3)}) == []


def test_a_lovasz_loss_copies_no_index() -> None:
    values = torch.empty(2, 5, device=META)
    with Copies() as seen:
        columns(values, (1, 3, 4))
    assert seen.names == []


class TestConstants:
    def test_weights_that_change_are_read_anew(self) -> None:
        like = torch.empty(2, device=META)
        weight = torch.tensor([1.0, 2.0])
        first = moved(weight, like)
        assert moved(weight, like) is first
        weight[0] = 5.0
        assert moved(weight, like) is not first

    def test_weights_on_the_device_and_of_its_dtype_are_left(self) -> None:
        weight = torch.tensor([1.0, 2.0])
        assert moved(weight, torch.ones(1)) is weight
        assert moved(weight, torch.ones(1, dtype=torch.float64)).dtype == torch.float64

    def test_validation_leaves_no_inference_tensor_to_training(self) -> None:
        loss = softdice.SoftDiceLoss(4, activation="softmax", regions=((0, 3), (1, 2)))
        input = torch.randn(2, 4, 6)
        target = torch.randint(0, 4, (2, 6))
        with torch.inference_mode():
            value = loss(input, target)
        leaf = input.clone().requires_grad_()
        again = loss(leaf, target)
        again.backward()
        assert again.item() == value.item()
        assert not constant((True, False), torch.bool, input).is_inference()

    def test_columns_are_those_of_an_index(self) -> None:
        values = torch.randn(3, 7)
        for numbers in ((1, 2, 3), (6, 0), (5,), (2, 3, 0, 1, 6, -1), (), (4, 4)):
            assert torch.equal(columns(values, numbers), values[..., list(numbers)])
        with pytest.raises(IndexError):
            columns(values, (7,))
