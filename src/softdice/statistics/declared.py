"""Declare every statistic once: its term and its slope.

A statistic is a sum over the voxels of w times its `term`; `slope` is what that term contributes to dL/dx, the gradient
of the logit (or probability) x of its own class. Both are expressions in the symbols below. The definition evaluates
them on torch tensors; the CPU and the GPU kernel compile them for one voxel and class. A new statistic is a line of
STATISTICS, and of the bundle in BUNDLES that losses read it with.

    ======  ================================================================================================
    p, q    the probability, and 1 - p (each computed without cancellation)
    y, n    the target after label smoothing, and 1 - y
    t       the target before label smoothing
    a, b    -ln p, or 0 where y = 0; -ln(1 - p), or 0 where y = 1 (b for a sigmoid only, elsewhere 0)
    u, v    q^gamma, p^gamma
    d, e    abs(p - y)^power, and its derivative by p
    j       dp/dx: p for a softmax (the rest of its Jacobian couples the classes), p q for a sigmoid, else 1
    s, r    -da/dx and db/dx: 1 and 0 for a softmax, q and p for a sigmoid, 1 / p and 0 else
    f, g    p a s / q and q b r / p, finite where q or p is 0
    m       the map: a number that the caller passes for each voxel, or for each voxel and class
    ======  ================================================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cached_property
from linecache import cache as sources
from typing import Any

SYMBOLS = ("p", "q", "y", "n", "t", "a", "b", "u", "v", "d", "e", "j", "s", "r", "f", "g", "gamma", "m")
"""The names that an expression may contain."""


def function(signature: str, body: str, names: dict[str, Any]) -> Callable[..., Any]:
    """Compile `def signature: body` and return the function; the text stays where debuggers and compilers look for it.

    The qualified name ends with a digest of the text, so that equal names mean equal code across two processes.

    signature: name and parameters, `f(x, y)`. body: statements; all lines after the first are indented by 4 already.
    names: the function's globals.
    """
    text = f"def {signature}:\n    {body}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = f"<softdice {digest}>"
    sources[file] = (len(text), None, text.splitlines(keepends=True), file)  # no time of change: never out of date
    scope = dict(names)
    exec(compile(text, file, "exec"), scope)
    result: Callable[..., Any] = scope[signature.partition("(")[0]]
    result.__qualname__ += f"_{digest}"
    return result


class Statistic:
    """One declaration: the name of the field, its formula for a reader, and the expressions `term` and `slope`.

    `value(**symbols)` evaluates the term on numbers or tensors; it ignores symbols that the term does not name.
    """

    def __init__(self, name: str, formula: str, term: str, slope: str) -> None:
        self.name, self.formula, self.term, self.slope = name, formula, term, slope
        self._in_term, self._in_slope = _symbols(term), _symbols(slope)
        self.value = function(f"{name}({', '.join((*self._in_term, '**others'))})", f"return {term}", {})

    def names(self, *symbols: str, slope: bool = False) -> bool:
        """Return whether one of the symbols occurs in the term, or with `slope` in the slope."""
        names = self._in_slope if slope else self._in_term
        return any(symbol in names for symbol in symbols)

    @cached_property
    def elsewhere(self) -> tuple[bool, bool]:
        """Whether term and slope differ from 0 at a class that a voxel does not belong to (y = 0); for a softmax."""
        # 0.3 stands for any number that is not 0: no expression vanishes there by chance
        numbers = dict.fromkeys(SYMBOLS, 0.3) | dict.fromkeys(("y", "t", "a", "b", "r", "f", "g"), 0.0) | {"n": 1.0}
        return tuple(eval(text, numbers) != 0 for text in (self.term, self.slope))


def _symbols(expression: str) -> list[str]:
    return sorted(set(re.findall(r"[a-z]+", expression)))


STATISTICS = (
    Statistic("intersection", "sum w p y", "p * y", "j * y"),
    Statistic("prediction", "sum w p", "p", "j"),
    Statistic("target", "sum w y", "y", "0"),
    Statistic("prediction_squared", "sum w p^2", "p * p", "j * (p + p)"),
    Statistic("target_squared", "sum w y^2", "y * y", "0"),
    Statistic("difference", "sum w abs(p - y)^power", "d", "j * e"),
    Statistic("cross_entropy", "sum w (y (-ln p) + (1 - y) (-ln(1 - p)))", "y * a + n * b", "n * r - y * s"),
    Statistic(
        "focal",
        "sum w (y (1 - p)^gamma (-ln p) + (1 - y) p^gamma (-ln(1 - p)))",
        "y * u * a + n * v * b",
        "n * v * (gamma * g + r) - y * u * (gamma * f + s)",
    ),
    Statistic("positive_cross_entropy", "sum w y (-ln p)", "y * a", "-y * s"),
    Statistic("negative_cross_entropy", "sum w (1 - y) (-ln(1 - p)); 0 but for a sigmoid", "n * b", "n * r"),
    Statistic("positive_focal", "sum w y (1 - p)^gamma (-ln p)", "y * u * a", "-y * u * (gamma * f + s)"),
    Statistic(
        "negative_focal",
        "sum w (1 - y) p^gamma (-ln(1 - p)); 0 but for a sigmoid",
        "n * v * b",
        "n * v * (gamma * g + r)",
    ),
    Statistic("voxels", "sum w", "1", "0"),
    Statistic("labelled", "sum w y, before label smoothing: 0 where a class is absent", "t", "0"),
    Statistic("mapped_prediction", "sum w m p", "m * p", "m * j"),
    Statistic("mapped_intersection", "sum w m p y", "m * p * y", "m * j * y"),
    Statistic("mapped_target", "sum w m y", "m * y", "0"),
)
"""Every statistic, in the order in which a pass returns those that it is asked for."""

NAMES = tuple(statistic.name for statistic in STATISTICS)
BY_NAME = {statistic.name: statistic for statistic in STATISTICS}
MAPPED = tuple(statistic.name for statistic in STATISTICS if statistic.names("m"))
"""Statistics that read a map beside the target."""
FIELDS = tuple(name for name in NAMES if name not in MAPPED)
"""Statistics that read no map."""

READERS = {
    "gamma": frozenset(statistic.name for statistic in STATISTICS if statistic.names("u", "v")),
    "power": frozenset(statistic.name for statistic in STATISTICS if statistic.names("d")),
}
"""Exponent -> the statistics that it changes."""

_OVERLAP = ("intersection", "prediction", "target", "labelled", "voxels")
_SQUARES = ("prediction_squared", "target_squared")
BUNDLES = (
    _OVERLAP,
    (*_OVERLAP, *_SQUARES),
    (*_OVERLAP, *_SQUARES, "difference"),
    (*_OVERLAP, "cross_entropy"),
    (*_OVERLAP, "cross_entropy", "focal"),
    (*_OVERLAP, "positive_cross_entropy", "negative_cross_entropy"),
    (*_OVERLAP, "positive_focal", "negative_focal"),
    (*_OVERLAP, "cross_entropy", *MAPPED),
    FIELDS,
    NAMES,
)
"""Sets of statistics that CPU kernels are compiled for, the smallest first."""


def bundle(fields: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first of BUNDLES that holds all the fields."""
    return next(names for names in BUNDLES if set(fields) <= set(names))
