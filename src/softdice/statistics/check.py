"""What a user passes -> a request: every check of tensors and of the settings of a pass.

Shapes, dtypes and settings are checked always; the ranges of labels, probabilities and weights only with
`validate=True`, because that reads every voxel. The CPU kernel counts its range errors during the pass and comes here
for the message; CUDA and compiled code assert without a host sync.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from softdice.internals import unwrapped
from softdice.statistics.declared import NAMES
from softdice.statistics.request import ACTIVATIONS, Pass, Request, constant, equals, signed
from softdice.validation import are_tensors, choice, class_numbers, fail, message, number, same_device

LABEL_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
    torch.uint32, torch.uint64,
)  # fmt: skip
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pass_settings(settings: Pass) -> Pass:
    """Return the settings of a pass with the fields in the package's order; raise an error that names a wrong one."""
    choice("activation", settings.activation, ACTIVATIONS)
    number("label_smoothing", settings.label_smoothing, 0, 1, below=True)
    number("gamma", settings.gamma, 0)
    number("power", settings.power, 1)
    ignore_index, regions = settings.ignore_index, settings.regions
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        fail("ignore_index to be an int or None", repr(ignore_index), "Pass the label to leave out.", TypeError)
    for field in settings.fields:
        choice("fields", field, NAMES)
    if not settings.fields:
        fail("at least one name in fields", "none", f"The names are {', '.join(NAMES)}.")
    if regions is not None:
        if settings.activation == "sigmoid":
            advice = "With a sigmoid each channel is a region already: pass per-class targets."
            fail("activation 'softmax' or 'none' with regions", "'sigmoid'", advice)
        if not regions or any(len(region) == 0 for region in regions):
            fail("every region to name a class", repr(regions), "Pass tuples of class numbers.")
    return settings.but(fields=tuple(name for name in NAMES if name in settings.fields))


def request(
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    settings: Pass,
    num_classes: int | None = None,
    map_values: Tensor | None = None,
) -> Request:
    """Return the request for what a user passed; raise where it does not fit."""
    if is_dtensor(input) or is_dtensor(target):
        advice = "Compute the logits and call the loss with them, or pass the local parts to a loss with group."
        fail("plain tensors", "a DTensor", advice, TypeError)
    made = tensors(input, target, voxel_weight, num_classes, settings)
    if settings.kind == "confusion":
        labels_alone(input, target)
    if settings.regions is not None:
        made = made._replace(regions=_membership(settings.regions, input))
    return made._replace(voxel_map=voxel_map(map_values, input, made.columns, settings.mapped))


def is_dtensor(value: object) -> bool:
    """Return whether it is a DTensor; does not import what makes them."""
    if type(value) in (Tensor, torch.nn.Parameter) or "torch.distributed.tensor" not in sys.modules:
        return False
    return isinstance(value, sys.modules["torch.distributed.tensor"].DTensor)


def _membership(regions: tuple[tuple[int, ...], ...], input: Tensor) -> Tensor:
    """Return which class belongs to which region, (R, C) bool, on the device of input."""
    C = input.shape[1]
    numbers = [class_numbers("regions", region, C) for region in regions]
    return constant(tuple(tuple(c in region for c in range(C)) for region in numbers), torch.bool, input)


def tensors(
    input: Tensor, target: Tensor, voxel_weight: Tensor | None, num_classes: int | None, settings: Pass
) -> Request:
    """Return the request for what a user passed, without regions and map: views where possible.

    Raises:
        TypeError, ValueError: a kind, dtype, shape or device that does not fit; never a value, whose check reads all.
    """
    ignore_index = settings.ignore_index
    are_tensors(input=input, target=target, **({} if voxel_weight is None else {"voxel_weight": voxel_weight}))
    if input.dtype not in INPUT_DTYPES:
        advice = "Pass logits or probabilities first, labels second."
        fail("input of dtype float16, bfloat16, float32 or float64", input.dtype, advice, TypeError)
    if input.ndim < 3:
        fail("input of shape (B, C, *S)", tuple(input.shape), "Add the missing dimension with unsqueeze.")
    if num_classes is not None and input.shape[1] != num_classes:
        expected = f"input of shape (B, {num_classes}, *S) for num_classes={num_classes}"
        fail(expected, tuple(input.shape), _advice_on_axes(input, target, num_classes))
    same_device(input.device, "input", target=target, voxel_weight=voxel_weight)

    input, target = without_metadata(input), signed(without_metadata(target))
    B, C, S = input.shape[0], input.shape[1], tuple(input.shape[2:])
    dense = C > 1 and tuple(target.shape) == (B, C, *S)
    if not dense and tuple(target.shape) not in ((B, *S), (B, 1, *S)):
        expected = f"target of shape {(B, *S)}, {(B, 1, *S)} or {(B, C, *S)} for input {(B, C, *S)}"
        advice = "Labels have no channel dimension, per-class values have one channel per class."
        fail(expected, tuple(target.shape), advice)
    if target.dtype not in LABEL_DTYPES + INPUT_DTYPES:
        fail("target of an integer, bool or floating dtype", target.dtype, "Convert it.", TypeError)
    soft_mask = C == 1 and target.is_floating_point() and ignore_index is None
    if dense or soft_mask:
        if ignore_index is not None:
            got = f"ignore_index={ignore_index} and target {tuple(target.shape)}"
            advice = "Pass voxel_weight with 0 at the voxels to leave out."
            fail("no ignore_index with per-class values", got, advice)
        target = target.flatten(1).unsqueeze(1) if soft_mask else target.flatten(2)
    else:
        target = (_whole(target, settings.validate) if target.is_floating_point() else target).flatten(1)
    return Request(input.flatten(2), target, _weight(voxel_weight, B, S), settings=settings)


def _advice_on_axes(input: Tensor, target: Tensor, num_classes: int) -> str:
    """Say what to do about an input whose second axis is not that of the classes."""
    if input.shape[0] == num_classes and tuple(target.shape) in (tuple(input.shape[1:]), (1, *input.shape[1:])):
        whole = "target" if target.ndim == input.ndim else "target[None]"
        return f"The batch axis is missing: pass input[None] and {whole}."
    B, *S, C = input.shape
    if num_classes == C and tuple(target.shape) in ((B, *S), (B, 1, *S), (B, *S, C)):
        return "The classes stand last: pass input.movedim(-1, 1)."
    return "Make num_classes the number of channels, which stand second."


def labels_alone(input: Tensor, target: Tensor) -> None:
    """Raise if the target is not a label map of several classes, where a pass needs one label for each voxel."""
    if isinstance(input, Tensor) and input.ndim > 1 and input.shape[1] == 1:
        advice = "With a single channel there is nothing to confuse: pass both classes."
        fail("input of at least two classes", tuple(input.shape), advice)
    if isinstance(target, Tensor) and isinstance(input, Tensor) and target.shape == input.shape:
        fail("a label map, (B, *S) or (B, 1, *S)", f"target of shape {tuple(target.shape)}", "Pass target.argmax(1).")


def without_metadata(tensor: Tensor) -> Tensor:
    """Return the Tensor in a subclass that only carries metadata (MONAI's MetaTensor); others as they are."""
    if type(tensor) is Tensor:
        return tensor
    metadata_only = type(tensor).__torch_function__ is not Tensor.__torch_function__ and (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    return tensor.as_subclass(Tensor) if metadata_only else tensor


def _weight(voxel_weight: Tensor | None, B: int, S: tuple[int, ...]) -> Tensor | None:
    if voxel_weight is None:
        return None
    if tuple(voxel_weight.shape) not in ((B, *S), (B, 1, *S)):
        advice = "One weight per voxel; expand it where it is the same for all."
        fail(f"voxel_weight of shape {(B, *S)} or {(B, 1, *S)}", tuple(voxel_weight.shape), advice)
    if voxel_weight.dtype.is_complex:
        fail("voxel_weight of a real dtype", voxel_weight.dtype, "Convert it.", TypeError)
    return without_metadata(voxel_weight).flatten(1)


def voxel_map(values: Tensor | None, input: Tensor, columns: int, read: bool) -> Tensor | None:
    """Return the map that a user passed as (B, 1 or columns, V), where the pass reads one."""
    if not read:
        if values is not None:
            advice = "Leave it out, or ask for a statistic that reads it, as BoundaryLoss does."
            fail("no voxel_map, since no statistic of this pass reads one", tuple(values.shape), advice)
        return None
    advice = "Pass the numbers that the loss multiplies with, for example softdice.distance_map(target, C)."
    are_tensors(advice, voxel_map=values)
    assert values is not None
    B, S = input.shape[0], tuple(input.shape[2:])
    shapes = ((B, *S), (B, 1, *S), (B, columns, *S))
    if tuple(values.shape) not in shapes:
        expected = f"voxel_map of shape {shapes[0]}, {shapes[1]} or {shapes[2]}"
        fail(expected, tuple(values.shape), "Give a number per voxel, or per voxel and class.")
    if values.dtype.is_complex:
        fail("voxel_map of a real dtype", values.dtype, "Convert it.", TypeError)
    if values.device != input.device:
        fail(f"voxel_map on {input.device} like input", values.device, f"Move it: voxel_map.to({input.device!s}).")
    values = signed(without_metadata(values))
    return values.flatten(2) if tuple(values.shape) != shapes[0] else values.flatten(1).unsqueeze(1)


def _whole(target: Tensor, validate: bool) -> Tensor:
    """Convert a float map with whole values to int32 labels."""
    labels = target.to(torch.int32)
    if validate:
        wrong = labels.to(target.dtype) != target
        advice = "A float label map must hold whole values; per-class values have shape (B, C, *S)."
        if _deferred(target):
            torch._assert_async(~wrong.any(), message("whole labels in target", "values outside", advice))
        elif bool(wrong.any()):
            got = f"{target[wrong][0].item():g} ({int(wrong.sum())} of {target.numel()} voxels are not whole)"
            fail("whole labels in target", got, advice)
    return labels


def _deferred(tensor: Tensor) -> bool:
    """Return whether values cannot be read without stopping the device or the compiler: then an assertion is left."""
    return tensor.is_cuda or tensor.is_meta or torch.compiler.is_compiling()


def values(request: Request) -> None:
    """Raise where a label, probability, weight or per-class value is out of range, by plain torch operations."""
    input, target, weight, _, _, settings = request
    C = input.shape[1]
    valid = None if weight is None else weight > 0
    if settings.ignore_index is not None:
        labelled = ~equals(target, settings.ignore_index)
        valid = labelled if valid is None else valid & labelled
    if target.ndim == 2 and target.dtype != torch.bool:
        labels = signed(target)
        wrong = labels < 0
        top = max(C, 2)
        if top <= torch.iinfo(labels.dtype).max:
            wrong = wrong | (labels >= top)
        check(wrong, valid, labels, partial(labels_error, C, settings.ignore_index))
    elif target.ndim == 3 and target.dtype != torch.bool:
        check((target < 0) | (target > 1), valid, target, target_error)
    if settings.activation == "none":
        slack = probability_slack(input.dtype)
        check((input < -slack) | (input > 1 + slack), valid, input, probabilities_error)
    if weight is not None and weight.dtype != torch.bool:
        check(~(weight >= 0), None, weight, weights_error)
    if settings.kind == "ranks":
        zeros_and_ones(request)


def zeros_and_ones(request: Request) -> None:
    """Raise where a per-class value or a weight lies between 0 and 1: voxels that are ranked have no place for it."""
    for name, numbers in (("target", None if request.hard else request.target), ("voxel_weight", request.weight)):
        if numbers is not None and numbers.dtype != torch.bool:
            check((numbers != 0) & (numbers != 1), None, numbers, partial(zero_or_one_error, name))


def check(wrong: Tensor, valid: Tensor | None, source: Tensor, error: Callable[..., str]) -> None:
    """Raise where a voxel that counts is wrong; where no value can be read, leave an assertion or say less."""
    if valid is not None:
        wrong = wrong & (valid if wrong.ndim == 2 else valid.unsqueeze(1))
    if _deferred(source):
        torch._assert_async(~wrong.any(), error())
    elif (seen := unwrapped(wrong)) is not wrong:
        if bool(seen.any()):
            raise ValueError(error())
    elif bool(wrong.any()):
        raise ValueError(error(source[wrong][0].item(), int(wrong.sum())))


def hard(values: Tensor, what: str = "target", advice: str = "Round it, or use softdice.FocalLoss.") -> Tensor:
    """Return per-class values or a mask, all 0 or 1; the formulas for values between are no sums over voxels."""

    def error(value: object = UNSEEN, count: object = SOME) -> str:
        got = f"values such as {value:g}" if isinstance(value, float) else f"{value}"
        return message(f"a {what} of zeros and ones", got, advice)

    if values.dtype != torch.bool:
        check((values != 0) & (values != 1), None, values, error)
    return values


def probability_slack(dtype: torch.dtype) -> float:
    """Return how far beyond [0, 1] a probability may lie by rounding alone."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


UNSEEN, SOME = "values outside", "some"
"""Words for the wrong value and the number of them where values cannot be read."""


def labels_error(num_classes: int, ignore_index: int | None, value: object = UNSEEN, count: object = SOME) -> str:
    """Say what to do about a label outside [0, C) that is not ignore_index."""
    allowed = f"labels in [0, {max(num_classes, 2)})" + ("" if ignore_index is None else f" or {ignore_index}")
    what = "target with " + (allowed if num_classes > 1 else f"{allowed} (1 is in the only class)")
    advice = "Raise num_classes, remap the labels, or set ignore_index."
    if value == 255 and ignore_index is None:  # as pictures mark a mask, and as data sets mark what to leave out
        advice = "If 255 marks the class, pass target // 255; if it marks voxels to leave out, set ignore_index=255."
    return message(what, f"{value} ({count} voxels)", advice)


def target_error(value: object = UNSEEN, count: object = SOME) -> str:
    """Say what to do about a per-class value outside [0, 1]."""
    return message("per-class values in [0, 1] in target", f"{value} ({count} values)", "Scale target to [0, 1].")


def probabilities_error(value: object = UNSEEN, count: object = SOME) -> str:
    """Say what to do about logits where probabilities should be."""
    advice = "For logits pass activation='softmax' or activation='sigmoid'."
    return message("probabilities in [0, 1] in input (activation='none')", f"{value} ({count} values)", advice)


def zero_or_one_error(name: str, value: object = UNSEEN, count: object = SOME) -> str:
    """Say what to do about a value or weight between 0 and 1 where voxels are ranked."""
    advice = "The order of the errors has no place for values between."
    return message(f"zeros and ones in {name}", f"{value} ({count} values)", advice)


def weights_error(value: object = UNSEEN, count: object = SOME) -> str:
    """Say what to do about a negative or NaN weight."""
    return message("voxel_weight >= 0", f"{value} ({count} voxels)", "Use 0 for a voxel that should not count.")
