"""Blocks of the usual case with two to four classes (Numba): softmax over a hard label map, in registers.

All of a voxel's classes fit in registers, so each logit is read once and each gradient written once, with no rows
between. `third` and `fourth` are None where there is no such class, `logs` is None where no cross-entropy is asked
for: what depends on them is left out when compiling. `plain` beside it is the
same for any number of classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softdice.kernels.cpu.compiled import jit, read_apart, write_apart
from softdice.kernels.cpu.plain import LABELLED, E, I, N, P, R, T
from softdice.kernels.cpu.rows import exp, log

CLASSES = 4  # at most
SUMS = sum(1 << field for field in (I, P, T, R, E, N, LABELLED))  # flags of what these loops serve: y is its own square


@jit
def narrow_sums(
    x: Any, off: Any, ld: Any, n: Any, t: Any, w: Any, third: Any, fourth: Any, logs: Any, sums: Any
) -> None:
    """One block's I, P, T and E, added to sums (fields, C). The parts are in the width of x: n is at most some 500."""
    o1 = off + ld
    o2 = o1 + ld
    o3 = o2 + ld
    zero, one = x.dtype.type(0), x.dtype.type(1)
    i0 = i1 = i2 = i3 = p0 = p1 = p2 = p3 = t0 = t1 = t2 = t3 = e0 = e1 = e2 = e3 = zero
    for v in range(n):
        k, u = t[v], w[v]
        live = u > zero  # a NaN at an ignored voxel must not reach a sum
        a = x[off + v] if live else zero
        b = x[o1 + v] if live else zero
        m = b if b > a else a
        if third is not None:
            c = x[o2 + v] if live else zero
            m = c if c > m else m
        if fourth is not None:
            d = x[o3 + v] if live else zero
            m = d if d > m else m
        ea, eb = exp(a - m), exp(b - m)
        s = ea + eb
        if third is not None:
            ec = exp(c - m)
            s += ec
        if fourth is not None:
            ed = exp(d - m)
            s += ed
        r = one / s * u
        y0, y1 = u if k == 0 else zero, u if k == 1 else zero
        t0 += y0
        t1 += y1
        p0 += ea * r
        p1 += eb * r
        i0 += ea * r if k == 0 else zero
        i1 += eb * r if k == 1 else zero
        if logs is not None:
            own = a if k == 0 else b
            if third is not None:
                own = c if k == 2 else own
            if fourth is not None:
                own = d if k == 3 else own
            z = u * (log(s) + (m - own))
            e0 += z if k == 0 else zero
            e1 += z if k == 1 else zero
        if third is not None:
            y2 = u if k == 2 else zero
            t2 += y2
            p2 += ec * r
            i2 += ec * r if k == 2 else zero
            if logs is not None:
                e2 += z if k == 2 else zero
        if fourth is not None:
            y3 = u if k == 3 else zero
            t3 += y3
            p3 += ed * r
            i3 += ed * r if k == 3 else zero
            if logs is not None:
                e3 += z if k == 3 else zero
    _add(sums, np.uint64(0), i0, p0, t0, e0)
    _add(sums, np.uint64(1), i1, p1, t1, e1)
    if third is not None:
        _add(sums, np.uint64(2), i2, p2, t2, e2)
    if fourth is not None:
        _add(sums, np.uint64(3), i3, p3, t3, e3)


@jit
def _add(sums: Any, c: Any, i: Any, p: Any, t: Any, e: Any) -> None:
    sums[I, c] += i
    sums[P, c] += p
    sums[T, c] += t
    sums[E, c] += e


@jit
def narrow_gradient(
    x: Any, off: Any, ld: Any, n: Any, t: Any, w: Any, third: Any, fourth: Any, logs: Any,
    g: Any, o: Any, gld: Any, coef: Any,
) -> None:  # fmt: skip
    """One block of dL/dx = w p_c (q_c - sum_j p_j q_j) + w dL/dE_t (p_c - y_c), with q_c = dL/dP_c + y_c dL/dI_c."""
    o1, g1 = off + ld, o + gld
    o2, g2 = o1 + ld, g1 + gld
    o3, g3 = o2 + ld, g2 + gld
    zero, one = x.dtype.type(0), x.dtype.type(1)
    a0, a1 = coef[P, 0], coef[P, 1]
    b0, b1 = a0 + coef[I, 0], a1 + coef[I, 1]
    l0, l1 = coef[E, 0], coef[E, 1]
    if third is not None:
        a2 = coef[P, 2]
        b2 = a2 + coef[I, 2]
        l2 = coef[E, 2]
    if fourth is not None:
        a3 = coef[P, 3]
        b3 = a3 + coef[I, 3]
        l3 = coef[E, 3]
    for v in range(n):
        k, u = read_apart(t, v), read_apart(w, v)
        live = u > zero
        a = read_apart(x, off + v)
        b = read_apart(x, o1 + v)
        a, b = a if live else zero, b if live else zero
        m = b if b > a else a
        if third is not None:
            c = read_apart(x, o2 + v)
            c = c if live else zero
            m = c if c > m else m
        if fourth is not None:
            d = read_apart(x, o3 + v)
            d = d if live else zero
            m = d if d > m else m
        a, b = exp(a - m), exp(b - m)
        q0, q1 = b0 if k == 0 else a0, b1 if k == 1 else a1
        s, dot = a + b, a * q0 + b * q1
        if third is not None:
            c = exp(c - m)
            q2 = b2 if k == 2 else a2
            s += c
            dot += c * q2
        if fourth is not None:
            d = exp(d - m)
            q3 = b3 if k == 3 else a3
            s += d
            dot += d * q3
        r = one / s
        dot *= r
        r *= u
        if logs is not None:
            own = l0 if k == 0 else (l1 if k == 1 else zero)
            if third is not None:
                own = l2 if k == 2 else own
            if fourth is not None:
                own = l3 if k == 3 else own
            dot -= own
            own *= u
            write_apart(g, o + v, a * r * (q0 - dot) - (own if k == 0 else zero))
            write_apart(g, g1 + v, b * r * (q1 - dot) - (own if k == 1 else zero))
            if third is not None:
                write_apart(g, g2 + v, c * r * (q2 - dot) - (own if k == 2 else zero))
            if fourth is not None:
                write_apart(g, g3 + v, d * r * (q3 - dot) - (own if k == 3 else zero))
        else:
            write_apart(g, o + v, a * r * (q0 - dot))
            write_apart(g, g1 + v, b * r * (q1 - dot))
            if third is not None:
                write_apart(g, g2 + v, c * r * (q2 - dot))
            if fourth is not None:
                write_apart(g, g3 + v, d * r * (q3 - dot))
