"""Blocks of every case but the usual one: any activation, per-class targets, smoothing, regions, exponents (Numba).

A row of y at a time. Rows (n voxels) as in `softdice.kernels.cpu.plain`, and y target, p probability, nlp = -ln p,
nlq = -ln(1 - p), q = dL/dp, k = the part of dL/dp that comes from logarithms, multiplied by p.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softdice.kernels.cpu.compiled import jit
from softdice.kernels.cpu.plain import (
    LABELLED,
    RUN,
    SIGMOID,
    SOFTMAX,
    D,
    E,
    F,
    I,
    P,
    Q,
    R,
    T,
    power_row,
    softmax,
    sum_product,
)
from softdice.kernels.cpu.rows import exp, load, log, scrub


@jit
def sum_product3(a: Any, o: Any, b: Any, c: Any, n: Any) -> Any:
    total = 0.0
    for v0 in range(np.uint64(0), n, RUN):
        part = a.dtype.type(0)
        for v in range(v0, min(v0 + RUN, n)):
            part += a[o + v] * b[v] * c[v]
        total += part
    return total


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
def _log_rows(act: Any, union: Any, src: Any, xo: Any, s: Any, p: Any, w: Any, n: Any, nlp: Any, nlq: Any) -> None:
    """nlp = -ln p and, for a sigmoid, nlq = -ln(1 - p); 0 where the weight is."""
    zero, one, tiny = nlp.dtype.type(0), nlp.dtype.type(1), nlp.dtype.type(1.1754944e-38)
    if act == SIGMOID:
        for v in range(n):
            x = src[xo + v]
            z = exp(-abs(x))
            u = one + z  # log1p(z) = log(u) z / (u - 1), exact where u rounds
            both = log(u) * z / (u - one) if u > one else z
            nlp[v] = both - x if x < zero else both
            nlq[v] = both + x if x > zero else both
        scrub(nlq, np.uint64(0), n, w, zero)
    elif act == SOFTMAX and not union:
        for v in range(n):
            nlp[v] = s[v] - src[xo + v]
    else:
        for v in range(n):
            nlp[v] = -log(tiny if p[v] < tiny else p[v])
    scrub(nlp, np.uint64(0), n, w, zero)


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
    y, p, nlp, nlq, q, d, z = rows[4], rows[5], rows[6], rows[7], rows[8], rows[9], rows[10]
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
        sums[LABELLED, c] += sum_product(y, zero, w, n)
        if smoothing > 0:
            _smooth(y, n, smoothing, share)
        if flags & (1 << I):
            sums[I, c] += sum_product3(y, zero, p, w, n)
        if flags & (1 << P):
            sums[P, c] += sum_product(p, zero, w, n)
        if flags & (1 << T):
            sums[T, c] += sum_product(y, zero, w, n)
        if flags & (1 << Q):
            sums[Q, c] += sum_product3(p, zero, p, w, n)
        if flags & (1 << R):
            sums[R, c] += sum_product3(y, zero, y, w, n)
        if flags & (1 << D):
            for v in range(n):
                q[v] = abs(p[v] - y[v])
            power_row(q, power, n, d)
            sums[D, c] += sum_product(d, zero, w, n)
        if flags & ((1 << E) | (1 << F)):
            _log_rows(act, union, src, off + c * ld, rows[1], p, w, n, nlp, nlq)
        if flags & (1 << E):
            sums[E, c] += sum_product3(y, zero, nlp, w, n)
            if act == SIGMOID:
                _complement(y, n, d)
                sums[E, c] += sum_product3(d, zero, nlq, w, n)
        if flags & (1 << F):
            _complement(p, n, q)
            power_row(q, gamma, n, d)
            for v in range(n):
                d[v] *= nlp[v]
            sums[F, c] += sum_product3(y, zero, d, w, n)
            if act == SIGMOID:
                power_row(p, gamma, n, d)
                for v in range(n):
                    d[v] *= nlq[v] * (one - y[v])
                sums[F, c] += sum_product(d, zero, w, n)
    return bad


@jit
def _general_slopes(
    act: Any, union: Any, flags: Any, gamma: Any, power: Any, y: Any, p: Any, nlp: Any, nlq: Any, n: Any,
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
                k[v] -= gf * y[v] * z[v] * (gamma * p[v] * nlp[v] + d[v])
            power_row(p, gamma, n, z)
            for v in range(n):
                k[v] += gf * (one - y[v]) * z[v] * (gamma * d[v] * nlq[v] + p[v])
        else:
            power_row(d, gamma - one, n, z)
            for v in range(n):
                slope = -z[v] * (gamma * p[v] * nlp[v] + d[v]) * gf * y[v]
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
    y, p, nlp, nlq, q, k, d, z = rows[4], rows[5], rows[6], rows[7], rows[8], rows[9], rows[10], rows[11]
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
            _log_rows(act, union, src, off + c * ld, rows[1], p, w, n, nlp, nlq)
        _general_slopes(
            act, union, flags, gamma, power, y, p, nlp, nlq, n,
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
