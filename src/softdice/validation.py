"""what a user passes -> what the pass works on, or one clear error: every check of the package and its message.

Messages read `function: expected X, got Y. What to do.` Shapes, dtypes and settings are checked always; the ranges of
labels, probabilities and weights only with `validate=True`, because that reads every voxel. The CPU kernel counts its
range errors during the pass itself and comes here for the message; CUDA and compiled code assert without a host sync.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from softdice.reference import ACTIVATIONS, FIELDS, equals

LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(caller: str, expected: str, got: object, advice: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise the one form of error that this package has."""
    raise error(f"{caller}: expected {expected}, got {got}. {advice}")


def choice(caller: str, name: str, value: object, allowed: Iterable[str]) -> None:
    """A setting that is one of a few words."""
    if value not in tuple(allowed):
        words = ", ".join(repr(word) for word in allowed)
        fail(caller, f"{name} to be one of {words}", repr(value), "Correct the spelling or pick another.")


def number(caller: str, name: str, value: object, low: float, high: float = float("inf"), below: bool = False) -> None:
    """A setting that is a finite number in [low, high], or in [low, high) with `below`."""
    bound = f"in [{low:g}, {high:g}{')' if below else ']'}" if high != float("inf") else f">= {low:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(caller, f"{name} to be a number {bound}", repr(value), f"Pass a float for {name}.", TypeError)
    if not (low <= value <= high) or value == float("inf") or (below and value == high):
        fail(caller, f"{name} {bound}", repr(value), f"Choose {name} in that range.")


def num_classes(caller: str, value: object) -> int:
    """The number of classes, a positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(caller, "num_classes to be an int", repr(value), "Pass the number of channels of input.", TypeError)
    if value < 1:
        fail(caller, "num_classes >= 1", value, "Pass the number of channels of input.")
    return value


def pass_settings(
    caller: str,
    activation: str,
    ignore_index: int | None,
    label_smoothing: float,
    gamma: float,
    power: float,
    fields: Sequence[str],
    regions: Sequence[Sequence[int]] | None,
) -> None:
    """Settings that concern the pass over the voxels."""
    choice(caller, "activation", activation, ACTIVATIONS)
    number(caller, "label_smoothing", label_smoothing, 0, 1, below=True)
    number(caller, "gamma", gamma, 0)
    number(caller, "power", power, 1)
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        fail(caller, "ignore_index to be an int or None", repr(ignore_index), "Pass the label to leave out.", TypeError)
    for field in fields:
        choice(caller, "fields", field, FIELDS)
    if not fields:
        fail(caller, "at least one name in fields", "none", f"The names are {', '.join(FIELDS)}.")
    if regions is not None:
        if activation == "sigmoid":
            fail(
                caller,
                "activation 'softmax' or 'none' with regions",
                "'sigmoid'",
                "With a sigmoid each channel is a region already: pass per-class targets.",
            )
        if not regions or any(len(region) == 0 for region in regions):
            fail(caller, "every region to name a class", repr(regions), "Pass tuples of class numbers.")


def frozen_regions(caller: str, regions: Any) -> tuple[tuple[int, ...], ...] | None:
    """A sequence of sequences of class numbers -> tuples; which classes there are is checked with the input."""
    if regions is None:
        return None
    try:
        return tuple(tuple(region) for region in regions)
    except TypeError:
        advice = "Write a single region with a comma: regions=((1, 2),)."
        fail(caller, "regions to be tuples of class numbers", repr(regions), advice, TypeError)


def class_numbers(caller: str, name: str, values: Sequence[int], count: int) -> tuple[int, ...]:
    """Distinct class numbers in [0, count)."""
    if not isinstance(values, Iterable) or not all(isinstance(value, SupportsIndex) for value in values):
        fail(
            caller,
            f"{name} to be a sequence of ints",
            repr(values),
            "Pass class numbers, for example (1, 2).",
            TypeError,
        )
    numbers = tuple(int(value) for value in values)
    bad = [value for value in numbers if not 0 <= value < count]
    if bad or not numbers or len(set(numbers)) != len(numbers):
        got = f"{bad[0]}" if bad else f"{numbers}"
        fail(caller, f"{name} to be distinct class numbers in [0, {count})", got, f"There are {count} classes.")
    return numbers


def class_weights(caller: str, values: Any, count: int) -> Tensor:
    """One finite weight >= 0 per class, not all of them 0."""
    try:
        weight_C = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        fail(caller, "class_weight to be numbers", repr(values), "Pass one weight per class.", TypeError)
    if weight_C.shape != (count,):
        fail(caller, f"class_weight of shape ({count},)", tuple(weight_C.shape), "Pass one weight per class.")
    if not bool(((weight_C >= 0) & weight_C.isfinite()).all()) or not bool((weight_C > 0).any()):
        fail(caller, "class_weight finite, >= 0 and not all 0", weight_C.tolist(), "Pass other weights.")
    return weight_C


def tensors(
    caller: str,
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    num_classes: int | None,
    ignore_index: int | None,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a user has -> input (B, C, V), target (B, V) or (B, C, V), weight (B, V) or None: views where possible."""
    for name, value in (("input", input), ("target", target), ("voxel_weight", voxel_weight)):
        if not isinstance(value, Tensor) and not (name == "voxel_weight" and value is None):
            fail(caller, f"{name} to be a Tensor", type(value).__name__, f"Wrap {name} in torch.as_tensor.", TypeError)
    if input.dtype not in INPUT_DTYPES:
        fail(
            caller,
            "input of dtype float16, bfloat16, float32 or float64",
            input.dtype,
            "Pass logits or probabilities first, labels second.",
            TypeError,
        )
    if input.ndim < 3:
        fail(caller, "input of shape (B, C, *S)", tuple(input.shape), "Add the missing dimension with unsqueeze.")
    if num_classes is not None and input.shape[1] != num_classes:
        fail(
            caller,
            f"input of shape (B, {num_classes}, *S) for num_classes={num_classes}",
            tuple(input.shape),
            "Make num_classes the number of channels, which stand second.",
        )
    for name, value in (("target", target), ("voxel_weight", voxel_weight)):
        if value is not None and value.device != input.device:
            fail(caller, f"{name} on {input.device} like input", value.device, f"Move it: {name}.to(input.device).")

    input, target = _plain(input), _plain(target)
    B, C, S = input.shape[0], input.shape[1], tuple(input.shape[2:])
    dense = C > 1 and tuple(target.shape) == (B, C, *S)
    if not dense and tuple(target.shape) not in ((B, *S), (B, 1, *S)):
        fail(
            caller,
            f"target of shape {(B, *S)}, {(B, 1, *S)} or {(B, C, *S)} for input {(B, C, *S)}",
            tuple(target.shape),
            "Labels have no channel dimension, per-class values have one channel per class.",
        )
    if target.dtype not in LABEL_DTYPES + INPUT_DTYPES:
        fail(caller, "target of an integer, bool or floating dtype", target.dtype, "Convert it.", TypeError)
    soft_mask = C == 1 and target.is_floating_point() and ignore_index is None
    if dense or soft_mask:
        if ignore_index is not None:
            fail(
                caller,
                "no ignore_index with per-class values",
                f"ignore_index={ignore_index} and target {tuple(target.shape)}",
                "Pass voxel_weight with 0 at the voxels to leave out.",
            )
        target = target.flatten(1).unsqueeze(1) if soft_mask else target.flatten(2)
    else:
        target = (_whole(caller, target, validate) if target.is_floating_point() else target).flatten(1)
    return input.flatten(2), target, _weight(caller, voxel_weight, B, S)


def _plain(tensor: Tensor) -> Tensor:
    """A subclass that only carries metadata (MONAI's MetaTensor) -> the Tensor in it; others as they are."""
    metadata_only = type(tensor).__torch_function__ is not Tensor.__torch_function__ and (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    return tensor.as_subclass(Tensor) if metadata_only else tensor


def _weight(caller: str, voxel_weight: Tensor | None, B: int, S: tuple[int, ...]) -> Tensor | None:
    if voxel_weight is None:
        return None
    if tuple(voxel_weight.shape) not in ((B, *S), (B, 1, *S)):
        fail(
            caller,
            f"voxel_weight of shape {(B, *S)} or {(B, 1, *S)}",
            tuple(voxel_weight.shape),
            "One weight per voxel; expand it where it is the same for all.",
        )
    if voxel_weight.dtype.is_complex:
        fail(caller, "voxel_weight of a real dtype", voxel_weight.dtype, "Convert it.", TypeError)
    return _plain(voxel_weight).flatten(1)


def _whole(caller: str, target: Tensor, validate: bool) -> Tensor:
    """A float map with whole values -> int32 labels."""
    labels = target.to(torch.int32)
    if validate:
        wrong = labels.to(target.dtype) != target
        advice = "A float label map must hold whole values; per-class values have shape (B, C, *S)."
        if _deferred(target):
            torch._assert_async(~wrong.any(), f"{caller}: expected whole labels in target. {advice}")
        elif bool(wrong.any()):
            got = f"{target[wrong][0].item():g} ({int(wrong.sum())} of {target.numel()} voxels are not whole)"
            fail(caller, "whole labels in target", got, advice)
    return labels


def _deferred(tensor: Tensor) -> bool:
    """Whether a look at the values would stop the device or the compiler: then the check is an assertion."""
    return tensor.is_cuda or torch.compiler.is_compiling()


def values(
    caller: str, input: Tensor, target: Tensor, weight: Tensor | None, activation: str, ignore_index: int | None
) -> None:
    """Ranges of labels, probabilities and weights, by plain torch operations on what `tensors` returned."""
    C = input.shape[1]
    valid = None if weight is None else weight > 0
    if ignore_index is not None:
        labelled = ~equals(target, ignore_index)
        valid = labelled if valid is None else valid & labelled
    if target.ndim == 2 and target.dtype != torch.bool:
        outside = target < 0
        top = max(C, 2)
        if top <= torch.iinfo(target.dtype).max:
            outside = outside | (target >= top)
        if valid is not None:
            outside = outside & valid
        _check(outside, target, lambda value, count: labels_error(caller, value, count, C, ignore_index))
    elif target.ndim == 3 and target.dtype != torch.bool:
        outside = (target < 0) | (target > 1)
        if valid is not None:
            outside = outside & valid.unsqueeze(1)
        _check(outside, target, lambda value, count: target_error(caller, value, count))
    if activation == "none":
        slack = probability_slack(input.dtype)
        outside = (input < -slack) | (input > 1 + slack)
        if valid is not None:
            outside = outside & valid.unsqueeze(1)
        _check(outside, input, lambda value, count: probabilities_error(caller, value, count))
    if weight is not None and weight.dtype != torch.bool:
        _check(~(weight >= 0), weight, lambda value, count: weights_error(caller, value, count))


def _check(outside: Tensor, source: Tensor, error: Any) -> None:
    if _deferred(source):
        torch._assert_async(~outside.any(), error_text(error))
    elif torch._C._functorch.is_functorch_wrapped_tensor(outside):  # vmap lets nobody look at a value: look beneath it
        while torch._C._functorch.is_functorch_wrapped_tensor(outside):
            outside = torch._C._functorch.get_unwrapped(outside)
        if bool(outside.any()):
            error("values outside", "some")
    elif bool(outside.any()):
        error(source[outside][0].item(), int(outside.sum()))


def error_text(error: Any) -> str:
    """The message that `error` raises, where the value that is wrong cannot be known."""
    try:
        error("values outside", "some")
    except ValueError as problem:
        return str(problem)
    raise AssertionError("an error function returned")


def probability_slack(dtype: torch.dtype) -> float:
    """How far beyond [0, 1] a probability may lie by rounding alone."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def labels_error(caller: str, value: object, count: object, num_classes: int, ignore_index: int | None) -> NoReturn:
    """A label outside [0, C) that is not ignore_index."""
    allowed = f"labels in [0, {max(num_classes, 2)})" + ("" if ignore_index is None else f" or {ignore_index}")
    what = "target with " + (allowed if num_classes > 1 else f"{allowed} (1 is in the only class)")
    fail(caller, what, f"{value} ({count} voxels)", "Raise num_classes, remap the labels, or set ignore_index.")


def target_error(caller: str, value: object, count: object) -> NoReturn:
    """A per-class value outside [0, 1]."""
    fail(caller, "per-class values in [0, 1] in target", f"{value} ({count} values)", "Scale target to [0, 1].")


def probabilities_error(caller: str, value: object, count: object) -> NoReturn:
    """Logits where probabilities should be."""
    advice = "For logits pass activation='softmax' or activation='sigmoid'."
    fail(caller, "probabilities in [0, 1] in input (activation='none')", f"{value} ({count} values)", advice)


def weights_error(caller: str, value: object, count: object) -> NoReturn:
    """A negative or NaN weight."""
    fail(caller, "voxel_weight >= 0", f"{value} ({count} voxels)", "Use 0 for a voxel that should not count.")


def package(caller: str, name: str, extra: str) -> ModuleType:
    """name of a package -> the package, imported; the error for a missing one names the extra that brings it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]  # the package itself, or one that it needs
        missing = {"PIL": "pillow"}.get(missing, missing)
        advice = f"Run: pip install 'softdice[{extra}]'"
        raise ModuleNotFoundError(
            f"{caller}: expected {missing} to be installed, got no such package. {advice}", name=missing
        ) from error
