"""name -> what a voxel adds to a statistic: the one place where each statistic is declared.

A statistic is a sum over the voxels of w times its `term`; `slope` is what that term does to dL/dx, the gradient of the
logit (or probability) x of its own class. Both are expressions in the symbols below, read by everyone who computes
statistics: the definition (on torch tensors), the CPU kernel and the GPU kernel (one voxel and class at a time), and
the documentation. A new statistic is a line of STATISTICS.

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
    m       the map: a number given for each voxel, or for each voxel and class
    ======  ================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from itertools import count
from linecache import cache as sources
from typing import Any

SYMBOLS = ("p", "q", "y", "n", "t", "a", "b", "u", "v", "d", "e", "j", "s", "r", "f", "g", "gamma", "m")
"""What an expression may name, in the order in which compiled code passes it on."""


def function(signature: str, body: str, names: dict[str, Any]) -> Callable[..., Any]:
    """signature, expression or statements -> a function whose source can be read, as compilers want to."""
    text = f"def {signature}:\n    {body}\n"
    file = f"<softdice.terms {next(_number)}>"
    sources[file] = (len(text), None, text.splitlines(keepends=True), file)
    found: dict[str, Any] = {}
    exec(compile(text, file, "exec"), names, found)
    (made,) = found.values()
    return made


_number = count()


class Statistic:
    """One declaration: the name of the field, its formula for a reader, and the two expressions.

    `value` is the term as a function of the symbols (by name; it may be given more than it reads), numbers or tensors.
    """

    def __init__(self, name: str, formula: str, term: str, slope: str) -> None:
        self.name, self.formula, self.term, self.slope = name, formula, term, slope
        self._in_term, self._in_slope = _symbols(term), _symbols(slope)
        self.value = function(f"{name}({', '.join((*self._in_term, '**others'))})", f"return {term}", {})

    def names(self, *symbols: str, slope: bool = False) -> bool:
        """Whether one of the symbols stands in the term (or the slope)."""
        read = self._in_slope if slope else self._in_term
        return any(symbol in read for symbol in symbols)

    @cached_property
    def elsewhere(self) -> tuple[bool, bool]:
        """Whether a class that a voxel does not belong to (y = 0) adds to the sum, and has a slope; of a softmax."""
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
MAPPED = tuple(statistic.name for statistic in STATISTICS if statistic.names("m"))
"""Those that read a map beside the target, and"""
FIELDS = tuple(name for name in NAMES if name not in MAPPED)
"""those that do not."""

READERS = {
    "gamma": frozenset(statistic.name for statistic in STATISTICS if statistic.names("u", "v")),
    "power": frozenset(statistic.name for statistic in STATISTICS if statistic.names("d")),
}
"""exponent -> the statistics that it changes."""
