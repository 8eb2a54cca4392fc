"""statistics asked for -> the functions that a Triton kernel is compiled with, written from `softdice.terms`."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from softdice.terms import STATISTICS, SYMBOLS, Statistic, function

_NAMES = {"tl": tl}


def _chosen(fields: tuple[str, ...]) -> list[Statistic]:
    known = {statistic.name: statistic for statistic in STATISTICS}
    return [known[name] for name in fields]


def _jit(signature: str, *lines: str) -> Any:
    return triton.jit(function(signature, "\n    ".join(lines), dict(_NAMES)))


@cache
def terms(fields: tuple[str, ...]) -> dict[str, Any]:
    """Statistics -> NOTHING, PLUS and PUT of the forward kernel, and which symbols they name.

    What is the same for every class of a voxel is summed once for all of them: in a lane, not in a row of lanes.
    """
    chosen = _chosen(fields)
    shared = [not s.names(*SYMBOLS) for s in chosen]
    zeros = ", ".join("lane" if same else "row" for same in shared)
    plus = ", ".join(f"sums[{i}] + ({s.term}) * w" for i, s in enumerate(chosen))
    put = [f"tl.store(partial + (row + {i}) * K + k, {_sum(i, same)}, mask=k < K)" for i, same in enumerate(shared)]
    return {
        "NOTHING": _jit("nothing(row, lane)", f"return ({zeros},)"),
        "PLUS": _jit("plus(sums, w, known)", f"{', '.join(SYMBOLS)} = known", f"return ({plus},)"),
        "PUT": _jit("put(sums, partial, row, k, K)", *put),
        **_needs(chosen, slope=False),
    }


@cache
def slopes(fields: tuple[str, ...]) -> dict[str, Any]:
    """Statistics -> TAKE, STEEP and STRAIGHT of the backward kernel, and which symbols they name.

    A slope with j = dp/dx in it is steep: it is divided by j, which is 1 among the symbols here, and applied when the
    classes have been brought together. The others are straight: dL/dx as they are, and finite where p is 0.
    """
    chosen = [s for s in _chosen(fields) if s.slope != "0"]
    take = ", ".join(
        f"tl.load(grad + {fields.index(s.name)} * gF + k * gK, mask=inside, other=0.0).to(W)[:, None]" for s in chosen
    )
    weighted = {
        steep: " + ".join(
            f"coefficients[{i}] * ({s.slope})" for i, s in enumerate(chosen) if s.names("j", slope=True) == steep
        )
        for steep in (True, False)
    }
    names = f"{', '.join(SYMBOLS)} = known"
    return {
        "TAKE": _jit("take(grad, k, gF, gK, inside, W: tl.constexpr)", f"return ({take}{',' if take else ''})"),
        "STEEP": _jit("steep(coefficients, known)", names, f"return {weighted[True] or 'p * 0.0'}"),
        "STRAIGHT": _jit("straight(coefficients, known)", names, f"return {weighted[False] or 'p * 0.0'}"),
        **_needs(chosen, slope=True),
        "SLOPED": len(chosen),
    }


def _sum(i: int, shared: bool) -> str:
    return f"tl.zeros_like(k).to(sums[{i}].dtype) + tl.sum(sums[{i}], 1)" if shared else f"tl.sum(sums[{i}], 1)"


def _needs(chosen: list[Statistic], slope: bool) -> dict[str, bool]:
    groups = {"LOGS": ("a", "b", "s", "r", "f", "g"), "POWERS": ("u", "v"), "APART": ("d", "e")}
    return {name: any(s.names(*group, slope=slope) for s in chosen) for name, group in groups.items()}
