"""Blocks of the usual case: softmax over a hard label map (Numba).

y is a comparison, and the true class alone has a cross-entropy, so nothing but the exponentials costs more than a
multiply-add per element. `softdice.kernels.cpu.general` does all other cases.

Rows (n voxels): t class number (-1: none), w weight, m maximum, s sum of exponentials, r = 1 / s, rw = w / s,
nlp = -ln p of the true class.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softdice.kernels.cpu.compiled import jit
from softdice.kernels.cpu.rows import exp, log, prefetch, scrub

# Bits of `flags`, and rows of the sums: the position of each name in softdice.settings.FIELDS.
I, P, T, Q, R, D, E, F, N, LABELLED = range(10)  # noqa: E741 - the letters of the formulas
SOFTMAX, SIGMOID = 1, 2
RUN = np.uint64(512)  # voxels added in the width of the input, some per vector lane, before float64 takes over
FEW = 12  # up to this many classes a comparison per class beats a gather per voxel


@jit
def _maximum(src: Any, off: Any, n: Any, m: Any) -> None:
    for v in range(n):
        x = src[off + v]
        m[v] = x if x > m[v] else m[v]


@jit
def _maximum4(src: Any, off: Any, ld: Any, n: Any, m: Any) -> None:
    """Four rows at a time, since each pass over m costs more than a comparison."""
    o1 = off + ld
    o2 = o1 + ld
    o3 = o2 + ld
    for v in range(n):
        a, b = src[off + v], src[o1 + v]
        c, d = src[o2 + v], src[o3 + v]
        a = b if b > a else a
        c = d if d > c else c
        a = c if c > a else a
        m[v] = a if a > m[v] else m[v]


@jit
def _exp_sum(src: Any, off: Any, n: Any, m: Any, s: Any, e: Any, o: Any) -> None:
    for v in range(n):
        y = exp(src[off + v] - m[v])
        e[o + v] = y
        s[v] += y


@jit
def softmax(
    src: Any,
    off: Any,
    ld: Any,
    C: Any,
    n: Any,
    w: Any,
    masked: Any,
    m: Any,
    s: Any,
    r: Any,
    rw: Any,
    e: Any,
    o: Any,
    eld: Any,
) -> None:
    """logits -> e = exp(x - m) with p = e r, and the rows m, s, r = 1 / s, rw = w / s."""
    zero, one = e.dtype.type(0), e.dtype.type(1)
    for v in range(n):
        m[v] = src[off + v]
        s[v] = zero
    first, four = np.uint64(1), np.uint64(4)
    while first + four <= C:
        _maximum4(src, off + first * ld, ld, n, m)
        first += four
    for c in range(first, C):
        _maximum(src, off + c * ld, n, m)
    for c in range(C):
        prefetch(src, off + c * ld + n, n)  # the next block's row: on its way while this one is computed
        _exp_sum(src, off + c * ld, n, m, s, e, o + c * eld)
    if masked:
        for c in range(C):
            scrub(e, o + c * eld, n, w, zero)
        scrub(s, np.uint64(0), n, w, one)
        scrub(m, np.uint64(0), n, w, zero)
    for v in range(n):
        r[v] = one / s[v]
    for v in range(n):
        rw[v] = r[v] * w[v]


@jit
def sum_product(a: Any, o: Any, b: Any, n: Any) -> Any:
    total = 0.0
    for v0 in range(np.uint64(0), n, RUN):
        part = a.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            part += a[o + v] * b[v]
        total += part
    return total


@jit
def weight_sum(w: Any, n: Any) -> Any:
    """Sum of the weights."""
    total = 0.0
    for v0 in range(np.uint64(0), n, RUN):
        part = w.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            part += w[v]
        total += part
    return total


@jit
def _hard_sums(e: Any, o: Any, rw: Any, t: Any, w: Any, c: Any, n: Any) -> Any:
    one = e.dtype.type(1)
    inter, pred, true = 0.0, 0.0, 0.0
    for v0 in range(np.uint64(0), n, RUN):
        i, a, b = e.dtype.type(0), e.dtype.type(0), e.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            y = one * (t[v] == c)
            p = e[o + v] * rw[v]
            a += p
            i += p * y
            b += w[v] * y
        inter += i
        pred += a
        true += b
    return inter, pred, true


@jit
def _hard_square(e: Any, o: Any, r: Any, rw: Any, n: Any) -> Any:
    total = 0.0
    for v0 in range(np.uint64(0), n, RUN):
        part = e.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            part += (e[o + v] * r[v]) * (e[o + v] * rw[v])
        total += part
    return total


@jit
def _hard_difference(e: Any, o: Any, r: Any, t: Any, w: Any, c: Any, n: Any) -> Any:
    one = e.dtype.type(1)
    total = 0.0
    for v0 in range(np.uint64(0), n, RUN):
        part = e.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            part += w[v] * abs(e[o + v] * r[v] - one * (t[v] == c))
        total += part
    return total


@jit
def _class_sum(row: Any, t: Any, w: Any, c: Any, n: Any) -> Any:
    one = row.dtype.type(1)
    total = 0.0
    for v0 in range(np.uint64(0), n, RUN):
        part = row.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            part += (one * (t[v] == c)) * (w[v] * row[v])
        total += part
    return total


@jit
def _add_by_class(row: Any, t: Any, w: Any, C: Any, n: Any, sums: Any) -> None:
    """sums[c] += sum of w row over the voxels of class c."""
    if C <= FEW:
        for c in range(C):
            sums[c] += _class_sum(row, t, w, np.int32(c), n)
    else:
        for v in range(n):
            if t[v] >= 0:
                sums[t[v]] += row[v] * w[v]


@jit
def power_row(base: Any, exponent: Any, n: Any, out: Any) -> None:
    """out = base^exponent for base in [0, 1]; the small whole exponents of the papers without a logarithm."""
    one, tiny = out.dtype.type(1), out.dtype.type(1.2e-38)
    if exponent == 0:
        for v in range(n):
            out[v] = one
    elif exponent == 1:
        for v in range(n):
            out[v] = base[v]
    elif exponent == 2:
        for v in range(n):
            out[v] = base[v] * base[v]
    else:
        for v in range(n):
            b = base[v]
            out[v] = exp(exponent * log(tiny if b < tiny else b))


@jit
def _true_class_rows(
    src: Any, off: Any, ld: Any, n: Any, t: Any, m: Any, s: Any, r: Any, e: Any, o: Any, eld: Any, nlp: Any, p: Any
) -> None:
    """nlp = -ln p and p of each voxel's own class; 0 where it has none."""
    for v in range(n):
        nlp[v] = m[v] + log(s[v])
    for v in range(n):
        if t[v] >= 0:
            c = np.uint64(t[v])
            nlp[v] -= src[off + c * ld + v]
            p[v] = e[o + c * eld + v] * r[v]
        else:
            nlp[v] = nlp.dtype.type(0)
            p[v] = p.dtype.type(0)


@jit
def plain_sums(
    src: Any, off: Any, ld: Any, C: Any, n: Any, flags: Any, gamma: Any, t: Any, w: Any, masked: Any,
    e: Any, eld: Any, rows: Any, sums: Any,
) -> None:  # fmt: skip
    """softmax, hard labels: one block's statistics, added to sums (fields, C)."""
    m, s, r, rw, nlp, p, q = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6]
    zero = np.uint64(0)
    softmax(src, off, ld, C, n, w, masked, m, s, r, rw, e, zero, eld)
    few = C <= FEW
    for c in range(C):
        o = c * eld
        if few:
            inter, pred, true = _hard_sums(e, o, rw, t, w, np.int32(c), n)
            sums[I, c] += inter
            sums[P, c] += pred
            sums[T, c] += true
        else:
            sums[P, c] += sum_product(e, o, rw, n)
        if flags & (1 << Q):
            sums[Q, c] += _hard_square(e, o, r, rw, n)
        if flags & (1 << D):
            sums[D, c] += _hard_difference(e, o, r, t, w, np.int32(c), n)
    if not few:
        for v in range(n):
            if t[v] >= 0:
                own = np.uint64(t[v])
                sums[I, own] += e[own * eld + v] * rw[v]
                sums[T, own] += w[v]
    if flags & ((1 << E) | (1 << F)):
        _true_class_rows(src, off, ld, n, t, m, s, r, e, zero, eld, nlp, p)
        if flags & (1 << E):
            _add_by_class(nlp, t, w, C, n, sums[E])
        if flags & (1 << F):
            for v in range(n):
                q[v] = p.dtype.type(1) - p[v]
            power_row(q, gamma, n, p)
            for v in range(n):
                nlp[v] *= p[v]
            _add_by_class(nlp, t, w, C, n, sums[F])


@jit
def _dot_few(e: Any, o: Any, r: Any, t: Any, c: Any, n: Any, a: Any, b: Any, qq: Any, dot: Any) -> None:
    one = e.dtype.type(1)
    for v in range(n):
        dot[v] += e[o + v] * (a + b * (one * (t[v] == c)) + qq * (e[o + v] * r[v]))


@jit
def _dot_many(e: Any, o: Any, r: Any, n: Any, a: Any, qq: Any, dot: Any) -> None:
    for v in range(n):
        dot[v] += e[o + v] * (a + qq * (e[o + v] * r[v]))


@jit
def _dot4(e: Any, o: Any, ld: Any, n: Any, a0: Any, a1: Any, a2: Any, a3: Any, dot: Any) -> None:
    """Four rows at a time, since each pass over dot costs more than a multiply-add."""
    o1 = o + ld
    o2 = o1 + ld
    o3 = o2 + ld
    for v in range(n):
        dot[v] += (e[o + v] * a0 + e[o1 + v] * a1) + (e[o2 + v] * a2 + e[o3 + v] * a3)


@jit
def _dots(e: Any, o: Any, ld: Any, r: Any, n: Any, C: Any, coef: Any, squares: Any, dot: Any) -> None:
    """dot += sum_c e_c (dL/dP_c + dL/dD_c + 2 p_c dL/dQ_c)."""
    c, four = np.uint64(0), np.uint64(4)
    while c + four <= C and not squares:
        a0, a1 = coef[P, c] + coef[D, c], coef[P, c + 1] + coef[D, c + 1]
        a2, a3 = coef[P, c + 2] + coef[D, c + 2], coef[P, c + 3] + coef[D, c + 3]
        _dot4(e, o + c * ld, ld, n, a0, a1, a2, a3, dot)
        c += four
    for d in range(c, C):
        _dot_many(e, o + d * ld, r, n, coef[P, d] + coef[D, d], dot.dtype.type(2) * coef[Q, d], dot)


@jit
def _gradient_few(
    e: Any, o: Any, r: Any, rw: Any, t: Any, kw: Any, c: Any, n: Any, a: Any, b: Any, qq: Any, base: Any,
    g: Any, to: Any,
) -> None:  # fmt: skip
    one = e.dtype.type(1)
    for v in range(n):
        y = one * (t[v] == c)
        x = e[o + v]
        g[to + v] = x * rw[v] * (a + b * y + qq * (x * r[v]) - base[v]) + y * kw[v]


@jit
def _gradient_many(e: Any, o: Any, r: Any, rw: Any, n: Any, a: Any, qq: Any, base: Any, g: Any, to: Any) -> None:
    for v in range(n):
        x = e[o + v]
        g[to + v] = x * rw[v] * (a + qq * (x * r[v]) - base[v])


@jit
def _gradient_linear(e: Any, o: Any, rw: Any, n: Any, a: Any, base: Any, g: Any, to: Any) -> None:
    for v in range(n):
        g[to + v] = e[o + v] * rw[v] * (a - base[v])


@jit
def plain_gradient(
    src: Any, off: Any, ld: Any, C: Any, n: Any, flags: Any, gamma: Any, t: Any, w: Any, masked: Any,
    e: Any, eld: Any, g: Any, o: Any, gld: Any, rows: Any, coef: Any,
) -> None:  # fmt: skip
    """softmax, hard labels: one block of dL/dx. The exponentials stay in scratch: rows of the gradient may share
    the same few sets of a cache, when the volume is a power of two, so each is written once.

    With q_c = a_c + y_c b_c + 2 p_c dL/dQ_c and k = -dL/dE + dL/dF g(p) of the true class:
    dx_c = w p_c (q_c - sum_j p_j q_j - k) + w y_c k.
    """
    m, s, r, rw, nlp, p, dot, k = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
    zero, none = g.dtype.type(0), np.uint64(0)
    two = g.dtype.type(2)
    softmax(src, off, ld, C, n, w, masked, m, s, r, rw, e, none, eld)
    with_log = (flags & ((1 << E) | (1 << F))) != 0
    for v in range(n):
        dot[v] = zero
        k[v] = zero
    if with_log:
        if flags & (1 << F):
            _true_class_rows(src, off, ld, n, t, m, s, r, e, none, eld, nlp, p)
        _focal_slope(p, nlp, gamma, n, flags, t, coef, k, rows[8], rows[9])
    few = C <= FEW
    squares = (flags & (1 << Q)) != 0
    if few:
        for c in range(C):
            a, b = coef[P, c] + coef[D, c], coef[I, c] - two * coef[D, c]
            _dot_few(e, c * eld, r, t, np.int32(c), n, a, b, two * coef[Q, c], dot)
    else:
        _dots(e, none, eld, r, n, C, coef, squares, dot)
    if not few:
        for v in range(n):
            if t[v] >= 0:
                own = np.uint64(t[v])
                x = e[own * eld + v]
                b = coef[I, own] - two * coef[D, own]
                dot[v] += x * b
                p[v] = w[v] * (x * r[v] * b + k[v])
    for v in range(n):
        dot[v] = dot[v] * r[v] + k[v]
        k[v] *= w[v]
    for c in range(C):
        prefetch(g, o + c * gld + n, n)
        if few:
            a, b = coef[P, c] + coef[D, c], coef[I, c] - two * coef[D, c]
            _gradient_few(e, c * eld, r, rw, t, k, np.int32(c), n, a, b, two * coef[Q, c], dot, g, o + c * gld)
        elif not squares:
            _gradient_linear(e, c * eld, rw, n, coef[P, c] + coef[D, c], dot, g, o + c * gld)
        else:
            _gradient_many(e, c * eld, r, rw, n, coef[P, c] + coef[D, c], two * coef[Q, c], dot, g, o + c * gld)
    if not few:
        for v in range(n):
            if t[v] >= 0:
                g[o + np.uint64(t[v]) * gld + v] += p[v]


@jit
def _focal_slope(
    p: Any, nlp: Any, gamma: Any, n: Any, flags: Any, t: Any, coef: Any, k: Any, base: Any, pw: Any
) -> None:
    """k = p d/dp of (dL/dE)(-ln p) + (dL/dF)(1 - p)^gamma (-ln p) at the true class."""
    one = p.dtype.type(1)
    for v in range(n):
        if t[v] >= 0:
            k[v] = -coef[E, np.uint64(t[v])]
    if flags & (1 << F):
        for v in range(n):
            base[v] = one - p[v]
        power_row(base, gamma - one, n, pw)
        for v in range(n):
            pw[v] *= -(gamma * p[v] * nlp[v]) - base[v]
        for v in range(n):
            if t[v] >= 0:
                k[v] += coef[F, np.uint64(t[v])] * pw[v]
