"""dL/dsums, logits, target -> dL/dlogits: the backward kernel (Triton).

With g and h the sums of the steep slopes (dL/dp) and of the straight slopes (dL/dx) of a class, each times its
coefficient (`softdice.backends.cuda.declared`):

    softmax   dx_c = w (p_c (g_c - sum_j (p_j g_j + h_j)) + h_c)
    sigmoid   dx_c = w (p_c (1 - p_c) g_c + h_c)
    none      dx_c = w (g_c + h_c)

With regions r and a softmax, dx_c = w sum_r (s_rc - p_c) (p_r g_r + h_r), where a class in r has the share
s_rc = p_c / p_r of it, and any other s_rc = 0.

Legend. b, c, k, v: sample, class, column (class or region), voxel. W is the dtype of all tiles, a tile [KT, BV]:

    x, target, weight, voxel_map, member, out   pointers to logits (or probabilities), target, weight, map, (K, C) bytes
                                                that say which class is in which region, and the result
    xb, tb, ub, ob, gb                          pointers to sample b of x, target, voxel_map, out and grad
    xB, xC, xV, XU; V, VU                       strides of x in units XU (so for t, w, u, o); V times VU voxels
    C, K, CT, KT, GROUPS, BV                    classes, columns; a tile's classes, its columns, tiles at once, voxels
    t, w, inside, m, log_sum                    [1, BV]: class number (-1: none), weight, whether a voxel exists,
                                                m = max x and log2 sum_c exp(x_c - m) of a softmax
    value, p, q, d, y, u                        tiles of logits, p, 1 - p, log2 exp(x - m), targets, map
    programs, steps, TOP                        programs of a sample, tiles of a program; the bound of labels
    VECTOR                                      neighbouring voxels that a thread reads at once
"""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc"
# ruff: noqa: RUF005
# (Triton reads the annotations of a kernel and knows none for a runtime value; its tuples grow by addition alone.)

from __future__ import annotations

import triton
import triton.language as tl

from softdice.backends.cuda.math import (
    GENERAL,
    KEPT,
    LOG2E,
    LOWEST,
    SIGMOID,
    SOFTMAX,
    along,
    class_sum,
    class_tile,
    class_tiles,
    exp2,
    places,
    probabilities,
    region_tiles,
    rows,
    softmax_from,
    softmax_rows,
    softmax_tiles,
    total,
    truth_tile,
    voxels,
    within,
)


@triton.jit
def _store(
    out, c, v, inside, dx, w, oC, oV, OU: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, WEIGHTED: tl.constexpr,
    IGNORE: tl.constexpr,
):  # fmt: skip
    """Write w dx, [CT, BV], to the sample's `out` in its dtype; 0 where a voxel does not count: dx may be NaN there."""
    if WEIGHTED:
        dx = dx * w
    if WEIGHTED or IGNORE:
        dx = tl.where(w > 0, dx, 0.0)
    place = out + (along(c, oC, OU[1]) + along(v, oV, OU[2]))
    tl.store(place, dx.to(out.dtype.element_ty), mask=within(c, inside, C, CT))


@triton.jit
def _slopes(
    coefficients, value, p, d, log_sum, y, u, k, K: tl.constexpr, KT: tl.constexpr, ACT: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """Return p, 1 - p, g and h, [KT, BV] each: the sums of coefficients times steep (dL/dp) and straight (dL/dx) slopes
    of columns k, 0 from column K on. coefficients: dL/dsums of the statistics with a slope, a tuple of tiles [KT, 1].
    value: logits. p: probabilities, if not of a sigmoid. d, log_sum: log2 exp(x - m) of a softmax, and log2 of its sum.
    y, u: targets and map, [KT, BV]."""
    p, q, a, other = probabilities(value, p, d, log_sum, k, K, KT, ACT)
    steep, straight = SLOPES(coefficients, p, q, a, other, y, u)
    if K % KT != 0:
        steep = tl.where(k < K, steep, 0.0)
        straight = tl.where(k < K, straight, 0.0)
    return p, q, steep, straight


@triton.jit(do_not_specialize=GENERAL)
def backward_kernel(
    grad, x, target, weight, voxel_map, member, out, V, programs, steps, gF, gB, gK, xB, xC, xV, tB, tC, tV, wB,
    wV, uB, uC, uV, oB, oC, oV, ignore, VU: tl.constexpr, XU: tl.constexpr, TU: tl.constexpr, WU: tl.constexpr,
    UU: tl.constexpr, OU: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, ACT: tl.constexpr,
    HARD: tl.constexpr, WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, REGIONS: tl.constexpr,
    MAPPED: tl.constexpr, TAKE: tl.constexpr, SLOPES: tl.constexpr,
    CT: tl.constexpr, KT: tl.constexpr, GROUPS: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write dL/dx (B, C, V) to out, for grad = dL/dsums (fields, B, K) of strides gF, gB, gK, in elements.
    TAKE loads the coefficients, SLOPES returns g and h, the sums of coefficients times steep and times straight slopes.
    Three ways: with regions; with a softmax over more classes than a program holds; else with all classes of the
    program together."""
    task = tl.program_id(0).to(tl.int64)
    b = task // programs
    end = V.to(tl.int64) * VU
    xb = x + along(b, xB, XU[0])
    tb = target + along(b, tB, TU[0])
    ub = voxel_map
    if MAPPED:
        ub = voxel_map + along(b, uB, UU[0])
    ob = out + along(b, oB, OU[0])
    gb = grad + b * gB
    k = rows(tl.program_id(1) * KT if K > KT * GROUPS and ACT != SOFTMAX else 0, KT)
    coefficients = ()  # where there is one set of classes, they stay in registers
    for g in tl.static_range(GROUPS):
        coefficients = coefficients + (TAKE(gb, k + g * KT, gF, gK, k + g * KT < K, W),)
    for step in range(0, steps):
        tile = task % programs + step * programs
        # XU[2] is 0 for neighbours; a tile of many rows is shared out by VECTOR whatever the stride
        v = places(tile, BV, VECTOR if XU[2] == 0 or KT > 1 else 1)
        inside = v < end
        t, w, _, _ = voxels(
            target, weight, b, v, inside, tB, tV, TU, wB, wV, WU, ignore, 1 if C == 1 else 0, TOP, HARD, WEIGHTED,
            IGNORE, W,
        )  # fmt: skip
        if REGIONS:
            # 1. the softmax over all classes, p of the regions, and their slopes
            p, d, y, m, log_sum = region_tiles(
                xb, tb, member, t, w, k, v, inside, xC, xV, XU, tC, tV, TU, C, K, CT, KT, BV, ACT, HARD, False, W
            )
            u = p  # without a map u is not read, nor is `value` with regions: p stands in for both
            if MAPPED:
                u = class_tile(ub, k, v, inside, w, uC, uV, UU, K, KT, False, 0.0, W)
            p, _q, steep, straight = _slopes(coefficients[0], p, p, d, log_sum, y, u, k, K, KT, ACT, SLOPES)
            slope = p * steep + straight if ACT == SOFTMAX else steep + straight
            for c0 in range(0, C, CT):  # 2. of each class the sum over the regions of its share times their slope
                c = rows(c0, CT)
                value = class_tile(xb, c, v, inside, w, xC, xV, XU, C, CT, False, 0.0, W)
                dx = tl.zeros([CT, BV], W)
                pc = dx
                if ACT == SOFTMAX:
                    pc, _d = softmax_from(value, m, log_sum)
                for r in range(K):
                    chosen = tl.load(member + r * C + c, mask=c < C, other=0) > 0
                    here = k == r
                    share = tl.where(chosen, 1.0, 0.0).to(W)
                    if ACT == SOFTMAX:
                        # s_rc = 2^(log2 exp(x_c - m) - d_r), without an infinity less an infinity
                        dr = tl.maximum(class_sum(tl.where(here, d, 0.0)), LOWEST, propagate_nan=KEPT)
                        power = (tl.maximum(value, LOWEST, propagate_nan=KEPT) - m) * LOG2E - dr
                        share = exp2(tl.where(chosen, power, LOWEST)) - pc
                    dx += share * class_sum(tl.where(here, slope, 0.0))
                _store(ob, c, v, inside, dx, w, oC, oV, OU, C, CT, WEIGHTED, IGNORE)
        elif ACT == SOFTMAX and C > KT * GROUPS:
            # 1. maximum and sum over all classes
            m, log_sum = softmax_rows(xb, v, inside, w, xC, xV, XU, C, KT, BV, False, W)
            dot = tl.zeros([1, BV], W)
            for turn in tl.static_range(2):  # 2. dot = sum_j p_j g_j + h_j; 3. the gradient
                for c0 in range(0, C, KT):
                    c = rows(c0, KT)
                    value = class_tile(xb, c, v, inside, w, xC, xV, XU, C, KT, False, float("-inf"), W)
                    p, d = softmax_from(value, m, log_sum)
                    u = p
                    if MAPPED:
                        u = class_tile(ub, c, v, inside, w, uC, uV, UU, K, KT, False, 0.0, W)
                    p, _q, steep, straight = _slopes(
                        TAKE(gb, c, gF, gK, c < K, W), value, p, d, log_sum,
                        truth_tile(tb, t, w, c, v, inside, tC, tV, TU, C, HARD, False, KT, W),
                        u, c, K, KT, ACT, SLOPES,
                    )  # fmt: skip
                    if turn == 0:
                        dot += class_sum(p * steep + straight)
                    else:
                        dx = p * (steep - dot) + straight
                        _store(ob, c, v, inside, dx, w, oC, oV, OU, C, KT, WEIGHTED, IGNORE)
        else:
            # 1. p of all classes of the program
            values = class_tiles(
                xb, k, v, inside, w, xC, xV, XU, C, KT, GROUPS, False, float("-inf") if ACT == SOFTMAX else 0.0, W
            )
            ps, ds, log_sum = values, values, w
            if ACT == SOFTMAX:
                ps, ds, log_sum = softmax_tiles(values, GROUPS)
            # 2. g (of a sigmoid p (1 - p) g) and h of each class
            steeps, straights, trues, shares = (), (), (), ()
            for g in tl.static_range(GROUPS):
                c = k + g * KT
                y = truth_tile(tb, t, w, c, v, inside, tC, tV, TU, C, HARD, False, KT, W)
                u = y
                if MAPPED:
                    u = class_tile(ub, c, v, inside, w, uC, uV, UU, K, KT, False, 0.0, W)
                p, q, steep, straight = _slopes(
                    coefficients[g], values[g], ps[g], ds[g], log_sum, y, u, c, K, KT, ACT, SLOPES
                )
                if ACT == SIGMOID:
                    steep = p * q * steep
                steeps, straights, trues = steeps + (steep,), straights + (straight,), trues + (steep * y,)
            # 3. of a softmax the sum over the classes, then the gradient
            true, dot = w * 0.0, w * 0.0  # [1, BV] of zeros
            if ACT == SOFTMAX:
                # dx_c = p_c (g_c - true - sum_j (p_j (g_j - true) + h_j)) + h_c, whatever `true` is
                if HARD:  # g of the true class: less cancellation where the network is sure
                    true = total(trues, GROUPS)
                for g in tl.static_range(GROUPS):
                    shares = shares + (ps[g] * (steeps[g] - true) + straights[g],)
                dot = total(shares, GROUPS)
            for g in tl.static_range(GROUPS):
                dx = steeps[g]
                if ACT == SOFTMAX:
                    dx = ps[g] * (dx - true - dot)
                _store(ob, k + g * KT, v, inside, dx + straights[g], w, oC, oV, OU, C, KT, WEIGHTED, IGNORE)
