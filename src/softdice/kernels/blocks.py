"""Blocks of voxels: statistics and gradients of some thousand voxels at a time, in scratch rows that stay in cache.

Two ways through a block, both compiled once per float width:

* `plain_*`: softmax over a hard label map, the usual case: y is a comparison, and the true class alone has a
  cross-entropy, so nothing but the exponentials costs more than a multiply-add per element;
* `general_*`: every activation, per-class targets, label smoothing, regions, any exponent, a row y at a time.

Rows (n voxels): t label, w weight, m maximum, s sum of exponentials, r = 1 / s, rw = w / s, l = -ln p of a class.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softdice.kernels.rows import exp, jit, load, log, scrub

# Bits of `flags`, and rows of the sums: the position of each name in softdice.reference.FIELDS.
I, P, T, Q, R, D, E, F, N, LABELLED = range(10)  # noqa: E741 - the letters of the formulas
SOFTMAX, SIGMOID = 1, 2
FEW = 12  # up to this many classes a comparison per class beats a gather per voxel


@jit
def _maximum(src: Any, off: Any, n: Any, m: Any) -> None:
    for v in range(n):
        x = src[off + v]
        m[v] = x if x > m[v] else m[v]


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
    for c in range(np.uint64(1), C):
        _maximum(src, off + c * ld, n, m)
    for c in range(C):
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
def _sum2(a: Any, o: Any, b: Any, n: Any) -> Any:
    total = a.dtype.type(0)
    for v in range(n):
        total += a[o + v] * b[v]
    return total


@jit
def _sum3(a: Any, o: Any, b: Any, c: Any, n: Any) -> Any:
    total = a.dtype.type(0)
    for v in range(n):
        total += a[o + v] * b[v] * c[v]
    return total


@jit
def _hard_sums(e: Any, o: Any, rw: Any, t: Any, w: Any, c: Any, n: Any) -> Any:
    one = e.dtype.type(1)
    inter, pred, true = e.dtype.type(0), e.dtype.type(0), e.dtype.type(0)
    for v in range(n):
        y = one * (t[v] == c)
        p = e[o + v] * rw[v]
        pred += p
        inter += p * y
        true += w[v] * y
    return inter, pred, true


@jit
def _hard_square(e: Any, o: Any, r: Any, rw: Any, n: Any) -> Any:
    total = e.dtype.type(0)
    for v in range(n):
        total += (e[o + v] * r[v]) * (e[o + v] * rw[v])
    return total


@jit
def _hard_difference(e: Any, o: Any, r: Any, t: Any, w: Any, c: Any, n: Any) -> Any:
    one = e.dtype.type(1)
    total = e.dtype.type(0)
    for v in range(n):
        total += w[v] * abs(e[o + v] * r[v] - one * (t[v] == c))
    return total


@jit
def _class_sum(row: Any, t: Any, w: Any, c: Any, n: Any) -> Any:
    one = row.dtype.type(1)
    total = row.dtype.type(0)
    for v in range(n):
        total += (one * (t[v] == c)) * (w[v] * row[v])
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
    src: Any, off: Any, ld: Any, n: Any, t: Any, m: Any, s: Any, r: Any, e: Any, o: Any, eld: Any, l: Any, p: Any
) -> None:
    """l = -ln p and p of each voxel's own class; 0 where it has none."""
    for v in range(n):
        l[v] = m[v] + log(s[v])
    for v in range(n):
        if t[v] >= 0:
            c = np.uint64(t[v])
            l[v] -= src[off + c * ld + v]
            p[v] = e[o + c * eld + v] * r[v]
        else:
            l[v] = l.dtype.type(0)
            p[v] = p.dtype.type(0)


@jit
def plain_sums(
    src: Any, off: Any, ld: Any, C: Any, n: Any, flags: Any, gamma: Any, t: Any, w: Any, masked: Any,
    e: Any, eld: Any, rows: Any, sums: Any,
) -> None:  # fmt: skip
    """softmax, hard labels: one block's statistics, added to sums (fields, C)."""
    m, s, r, rw, l, p, q = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6]
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
            sums[P, c] += _sum2(e, o, rw, n)
        if flags & (1 << Q):
            sums[Q, c] += _hard_square(e, o, r, rw, n)
        if flags & (1 << D):
            sums[D, c] += _hard_difference(e, o, r, t, w, np.int32(c), n)
    if not few:
        for v in range(n):
            if t[v] >= 0:
                c = np.uint64(t[v])
                sums[I, c] += e[c * eld + v] * rw[v]
                sums[T, c] += w[v]
    if flags & ((1 << E) | (1 << F)):
        _true_class_rows(src, off, ld, n, t, m, s, r, e, zero, eld, l, p)
        if flags & (1 << E):
            _add_by_class(l, t, w, C, n, sums[E])
        if flags & (1 << F):
            for v in range(n):
                q[v] = p.dtype.type(1) - p[v]
            power_row(q, gamma, n, p)
            for v in range(n):
                l[v] *= p[v]
            _add_by_class(l, t, w, C, n, sums[F])


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
def _gradient_few(
    e: Any, o: Any, r: Any, rw: Any, t: Any, kw: Any, c: Any, n: Any, a: Any, b: Any, qq: Any, base: Any
) -> None:
    one = e.dtype.type(1)
    for v in range(n):
        y = one * (t[v] == c)
        x = e[o + v]
        e[o + v] = x * rw[v] * (a + b * y + qq * (x * r[v]) - base[v]) + y * kw[v]


@jit
def _gradient_many(e: Any, o: Any, r: Any, rw: Any, n: Any, a: Any, qq: Any, base: Any) -> None:
    for v in range(n):
        x = e[o + v]
        e[o + v] = x * rw[v] * (a + qq * (x * r[v]) - base[v])


@jit
def plain_gradient(
    src: Any, off: Any, ld: Any, C: Any, n: Any, flags: Any, gamma: Any, t: Any, w: Any, masked: Any,
    g: Any, o: Any, gld: Any, rows: Any, coef: Any,
) -> None:  # fmt: skip
    """softmax, hard labels: one block of dL/dx. The exponentials live in the gradient's own memory.

    With q_c = a_c + y_c b_c + 2 p_c dL/dQ_c and k = -dL/dE + dL/dF g(p) of the true class:
    dx_c = w p_c (q_c - sum_j p_j q_j - k) + w y_c k.
    """
    m, s, r, rw, l, p, dot, k = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
    zero = g.dtype.type(0)
    two = g.dtype.type(2)
    softmax(src, off, ld, C, n, w, masked, m, s, r, rw, g, o, gld)
    with_log = (flags & ((1 << E) | (1 << F))) != 0
    for v in range(n):
        dot[v] = zero
        k[v] = zero
    if with_log:
        _true_class_rows(src, off, ld, n, t, m, s, r, g, o, gld, l, p)
        _focal_slope(p, l, gamma, n, flags, t, coef, k, rows[8], rows[9])
    few = C <= FEW
    for c in range(C):
        if few:
            a, b = coef[P, c] + coef[D, c], coef[I, c] - two * coef[D, c]
            _dot_few(g, o + c * gld, r, t, np.int32(c), n, a, b, two * coef[Q, c], dot)
        else:
            _dot_many(g, o + c * gld, r, n, coef[P, c] + coef[D, c], two * coef[Q, c], dot)
    if not few:
        for v in range(n):
            if t[v] >= 0:
                c = np.uint64(t[v])
                x = g[o + c * gld + v]
                b = coef[I, c] - two * coef[D, c]
                dot[v] += x * b
                p[v] = w[v] * (x * r[v] * b + k[v])
    for v in range(n):
        dot[v] = dot[v] * r[v] + k[v]
        k[v] *= w[v]
    for c in range(C):
        if few:
            a, b = coef[P, c] + coef[D, c], coef[I, c] - two * coef[D, c]
            _gradient_few(g, o + c * gld, r, rw, t, k, np.int32(c), n, a, b, two * coef[Q, c], dot)
        else:
            _gradient_many(g, o + c * gld, r, rw, n, coef[P, c] + coef[D, c], two * coef[Q, c], dot)
    if not few:
        for v in range(n):
            if t[v] >= 0:
                g[o + np.uint64(t[v]) * gld + v] += p[v]


@jit
def _focal_slope(p: Any, l: Any, gamma: Any, n: Any, flags: Any, t: Any, coef: Any, k: Any, base: Any, pw: Any) -> None:
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
            pw[v] *= -(gamma * p[v] * l[v]) - base[v]
        for v in range(n):
            if t[v] >= 0:
                k[v] += coef[F, np.uint64(t[v])] * pw[v]


# --- the general way ----------------------------------------------------------------------------------------------


@jit
def true_row(
    t: Any, dense: Any, traw: Any, tcode: Any, toff: Any, tld: Any, member: Any, union: Any, c: Any, C: Any, n: Any,
    y: Any, spare: Any,
) -> None:  # fmt: skip
    """y of class (or region) c, before label smoothing."""
    zero, one = y.dtype.type(0), y.dtype.type(1)
    if dense and not union:
        load(traw, tcode, toff + c * tld, np.uint64(1), n, y, np.uint64(0))
    elif dense:
        for v in range(n):
            y[v] = zero
        for j in range(C):
            if member[c, j]:
                load(traw, tcode, toff + j * tld, np.uint64(1), n, spare, np.uint64(0))
                for v in range(n):
                    y[v] = spare[v] if spare[v] > y[v] else y[v]
    elif union:
        for v in range(n):
            y[v] = one * member[c, np.uint64(t[v])] if t[v] >= 0 else zero
    else:
        for v in range(n):
            y[v] = one * (t[v] == np.int32(c))


@jit
def probabilities(
    act: Any, src: Any, off: Any, ld: Any, C: Any, n: Any, w: Any, masked: Any, rows: Any, e: Any, o: Any, eld: Any
) -> None:
    """logits or probabilities -> p, in e."""
    m, s, r, rw = rows[0], rows[1], rows[2], rows[3]
    zero, one = e.dtype.type(0), e.dtype.type(1)
    if act == SOFTMAX:
        softmax(src, off, ld, C, n, w, masked, m, s, r, rw, e, o, eld)
        for c in range(C):
            for v in range(n):
                e[o + c * eld + v] *= r[v]
        for v in range(n):
            s[v] = m[v] + log(s[v])  # ln of the sum of exponentials, for -ln p = s - x
        return
    for c in range(C):
        oc, xc = o + c * eld, off + c * ld
        if act == SIGMOID:
            for v in range(n):
                x = src[xc + v]
                z = exp(-abs(x))
                q = one / (one + z)
                e[oc + v] = q if x >= zero else z * q
        else:
            for v in range(n):
                e[oc + v] = src[xc + v]
        if masked:
            scrub(e, oc, n, w, zero)


@jit
def _log_rows(act: Any, union: Any, src: Any, xo: Any, s: Any, p: Any, w: Any, n: Any, l: Any, l2: Any) -> None:
    """l = -ln p and, for a sigmoid, l2 = -ln(1 - p); 0 where the weight is."""
    zero, one, tiny = l.dtype.type(0), l.dtype.type(1), l.dtype.type(1.1754944e-38)
    if act == SIGMOID:
        for v in range(n):
            x = src[xo + v]
            z = exp(-abs(x))
            u = one + z  # log1p(z) = log(u) z / (u - 1), exact where u rounds
            both = log(u) * z / (u - one) if u > one else z
            l[v] = both - x if x < zero else both
            l2[v] = both + x if x > zero else both
        scrub(l2, np.uint64(0), n, w, zero)
    elif act == SOFTMAX and not union:
        for v in range(n):
            l[v] = s[v] - src[xo + v]
    else:
        for v in range(n):
            l[v] = -log(tiny if p[v] < tiny else p[v])
    scrub(l, np.uint64(0), n, w, zero)


@jit
def union_row(e: Any, o: Any, eld: Any, member: Any, c: Any, C: Any, n: Any, p: Any) -> None:
    """p of region c: the sum of its classes'."""
    for v in range(n):
        p[v] = p.dtype.type(0)
    for j in range(C):
        if member[c, j]:
            for v in range(n):
                p[v] += e[o + j * eld + v]


@jit
def _smooth(y: Any, n: Any, smoothing: Any, share: Any) -> None:
    keep = y.dtype.type(1) - smoothing
    for v in range(n):
        y[v] = keep * y[v] + share


@jit
def _complement(p: Any, n: Any, q: Any) -> None:
    for v in range(n):
        q[v] = p.dtype.type(1) - p[v]


@jit
def general_sums(
    act: Any, src: Any, off: Any, ld: Any, C: Any, K: Any, n: Any, flags: Any, gamma: Any, power: Any, smoothing: Any,
    share: Any, t: Any, w: Any, masked: Any, dense: Any, traw: Any, tcode: Any, toff: Any, tld: Any, member: Any,
    union: Any, validate: Any, e: Any, eld: Any, rows: Any, sums: Any,
) -> Any:  # fmt: skip
    """One block's statistics, added to sums (fields, K); returns how many target values lie outside [0, 1]."""
    y, p, l, l2, q, d, z = rows[4], rows[5], rows[6], rows[7], rows[8], rows[9], rows[10]
    zero, one = np.uint64(0), e.dtype.type(1)
    bad = np.int64(0)
    probabilities(act, src, off, ld, C, n, w, masked, rows, e, zero, eld)
    for c in range(K):
        true_row(t, dense, traw, tcode, toff, tld, member, union, c, C, n, y, z)
        if dense and validate:
            for v in range(n):
                bad += np.int64((y[v] < 0) | (y[v] > one))
        if union:
            union_row(e, zero, eld, member, c, C, n, p)
        else:
            for v in range(n):
                p[v] = e[c * eld + v]
        if masked:
            scrub(y, zero, n, w, y.dtype.type(0))
        sums[LABELLED, c] += _sum2(y, zero, w, n)
        if smoothing > 0:
            _smooth(y, n, smoothing, share)
        if flags & (1 << I):
            sums[I, c] += _sum3(y, zero, p, w, n)
        if flags & (1 << P):
            sums[P, c] += _sum2(p, zero, w, n)
        if flags & (1 << T):
            sums[T, c] += _sum2(y, zero, w, n)
        if flags & (1 << Q):
            sums[Q, c] += _sum3(p, zero, p, w, n)
        if flags & (1 << R):
            sums[R, c] += _sum3(y, zero, y, w, n)
        if flags & (1 << D):
            for v in range(n):
                q[v] = abs(p[v] - y[v])
            power_row(q, power, n, d)
            sums[D, c] += _sum2(d, zero, w, n)
        if flags & ((1 << E) | (1 << F)):
            _log_rows(act, union, src, off + c * ld, rows[1], p, w, n, l, l2)
        if flags & (1 << E):
            sums[E, c] += _sum3(y, zero, l, w, n)
            if act == SIGMOID:
                _complement(y, n, d)
                sums[E, c] += _sum3(d, zero, l2, w, n)
        if flags & (1 << F):
            _complement(p, n, q)
            power_row(q, gamma, n, d)
            for v in range(n):
                d[v] *= l[v]
            sums[F, c] += _sum3(y, zero, d, w, n)
            if act == SIGMOID:
                power_row(p, gamma, n, d)
                for v in range(n):
                    d[v] *= l2[v] * (one - y[v])
                sums[F, c] += _sum2(d, zero, w, n)
    return bad


@jit
def _general_slopes(
    act: Any, union: Any, flags: Any, gamma: Any, power: Any, y: Any, p: Any, l: Any, l2: Any, n: Any,
    gi: Any, gp: Any, gq: Any, gd: Any, ge: Any, gf: Any, q: Any, k: Any, d: Any, z: Any,
) -> None:  # fmt: skip
    """q = dL/dp, but for the logarithms k = p dL/dp (softmax) or dL/dx (sigmoid), which stay finite at p = 0."""
    zero, one, two, tiny = q.dtype.type(0), q.dtype.type(1), q.dtype.type(2), q.dtype.type(1.1754944e-38)
    for v in range(n):
        q[v] = gp + gi * y[v] + two * gq * p[v]
        k[v] = zero
    if flags & (1 << D):
        for v in range(n):
            d[v] = abs(p[v] - y[v])
        power_row(d, power - one, n, z)
        for v in range(n):
            x = p[v] - y[v]
            q[v] += gd * power * z[v] * (one * (x > zero) - one * (x < zero))
    direct = act == SOFTMAX and not union
    if flags & (1 << E):
        if act == SIGMOID:
            for v in range(n):
                k[v] += ge * (p[v] - y[v])
        elif direct:
            for v in range(n):
                k[v] -= ge * y[v]
        else:
            for v in range(n):
                q[v] -= ge * y[v] / p[v] if p[v] >= tiny else zero
    if flags & (1 << F):
        _complement(p, n, d)
        if act == SIGMOID:
            power_row(d, gamma, n, z)
            for v in range(n):
                k[v] -= gf * y[v] * z[v] * (gamma * p[v] * l[v] + d[v])
            power_row(p, gamma, n, z)
            for v in range(n):
                k[v] += gf * (one - y[v]) * z[v] * (gamma * d[v] * l2[v] + p[v])
        else:
            power_row(d, gamma - one, n, z)
            for v in range(n):
                slope = -z[v] * (gamma * p[v] * l[v] + d[v]) * gf * y[v]
                if direct:
                    k[v] += slope
                else:
                    q[v] += slope / p[v] if p[v] >= tiny else zero


@jit
def general_gradient(
    act: Any, src: Any, off: Any, ld: Any, C: Any, K: Any, n: Any, flags: Any, gamma: Any, power: Any, smoothing: Any,
    share: Any, t: Any, w: Any, masked: Any, dense: Any, traw: Any, tcode: Any, toff: Any, tld: Any, member: Any,
    union: Any, h: Any, hld: Any, g: Any, o: Any, gld: Any, rows: Any, coef: Any,
) -> None:  # fmt: skip
    """One block of dL/dx. The probabilities live in the gradient's own memory, h holds p dL/dp of every class."""
    y, p, l, l2, q, k, d, z = rows[4], rows[5], rows[6], rows[7], rows[8], rows[9], rows[10], rows[11]
    zero = np.uint64(0)
    probabilities(act, src, off, ld, C, n, w, masked, rows, g, o, gld)
    if union:
        for i in range(C * hld):
            h[i] = h.dtype.type(0)
    for c in range(K):
        true_row(t, dense, traw, tcode, toff, tld, member, union, c, C, n, y, z)
        if smoothing > 0:
            _smooth(y, n, smoothing, share)
        if union:
            union_row(g, o, gld, member, c, C, n, p)
        else:
            for v in range(n):
                p[v] = g[o + c * gld + v]
        if flags & ((1 << E) | (1 << F)):
            _log_rows(act, union, src, off + c * ld, rows[1], p, w, n, l, l2)
        _general_slopes(
            act, union, flags, gamma, power, y, p, l, l2, n,
            coef[I, c], coef[P, c], coef[Q, c], coef[D, c], coef[E, c], coef[F, c], q, k, d, z,
        )  # fmt: skip
        if union:
            for j in range(C):
                if member[c, j]:
                    for v in range(n):
                        h[j * hld + v] += q[v]
        elif act == SOFTMAX:
            for v in range(n):
                h[c * hld + v] = p[v] * q[v] + k[v]
        elif act == SIGMOID:
            for v in range(n):
                h[c * hld + v] = p[v] * (p.dtype.type(1) - p[v]) * q[v] + k[v]
        else:
            for v in range(n):
                h[c * hld + v] = q[v]
    _finish(act, union, C, n, w, h, hld, g, o, gld, d)


@jit
def _finish(act: Any, union: Any, C: Any, n: Any, w: Any, h: Any, hld: Any, g: Any, o: Any, gld: Any, dot: Any) -> None:
    """dx = w (h - p sum_j h_j) for a softmax, w h otherwise; exactly 0 where the weight is."""
    zero = g.dtype.type(0)
    if act == SOFTMAX:
        for v in range(n):
            dot[v] = zero
        for c in range(C):
            if union:
                for v in range(n):
                    h[c * hld + v] *= g[o + c * gld + v]
            for v in range(n):
                dot[v] += h[c * hld + v]
        for c in range(C):
            for v in range(n):
                g[o + c * gld + v] = w[v] * (h[c * hld + v] - g[o + c * gld + v] * dot[v])
    else:
        for c in range(C):
            for v in range(n):
                g[o + c * gld + v] = w[v] * h[c * hld + v]
    for c in range(C):
        scrub(g, o + c * gld, n, w, zero)
