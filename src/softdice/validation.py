"""The one form of error, whose it is, checks of single settings, and packages that may be missing.

Messages read `function: expected X, got Y. What to do.` Checks of tensors are in `softdice.statistics.check`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn, ParamSpec, SupportsIndex, TypeVar

import torch
from torch import Tensor

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
    """Put a function's name in front of the errors that cross it, unless they have one already.

    The name is the function's, the class's for those of `_OF_THE_CLASS`, `Class.method` for its other methods.
    """
    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]
    method = "" if function.__name__ in _OF_THE_CLASS else f".{function.__name__}"

    def named(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except Exception as error:
            if not torch.compiler.is_compiling():
                default = type(args[0]).__name__ + method if is_method else function.__name__
                _say_whose(error, name or default)
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


def frozen_regions(regions: Any) -> tuple[tuple[int, ...], ...] | None:
    """Return sequences of class numbers as tuples; which classes there are is checked with the input."""
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
        torch._assert_async(right, message(f"class_weight {expected}", "values outside", "Pass other weights."))
    elif not bool(right):
        fail(f"class_weight {expected}", weight_C.tolist(), "Pass other weights.")
    return weight_C


def are_tensors(advice: str | None = None, /, **values: object) -> None:
    """Raise TypeError for the first value that is not a Tensor with its elements at strides."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            _require_strided(name, value)
        else:
            parts = isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape")
            how = "Stack them with torch.stack." if parts else f"Wrap {name} in torch.as_tensor."
            if isinstance(value, Mapping):  # what torchvision's and transformers' networks return
                key = next((key for key, part in value.items() if isinstance(part, Tensor)), "out")
                how = f"Pass the tensor in it, for example {name}[{key!r}]."
            fail(f"{name} to be a Tensor", type(value).__name__, advice or how, TypeError)


def _require_strided(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a nested or a sparse tensor. It comes before checks of shapes, which fail on them."""
    expected = f"a strided tensor for {name}"
    if tensor.is_nested:
        advice = f"Pad it, torch.nested.to_padded_tensor({name}, 0), and leave the padding out: give it the label "
        fail(expected, "a nested one", advice + "ignore_index in target, or a voxel_weight of 0.", TypeError)
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        fail(expected, f"a {layout} one", f"Pass {name}.to_dense().", TypeError)


def same_device(device: torch.device, owner: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not on the owner's device."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            fail(f"{name} on {device} like {owner}", value.device, f"Move it: {name}.to({owner}.device).")


def package(caller: str, name: str, extra: str) -> ModuleType:
    """Import a package; the error for a missing one names the extra that brings it."""
    packages(caller, (name,), extra)
    return import_module(name)


def packages(caller: str, names: Iterable[str], extra: str) -> None:
    """Raise one error that names all packages that are missing, and the extra that brings them."""
    absent = list(dict.fromkeys(filter(None, map(_missing, names))))
    if absent:
        got = "no such package" if len(absent) == 1 else "no such packages"
        advice = f"Run: pip install 'softdice[{extra}]'"
        raise ModuleNotFoundError(
            f"{caller}: expected {', '.join(absent)} to be installed, got {got}. {advice}", name=absent[0]
        )


def _missing(name: str) -> str | None:
    """Return the name of the package, it or one that it needs, that an import cannot find; None if all are there."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        return {"PIL": "pillow", "cc3d": "connected-components-3d", "skimage": "scikit-image"}.get(missing, missing)
    return None


def attribute_needs(attribute: str, name: str, extra: str) -> None:
    """Raise for a module's attribute whose package is missing; called in the module's `__getattr__`.

    Else the module has no such attribute, and hasattr is False. `from module import attribute` would not show why, so
    what looks the name up for it gets the error itself.
    """
    try:
        package(attribute, name, extra)
    except ModuleNotFoundError as error:
        if sys._getframe(2).f_code.co_name == "_handle_fromlist":
            raise
        raise AttributeError(str(error)) from error
