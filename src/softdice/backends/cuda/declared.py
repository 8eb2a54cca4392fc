"""Write the functions that a Triton kernel is compiled with, from the declared statistics that a pass asks for."""

from __future__ import annotations

import ast
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from softdice.backends.cuda.math import SIGMOID, SOFTMAX, symbols, voxel_sum
from softdice.statistics.declared import STATISTICS, SYMBOLS, Statistic, function


class Constants(NamedTuple):
    """What the symbols depend on beside the voxel: the exponents, y' = keep y + share, the activation's number."""

    keep: float
    share: float
    gamma: float
    power: float
    activation: int


@cache
def terms(fields: tuple[str, ...], constants: Constants) -> dict[str, Any]:
    """Return NOTHING, PLUS and PUT of the forward kernel.

    What is the same for every class of a voxel is summed once for all of them: in a lane, not in a row of lanes, and
    with the first tile of classes alone.
    """
    chosen = _chosen(fields)
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
    """Return TAKE and SLOPES of the backward kernel, and SLOPED, the number of statistics with a slope.

    A slope with j = dp/dx in it is steep: it is divided by j, which is 1 among the symbols here, and applied when the
    classes have been brought together. The others are straight: dL/dx as they are, and finite where p is 0.
    """
    chosen = [s for s in _chosen(fields) if _reduced(s.slope, constants) != "0"]
    take = ", ".join(
        f"tl.load(grad + {fields.index(s.name)} * gF + k * gK, mask=inside, other=0.0).to(W)" for s in chosen
    )
    steep, straight = (
        " + ".join(
            f"coefficients[{i}] * ({_reduced(s.slope, constants)})"
            for i, s in enumerate(chosen)
            if s.names("j", slope=True) == way
        )
        or "tl.zeros_like(p)"
        for way in (True, False)
    )
    known = _known(chosen, constants, slope=True)
    return {
        "TAKE": _jit("take(grad, k, gF, gK, inside, W: tl.constexpr)", f"return ({take}{',' if take else ''})"),
        "SLOPES": _jit("slopes(coefficients, p, q, a, b, t, m)", known, f"return {steep}, {straight}"),
        "SLOPED": len(chosen),
    }


class _Reduction(ast.NodeTransformer):
    """Work out products with 0 and 1, and sums with 0: the compiler may not, because of NaN."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self.numbers = numbers

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.numbers[node.id]) if node.id in self.numbers else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
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
    """Return an expression without the symbols that are 0 or 1 for an activation.

    One that is 0 with them stays as it is: what is NaN in it reaches the sum, as by the definition.
    """
    numbers = {"j": 1}
    if constants.activation != SIGMOID:
        numbers |= {"b": 0, "r": 0, "g": 0}
    if constants.activation == SOFTMAX:
        numbers |= {"s": 1}
    reduced = ast.unparse(_Reduction(numbers).visit(ast.parse(expression, mode="eval")))
    return expression if reduced == "0" else reduced


def _chosen(fields: tuple[str, ...]) -> list[Statistic]:
    known = {statistic.name: statistic for statistic in STATISTICS}
    return [known[name] for name in fields]


def _known(chosen: list[Statistic], constants: Constants, slope: bool) -> str:
    """The line that works the symbols out, and of those that cost something only the ones that are named."""
    groups = (("a", "b", "s", "r", "f", "g"), ("u", "v"), ("d", "e"))
    needed = [any(s.names(*group, slope=slope) for s in chosen) for group in groups]
    return f"{', '.join(SYMBOLS)} = symbols(p, q, a, b, t, m, {', '.join(map(repr, (*constants, *needed)))})"


def _jit(signature: str, *lines: str) -> Any:
    return triton.jit(function(signature, "\n    ".join(lines), {"tl": tl, "symbols": symbols, "voxel_sum": voxel_sum}))
