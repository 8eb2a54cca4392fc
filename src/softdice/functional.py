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
from typing import Any

from torch import Tensor

from softdice import losses, validation
from softdice.losses import Loss, masks
from softdice.losses.base import words
from softdice.losses.masks import *  # noqa: F403

DOCSTRING = """input, target -> the loss that `softdice.{loss}` returns.

    Args: the arguments of the class as keywords, without num_classes; voxel_weight{and_map} as in a call of the loss.

    Example:
        >>> import torch, softdice
        >>> logits, labels = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]]), torch.tensor([[[0, 1]]])
        >>> value = softdice.functional.{name}(logits, labels, {map}activation="softmax")
        >>> torch.equal(value, softdice.{loss}(2, activation="softmax")(logits, labels{also}))
        True
    """


def _function_of(loss: type[Loss]) -> Callable[..., Tensor]:
    """Return a function that makes a loss of the class and calls it; its name, docstring and signature fit the class.

    Example:
        >>> _function_of(losses.MCCLoss)
        <function mcc_loss at ...>
    """
    name = words(loss) + "_loss"  # "mcc_loss" for MCCLoss
    reads_map = loss in losses.MAPPED

    def function(input: Tensor, target: Tensor, *, voxel_weight: Tensor | None = None, **keywords: Any) -> Tensor:
        if "num_classes" in keywords:
            got = keywords["num_classes"]
            validation.fail("no num_classes, which is the number of channels of input", got, "Leave it out.", TypeError)
        maps = {"voxel_map": keywords.pop("voxel_map")} if reads_map and "voxel_map" in keywords else {}
        return loss(_channels(input), **keywords)(input, target, voxel_weight, **maps)

    function.__name__ = function.__qualname__ = name
    # the parts of DOCSTRING about voxel_map, empty for a loss that reads none
    map_texts = {"and_map": " and voxel_map", "map": "voxel_map=labels, ", "also": ", voxel_map=labels"}
    texts = {key: text if reads_map else "" for key, text in map_texts.items()}
    function.__doc__ = DOCSTRING.format(loss=loss.__name__, name=name, **texts)
    *parameters, _keywords = inspect.signature(function).parameters.values()
    if reads_map:
        parameters.append(inspect.Parameter("voxel_map", inspect.Parameter.KEYWORD_ONLY, annotation="Tensor"))
    _num_classes, *settings = inspect.signature(loss).parameters.values()  # they replace **keywords in help()
    parameters += [p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in settings]
    function.__signature__ = inspect.Signature(parameters, return_annotation="Tensor")
    return validation.public(function)


def _channels(input: Tensor) -> int:
    """Return C of an input (B, C, *S), as a user passed it; raise TypeError or ValueError for anything else."""
    validation.are_tensors(input=input)
    if input.ndim < 3:
        validation.fail("input of shape (B, C, *S)", tuple(input.shape), "Add the missing dimension with unsqueeze.")
    return input.shape[1]


FUNCTIONS = {
    function.__name__: function for function in map(_function_of, (*losses.FAMILY, *losses.MAPPED, *losses.BEYOND))
}
globals().update(FUNCTIONS)
__all__ = sorted([*FUNCTIONS, *masks.__all__])
