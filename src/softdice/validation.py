"""The form that all errors have, the name of the function in them, checks of settings, packages that may be missing.

Messages read `function: expected X, got Y. What to do.` Checks of tensors are in `softdice.statistics.check`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from numbers import Real
from types import ModuleType
from typing import Any, NoReturn, ParamSpec, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# --- the form of an error, and the name in it

PACKAGE = "softdice"
"""First word of an error until `public` replaces it by the name of the function that the user called (in compiled code
it cannot)."""


def message(expected: str, got: object, advice: str) -> str:
    """Return the one form of error that this package has; expected and got are nouns, advice is a sentence."""
    return f"{PACKAGE}: expected {expected}, got {got}. {advice}"


def fail(expected: str, got: object, advice: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise an error with the text of `message`; the first `public` function that it crosses puts its name in front."""
    raise error(message(expected, got, advice))


_OF_THE_CLASS = ("__init__", "__post_init__", "__prepare_scriptable__", "forward")
"""Methods that stand for their class; torch.jit.script calls the third before it does anything."""


def public(function: Callable[P, R], name: str | None = None) -> Callable[P, R]:
    """Wrap a function that users call, so that the errors of this package that leave it begin with its name.

    An error that has a name already keeps it. If `name` is None, the name is "Class" for a method that stands for its
    class (`__init__`, `forward`), "Class.method" for other methods, and "function" for a function.
    """
    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]
    method = "" if function.__name__ in _OF_THE_CLASS else f".{function.__name__}"

    def named(*args: P.args, **keywords: P.kwargs) -> R:
        """Call the function, and name it in an error; compiled code cannot look into errors."""
        try:
            return function(*args, **keywords)
        except Exception as error:
            if not torch.compiler.is_compiling():
                default = type(args[0]).__name__ + method if is_method else function.__name__
                _say_whose(error, name or default)
            raise

    # one code object for each function: torch.compile limits recompilations, and notes what varies, by code object
    named.__code__ = named.__code__.replace(co_name=function.__name__)
    return wraps(function)(named)


def public_as(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return `public` as a decorator, for what users know by another name than the function's own."""
    return lambda function: public(function, name)


def _say_whose(error: Exception, name: str) -> None:
    """Write the name into the text of an error of this package's form that has none; leave others as they are."""
    text = str(error.args[0]) if error.args else ""
    if text.startswith(f"{PACKAGE}: expected "):
        error.args = (text.replace(PACKAGE, name, 1),)


# --- settings


# name: of the setting, for the message. value: what a user passed.


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless a setting is one of a few words."""
    if value not in tuple(allowed):
        words = ", ".join(repr(word) for word in allowed)
        fail(f"{name} to be one of {words}", repr(value), "Correct the spelling or pick another.")


def number(name: str, value: object, low: float, high: float = float("inf"), below: bool = False) -> None:
    """Raise TypeError unless a setting is an int or float, ValueError unless it is finite and in the range.

    The range is [low, high], or [low, high) with `below`.
    """
    bound = f"in [{low:g}, {high:g}{')' if below else ']'}" if high != float("inf") else f">= {low:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(f"{name} to be a number {bound}", repr(value), f"Pass a float for {name}.", TypeError)
    if not (low <= value <= high) or abs(value) == float("inf") or (below and value == high):
        fail(f"{name} {bound}", repr(value), f"Choose {name} in that range.")


def exponent(name: str, value: object) -> None:
    """Raise TypeError unless the exponent of a cost is an int or float, ValueError unless it is finite and above 0."""
    number(name, value, 0)
    if value == 0:
        fail(f"{name} > 0", value, "With 0 the loss would be constant.")


def numbers_of(values: object) -> Any:
    """Return a user's setting in Python's types: a number of NumPy or torch as int or float, several as a tuple.

    Anything else is returned as it is, for the check that follows.

    Example:
        >>> numbers_of(np.float32(0.5)), numbers_of(torch.tensor([1, 2])), numbers_of([np.int64(3), 1.5])
        (0.5, (1, 2), (3, 1.5))
    """
    if isinstance(values, (Tensor, np.ndarray, np.generic)):
        values = values.tolist()
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes)):
        return tuple(map(numbers_of, values))
    return values


SMALLEST_VOXEL = 1e-50
"""Size of a voxel from which on products of areas are no zeros in float64; its inverse is the largest."""


def voxel_sizes(spacing: object, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Check a user's spacing, and return the size of a voxel along each axis of an image of that shape; 1 for None."""
    ndim, values = len(shape), numbers_of(spacing)
    sizes = values if isinstance(values, tuple) else (1.0 if values is None else values,) * ndim
    numeric = all(isinstance(size, Real) and not isinstance(size, bool) for size in sizes)
    in_range = numeric and all(SMALLEST_VOXEL <= size <= 1 / SMALLEST_VOXEL for size in sizes)
    if len(sizes) != ndim or not in_range:
        advice = f"Pass the size of a voxel along each axis, from {SMALLEST_VOXEL:g} to {1 / SMALLEST_VOXEL:g}."
        fail(f"spacing of {ndim} positive numbers for images of shape {shape}", repr(spacing), advice)
    return tuple(map(float, sizes))


def num_classes(value: object) -> int:
    """Return the number of classes; raise TypeError or ValueError unless it is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail("num_classes to be an int", repr(value), "Pass the number of channels of input.", TypeError)
    if value < 1:
        fail("num_classes >= 1", value, "Pass the number of channels of input.")
    return value


def frozen_regions(regions: Any) -> tuple[tuple[int, ...], ...] | None:
    """Return sequences of class numbers as tuples, or None; raise TypeError for anything else.

    Which classes there are is checked with the input.
    """
    if regions is None:
        return None
    try:
        return tuple(tuple(region) for region in regions)
    except TypeError:
        advice = "Write a single region with a comma: regions=((1, 2),)."
        fail("regions to be tuples of class numbers", repr(regions), advice, TypeError)


def class_numbers(name: str, values: Sequence[int], count: int) -> tuple[int, ...]:
    """Return distinct class numbers in [0, count) as ints; raise TypeError or ValueError for other values.

    True and False are no class numbers: a mask of the classes is not to be taken for classes 1 and 0.
    """
    classes = numbers_of(values)
    if not isinstance(classes, tuple) or not all(
        isinstance(c, SupportsIndex) and not isinstance(c, bool) for c in classes
    ):
        advice = "Pass class numbers, for example (1, 2)."
        fail(f"{name} to be a sequence of ints", repr(values), advice, TypeError)
    numbers = tuple(int(c) for c in classes)
    bad = [value for value in numbers if not 0 <= value < count]
    if bad or not numbers or len(set(numbers)) != len(numbers):
        got = f"{bad[0]}" if bad else f"{numbers}"
        fail(f"{name} to be distinct class numbers in [0, {count})", got, f"There are {count} classes.")
    return numbers


def class_weights(values: Any, count: int, classes: Sequence[int] | None = None) -> Tensor:
    """Return the weights of `classes` (None: all), from a user's, one per class, (count,), as a copy, float32.

    Raise TypeError if they are no numbers; ValueError for another shape, or unless all are finite and >= 0 and one of
    `classes` is above 0. In compiled code and on meta, where values cannot be read, leave an assertion about the values
    instead.
    """
    try:
        weight_C = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        fail("class_weight to be numbers", repr(values), "Pass one weight per class.", TypeError)
    if weight_C.shape != (count,):
        fail(f"class_weight of shape ({count},)", tuple(weight_C.shape), "Pass one weight per class.")
    chosen_C = weight_C if classes is None else weight_C[list(classes)]
    right = ((weight_C >= 0) & weight_C.isfinite()).all() & (chosen_C > 0).any()
    those = "" if classes is None else f" for classes {tuple(classes)}"
    expected, advice = f"class_weight finite, >= 0 and not all 0{those}", "Pass other weights."
    if weight_C.is_meta or torch.compiler.is_compiling():
        torch._assert_async(right, message(expected, "values outside", advice))
    elif not bool(right):
        fail(expected, weight_C.tolist(), advice)
    return chosen_C


def are_tensors(advice: str | None = None, /, **values: object) -> None:
    """Raise TypeError for the first value that is not a Tensor with its elements at strides.

    values: what a user passed, by the names of the arguments. advice: last sentence of the message for a value that is
    no Tensor; None: a sentence that fits its type.
    """
    for name, value in values.items():
        if isinstance(value, Tensor):
            _require_strided(name, value)
        else:
            arrays = isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape")
            how = "Stack them with torch.stack." if arrays else f"Wrap {name} in torch.as_tensor."
            if isinstance(value, Mapping):  # what torchvision's and transformers' networks return
                key = next((key for key, entry in value.items() if isinstance(entry, Tensor)), "out")
                how = f"Pass the tensor in it, for example {name}[{key!r}]."
            fail(f"{name} to be a Tensor", type(value).__name__, advice or how, TypeError)


def _require_strided(name: str, tensor: Tensor) -> None:
    """Raise TypeError if the argument `name` is a nested or sparse tensor, on which checks of shapes would fail."""
    expected = f"a strided tensor for {name}"
    if tensor.is_nested:
        advice = f"Pad it, torch.nested.to_padded_tensor({name}, 0), and leave the padding out: give it the label "
        fail(expected, "a nested one", advice + "ignore_index in target, or a voxel_weight of 0.", TypeError)
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        fail(expected, f"a {layout} one", f"Pass {name}.to_dense().", TypeError)


def same_device(device: torch.device, owner: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor, by the name of its argument, that is not on `device`, the argument `owner`'s."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            fail(f"{name} on {device} like {owner}", value.device, f"Move it: {name}.to({owner}.device).")


def package(caller: str, name: str, extra: str) -> ModuleType:
    """Import and return a package; raise ModuleNotFoundError with the extra of softdice that brings it.

    caller: the function or option that the user called, for the message. name: as it is imported. extra: of
    `pip install softdice[extra]`.
    """
    packages(caller, (name,), extra)
    return import_module(name)


def packages(caller: str, names: Iterable[str], extra: str) -> None:
    """Raise one ModuleNotFoundError that names all packages that are missing; args as `package`."""
    absent = list(dict.fromkeys(filter(None, map(_missing, names))))
    if absent:
        got = "no such package" if len(absent) == 1 else "no such packages"
        text = f"{caller}: expected {', '.join(absent)} to be installed, got {got}."
        raise ModuleNotFoundError(f"{text} Run: pip install 'softdice[{extra}]'", name=absent[0])


def _missing(name: str) -> str | None:
    """Return the package to install, by pip's name, so that the module `name` can be imported; None if it can be."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        return {"PIL": "pillow", "cc3d": "connected-components-3d", "skimage": "scikit-image"}.get(missing, missing)
    return None


def attribute_needs(attribute: str, name: str, extra: str) -> None:
    """Raise AttributeError if a module's attribute needs a package that is missing. A module's `__getattr__` calls it.

    AttributeError makes hasattr return False. But `from module import attribute` drops the error's text, so there the
    ModuleNotFoundError is raised. attribute: its name, for the message. name: of the package, as it is imported.
    extra: of `pip install softdice[extra]`.
    """
    try:
        package(attribute, name, extra)
    except ModuleNotFoundError as error:
        if sys._getframe(2).f_code.co_name == "_handle_fromlist":  # who called __getattr__
            raise
        raise AttributeError(str(error)) from error
