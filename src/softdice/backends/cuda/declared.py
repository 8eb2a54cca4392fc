"""Write the functions that a Triton kernel is compiled with, from the declared statistics that a pass asks for.

`fields` are names of statistics, whose term and slope are expressions in symbols (`softdice.statistics.declared`). The
texts name tiles and pointers as `softdice.backends.cuda.math` does; W is the dtype of sums. Beside them:

    sums               a tuple of tiles, one for each statistic: [KT, BV], or [1, BV] if it is the same for all classes;
                       NOTHING takes two such tiles of zeros, row and lane
    k                  columns, classes or regions, [KT, 1]
    partial, row       pointer to the sums of all programs (rows, K), and the first row of this program
    grad, gF, gK       pointer to dL/dsums of a sample, and its strides by statistic and column
    coefficients       dL/dsums of the statistics with a slope, a tuple of tiles [KT, 1]
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from softdice.backends.cuda.math import SIGMOID, SOFTMAX, symbols, voxel_sum
from softdice.statistics.declared import BY_NAME, SYMBOLS, Statistic, function


class Constants(NamedTuple):
    """What the symbols depend on beside the voxel: y = keep t + share, the exponents, the activation's number."""

    keep: float
    share: float
    gamma: float
    power: float
    activation: int


@cache
def terms(fields: tuple[str, ...], constants: Constants) -> dict[str, Any]:
    """Return the forward kernel's functions by name: NOTHING returns sums of 0, PLUS adds a tile, PUT stores the sums.
    A statistic without symbols, such as the number of voxels, is the same for every class: its sum is a lane, [1, BV].
    Only the first of a program's tiles of classes (FIRST) adds to it, and PUT stores it for all of them."""
    chosen = [BY_NAME[name] for name in fields]
    shared = [not s.names(*SYMBOLS) for s in chosen]
    zeros = ", ".join("lane" if same else "row" for same in shared)
    plus = ", ".join(
        f"sums[{i}] + w if FIRST else sums[{i}]" if same else f"sums[{i}] + ({_reduced(s.term, constants)}) * w"
        for i, (s, same) in enumerate(zip(chosen, shared, strict=True))
    )
    put = [
        f"tl.store(partial + (row + {i}) * K + k, voxel_sum({'first' if same else 'sums'}[{i}]), mask=k < K)"
        for i, same in enumerate(shared)
    ]
    return {
        "NOTHING": _jit("nothing(row, lane)", f"return ({zeros},)"),
        "PLUS": _jit(
            "plus(sums, FIRST: tl.constexpr, w, p, q, a, b, t, m)",
            _known(chosen, constants, slope=False),
            f"return ({plus},)",
        ),
        "PUT": _jit("put(sums, first, partial, row, k, K)", *put),
    }


@cache
def slopes(fields: tuple[str, ...], constants: Constants) -> dict[str, Any]:
    """Return the backward kernel's functions by name, TAKE and SLOPES, and SLOPED, the number of sloped statistics.
    TAKE loads the coefficients; SLOPES returns two tiles, the sums of steep and of straight slopes times coefficients.
    A steep slope has the factor j = dp/dx. Here j is 1, so that the sum is dL/dp; the kernel multiplies it by dp/dx,
    for which a softmax needs all classes. The other slopes are straight: they are dL/dx, and finite where p is 0."""
    chosen = [s for s in map(BY_NAME.__getitem__, fields) if _reduced(s.slope, constants) != "0"]
    take = ", ".join(
        f"tl.load(grad + {fields.index(s.name)} * gF + k * gK, mask=inside, other=0.0).to(W)" for s in chosen
    )
    steep, straight = (
        " + ".join(
            f"coefficients[{i}] * ({_reduced(s.slope, constants)})"
            for i, s in enumerate(chosen)
            if s.names("j", slope=True) == of_steep
        )
        or "tl.zeros_like(p)"
        for of_steep in (True, False)
    )
    known = _known(chosen, constants, slope=True)
    return {
        "TAKE": _jit("take(grad, k, gF, gK, inside, W: tl.constexpr)", f"return ({take}{',' if take else ''})"),
        "SLOPES": _jit("slopes(coefficients, p, q, a, b, t, m)", known, f"return {steep}, {straight}"),
        "SLOPED": len(chosen),
    }


class _Reduction(ast.NodeTransformer):
    """Simplify products with 0 and 1, and sums with 0, which the compiler may not because of NaN.
    Declared expressions have no operators but +, - and *. numbers: symbols that stand for 0 or 1, by name."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self.numbers = numbers

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.numbers[node.id]) if node.id in self.numbers else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Return the operation with both sides simplified; or one side, its negative, or 0, if it is equal to that."""
        a, b = self.visit(node.left), self.visit(node.right)
        zeros = [isinstance(side, ast.Constant) and side.value == 0 for side in (a, b)]
        ones = [isinstance(side, ast.Constant) and side.value == 1 for side in (a, b)]
        if isinstance(node.op, ast.Mult):
            if any(zeros):
                return ast.Constant(0)
            return b if ones[0] else a if ones[1] else ast.BinOp(a, node.op, b)
        if zeros[0] and isinstance(node.op, ast.Sub):
            return ast.UnaryOp(ast.USub(), b)
        return b if zeros[0] else a if zeros[1] else ast.BinOp(a, node.op, b)


def _reduced(expression: str, constants: Constants) -> str:
    """Return a declared term or slope simplified for the symbols that are 0 or 1 with an activation.
    1: j = dp/dx, which the kernel applies, and s = -da/dx of a softmax. 0, but for a sigmoid: b = -ln(1 - p), r and g.
    An expression that would become 0 stays as it is: a NaN in it has to reach the sum, as in the definition."""
    numbers = {"j": 1}
    if constants.activation != SIGMOID:
        numbers |= {"b": 0, "r": 0, "g": 0}
    if constants.activation == SOFTMAX:
        numbers |= {"s": 1}
    reduced = ast.unparse(_Reduction(numbers).visit(ast.parse(expression, mode="eval")))
    return expression if reduced == "0" else reduced


def _known(chosen: list[Statistic], constants: Constants, slope: bool) -> str:
    """Return the line that assigns all symbols, and works out a group of dear ones only if a term or slope needs it."""
    groups = (("a", "b", "s", "r", "f", "g"), ("u", "v"), ("d", "e"))
    needed = [any(s.names(*group, slope=slope) for s in chosen) for group in groups]
    return f"{', '.join(SYMBOLS)} = symbols(p, q, a, b, t, m, {', '.join(map(repr, (*constants, *needed)))})"


def _jit(signature: str, *lines: str) -> Any:
    """Return the Triton function with a signature and lines of text."""
    return triton.jit(function(signature, "\n    ".join(lines), {"tl": tl, "symbols": symbols, "voxel_sum": voxel_sum}))
