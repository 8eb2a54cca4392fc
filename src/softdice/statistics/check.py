"""Every check of the tensors and settings that a user passes; the result is a `Request`, the input of a pass.

Shapes, dtypes and settings are checked always; the ranges of labels, probabilities and weights only with
`validate=True`, because that reads every voxel. The CPU kernel counts its range errors during the pass and comes here
for the message; CUDA and compiled code assert without a host sync.

A check raises TypeError for a type or dtype and ValueError for a shape, device or value; `message` makes the text,
`expected X, got Y. What to do.` Shape letters: B sample, C class, R region, *S space, V voxels (*S as one axis).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from softdice.internals import unwrapped
from softdice.statistics.declared import NAMES
from softdice.statistics.request import ACTIVATIONS, Pass, Request, constant, signed
from softdice.validation import are_tensors, choice, class_numbers, fail, message, number, same_device

LABEL_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
    torch.uint32, torch.uint64,
)  # fmt: skip
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pass_settings(settings: Pass) -> Pass:
    """Check the settings of a pass; return them with `fields` in the order of `declared.NAMES`, which kernels rely on.

    Raise TypeError or ValueError, which name the setting. Class numbers in `regions` are checked later, with the input.
    """
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
    """Check the tensors that a user passed, and return them as the request that a backend runs, *S as one axis V.

    Args:
        input: (B, C, *S). target: labels (B, *S) or (B, 1, *S), or values (B, C, *S). voxel_weight: (B, *S) or
            (B, 1, *S). map_values: (B, *S), (B, 1, *S) or (B, C, *S), numbers for the mapped statistics.
        settings: from `pass_settings`. num_classes: what C has to be; None for any.

    Raise TypeError for a wrong type or dtype, or a DTensor; ValueError for a wrong shape or device, and for a confusion
    matrix of one class or of per-class values.
    """
    if is_dtensor(input) or is_dtensor(target):
        advice = "Compute the logits and call the loss with them, or pass the local parts to a loss with group."
        fail("plain tensors", "a DTensor", advice, TypeError)
    made = tensors(input, target, voxel_weight, num_classes, settings)
    if settings.kind == "confusion":
        if input.shape[1] == 1:
            advice = "With a single channel there is nothing to confuse: pass both classes."
            fail("input of at least two classes", tuple(input.shape), advice)
        if not made.hard:
            got = f"target of shape {tuple(target.shape)}"
            fail("a label map, (B, *S) or (B, 1, *S)", got, "Pass target.argmax(1).")
    if settings.regions is not None:
        made = made._replace(regions=_membership(settings.regions, input))
    return made._replace(voxel_map=voxel_map(map_values, input, made.columns, settings.mapped))


def is_dtensor(value: object) -> bool:
    """Return whether it is a DTensor, without importing torch.distributed.tensor, which is slow."""
    if type(value) in (Tensor, torch.nn.Parameter) or "torch.distributed.tensor" not in sys.modules:
        return False
    return isinstance(value, sys.modules["torch.distributed.tensor"].DTensor)


def _membership(regions: tuple[tuple[int, ...], ...], input: Tensor) -> Tensor:
    """Return which class belongs to which region, (R, C) bool on the device of input, (B, C, *S).

    Raise TypeError or ValueError if a region holds anything but distinct class numbers.
    """
    C = input.shape[1]
    numbers = [class_numbers("regions", region, C) for region in regions]
    return constant(tuple(tuple(c in region for c in range(C)) for region in numbers), torch.bool, input)


def tensors(
    input: Tensor, target: Tensor, voxel_weight: Tensor | None, num_classes: int | None, settings: Pass
) -> Request:
    """Check types, dtypes, shapes and devices of a user's tensors, and return the request without regions and map.

    Input (B, C, *S) becomes a view (B, C, V), voxel_weight (B, *S) or (B, 1, *S) a view (B, V). A target of labels
    becomes (B, V), of values (B, C, V); a float label map becomes int32. Meta tensors can be checked, too. Raise
    TypeError for types and dtypes, ValueError for shapes, devices and a fraction in a float label map; `values` checks
    the other values.
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
    per_class = C > 1 and tuple(target.shape) == (B, C, *S)
    if not per_class and tuple(target.shape) not in ((B, *S), (B, 1, *S)):
        expected = f"target of shape {(B, *S)}, {(B, 1, *S)} or {(B, C, *S)} for input {(B, C, *S)}"
        advice = "Labels have no channel dimension, per-class values have one channel per class."
        fail(expected, tuple(target.shape), advice)
    if target.dtype not in LABEL_DTYPES + INPUT_DTYPES:
        fail("target of an integer, bool or floating dtype", target.dtype, "Convert it.", TypeError)
    # the floats of one class are values in [0, 1]; with ignore_index they are labels
    soft_mask = C == 1 and target.is_floating_point() and ignore_index is None
    if per_class or soft_mask:
        if ignore_index is not None:
            got = f"ignore_index={ignore_index} and target {tuple(target.shape)}"
            advice = "Pass voxel_weight with 0 at the voxels to leave out."
            fail("no ignore_index with per-class values", got, advice)
        target = target.flatten(1).unsqueeze(1) if soft_mask else target.flatten(2)
    else:
        target = (_integer_labels(target, settings.validate) if target.is_floating_point() else target).flatten(1)
    return Request(input.flatten(2), target, _weight(voxel_weight, B, S), settings=settings)


def _advice_on_axes(input: Tensor, target: Tensor, num_classes: int) -> str:
    """Return the advice for an input (3 axes or more) whose second axis has not the length num_classes.

    The shapes may show the cause: the batch axis is missing, or the classes stand in the last axis.
    """
    if input.shape[0] == num_classes and tuple(target.shape) in (tuple(input.shape[1:]), (1, *input.shape[1:])):
        batched_target = "target" if target.ndim == input.ndim else "target[None]"
        return f"The batch axis is missing: pass input[None] and {batched_target}."
    B, *S, C = input.shape
    if num_classes == C and tuple(target.shape) in ((B, *S), (B, 1, *S), (B, *S, C)):
        return "The classes stand last: pass input.movedim(-1, 1)."
    return "Make num_classes the number of channels, which stand second."


def without_metadata(tensor: Tensor) -> Tensor:
    """Return the plain Tensor in a subclass that only carries metadata (MONAI's MetaTensor).

    Others come back as they are; a subclass with its own `__torch_dispatch__`, such as DTensor, computes differently.
    """
    if type(tensor) is Tensor:
        return tensor
    metadata_only = type(tensor).__torch_function__ is not Tensor.__torch_function__ and (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    return tensor.as_subclass(Tensor) if metadata_only else tensor


def _weight(voxel_weight: Tensor | None, B: int, S: tuple[int, ...]) -> Tensor | None:
    """Return a user's weights (B, *S) or (B, 1, *S) as (B, V), None as None.

    Raise ValueError for another shape, TypeError for a dtype that is neither a label's nor an input's.
    """
    if voxel_weight is None:
        return None
    if tuple(voxel_weight.shape) not in ((B, *S), (B, 1, *S)):
        advice = "One weight per voxel; expand it where it is the same for all."
        fail(f"voxel_weight of shape {(B, *S)} or {(B, 1, *S)}", tuple(voxel_weight.shape), advice)
    if voxel_weight.dtype not in LABEL_DTYPES + INPUT_DTYPES:
        fail("voxel_weight of an integer, bool or floating dtype", voxel_weight.dtype, "Convert it.", TypeError)
    return signed(without_metadata(voxel_weight)).flatten(1)


def voxel_map(values: Tensor | None, input: Tensor, columns: int, read: bool) -> Tensor | None:
    """Check the user's numbers for the mapped statistics, and return a view of them, (B, columns, V) or (B, 1, V).

    input: (B, C, *S). columns: C, with regions R. read: whether the pass has mapped statistics; if not, `values` has to
    be None.
    Raise TypeError or ValueError for anything else.
    """
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
    same_device(input.device, "input", voxel_map=values)
    values = signed(without_metadata(values))
    return values.flatten(2) if tuple(values.shape) != shapes[0] else values.flatten(1).unsqueeze(1)


def _integer_labels(target: Tensor, validate: bool) -> Tensor:
    """Return a floating label map of any shape as int32; with `validate`, let `check` raise for a fraction in it."""
    labels = target.to(torch.int32)
    if validate:
        check(labels.to(target.dtype) != target, None, target, partial(fractions_error, target.numel()))
    return labels


def _deferred(tensor: Tensor) -> bool:
    """Return whether reading the tensor's values would wait for a GPU or break compilation (or there are none: meta).

    A check of values then leaves an assertion on the device instead.
    """
    return tensor.is_cuda or tensor.is_meta or torch.compiler.is_compiling()


def values(request: Request) -> None:
    """Raise ValueError (on CUDA leave an assertion) for a label, probability, weight or per-class value out of range.

    At a voxel that is ignored or has a weight of 0, any label or value passes. A NaN in `input` passes. In a pass of
    kind "ranks" the values of target and weight have to be 0 or 1.
    """
    input, target, weight, _, _, settings = request
    C, counted_BV = input.shape[1], request.counted
    if request.hard and target.dtype != torch.bool:
        labels = signed(target)
        wrong = labels < 0
        label_count = max(C, 2)  # a single class has the labels 0 and 1
        if label_count <= torch.iinfo(labels.dtype).max:  # else no label of this dtype is too large
            wrong = wrong | (labels >= label_count)
        check(wrong, counted_BV, labels, partial(labels_error, C, settings.ignore_index))
    elif target.dtype != torch.bool:
        check((target < 0) | (target > 1), counted_BV, target, target_error)
    if settings.activation == "none":
        slack = probability_slack(input.dtype)  # a probability may leave [0, 1] by rounding
        check((input < -slack) | (input > 1 + slack), counted_BV, input, probabilities_error)
    if weight is not None and weight.dtype != torch.bool:
        check(~(weight >= 0), None, weight, weights_error)  # not `< 0`, so that a NaN is refused
    if settings.kind == "ranks":
        zeros_and_ones(request)


def zeros_and_ones(request: Request) -> None:
    """Raise ValueError (on CUDA leave an assertion) for a per-class value or a weight other than 0 and 1."""
    for name, numbers in (("target", None if request.hard else request.target), ("voxel_weight", request.weight)):
        if numbers is not None and numbers.dtype != torch.bool:
            advice = "The order of the errors has no place for values between."
            error = partial(_range_error, f"zeros and ones in {name}", "values", advice)
            check((numbers != 0) & (numbers != 1), None, numbers, error)


def check(wrong: Tensor, counted_BV: Tensor | None, source: Tensor, error: Callable[..., str]) -> None:
    """Raise ValueError if one of the values `source` is wrong at a voxel that counts.

    On CUDA and in compiled code, which cannot wait for a value, leave an assertion that fails later.

    Args:
        wrong: bool, shaped as `source`: (B, V) or (B, C, V) with a mask, else any shape.
        counted_BV: bool mask of the voxels that count, None for all.
        error: makes the message from the first wrong value and the number of wrong values, or without arguments if
            they cannot be read.
    """
    if counted_BV is not None:
        wrong = wrong & (counted_BV if wrong.ndim == 2 else counted_BV.unsqueeze(1))
    if _deferred(source):
        torch._assert_async(~wrong.any(), error())
    elif (seen := unwrapped(wrong)) is not wrong:  # inside torch.func, where no single value can be read
        if bool(seen.any()):
            raise ValueError(error())
    elif bool(wrong.any()):
        raise ValueError(error(source[wrong][0].item(), int(wrong.sum())))


def hard(values: Tensor, what: str = "target", advice: str = "Round it, or use softdice.FocalLoss.") -> Tensor:
    """Return the values, of any shape and dtype; raise ValueError (on CUDA leave an assertion) unless all are 0 or 1.

    what: the tensor's name in the message. advice: the message's last sentence.
    """

    def error(value: object = UNSEEN, count: object = SOME) -> str:
        got = f"values such as {value:g}" if isinstance(value, float) else f"{value}"
        how = f"Pass {what} > 0 for a {what} of 0 and 255." if value == 255 else advice
        return message(f"a {what} of zeros and ones", got, how)

    if values.dtype != torch.bool:
        check((values != 0) & (values != 1), None, values, error)
    return values


def probability_slack(dtype: torch.dtype) -> float:
    """Return how far beyond [0, 1] a probability may lie by rounding alone."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


UNSEEN, SOME = "values outside", "some"
"""Words of the messages below for the first wrong value and the number of wrong ones, where they cannot be read."""


def labels_error(num_classes: int, ignore_index: int | None, value: object = UNSEEN, count: object = SOME) -> str:
    """Return the message for `count` labels out of range, the first of which is `value`.

    The range is [0, num_classes), or [0, 2) for a single class, and ignore_index if it is not None.
    """
    allowed = f"labels in [0, {max(num_classes, 2)})" + ("" if ignore_index is None else f" or {ignore_index}")
    what = "target with " + (allowed if num_classes > 1 else f"{allowed} (1 is in the only class)")
    return message(what, f"{value} ({count} voxels)", labels_advice("target", ignore_index, value))


def labels_advice(name: str, ignore_index: int | None, value: object) -> str:
    """Return what to do about a label `value` out of range in the argument `name`."""
    if value == 255 and ignore_index is None:  # as pictures mark a mask, and as data sets mark what to leave out
        leave_out = "; if it marks voxels to leave out, set ignore_index=255" if name == "target" else ""
        return f"If 255 marks the class, pass {name} // 255{leave_out}."
    return "Raise num_classes, remap the labels, or set ignore_index."


def fractions_error(numel: int, value: object = UNSEEN, count: object = SOME) -> str:
    """Return the message for a float label map of `numel` voxels that holds a fraction; see `_range_error`."""
    advice = "A float label map must hold whole values; per-class values have shape (B, C, *S)."
    got = f"{value:g} ({count} of {numel} voxels are not whole)" if isinstance(value, float) else f"{value}"
    return message("whole labels in target", got, advice)


def _range_error(expected: str, unit: str, advice: str, value: object = UNSEEN, count: object = SOME) -> str:
    """Return the message for `count` wrong values, the first of which is `value`.

    expected: the first noun of the message. unit: "values" or "voxels", which `count` counts.
    """
    return message(expected, f"{value} ({count} {unit})", advice)


target_error = partial(_range_error, "per-class values in [0, 1] in target", "values", "Scale target to [0, 1].")
probabilities_error = partial(
    _range_error,
    "probabilities in [0, 1] in input (activation='none')",
    "values",
    "For logits pass activation='softmax' or activation='sigmoid'.",
)
weights_error = partial(_range_error, "voxel_weight >= 0", "voxels", "Use 0 for a voxel that should not count.")
