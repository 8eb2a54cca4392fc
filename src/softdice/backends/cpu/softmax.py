"""The softmax of a block: e = exp(x - m), m, 1 / sum e and ln sum e, four classes at a time (Numba).

Called by address with (x, bytes between classes, C, n, m, r, ls, dot, e, bytes between rows, k, logs). Each loop is
a function of its own, since the promise of `read` and `write` holds for one loop.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from softdice.backends.cpu.arithmetic import ONE, ZERO, exp, log, minus
from softdice.backends.cpu.compiler import ADDRESS, COUNT, address_of, each, jit, kernel
from softdice.backends.cpu.intrinsics import prefetch_line, read, reread, write
from softdice.statistics.declared import function

LOWEST = np.float32(-np.inf)
LINE = np.uint64(64)  # bytes of a cache line
_4 = np.uint64(4)


@each
def larger(a, b):
    """Return the larger number, a where one is NaN: m may be any number, e carries the NaN."""
    return b if b > a else a


@jit
def prefetch(row, n):
    """Ask for n numbers while something else is computed."""
    for offset in range(np.uint64(0), n * _4, LINE):
        prefetch_line(row + offset)


@jit
def fill(row, n, value):
    """Set n numbers of a row."""
    for v in range(n):
        write(row, v, value)


@cache
def _largest(size: int) -> Any:
    """Return a function that raises m to the logits of `size` classes."""
    lines = [f"x{i} = x + np.uint64({i}) * ld" for i in range(size)]
    lines += ["for v in range(n):", "    most = reread(m, v)"]
    lines += [f"    most = larger(most, read(x{i}, v))" for i in range(size)]
    names = {"np": np, "larger": larger, "read": read, "reread": reread, "write": write}
    return jit(function("largest(x, ld, n, m)", "\n    ".join([*lines, "    write(m, v, most)"]), names))


@cache
def _exponentials(size: int, weighted: bool) -> Any:
    """Return a function: e = exp(x - m) of `size` classes, their sum added to r and, weighted with k, to dot."""
    lines = [f"x{i}, e{i} = x + np.uint64({i}) * ld, e + np.uint64({i}) * eld" for i in range(size)]
    lines += [f"prefetch(x{i} + n * np.uint64(4), n)" for i in range(size)]  # the next block's rows
    lines += [f"k{i} = read(k, np.uint64({i}))" for i in range(size if weighted else 0)]
    lines += ["for v in range(n):", "    most, total = read(m, v), reread(r, v)"]
    lines += ["    slope = reread(dot, v)"] if weighted else []
    for i in range(size):
        lines += [f"    z{i} = exp(minus(read(x{i}, v), most))", f"    write(e{i}, v, z{i})"]
    lines += [f"    write(r, v, total + ({' + '.join(f'z{i}' for i in range(size))}))"]
    if weighted:
        lines += [f"    write(dot, v, slope + ({' + '.join(f'k{i} * z{i}' for i in range(size))}))"]
    names = {"np": np, "exp": exp, "minus": minus, "prefetch": prefetch, "read": read, "reread": reread, "write": write}
    return jit(function("exponentials(x, ld, n, m, r, dot, e, eld, k)", "\n    ".join(lines), names))


@jit
def _invert(r, ls, n, logs):
    """Replace the sum of exponentials in r by its inverse, and write its logarithm to ls if wanted."""
    if logs:
        for v in range(n):
            write(ls, v, log(reread(r, v)))
    for v in range(n):
        write(r, v, ONE / reread(r, v))


@jit
def _scale(dot, r, n):
    for v in range(n):
        write(dot, v, reread(dot, v) * read(r, v))


def softmax(num_classes: int, weighted: bool) -> np.uint64:
    """Return the address of the softmax for a number of classes; weighted: dot = sum_c k_c p_c comes with it."""
    return _softmax(num_classes >= 4, num_classes % 4, weighted)


@cache
def _softmax(many: bool, rest: int, weighted: bool) -> np.uint64:
    largest4, exponentials4 = _largest(4), _exponentials(4, weighted)
    largest_rest, exponentials_rest = _largest(rest or 1), _exponentials(rest or 1, weighted)

    @kernel((many, rest, weighted))
    def softmax(x, ld, C, n, m, r, ls, dot, e, eld, k, logs):
        fill(m, n, LOWEST)
        fill(r, n, ZERO)
        if weighted:
            fill(dot, n, ZERO)
        whole = C // _4 * _4
        if many:
            for c in range(np.uint64(0), whole, _4):
                largest4(x + c * ld, ld, n, m)
        if rest != 0:
            largest_rest(x + whole * ld, ld, n, m)
        if many:
            for c in range(np.uint64(0), whole, _4):
                exponentials4(x + c * ld, ld, n, m, r, dot, e + c * eld, eld, k + c * _4)
        if rest != 0:
            exponentials_rest(x + whole * ld, ld, n, m, r, dot, e + whole * eld, eld, k + whole * _4)
        _invert(r, ls, n, logs)
        if weighted:
            _scale(dot, r, n)
        return 0

    return address_of(softmax, types.int64(*[ADDRESS] * 11, COUNT))
