"""regions (unions of classes) -> rows that the loops take for a class, and the gradient back to the classes (Numba).

Of a softmax a region has p = sum of its classes' p, and -ln p = l - z with z = ln sum_c exp(x_c - m) over its classes,
taken as a logsumexp of its own: the logarithm of a sum of p would end where p underflows. A class has the share
exp(x_c - m - z) of the slope of each region that it belongs to.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from softdice.kernels.cpu.arithmetic import exp, log, minus
from softdice.kernels.cpu.compiled import jit
from softdice.kernels.cpu.rows import load


class Unions(NamedTuple):
    """The loops over a region."""

    row: Any
    truth: Any
    gradient: Any


@cache
def unions(SOFTMAX: bool, LABELS: bool, R: Any) -> Unions:
    """What a call needs -> its loops over regions."""
    ZERO, ONE, LOWEST = R(0), R(1), R(-np.inf)

    @jit
    def row(member, x, xo, ld, C, k, n, rows, e, eld, z, zo):
        """Region k: the sum of its exponentials into e behind those of the C classes, z into z; else p into z."""
        w, m, to = rows.w, rows.m, C * eld
        for v in range(n):
            z[zo + v] = LOWEST if SOFTMAX else ZERO
        for c in range(C):
            if member[k, c]:
                for v in range(n):
                    value = x[xo + c * ld + v] if w[v] > ZERO else ZERO
                    if SOFTMAX:
                        z[zo + v] = value if value > z[zo + v] else z[zo + v]
                    else:
                        z[zo + v] += value
        if SOFTMAX:
            for v in range(n):
                e[to + v] = ZERO
            for c in range(C):
                if member[k, c]:
                    for v in range(n):
                        value = x[xo + c * ld + v] if w[v] > ZERO else ZERO
                        e[to + v] += exp(minus(value, z[zo + v]))
            for v in range(n):
                most = z[zo + v]
                z[zo + v] = minus(log(e[to + v]), minus(m[v], most)) if most > LOWEST else most
            for v in range(n):
                e[to + v] = ZERO
            for c in range(C):
                if member[k, c]:
                    for v in range(n):
                        e[to + v] += e[c * eld + v]

    @jit
    def truth(target, member, C, b, v0, k, n, t, spare, y):
        """y of region k: the largest of its classes'."""
        zero = np.uint64(0)
        for v in range(n):
            y[v] = ZERO
        if LABELS:
            for v in range(n):
                if t[v] >= 0:
                    y[v] = ONE if member[k, np.uint64(t[v])] else ZERO
            return
        for c in range(C):
            if member[k, c]:
                load(
                    target.address,
                    target.code,
                    b * target.per_sample + c * target.per_class + v0 * target.per_voxel,
                    target.per_voxel,
                    n,
                    spare,
                    zero,
                )
                for v in range(n):
                    y[v] = spare[v] if spare[v] > y[v] or spare[v] != spare[v] else y[v]

    @jit
    def gradient(member, x, xo, ld, C, K, n, rows, e, eld, z, h, g, go, gld):
        """Slopes h of the regions -> gradient of every class."""
        w, m, r = rows.w, rows.m, rows.r
        for c in range(C):
            to = go + c * gld
            for v in range(n):
                g[to + v] = ZERO
            for k in range(K):
                inside = member[k, c] != 0
                for v in range(n):
                    share = ONE if inside else ZERO
                    if SOFTMAX:
                        value = x[xo + c * ld + v] if w[v] > ZERO else ZERO
                        if inside:
                            share = exp(minus(minus(value, m[v]), z[k * eld + v])) if value > LOWEST else ZERO
                        share -= e[c * eld + v] * r[v]
                    g[to + v] += share * h[k * eld + v]
            for v in range(n):
                g[to + v] = g[to + v] * w[v] if w[v] > ZERO else ZERO

    return Unions(row, truth, gradient)
