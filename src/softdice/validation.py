"""what a user passes -> what the pass works on, or one clear error: every check of the package and its message.

Messages read `function: expected X, got Y. What to do.` Shapes, dtypes and settings are checked always; the ranges of
labels, probabilities and weights only with `validate=True`, because that reads every voxel. The CPU kernel counts its
range errors during the pass itself and comes here for the message; CUDA and compiled code assert without a host sync.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn, ParamSpec, SupportsIndex, TypeVar

import torch
from torch import Tensor

from softdice.reference import equals, signed
from softdice.settings import ACTIVATIONS, Pass, Voxels
from softdice.terms import NAMES

LABEL_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
    torch.uint32, torch.uint64,
)  # fmt: skip
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

P = ParamSpec("P")
R = TypeVar("R")

# --- the form of an error, and whose it is

PACKAGE = "softdice"
"""Whose an error is until it reaches the function that the user called; in compiled code it never does."""


def message(expected: str, got: object, advice: str) -> str:
    """The one form of error that this package has."""
    return f"{PACKAGE}: expected {expected}, got {got}. {advice}"


def fail(expected: str, got: object, advice: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise an error of that form; the first `public` function that it crosses puts in front whose it is."""
    raise error(message(expected, got, advice))


_OF_THE_CLASS = ("__init__", "__post_init__", "__prepare_scriptable__", "forward")
"""Methods that stand for their class; torch.jit.script calls the third before it does anything."""


def public(function: Callable[P, R], name: str | None = None) -> Callable[P, R]:
    """A function that users call -> the same; errors that cross it begin with its name, unless they have one already.

    The name is the function's, the class's for those of `_OF_THE_CLASS`, `Class.method` for its other methods.
    """
    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]
    method = "" if function.__name__ in _OF_THE_CLASS else f".{function.__name__}"

    def named(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except Exception as error:
            if not torch.compiler.is_compiling():
                own = type(args[0]).__name__ + method if is_method else function.__name__
                _say_whose(error, name or own)
            raise

    # torch.compile remembers by code object what varies between calls, and how often it compiled: each has its own
    named.__code__ = named.__code__.replace(co_name=function.__name__)
    return wraps(function)(named)


def public_as(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`public` for what users know by another name than the function's own."""
    return lambda function: public(function, name)


def _say_whose(error: Exception, name: str) -> None:
    text = str(error.args[0]) if error.args else ""
    if text.startswith(f"{PACKAGE}: expected "):
        error.args = (text.replace(PACKAGE, name, 1),)


# --- settings


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """A setting that is one of a few words."""
    if value not in tuple(allowed):
        words = ", ".join(repr(word) for word in allowed)
        fail(f"{name} to be one of {words}", repr(value), "Correct the spelling or pick another.")


def number(name: str, value: object, low: float, high: float = float("inf"), below: bool = False) -> None:
    """A setting that is a finite number in [low, high], or in [low, high) with `below`."""
    bound = f"in [{low:g}, {high:g}{')' if below else ']'}" if high != float("inf") else f">= {low:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(f"{name} to be a number {bound}", repr(value), f"Pass a float for {name}.", TypeError)
    if not (low <= value <= high) or value == float("inf") or (below and value == high):
        fail(f"{name} {bound}", repr(value), f"Choose {name} in that range.")


def num_classes(value: object) -> int:
    """The number of classes, a positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail("num_classes to be an int", repr(value), "Pass the number of channels of input.", TypeError)
    if value < 1:
        fail("num_classes >= 1", value, "Pass the number of channels of input.")
    return value


def pass_settings(settings: Pass) -> Pass:
    """Settings of a pass -> the same, with the fields in the package's order; or an error that names the setting."""
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


def frozen_regions(regions: Any) -> tuple[tuple[int, ...], ...] | None:
    """A sequence of sequences of class numbers -> tuples; which classes there are is checked with the input."""
    if regions is None:
        return None
    try:
        return tuple(tuple(region) for region in regions)
    except TypeError:
        advice = "Write a single region with a comma: regions=((1, 2),)."
        fail("regions to be tuples of class numbers", repr(regions), advice, TypeError)


def class_numbers(name: str, values: Sequence[int], count: int) -> tuple[int, ...]:
    """Distinct class numbers in [0, count)."""
    if not isinstance(values, Iterable) or not all(isinstance(value, SupportsIndex) for value in values):
        advice = "Pass class numbers, for example (1, 2)."
        fail(f"{name} to be a sequence of ints", repr(values), advice, TypeError)
    numbers = tuple(int(value) for value in values)
    bad = [value for value in numbers if not 0 <= value < count]
    if bad or not numbers or len(set(numbers)) != len(numbers):
        got = f"{bad[0]}" if bad else f"{numbers}"
        fail(f"{name} to be distinct class numbers in [0, {count})", got, f"There are {count} classes.")
    return numbers


def class_weights(values: Any, count: int) -> Tensor:
    """One finite weight >= 0 per class, not all of them 0."""
    try:
        weight_C = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        fail("class_weight to be numbers", repr(values), "Pass one weight per class.", TypeError)
    if weight_C.shape != (count,):
        fail(f"class_weight of shape ({count},)", tuple(weight_C.shape), "Pass one weight per class.")
    right, expected = ((weight_C >= 0) & weight_C.isfinite()).all() & (weight_C > 0).any(), "finite, >= 0 and not all 0"
    if weight_C.is_meta or torch.compiler.is_compiling():
        torch._assert_async(right, message(f"class_weight {expected}", UNSEEN, "Pass other weights."))
    elif not bool(right):
        fail(f"class_weight {expected}", weight_C.tolist(), "Pass other weights.")
    return weight_C


def tensors(
    input: Tensor,
    target: Tensor,
    voxel_weight: Tensor | None,
    num_classes: int | None,
    ignore_index: int | None,
    validate: bool,
) -> Voxels:
    """What a user has -> input (B, C, V), target (B, V) or (B, C, V), weight (B, V) or None: views where possible."""
    are_tensors(input=input, target=target, **({} if voxel_weight is None else {"voxel_weight": voxel_weight}))
    if input.dtype not in INPUT_DTYPES:
        advice = "Pass logits or probabilities first, labels second."
        fail("input of dtype float16, bfloat16, float32 or float64", input.dtype, advice, TypeError)
    if input.ndim < 3:
        fail("input of shape (B, C, *S)", tuple(input.shape), "Add the missing dimension with unsqueeze.")
    if num_classes is not None and input.shape[1] != num_classes:
        expected = f"input of shape (B, {num_classes}, *S) for num_classes={num_classes}"
        fail(expected, tuple(input.shape), "Make num_classes the number of channels, which stand second.")
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
        target = (_whole(target, validate) if target.is_floating_point() else target).flatten(1)
    return Voxels(input.flatten(2), target, _weight(voxel_weight, B, S))


def labels_alone(input: Tensor, target: Tensor) -> None:
    """A label map of several classes, where each voxel has to have one label."""
    if isinstance(input, Tensor) and input.ndim > 1 and input.shape[1] == 1:
        advice = "With a single channel there is nothing to confuse: pass both classes."
        fail("input of at least two classes", tuple(input.shape), advice)
    if isinstance(target, Tensor) and isinstance(input, Tensor) and target.shape == input.shape:
        fail("a label map, (B, *S) or (B, 1, *S)", f"target of shape {tuple(target.shape)}", "Pass target.argmax(1).")


def are_tensors(advice: str | None = None, /, **given: object) -> None:
    """Values by name -> they are Tensors; else what to do about the first that is none."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            parts = isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape")
            how = "Stack them with torch.stack." if parts else f"Wrap {name} in torch.as_tensor."
            fail(f"{name} to be a Tensor", type(value).__name__, advice or how, TypeError)


def same_device(device: torch.device, owner: str, **given: Tensor | None) -> None:
    """Tensors by name, or None -> they are on the device, which is the owner's."""
    for name, value in given.items():
        if value is not None and value.device != device:
            fail(f"{name} on {device} like {owner}", value.device, f"Move it: {name}.to({owner}.device).")


def without_metadata(tensor: Tensor) -> Tensor:
    """A subclass that only carries metadata (MONAI's MetaTensor) -> the Tensor in it; others as they are."""
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
    """What a user has, input (B, C, *S), classes or regions -> the map (B, 1 or columns, V), where one is read."""
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
    """A float map with whole values -> int32 labels."""
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
    """Whether there are no values, or a look at them would stop the device or the compiler: an assertion is left."""
    return tensor.is_cuda or tensor.is_meta or torch.compiler.is_compiling()


def values(given: Voxels, settings: Pass) -> None:
    """Ranges of labels, probabilities and weights, by plain torch operations on what `tensors` returned."""
    input, target, weight, *_ = given
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


def check(wrong: Tensor, valid: Tensor | None, source: Tensor, error: Callable[..., str]) -> None:
    """Raise where a voxel that counts is wrong; where no value can be looked at, leave an assertion or say less."""
    if valid is not None:
        wrong = wrong & (valid if wrong.ndim == 2 else valid.unsqueeze(1))
    if _deferred(source):
        torch._assert_async(~wrong.any(), error())
    elif torch._C._functorch.is_functorch_wrapped_tensor(wrong):  # vmap lets nobody look at a value: look beneath it
        while torch._C._functorch.is_functorch_wrapped_tensor(wrong):
            wrong = torch._C._functorch.get_unwrapped(wrong)
        if bool(wrong.any()):
            raise ValueError(error())
    elif bool(wrong.any()):
        raise ValueError(error(source[wrong][0].item(), int(wrong.sum())))


def hard(values: Tensor, what: str = "target", advice: str = "Round it, or use softdice.FocalLoss.") -> Tensor:
    """Per-class values or a mask -> the same, all 0 or 1; the formulas for values between are no sums over voxels."""

    def error(value: object = UNSEEN, count: object = SOME) -> str:
        got = f"values such as {value:g}" if isinstance(value, float) else f"{value}"
        return message(f"a {what} of zeros and ones", got, advice)

    if values.dtype != torch.bool:
        check((values != 0) & (values != 1), None, values, error)
    return values


def probability_slack(dtype: torch.dtype) -> float:
    """How far beyond [0, 1] a probability may lie by rounding alone."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


UNSEEN, SOME = "values outside", "some"
"""In the place of the value that is wrong and of their number, where nobody can look."""


def labels_error(num_classes: int, ignore_index: int | None, value: object = UNSEEN, count: object = SOME) -> str:
    """A label outside [0, C) that is not ignore_index -> what to say."""
    allowed = f"labels in [0, {max(num_classes, 2)})" + ("" if ignore_index is None else f" or {ignore_index}")
    what = "target with " + (allowed if num_classes > 1 else f"{allowed} (1 is in the only class)")
    return message(what, f"{value} ({count} voxels)", "Raise num_classes, remap the labels, or set ignore_index.")


def target_error(value: object = UNSEEN, count: object = SOME) -> str:
    """A per-class value outside [0, 1] -> what to say."""
    return message("per-class values in [0, 1] in target", f"{value} ({count} values)", "Scale target to [0, 1].")


def probabilities_error(value: object = UNSEEN, count: object = SOME) -> str:
    """Logits where probabilities should be -> what to say."""
    advice = "For logits pass activation='softmax' or activation='sigmoid'."
    return message("probabilities in [0, 1] in input (activation='none')", f"{value} ({count} values)", advice)


def weights_error(value: object = UNSEEN, count: object = SOME) -> str:
    """A negative or NaN weight -> what to say."""
    return message("voxel_weight >= 0", f"{value} ({count} voxels)", "Use 0 for a voxel that should not count.")


def package(caller: str, name: str, extra: str) -> ModuleType:
    """name of a package -> the package, imported; the error for a missing one names the extra that brings it."""
    packages(caller, (name,), extra)
    return import_module(name)


def packages(caller: str, names: Iterable[str], extra: str) -> None:
    """names of packages -> all of them can be imported; or one error that names all that are missing, and the extra."""
    absent = list(dict.fromkeys(filter(None, map(_missing, names))))
    if absent:
        got = "no such package" if len(absent) == 1 else "no such packages"
        advice = f"Run: pip install 'softdice[{extra}]'"
        raise ModuleNotFoundError(
            f"{caller}: expected {', '.join(absent)} to be installed, got {got}. {advice}", name=absent[0]
        )


def _missing(name: str) -> str | None:
    """name of a package -> of what cannot be found when it is imported, itself or one that it needs; None: nothing."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        return {"PIL": "pillow", "cc3d": "connected-components-3d", "skimage": "scikit-image"}.get(missing, missing)
    return None


def attribute_needs(attribute: str, name: str, extra: str) -> None:
    """For a module's `__getattr__`: "module.attribute", name of the package that it needs -> the package is there.

    Else the module has no such attribute, and hasattr is False. `from module import attribute` would not show why, so
    what looks the name up for it gets the error itself.
    """
    try:
        package(attribute, name, extra)
    except ModuleNotFoundError as error:
        if sys._getframe(2).f_code.co_name == "_handle_fromlist":
            raise
        raise AttributeError(str(error)) from error
