"""logits, target -> partial sums: the forward kernels (Triton).

Every program walks some tiles of one sample, keeps its sums in registers, one lane per voxel of a tile, and writes one
row of `partial` at the end. A lane adds at most RUN numbers, a row holds at most RUN tiles, so that counts are whole
numbers below 2^24 and no sum in float32 grows long; the rows are added afterwards in float64 and in order.
"""

# mypy: allow-untyped-defs
# (Triton reads the annotations of a kernel and knows none for a runtime value.)

from __future__ import annotations

import triton
import triton.language as tl

from softdice.kernels.triton.math import (
    LN2,
    NONE,
    SIGMOID,
    SOFTMAX,
    class_tile,
    minus_log,
    outside,
    power,
    region_tiles,
    sigmoid,
    sigmoid_logs,
    softmax_given,
    softmax_rows,
    softmax_tile,
    voxels,
)


@triton.jit(do_not_specialize=["programs", "steps", "ignore"])
def rows_kernel(
    x, target, weight, maxima, logs, V, programs, steps, xB, xC, xV, tB, tV, wB, wV, ignore, C: tl.constexpr,
    TOP: tl.constexpr, HARD: tl.constexpr, WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, CT: tl.constexpr,
    BV: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Softmax over more classes than a tile holds -> maximum and log2 of the sum of exponentials, (B, V) each."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    for step in range(0, steps):
        tile = tl.program_id(0) % programs + step * programs
        v = tile.to(tl.int64) * BV + tl.arange(0, BV)
        inside = v < V
        _, w, _, _ = voxels(target, weight, b, v, inside, tB, tV, wB, wV, ignore, 0, TOP, HARD, WEIGHTED, IGNORE, W)
        m, log_sum = softmax_rows(x + b * xB, v, inside, w, xC, xV, C, CT, BV, WEIGHTED or IGNORE, W)
        tl.store(maxima + b * V + v, m, mask=inside)
        tl.store(logs + b * V + v, log_sum, mask=inside)


@triton.jit
def _put(partial, row, AT: tl.constexpr, K: tl.constexpr, k, value):
    """Lanes -> one number per class, into its row of `partial`."""
    if AT >= 0:
        tl.store(partial + (row + AT) * K + k, tl.sum(value, 1), mask=k < K)


@triton.jit(do_not_specialize=["programs", "steps", "ignore"])
def forward_kernel(
    x, target, weight, member, maxima, logs, partial, bad, V, programs, steps, xB, xC, xV, tB, tC, tV,
    wB, wV, ignore, C: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, ACT: tl.constexpr,
    HARD: tl.constexpr, WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, REGIONS: tl.constexpr,
    VALIDATE: tl.constexpr, I: tl.constexpr, P: tl.constexpr, T: tl.constexpr, Q: tl.constexpr,  # noqa: E741
    R: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, N: tl.constexpr,
    LABELLED: tl.constexpr, ROWS: tl.constexpr, GAMMA: tl.constexpr, POWER: tl.constexpr,
    KEEP: tl.constexpr, SHARE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CT: tl.constexpr,
    KT: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """I, P, T ... are the places of the statistics among the ROWS rows, -1 for those that nobody asked for."""
    MASKED: tl.constexpr = WEIGHTED or IGNORE
    SMOOTH: tl.constexpr = KEEP != 1.0
    task = tl.program_id(0).to(tl.int64)
    b = task // programs
    k = (tl.program_id(1) * KT + tl.arange(0, KT)).to(tl.int64)
    zero = tl.zeros([KT, BV], W)
    acc_i, acc_p, acc_t, acc_q, acc_r, acc_d, acc_e, acc_f, acc_l = zero, zero, zero, zero, zero, zero, zero, zero, zero
    acc_n = tl.zeros([BV], W)
    bad_label = tl.zeros([BV], tl.int32)
    bad_value = tl.zeros([BV], tl.int32)
    bad_target = tl.zeros([BV], tl.int32)
    bad_weight = tl.zeros([BV], tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = task % programs + step * programs
        v = tl.max_contiguous(tile * BV + tl.arange(0, BV), VECTOR)
        inside = v < V
        t, w, wrong_label, wrong_weight = voxels(
            target, weight, b, v, inside, tB, tV, wB, wV, ignore, 1 if C == 1 else 0, TOP, HARD, WEIGHTED, IGNORE, W
        )
        # p, y and -ln p
        if REGIONS:
            m = w
            log_sum = w
            if ACT == SOFTMAX:
                m, log_sum = softmax_rows(x + b * xB, v, inside, w, xC, xV, C, CT, BV, MASKED, W)
            p, y = region_tiles(
                x + b * xB, target + b * tB, member, m, log_sum, t, w, k, v, inside, xC, xV, tC, tV,
                C, K, CT, KT, BV, ACT, HARD, MASKED, W,
            )  # fmt: skip
            value = p
        else:
            FILL: tl.constexpr = float("-inf") if ACT == SOFTMAX else 0.0
            value = class_tile(x + b * xB, k, v, inside, w, xC, xV, C, KT, MASKED, FILL, W)
            p = value
            if ACT == SOFTMAX:
                if C <= KT:
                    p, d, log_sum = softmax_tile(value)
                else:
                    m = tl.load(maxima + b * V + v, mask=inside, other=0.0)
                    log_sum = tl.load(logs + b * V + v, mask=inside, other=0.0)
                    p, d = softmax_given(value, m, log_sum)
            elif ACT == SIGMOID:
                p = sigmoid(value)
            if HARD:
                y = tl.where(t[None, :] == k[:, None], 1.0, 0.0).to(W)
            else:
                y = class_tile(target + b * tB, k, v, inside, w, tC, tV, C, KT, MASKED, 0.0, W)
        w_ = w[None, :]
        if VALIDATE:
            if WEIGHTED:
                bad_weight += wrong_weight.to(tl.int32)
            if HARD:
                bad_label += wrong_label.to(tl.int32)
            elif not REGIONS:
                bad_target += outside(y, 0.0, 1.0)
            if ACT == NONE and not REGIONS:
                bad_value += outside(value, LOW, HIGH)
            if REGIONS and (ACT == NONE or not HARD):
                for c0 in range(0, C, CT):
                    c = (c0 + tl.arange(0, CT)).to(tl.int64)
                    if not HARD:
                        true = class_tile(target + b * tB, c, v, inside, w, tC, tV, C, CT, MASKED, 0.0, W)
                        bad_target += outside(true, 0.0, 1.0)
                    if ACT == NONE:
                        value = class_tile(x + b * xB, c, v, inside, w, xC, xV, C, CT, MASKED, 0.0, W)
                        bad_value += outside(value, LOW, HIGH)
        # the sums, as softdice.reference.statistics defines them
        if LABELLED >= 0:
            acc_l += y * w_
        if SMOOTH:
            y = KEEP * y + SHARE
        pw = p * w_
        if I >= 0:
            acc_i += pw * y
        if P >= 0:
            acc_p += pw
        if T >= 0:
            if SMOOTH or WEIGHTED or not HARD:
                acc_t += y * w_
            else:  # w is 1 where y is
                acc_t += y
        if Q >= 0:
            acc_q += pw * p
        if R >= 0:
            acc_r += y * y * w_
        if D >= 0:
            acc_d += power(tl.abs(p - y), POWER) * w_
        if E >= 0 or F >= 0:
            if ACT == SIGMOID:
                nlp, nlq = sigmoid_logs(value)
            elif ACT == SOFTMAX and not REGIONS:
                nlp = (log_sum[None, :] - d) * LN2
            else:
                nlp = minus_log(p)
            if HARD and not SMOOTH and ACT != SIGMOID:  # an infinite logarithm elsewhere is none of this class
                nlp = tl.where(y > 0, nlp, 0.0)
            elif K % KT != 0:
                nlp = tl.where((k < K)[:, None], nlp, 0.0)
            if E >= 0:
                term = y * nlp
                if ACT == SIGMOID:
                    term += (1.0 - y) * nlq
                acc_e += term * w_
            if F >= 0:
                term = y * power(1.0 - p, GAMMA) * nlp
                if ACT == SIGMOID:
                    term += (1.0 - y) * power(p, GAMMA) * nlq
                acc_f += term * w_
        if N >= 0:
            acc_n += w
    row = task * ROWS
    _put(partial, row, I, K, k, acc_i)
    _put(partial, row, P, K, k, acc_p)
    _put(partial, row, T, K, k, acc_t)
    _put(partial, row, Q, K, k, acc_q)
    _put(partial, row, R, K, k, acc_r)
    _put(partial, row, D, K, k, acc_d)
    _put(partial, row, E, K, k, acc_e)
    _put(partial, row, F, K, k, acc_f)
    _put(partial, row, LABELLED, K, k, acc_l)
    if N >= 0:
        tl.store(partial + (row + N) * K + k, tl.zeros([KT], W) + tl.sum(acc_n, 0), mask=k < K)
    if VALIDATE:
        place = bad + (task * tl.num_programs(1) + tl.program_id(1)) * 4
        tl.store(place, tl.sum(bad_label, 0))
        tl.store(place + 1, tl.sum(bad_target, 0))
        tl.store(place + 2, tl.sum(bad_value, 0))
        tl.store(place + 3, tl.sum(bad_weight, 0))
