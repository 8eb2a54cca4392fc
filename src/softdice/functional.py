"""input, target -> loss: every loss as a function, for a call or two; in a training loop keep the module.

`soft_dice_loss(input, target, voxel_weight=..., eps=..., **settings)` is `SoftDiceLoss(C, eps, **settings)(input,
target, voxel_weight)`, with C read off input; so for every class in FAMILY, MAPPED and BEYOND of `softdice.losses`,
from which the functions are made. Their types, for editors and type checkers, stand in functional.pyi, which `make
format` writes. The losses of single masks, `mask_dice_loss` and its siblings, have no class: see
`softdice.losses.masks`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from softdice import losses, validation
from softdice.losses import Loss, masks
from softdice.losses.base import words
from softdice.losses.masks import *  # noqa: F403

DOCSTRING = """input, target -> what `softdice.{loss}` returns.

    Args: those of the class by keyword, but for num_classes; voxel_weight{and_map} as when it is called.

    Example:
        >>> import torch, softdice
        >>> logits, labels = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]]), torch.tensor([[[0, 1]]])
        >>> value = softdice.functional.{name}(logits, labels, {map}activation="softmax")
        >>> torch.equal(value, softdice.{loss}(2, activation="softmax")(logits, labels{also}))
        True
    """


def _function_of(loss: type[Loss]) -> Callable[..., Tensor]:
    """class of a loss -> its function.

    Example:
        >>> _function_of(losses.MCCLoss)
        <function mcc_loss at ...>
    """

    def function(input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None, **keywords: Any) -> Tensor:
        of_call = {name: keywords.pop(name) for name in maps if name in keywords}
        return _module(loss, _channels(input), keywords)(input, target, voxel_weight, **of_call)

    maps = ("voxel_map",) if loss in losses.MAPPED else ()
    name = words(loss) + "_loss"
    function.__name__ = function.__qualname__ = name
    shown = {"and_map": " and voxel_map", "map": "voxel_map=labels, ", "also": ", voxel_map=labels"}
    shown = {key: text if maps else "" for key, text in shown.items()}
    function.__doc__ = DOCSTRING.format(loss=loss.__name__, name=name, **shown)
    *first, _ = inspect.signature(function).parameters.values()
    _, *own = inspect.signature(loss).parameters.values()  # the first is num_classes
    own = [p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in own]
    first += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation="Tensor") for name in maps]
    function.__signature__ = inspect.Signature([*first, *own], return_annotation="Tensor")
    return validation.public(function)


def _channels(input: Tensor) -> int:
    """input (B, C, *S) -> C."""
    validation.are_tensors(input=input)
    if input.ndim < 3:
        validation.fail("input of shape (B, C, *S)", tuple(input.shape), "Add the missing dimension with unsqueeze.")
    return input.shape[1]


def _module(loss: type[Loss], num_classes: int, keywords: dict[str, Any]) -> Loss:
    """class, classes, keywords -> the loss; the same one again where words and numbers alone made it.

    A tensor, or a callable that may hold one, is not kept; nor are class weights, which become a tensor.
    """
    if torch.compiler.is_compiling() or "class_weight" in keywords or not all(map(_keepable, keywords.values())):
        return loss(num_classes, **keywords)
    return _kept_module(loss, num_classes, tuple((name, type(value), value) for name, value in keywords.items()))


def _keepable(value: object) -> bool:
    """Whether a value holds no tensor for certain: a word or a number, or a tuple of such."""
    return (
        all(map(_keepable, value)) if type(value) is tuple else isinstance(value, (str, int, float, range, type(None)))
    )


@lru_cache(maxsize=256)
def _kept_module(loss: type[Loss], num_classes: int, keywords: tuple[tuple[str, type, Any], ...]) -> Loss:
    """`_module` for words and numbers: an index is traced once for the same settings."""
    return loss(num_classes, **{name: value for name, _, value in keywords})


FUNCTIONS = {
    function.__name__: function for function in map(_function_of, (*losses.FAMILY, *losses.MAPPED, *losses.BEYOND))
}
globals().update(FUNCTIONS)
__all__ = sorted([*FUNCTIONS, *masks.__all__])
