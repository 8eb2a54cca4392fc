"""The softmax of a block: e = exp(x - m), m, 1 / sum e and ln sum e, four classes at a time (Numba).

Arguments are uint64, and a row is the address of n float32, one for each voxel of a block:

    x, x_stride, C, n     logits: address of the first row, bytes from class to class, classes, voxels
    e, e_stride           exponentials: the same
    m, r, ls              rows of the maximum, of 1 / sum e and of ln sum e; logs: whether ls is wanted (int64)
    coefs, dot            address of a float32 for each class, and the row of sum_c coefs[c] p_c

While the classes are added, r and dot hold the running sums of e and of coefs e; they are divided at the end.

Each loop is a function of its own: `read` and `write` promise LLVM that within a function no row overlaps another.
`reread` promises nothing: it reads a row that the same function writes, and such a function may have several loops.
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
_4 = np.uint64(4)  # classes that are done together; bytes of a float32


@each
def larger(a, b):
    """Return the larger number; a where they are equal or one is NaN. A softmax may then have any m: its e is NaN."""
    return b if b > a else a


@jit
def prefetch(row, n):
    """Prefetch n float32 from the address `row` on into cache; the address may lie outside any memory of ours."""
    for offset in range(np.uint64(0), n * _4, LINE):
        prefetch_line(row + offset)


@jit
def fill(row, n, value):
    """Set n numbers of a row to a value, float32."""
    for v in range(n):
        write(row, v, value)


@jit
def scale(row, factor, n):
    """Multiply a row with the row `factor`."""
    for v in range(n):
        write(row, v, reread(row, v) * read(factor, v))


@cache
def _largest(size: int) -> Any:
    """Return a compiled function: m = max(m, x) over `size` classes from the row x on, read together by one loop."""
    lines = [f"x{i} = x + np.uint64({i}) * x_stride" for i in range(size)]
    lines += ["for v in range(n):", "    most = reread(m, v)"]
    lines += [f"    most = larger(most, read(x{i}, v))" for i in range(size)]
    names = {"np": np, "larger": larger, "read": read, "reread": reread, "write": write}
    return jit(function("largest(x, x_stride, n, m)", "\n    ".join([*lines, "    write(m, v, most)"]), names))


@cache
def _exponentials(size: int, weighted: bool) -> Any:
    """Return a compiled function: e = exp(x - m) of `size` classes from the row x on; r += sum e, dot += sum coefs e.
    m holds the maximum of all classes already, r and dot the sums of the classes before. Unless `weighted`, dot and
    coefs, the address of the first of these classes' coefficients, are not read."""
    lines = [f"x{i}, e{i} = x + np.uint64({i}) * x_stride, e + np.uint64({i}) * e_stride" for i in range(size)]
    lines += [f"prefetch(x{i} + n * np.uint64(4), n)" for i in range(size)]  # the next block's rows
    lines += [f"coef{i} = read(coefs, np.uint64({i}))" for i in range(size if weighted else 0)]
    lines += ["for v in range(n):", "    most, total = read(m, v), reread(r, v)"]
    lines += ["    weighted_total = reread(dot, v)"] if weighted else []
    for i in range(size):
        lines += [f"    z{i} = exp(minus(read(x{i}, v), most))", f"    write(e{i}, v, z{i})"]
    lines += [f"    write(r, v, total + ({' + '.join(f'z{i}' for i in range(size))}))"]
    if weighted:
        lines += [f"    write(dot, v, weighted_total + ({' + '.join(f'coef{i} * z{i}' for i in range(size))}))"]
    names = {"np": np, "exp": exp, "minus": minus, "prefetch": prefetch, "read": read, "reread": reread, "write": write}
    return jit(function("exponentials(x, x_stride, n, m, r, dot, e, e_stride, coefs)", "\n    ".join(lines), names))


@jit
def _invert(r, ls, n, logs):
    """Replace the sums of exponentials in r by their inverses; if logs is not 0, write their logarithms to ls."""
    if logs:
        for v in range(n):
            write(ls, v, log(reread(r, v)))
    for v in range(n):
        write(r, v, ONE / reread(r, v))


def softmax(num_classes: int, weighted: bool) -> np.uint64:
    """Return the address of the softmax of so many classes, for `walk` to call; weighted: whether it writes dot."""
    return _softmax(num_classes >= 4, num_classes % 4, weighted)


@cache
def _softmax(many: bool, rest: int, weighted: bool) -> np.uint64:
    """Return the address of the softmax that reads four classes at a time, and then the remaining ones.
    many: whether there are four classes or more. rest: C % 4. weighted: whether it writes dot."""
    largest4, exponentials4 = _largest(4), _exponentials(4, weighted)
    largest_rest, exponentials_rest = _largest(rest or 1), _exponentials(rest or 1, weighted)

    @kernel((many, rest, weighted))
    def softmax(x, x_stride, C, n, m, r, ls, dot, e, e_stride, coefs, logs):
        """Write m, e and r; ls if logs is not 0, dot if `weighted`. Return 0."""
        fill(m, n, LOWEST)
        fill(r, n, ZERO)
        if weighted:
            fill(dot, n, ZERO)
        in_fours = C // _4 * _4
        if many:
            for c in range(np.uint64(0), in_fours, _4):
                largest4(x + c * x_stride, x_stride, n, m)
        if rest != 0:
            largest_rest(x + in_fours * x_stride, x_stride, n, m)
        if many:
            for c in range(np.uint64(0), in_fours, _4):
                x_c, e_c, coefs_c = x + c * x_stride, e + c * e_stride, coefs + c * _4
                exponentials4(x_c, x_stride, n, m, r, dot, e_c, e_stride, coefs_c)
        if rest != 0:
            x_c, e_c, coefs_c = x + in_fours * x_stride, e + in_fours * e_stride, coefs + in_fours * _4
            exponentials_rest(x_c, x_stride, n, m, r, dot, e_c, e_stride, coefs_c)
        _invert(r, ls, n, logs)
        if weighted:
            scale(dot, r, n)
        return 0

    return address_of(softmax, types.int64(*[ADDRESS] * 11, COUNT))
