"""dL/dsums, logits, target -> dL/dlogits: the backward kernel (Triton).

With q = dL/dp, but for the logarithms k = p dL/dp (softmax) or dL/dx (sigmoid), which stay finite at p = 0:

    softmax   dx_c = w (p_c (q_c - sum_j (p_j q_j + k_j)) + k_c)
    sigmoid   dx_c = w (p_c (1 - p_c) q_c + k_c)
    none      dx_c = w q_c
"""

# mypy: allow-untyped-defs
# (Triton reads the annotations of a kernel and knows none for a runtime value.)

from __future__ import annotations

import triton
import triton.language as tl

from softdice.kernels.triton.math import (
    LN2,
    SIGMOID,
    SOFTMAX,
    TINY,
    class_tile,
    minus_log,
    power,
    region_tiles,
    sigmoid,
    sigmoid_logs,
    softmax_given,
    softmax_rows,
    softmax_tile,
    voxels,
)


@triton.jit
def _coefficient(grad, at: tl.constexpr, b, k, gF, gB, gK, K: tl.constexpr, KT: tl.constexpr, W: tl.constexpr):
    """dL/d(statistic) of each class, [KT, 1]; 0 for a statistic that nobody asked for."""
    value = tl.zeros([KT], W)
    if at >= 0:
        value = tl.load(grad + at * gF + b * gB + k * gK, mask=k < K, other=0.0).to(W)
    return value[:, None]


@triton.jit
def _slopes(
    p, y, nlp, nlq, gi, gp, gq, gd, ge, gf, I: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,  # noqa: E741
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, GAMMA: tl.constexpr, POWER: tl.constexpr,
    DIRECT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """p, y -> q and k; DIRECT: the logarithm is that of a softmax, not of a sum of probabilities."""
    q = p * 0.0
    k = p * 0.0
    if P >= 0:
        q = q + gp
    if I >= 0:
        q += gi * y
    if Q >= 0:
        q += 2.0 * gq * p
    if D >= 0:
        apart = p - y
        if POWER == 2:
            q += 2.0 * gd * apart
        else:
            sign = tl.where(apart > 0, 1.0, 0.0) - tl.where(apart < 0, 1.0, 0.0)
            q += POWER * gd * power(tl.abs(apart), POWER - 1) * sign
    if E >= 0:
        if ACT == SIGMOID:
            k += ge * (p - y)
        elif DIRECT:
            k -= ge * y
        else:
            q -= tl.where(p >= TINY, ge * y / tl.maximum(p, TINY), 0.0)
    if F >= 0:
        if ACT == SIGMOID:
            k -= gf * y * power(1.0 - p, GAMMA) * (GAMMA * p * nlp + (1.0 - p))
            k += gf * (1.0 - y) * power(p, GAMMA) * (GAMMA * (1.0 - p) * nlq + p)
        else:
            if GAMMA == 0:  # noqa: SIM108 - the branch is taken when compiling
                slope = -gf * y
            else:
                slope = -gf * y * power(1.0 - p, GAMMA - 1) * (GAMMA * p * nlp + (1.0 - p))
            if DIRECT:
                k += slope
            else:
                q += tl.where(p >= TINY, slope / tl.maximum(p, TINY), 0.0)
    return q, k


@triton.jit
def _store(out, c, v, inside, dx, w, oC, oV, C: tl.constexpr, MASKED: tl.constexpr):
    """Exactly 0 where the voxel does not count, rounded to the dtype of the logits."""
    if MASKED:
        dx = tl.where((w > 0)[None, :], dx, 0.0)
    place = out + (c[:, None] * oC + v[None, :] * oV)
    tl.store(place, dx.to(out.dtype.element_ty), mask=(c < C)[:, None] & inside[None, :])


@triton.jit
def _tile(
    x, target, value, p, d, log_sum, t, w, k, v, inside, tC, tV, gi, gp, gq, gd, ge, gf,
    C: tl.constexpr, ACT: tl.constexpr, HARD: tl.constexpr, MASKED: tl.constexpr, I: tl.constexpr,  # noqa: E741
    P: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    GAMMA: tl.constexpr, POWER: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, KT: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Probabilities of some classes -> their q and k, and y before smoothing."""
    if HARD:
        y = tl.where(t[None, :] == k[:, None], 1.0, 0.0).to(W)
    else:
        y = class_tile(target, k, v, inside, w, tC, tV, C, KT, MASKED, 0.0, W)
    nlp = p
    nlq = p
    if F >= 0:
        if ACT == SIGMOID:
            nlp, nlq = sigmoid_logs(value)
        elif ACT == SOFTMAX:
            nlp = (log_sum[None, :] - d) * LN2
            if HARD and KEEP == 1.0:  # an infinite logarithm elsewhere is none of this class
                nlp = tl.where(y > 0, nlp, 0.0)
            elif C % KT != 0:
                nlp = tl.where((k < C)[:, None], nlp, 0.0)
        else:
            nlp = minus_log(p)
    smooth = y
    if KEEP != 1.0:
        smooth = KEEP * y + SHARE
    q, kk = _slopes(p, smooth, nlp, nlq, gi, gp, gq, gd, ge, gf, I, P, Q, D, E, F, GAMMA, POWER, ACT == SOFTMAX, ACT)
    if C % KT != 0:  # beyond the last class
        q = tl.where((k < C)[:, None], q, 0.0)
        kk = tl.where((k < C)[:, None], kk, 0.0)
    return q, kk, y


@triton.jit(do_not_specialize=["programs", "steps", "ignore"])
def backward_kernel(
    grad, x, target, weight, member, out, V, programs, steps, gF, gB, gK, xB, xC, xV, tB, tC, tV, wB,
    wV, oB, oC, oV, ignore, C: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, ACT: tl.constexpr,
    HARD: tl.constexpr, WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, REGIONS: tl.constexpr,
    I: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, E: tl.constexpr,  # noqa: E741
    F: tl.constexpr, GAMMA: tl.constexpr, POWER: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr,
    CT: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """I, P ... are the places of the statistics in `grad`, -1 for those that nobody asked for."""
    MASKED: tl.constexpr = WEIGHTED or IGNORE
    task = tl.program_id(0).to(tl.int64)
    b = task // programs
    xb = x + b * xB
    tb = target + b * tB
    ob = out + b * oB
    k = (tl.program_id(1) * KT + tl.arange(0, KT)).to(tl.int64)
    if REGIONS or ACT != SOFTMAX or C <= KT:  # one set of classes: their coefficients stay in registers
        gi = _coefficient(grad, I, b, k, gF, gB, gK, K, KT, W)
        gp = _coefficient(grad, P, b, k, gF, gB, gK, K, KT, W)
        gq = _coefficient(grad, Q, b, k, gF, gB, gK, K, KT, W)
        gd = _coefficient(grad, D, b, k, gF, gB, gK, K, KT, W)
        ge = _coefficient(grad, E, b, k, gF, gB, gK, K, KT, W)
        gf = _coefficient(grad, F, b, k, gF, gB, gK, K, KT, W)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = task % programs + step * programs
        v = tl.max_contiguous(tile * BV + tl.arange(0, BV), VECTOR)
        inside = v < V
        t, w, _, _ = voxels(
            target, weight, b, v, inside, tB, tV, wB, wV, ignore, 1 if C == 1 else 0, TOP, HARD, WEIGHTED, IGNORE, W
        )
        if REGIONS:
            m = w
            log_sum = w
            if ACT == SOFTMAX:
                m, log_sum = softmax_rows(xb, v, inside, w, xC, xV, C, CT, BV, MASKED, W)
            p, y = region_tiles(
                xb, tb, member, m, log_sum, t, w, k, v, inside, xC, xV, tC, tV,
                C, K, CT, KT, BV, ACT, HARD, MASKED, W,
            )  # fmt: skip
            if KEEP != 1.0:
                y = KEEP * y + SHARE
            q, _k = _slopes(p, y, minus_log(p), p, gi, gp, gq, gd, ge, gf, I, P, Q, D, E, F, GAMMA, POWER, False, ACT)
            q = tl.where((k < K)[:, None], q, 0.0)
            dot = tl.sum(p * q, 0)  # sum_j p_j sum_(r with j) q_r
            for c0 in range(0, C, CT):
                c = (c0 + tl.arange(0, CT)).to(tl.int64)
                pc = class_tile(xb, c, v, inside, w, xC, xV, C, CT, MASKED, 0.0, W)
                h = tl.zeros([CT, BV], W)
                for r in range(K):
                    chosen = tl.load(member + r * C + c, mask=c < C, other=0) > 0
                    row = tl.sum(tl.where((k == r)[:, None], q, 0.0), 0)
                    h += tl.where(chosen[:, None], row[None, :], 0.0)
                if ACT == SOFTMAX:
                    pc, _d = softmax_given(pc, m, log_sum)
                    h = pc * (h - dot[None, :])
                _store(ob, c, v, inside, h * w[None, :], w, oC, oV, C, MASKED)
        elif ACT == SOFTMAX and C > KT:  # maximum and sum, then sum_j p_j q_j + k_j, then the gradient
            m, log_sum = softmax_rows(xb, v, inside, w, xC, xV, C, KT, BV, MASKED, W)
            dot = tl.zeros([BV], W)
            for turn in tl.static_range(2):
                for c0 in range(0, C, KT):
                    c = (c0 + tl.arange(0, KT)).to(tl.int64)
                    value = class_tile(xb, c, v, inside, w, xC, xV, C, KT, MASKED, float("-inf"), W)
                    p, d = softmax_given(value, m, log_sum)
                    q, kk, y = _tile(
                        x, tb, value, p, d, log_sum, t, w, c, v, inside, tC, tV,
                        _coefficient(grad, I, b, c, gF, gB, gK, K, KT, W),
                        _coefficient(grad, P, b, c, gF, gB, gK, K, KT, W),
                        _coefficient(grad, Q, b, c, gF, gB, gK, K, KT, W),
                        _coefficient(grad, D, b, c, gF, gB, gK, K, KT, W),
                        _coefficient(grad, E, b, c, gF, gB, gK, K, KT, W),
                        _coefficient(grad, F, b, c, gF, gB, gK, K, KT, W),
                        C, ACT, HARD, MASKED, I, P, Q, D, E, F, GAMMA, POWER, KEEP, SHARE, KT, W,
                    )  # fmt: skip
                    if turn == 0:
                        dot += tl.sum(p * q + kk, 0)
                    else:
                        dx = w[None, :] * (p * (q - dot[None, :]) + kk)
                        _store(ob, c, v, inside, dx, w, oC, oV, C, MASKED)
        else:
            FILL: tl.constexpr = float("-inf") if ACT == SOFTMAX else 0.0
            value = class_tile(xb, k, v, inside, w, xC, xV, C, KT, MASKED, FILL, W)
            p = value
            d = value
            log_sum = w
            if ACT == SOFTMAX:
                p, d, log_sum = softmax_tile(value)
            elif ACT == SIGMOID:
                p = sigmoid(value)
            q, kk, y = _tile(
                x, tb, value, p, d, log_sum, t, w, k, v, inside, tC, tV, gi, gp, gq, gd, ge, gf,
                C, ACT, HARD, MASKED, I, P, Q, D, E, F, GAMMA, POWER, KEEP, SHARE, KT, W,
            )  # fmt: skip
            if ACT == SOFTMAX:
                if HARD:  # q of the true class is taken off first: less cancellation where the network is sure
                    q -= tl.sum(q * y, 0)[None, :]
                dot = tl.sum(p * q + kk, 0)
                dx = p * (q - dot[None, :]) + kk
            elif ACT == SIGMOID:
                dx = p * (1.0 - p) * q + kk
            else:
                dx = q
            _store(ob, k, v, inside, dx * w[None, :], w, oC, oV, C, MASKED)
