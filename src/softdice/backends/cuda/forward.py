"""logits, target -> partial sums: the forward kernels (Triton).

Every program walks some tiles of one sample, keeps its sums in registers, one lane per voxel of a tile, and writes one
row of `partial` at the end. A lane adds at most RUN numbers, a row holds at most RUN tiles, so that counts are whole
numbers below 2^24 and no sum in float32 grows long; the rows are added afterwards in float64 and in order.

Legend, beside that of `softdice.backends.cuda.math`. x, target, weight, voxel_map, member: pointers to a request's
tensors. xB, xC, xV: strides of x by sample, class and voxel, in elements divided by their units XU, which are constants
that tell the compiler what divides a stride (0: the stride is 1); so for t, w, u, and for the number of voxels, V times
VU. HARD, WEIGHTED, IGNORE, REGIONS, MAPPED: whether the target is labels, and there are weights, an ignored label,
regions, a map (a number for each voxel, or voxel and class, which mapped statistics read). ignore: that label; TOP:
labels are below it. t, w, inside: class number, weight, existence of a voxel, [1, BV]. value, p, q, a, other, y, u:
tiles of logits, p, 1 - p, -ln p, -ln(1 - p), targets, map. W: the dtype of sums, tl.float32 or tl.float64. C classes, K
columns (classes, or regions). A tile has CT classes or KT columns, and BV voxels, of which a thread reads VECTOR
neighbours at once; a program has GROUPS tiles of columns at once. `programs` walk a sample, in `steps` tiles each.
tl.program_id(0) is sample times `programs` plus the program's place in the sample, tl.program_id(1) its tile of
columns. xb, tb, ub: pointers to sample b.
"""

# mypy: allow-untyped-defs
# (Triton reads the annotations of a kernel and knows none for a runtime value.)

from __future__ import annotations

import triton
import triton.language as tl

from softdice.backends.cuda.math import (
    GENERAL,
    NONE,
    SOFTMAX,
    along,
    class_tile,
    class_tiles,
    outside,
    places,
    probabilities,
    region_tiles,
    rows,
    softmax_from,
    softmax_rows,
    softmax_tiles,
    truth_tile,
    voxels,
)


@triton.jit(do_not_specialize=GENERAL)
def rows_kernel(
    x, target, weight, maxima, logs, V, programs, steps, xB, xC, xV, tB, tV, wB, wV, ignore, VU: tl.constexpr,
    XU: tl.constexpr, TU: tl.constexpr, WU: tl.constexpr, C: tl.constexpr, TOP: tl.constexpr, HARD: tl.constexpr,
    WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, CT: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write m = max_c x_c to maxima and log2 sum_c exp(x_c - m) to logs, (B, V) each in W, for a softmax over more
    classes than a program holds. `forward_kernel` is launched after it and reads them. A voxel of weight 0 may hold
    NaN: its logits are left out."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    end = V.to(tl.int64) * VU
    xb = x + along(b, xB, XU[0])
    for step in range(0, steps):
        tile = tl.program_id(0) % programs + step * programs
        v = places(tile.to(tl.int64), BV, 1)
        inside = v < end
        _, w, _, _ = voxels(
            target, weight, b, v, inside, tB, tV, TU, wB, wV, WU, ignore, 0, TOP, HARD, WEIGHTED, IGNORE, W
        )  # the 0: FIRST
        m, log_sum = softmax_rows(xb, v, inside, w, xC, xV, XU, C, CT, BV, WEIGHTED or IGNORE, W)
        tl.store(maxima + b * end + v, m, mask=inside)
        tl.store(logs + b * end + v, log_sum, mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def forward_kernel(
    x, target, weight, voxel_map, member, maxima, logs, partial, bad, V, programs, steps, xB, xC, xV, tB, tC, tV,
    wB, wV, uB, uC, uV, ignore, VU: tl.constexpr, XU: tl.constexpr, TU: tl.constexpr, WU: tl.constexpr,
    UU: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, ACT: tl.constexpr,
    HARD: tl.constexpr, WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, REGIONS: tl.constexpr,
    MAPPED: tl.constexpr, VALIDATE: tl.constexpr, ROWS: tl.constexpr, NOTHING: tl.constexpr, PLUS: tl.constexpr,
    PUT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CT: tl.constexpr, KT: tl.constexpr,
    GROUPS: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write partial sums (B, programs, ROWS, K) in W, and with VALIDATE counts of voxels with a value out of range.
    maxima, logs: what `rows_kernel` wrote, for a softmax over more classes than a program holds. bad: the counts, int32
    (all programs, 4): of labels, targets, probabilities (outside [LOW, HIGH]), weights. NOTHING, PLUS and PUT start,
    increase and store sums of ROWS statistics (`softdice.backends.cuda.declared`)."""
    MASKED: tl.constexpr = WEIGHTED or IGNORE
    task = tl.program_id(0).to(tl.int64)
    b = task // programs
    end = V.to(tl.int64) * VU
    xb = x + along(b, xB, XU[0])
    tb = target + along(b, tB, TU[0])
    ub = voxel_map
    if MAPPED:
        ub = voxel_map + along(b, uB, UU[0])
    k = rows(tl.program_id(1) * KT if K > KT * GROUPS else 0, KT)
    # ROWS tiles for each group of columns, one group after the other. A sum that all classes share (of weights) is kept
    # in group 0: PLUS adds to it where g is 0, and PUT finds it in all the sums
    sums = ()
    for _ in tl.static_range(GROUPS):
        sums = sums + NOTHING(tl.zeros([KT, BV], W), tl.zeros([1, BV], W))
    bad_label = tl.zeros([1, BV], tl.int32)
    bad_value = tl.zeros([1, BV], tl.int32)
    bad_target = tl.zeros([1, BV], tl.int32)
    bad_weight = tl.zeros([1, BV], tl.int32)
    for step in range(0, steps):
        tile = task % programs + step * programs
        # a tile of many rows is shared out by VECTOR whatever the stride
        v = places(tile, BV, VECTOR if XU[2] == 0 or KT > 1 else 1)
        inside = v < end
        t, w, wrong_label, wrong_weight = voxels(
            target, weight, b, v, inside, tB, tV, TU, wB, wV, WU, ignore, 1 if C == 1 else 0, TOP, HARD, WEIGHTED,
            IGNORE, W,
        )  # fmt: skip
        # 1. p of the columns, and d = log2 exp(x - m) of a softmax
        if REGIONS:
            p, d, y, _m, log_sum = region_tiles(
                xb, tb, member, t, w, k, v, inside, xC, xV, XU, tC, tV, TU, C, K, CT, KT, BV, ACT, HARD, MASKED, W
            )
            values, ps, ds = (p,), (p,), (d,)
        else:
            FILL: tl.constexpr = float("-inf") if ACT == SOFTMAX else 0.0
            values = class_tiles(xb, k, v, inside, w, xC, xV, XU, C, KT, GROUPS, MASKED, FILL, W)
            ps, ds, log_sum = values, values, w
            if ACT == SOFTMAX and K <= KT * GROUPS:
                ps, ds, log_sum = softmax_tiles(values, GROUPS)
            elif ACT == SOFTMAX:
                m = tl.load(maxima + b * end + v, mask=inside, other=0.0)
                log_sum = tl.load(logs + b * end + v, mask=inside, other=0.0)
                p, d = softmax_from(values[0], m, log_sum)  # GROUPS is 1 for so many classes, and with regions
                ps, ds = (p,), (d,)
        # 2. each group's targets and map, and w times the terms added to its sums
        added = ()
        for g in tl.static_range(GROUPS):
            c = k + g * KT
            p, q, a, other = probabilities(values[g], ps[g], ds[g], log_sum, c, K, KT, ACT)
            if not REGIONS:
                y = truth_tile(tb, t, w, c, v, inside, tC, tV, TU, C, HARD, MASKED, KT, W)
            if VALIDATE and not REGIONS:
                if not HARD:
                    bad_target += outside(y, 0.0, 1.0)
                if ACT == NONE:
                    bad_value += outside(values[g], LOW, HIGH)
            u = p  # not read without a map
            if MAPPED:
                u = class_tile(ub, c, v, inside, w, uC, uV, UU, K, KT, MASKED, 0.0, W)
            added = added + PLUS(sums[g * ROWS : (g + 1) * ROWS], g == 0, w, p, q, a, other, y, u)
        sums = added
        if VALIDATE:  # 3. voxels with a value out of range; of regions, the values of their classes
            if WEIGHTED:
                bad_weight += wrong_weight.to(tl.int32)
            if HARD:
                bad_label += wrong_label.to(tl.int32)
            if REGIONS and (ACT == NONE or not HARD):
                for c0 in range(0, C, CT):
                    channels = rows(c0, CT)
                    if not HARD:
                        true = class_tile(tb, channels, v, inside, w, tC, tV, TU, C, CT, MASKED, 0.0, W)
                        bad_target += outside(true, 0.0, 1.0)
                    if ACT == NONE:
                        value = class_tile(xb, channels, v, inside, w, xC, xV, XU, C, CT, MASKED, 0.0, W)
                        bad_value += outside(value, LOW, HIGH)
    for g in tl.static_range(GROUPS):
        PUT(sums[g * ROWS : (g + 1) * ROWS], sums, partial, task * ROWS, k + g * KT, K)
    if VALIDATE:
        place = bad + (task * tl.num_programs(1) + tl.program_id(1)) * 4
        tl.store(place, tl.sum(bad_label))
        tl.store(place + 1, tl.sum(bad_target))
        tl.store(place + 2, tl.sum(bad_value))
        tl.store(place + 3, tl.sum(bad_weight))
