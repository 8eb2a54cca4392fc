"""One voxel tile at a time: what the Triton kernels of both directions are made of.

Tiles are [class, voxel] or [region, voxel], in the dtype W: float32, or float64 for float64 input. A voxel has a class
number t (-1: none) and a weight w (0: it does not count, and no value of it may reach a sum). Offsets are 64-bit.

Legend, for all kernels:

    x, target, weight, voxel_map  pointers to a tensor, or to its sample b. xC, xV, XU: strides by class and voxel, and
                                  their units (`layout`); so for t, w, u and the output o. member: pointer, (K, C) bytes
    b, c, k, v                    sample; class, column (class or region) [CT or KT, 1]; voxels [1, BV]: numbers, int64
    inside, t, w                  [1, BV]: whether a voxel exists, its class number (int32), its weight
    value, p, q, y, u             tiles of logits (or probabilities), p, 1 - p, targets, map
    m, d, log_sum                 of a softmax: largest logit [1, BV], log2 exp(x - m), log2 sum_c exp(x_c - m) [1, BV]
    C, K                          classes; columns: regions where there are any, else classes
    CT, KT, BV                    a tile's rows of classes, and of columns; its voxels
    GROUPS, g                     tiles of columns that a program holds at once, as a tuple; the number of one of them
    ACT, HARD, MASKED             the activation, whether the target is a label map, whether a voxel may not count
"""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc"
# ruff: noqa: RUF005
# (Triton reads the annotations of a kernel and knows none for a runtime value; its tuples grow by addition alone.)

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)  # softdice.statistics.request.ACTIVATIONS
SOFTMAX = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)
TINY64 = tl.constexpr(2.2250738585072014e-308)
LOWEST = tl.constexpr(-1.0e38)  # below any logit with a probability above 0; finite: inf - inf would be NaN
KEPT = tl.constexpr(tl.PropagateNan.ALL)  # makes tl.maximum return NaN, not the number, for a NaN and a number

GENERAL = (
    "V", "programs", "steps", "gF", "gB", "gK", "xB", "xC", "xV", "tB", "tC", "tV", "wB", "wV", "uB", "uC", "uV", "oB",
    "oC", "oV", "ignore",
)  # fmt: skip
"""Arguments whose values the compiler does not see: what it should know of them, the units of `layout` tell it."""


@triton.jit
def along(i, step, UNIT: tl.constexpr):
    """Return the offset in elements of place i along an axis with stride step UNIT, or 1 for a UNIT of 0 (`layout`)."""
    return i if UNIT == 0 else i * step * UNIT


@triton.jit
def rows(c0, CT: tl.constexpr):
    """Return the class numbers of a tile of CT classes, c0 the first: int64, [CT, 1], or one number if CT is 1."""
    return tl.cast(c0, tl.int64) + (0 if CT == 1 else tl.arange(0, CT)[:, None])


@triton.jit
def places(tile, BV: tl.constexpr, VECTOR: tl.constexpr):
    """Return the numbers of the BV voxels of a tile, by its number: [1, BV]. Triton may read VECTOR of them at once."""
    return tl.max_contiguous(tile * BV + tl.arange(0, BV)[None, :], (1, VECTOR))


INTERPRETED = tl.constexpr(not isinstance(along, triton.runtime.JITFunction))


@triton.jit
def instruction(x, NAME: tl.constexpr):
    """Apply the PTX instruction NAME.approx.ftz to float32 x; it takes numbers below 2^-126 for 0.
    Triton's own functions treat them exactly, with three instructions more."""
    return tl.inline_asm_elementwise(NAME + ".approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(s):
    """Return 1 / s to the last digit but one, for s between 2^-126 and 2^126."""
    return 1.0 / s if INTERPRETED or s.dtype == tl.float64 else instruction(s, "rcp")


@triton.jit
def exp2(x):
    """Return 2^x."""
    return tl.exp2(x) if INTERPRETED or x.dtype == tl.float64 else instruction(x, "ex2")


@triton.jit
def log2(x):
    """Return log2 x for x >= 2^-126."""
    return tl.log2(x) if INTERPRETED or x.dtype == tl.float64 else instruction(x, "lg2")


@triton.jit
def class_sum(value):
    """Return [1, voxels]: the sum over the classes of a tile."""
    return value if value.shape[0] == 1 else tl.sum(value, 0, keep_dims=True)


@triton.jit
def class_max(value):
    """Return [1, voxels]: the largest of the classes of a tile."""
    return value if value.shape[0] == 1 else tl.max(value, 0, keep_dims=True)


@triton.jit
def voxel_sum(value):
    """Return [classes, 1], or one number: the sum over the voxels of a tile."""
    return tl.sum(value) if value.shape[0] == 1 else tl.sum(value, 1, keep_dims=True)


@triton.jit
def total(values, GROUPS: tl.constexpr):
    """Return [1, voxels]: the sum over the classes of all tiles, a tuple of GROUPS."""
    s = class_sum(values[0])
    for g in tl.static_range(1, GROUPS):
        s += class_sum(values[g])
    return s


@triton.jit
def voxels(
    target, weight, b, v, inside, tB, tV, TU: tl.constexpr, wB, wV, WU: tl.constexpr, ignore,
    FIRST: tl.constexpr, TOP: tl.constexpr, HARD: tl.constexpr,
    WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return t, w, bad_label, bad_weight, [1, BV] each; the last two are bool: where a label or weight is out of range.
    ignore: the ignored label, an integer. TOP: the bound that labels are below; FIRST: the label of class 0. WEIGHTED,
    IGNORE: whether there are weights, and whether a label is ignored."""
    w = tl.where(inside, 1.0, 0.0).to(W)
    t = tl.where(inside, 0, -1)
    bad_label = t > 0  # false everywhere
    bad_weight = t > 0
    if WEIGHTED:
        raw = tl.load(weight + along(b, wB, WU[0]) + along(v, wV, WU[2]), mask=inside, other=0).to(W)
        fine = raw >= 0
        bad_weight = inside & (fine == 0)  # also where NaN
        w = tl.where(raw > 0, raw, 0.0)
    if HARD:
        label = tl.load(target + along(b, tB, TU[0]) + along(v, tV, TU[2]), mask=inside, other=0)
        low = label.to(tl.int32)  # the lower half of an int64
        known = (low >= 0) & (low < TOP)
        left_out = ignore.to(tl.int64)
        high_left_out = (left_out >> 32).to(tl.int32)
        other = low != left_out.to(tl.int32)
        if label.dtype == tl.int64:  # in two halves: a comparison of 64 bits costs more
            high = (label >> 32).to(tl.int32)
            known = known & (high == 0)
            other = other | (high != high_left_out)
        else:
            other = other | (high_left_out != left_out.to(tl.int32) >> 31)  # beyond what a label holds
        counts = inside
        if IGNORE:
            counts = inside & other
            w = tl.where(counts, w, 0.0)
        bad_label = counts & (known == 0) & (w > 0)
        t = tl.where(counts & known, low - FIRST, -1)
    return t, w, bad_label, bad_weight


@triton.jit
def class_tile(
    x, c, v, inside, w, xC, xV, XU: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, MASKED: tl.constexpr,
    FILL: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return the values of classes c at voxels v, [CT, BV] in W; 0 at voxels that do not count, FILL from class C on.
    x, xC, xV, XU: pointer to the sample of any tensor (B, C, V), not of logits alone; its strides and their unit."""
    place = x + (along(c, xC, XU[1]) + along(v, xV, XU[2]))
    value = tl.load(place, mask=within(c, inside, C, CT), other=0.0).to(W)
    if MASKED:
        value = tl.where(w > 0, value, 0.0)
    if C % CT != 0 and FILL != 0:
        value = tl.where((c < C), value, FILL)
    return value


@triton.jit
def within(c, inside, C: tl.constexpr, CT: tl.constexpr):
    """Return the mask of a tile [CT, BV]: where class and voxel exist. c: class numbers, or columns with K and KT."""
    return inside if C % CT == 0 else (c < C) & inside


@triton.jit
def class_tiles(
    x, k, v, inside, w, xC, xV, XU: tl.constexpr, C: tl.constexpr, KT: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, FILL: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return a tuple of GROUPS tiles [KT, BV] of consecutive classes, the first from class k on; 0 at voxels that do
    not count, FILL from class C on."""
    values = ()
    for g in tl.static_range(GROUPS):
        values = values + (class_tile(x, k + g * KT, v, inside, w, xC, xV, XU, C, KT, MASKED, FILL, W),)
    return values


@triton.jit
def truth_tile(
    target, t, w, c, v, inside, tC, tV, TU: tl.constexpr, C: tl.constexpr, HARD: tl.constexpr, MASKED: tl.constexpr,
    CT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return targets before smoothing, [CT, BV] in W: one-hot (1 where t is c) for a label map, else the values."""
    if HARD:
        y = tl.where(t == c.to(tl.int32), 1.0, 0.0).to(W)
    else:
        y = class_tile(target, c, v, inside, w, tC, tV, TU, C, CT, MASKED, 0.0, W)
    return y


@triton.jit
def softmax_rows(
    x, v, inside, w, xC, xV, XU: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return m and log_sum, [1, BV] each, over all C classes, CT at a time. x: pointer to the sample's logits."""
    m = tl.full([1, BV], LOWEST, W)
    s = tl.zeros([1, BV], W)
    for c0 in range(0, C, CT):
        c = rows(c0, CT)
        value = class_tile(x, c, v, inside, w, xC, xV, XU, C, CT, MASKED, float("-inf"), W)
        top = tl.maximum(m, class_max(value), propagate_nan=KEPT)
        # s = sum exp(x - top): what is there already is brought to the new maximum
        s = s * exp2((m - top) * LOG2E) + class_sum(exp2((value - top) * LOG2E))
        m = top
    return m, log2(s)


@triton.jit
def softmax_tiles(values, GROUPS: tl.constexpr):
    """Return tuples of p and d, and log_sum, from `values`, a tuple of GROUPS tiles of logits that hold all classes.
    Rows past the last class hold -inf, so p is 0. Voxels that do not count hold 0 if MASKED, else anything."""
    m = class_max(values[0])
    for g in tl.static_range(1, GROUPS):
        m = tl.maximum(m, class_max(values[g]))
    ds, es, ps = (), (), ()
    for g in tl.static_range(GROUPS):
        d = (values[g] - m) * LOG2E
        ds, es = ds + (d,), es + (exp2(d),)
    s = total(es, GROUPS)
    inverse = reciprocal(s)
    for g in tl.static_range(GROUPS):
        ps = ps + (es[g] * inverse,)
    return ps, ds, log2(s)


@triton.jit
def softmax_from(value, m, log_sum):
    """Return p and d of a tile of logits, from the voxels' m and log_sum: p = 2^(d - log_sum)."""
    d = (value - m) * LOG2E
    return exp2(d - log_sum), d


@triton.jit
def exp_minus(x):
    """Return e^-x for x >= 0 with all its digits; exp2 of a product with log2(e) loses digits for large x.
    e^-x = 2^-n e^-r, n = x / ln 2 to the nearest, r = x - n ln 2, ln 2 in two parts: n times the first is exact."""
    n = tl.floor(x * LOG2E + 0.5)
    if x.dtype == tl.float64:
        r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6
    else:
        r = (x - n * 0.693359375) + n * 2.12194440e-4
    # e^-x is 0 from 1e4 on, and an infinite x would give inf - inf
    return tl.where(x >= 1e4, tl.zeros_like(x), exp2(-n) * exp2(-r * LOG2E))


@triton.jit
def of_sigmoid(x):
    """Return (p, 1 - p, -ln p, -ln(1 - p)) of logits x, without overflow and without cancellation."""
    z = exp_minus(tl.abs(x))
    large = reciprocal(1.0 + z)
    small = z * large
    p = tl.where(x >= 0, large, small)
    q = tl.where(x >= 0, small, large)
    u = 1.0 + z  # log1p(z) = log(u) z / (u - 1), exact where u rounds
    both = tl.where(u > 1.0, log2(u) * LN2 * z * reciprocal(tl.where(u > 1.0, u - 1.0, 1.0)), z)
    a = both - tl.minimum(x, 0.0, propagate_nan=KEPT)
    b = both + tl.maximum(x, 0.0, propagate_nan=KEPT)
    return p, q, a, b


@triton.jit
def complement(p):
    """Return 1 - p, where rounding may have put p above 1, at least 0."""
    return tl.maximum(1.0 - p, 0.0, propagate_nan=KEPT)


@triton.jit
def not_zero(p):
    """Return p, at least the smallest normal number of its dtype."""
    return tl.maximum(p, TINY64 if p.dtype == tl.float64 else TINY, propagate_nan=KEPT)


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """Return base^EXPONENT for base >= 0; exponents 0, 1 and 2, the usual ones, without a logarithm."""
    if EXPONENT == 0:
        result = base * 0.0 + 1.0  # a tile of ones, and NaN where base is
    elif EXPONENT == 1:
        result = base
    elif EXPONENT == 2:
        result = base * base
    else:
        result = exp2(EXPONENT * log2(not_zero(base)))
    return result


@triton.jit
def probabilities(value, p, d, log_sum, k, K: tl.constexpr, KT: tl.constexpr, ACT: tl.constexpr):
    """Return (p, 1 - p, -ln p, -ln(1 - p)) of columns k, [KT, BV] each; the last has a meaning for a sigmoid alone.
    value: logits; a sigmoid makes p of them. p: the probabilities otherwise. d, log_sum: log2 exp(x - m) of a softmax,
    and log2 of its sum over the classes: -ln p is (log_sum - d) ln 2."""
    a, other = p, p
    if ACT == SIGMOID:
        p, q, a, other = of_sigmoid(value)
    else:
        q = complement(p)
        a = (log_sum - d) * LN2 if ACT == SOFTMAX else -log2(not_zero(p)) * LN2
    if K % KT != 0:  # no infinite logarithm beyond the last class
        a = tl.where(k < K, a, 0.0)
    return p, q, a, other


@triton.jit
def symbols(
    p, q, a, b, t, m, KEEP: tl.constexpr, SHARE: tl.constexpr, GAMMA: tl.constexpr, POWER: tl.constexpr,
    ACT: tl.constexpr, LOGS: tl.constexpr, POWERS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Return p, q, y, n, t, a, b, u, v, d, e, j, s, r, f, g, gamma, m, the symbols of `declared`; t is the target.
    q = 1 - p; y = KEEP t + SHARE, n = 1 - y; a = -ln p, b = -ln(1 - p); u = q^GAMMA, v = p^GAMMA; d = abs(p - y)^POWER,
    e = dd/dp; s = -da/dx, r = db/dx, f = p a s / q, g = q b r / p; m the map. x is the logit of a sigmoid, ln p of a
    softmax, p without activation. j is 1: the kernels multiply by dp/dx where a slope holds j; s, r, f, g hold theirs.
    b belongs to a sigmoid alone: else b, r, g are 0. LOGS, POWERS, APART: whether a term or slope names one of a, b, s,
    r, f, g; of u, v; of d, e. Else they are arbitrary."""
    y = t
    if KEEP != 1.0:
        y = KEEP * t + SHARE
    n = 1.0 - y
    u, v, d, e = p, p, p, p
    zero = tl.zeros_like(p)
    s, r, f, g = zero, zero, zero, zero
    if LOGS:
        a = tl.where(y == 0, 0.0, a)  # where it may be infinite, and 0 times it NaN
        if ACT == SIGMOID:
            b = tl.where(n == 0, 0.0, b)
            s, r, f, g = q, p, p * a, q * b
        else:
            b = zero
            series = 1.0 + q * (0.5 + q * (1 / 3 + q * 0.25))  # of a / q, where q has few digits left
            f = tl.where(q > 0.01, a / tl.where(q > 0.01, q, 1.0), series)
            if ACT == NONE:  # a stays the same below the smallest normal p (`probabilities`): slope 0
                s = tl.where(p < not_zero(p), 0.0, 1.0 / not_zero(p))
                f = tl.where(p < not_zero(p), 0.0, f)
            else:
                s = zero + 1.0
                f = p * f
    if POWERS:
        u = power(q, GAMMA)
        v = power(p, GAMMA)
    if APART:
        apart = p - y
        d = power(tl.abs(apart), POWER)
        if POWER == 2:
            e = 2.0 * apart  # the formula below in one operation
        else:
            sign = tl.where(apart > 0, 1.0, 0.0) - tl.where(apart < 0, 1.0, 0.0)
            e = POWER * power(tl.abs(apart), POWER - 1) * sign
    return p, q, y, n, t, a, b, u, v, d, e, zero + 1.0, s, r, f, g, zero + GAMMA, m


@triton.jit
def outside(value, low, high):
    """Return 1 for each voxel where some value of the tile is outside [low, high], else 0: [1, BV] int32."""
    return class_max(((value < low) | (value > high)).to(tl.int32))


@triton.jit
def largest(value):
    """Return each voxel's largest value of a tile, [1, BV]; NaN where one of them is NaN, which tl.max would drop.
    The maximum of a softmax needs no such care, since the NaN comes back in the sum of exponentials."""
    return class_max(value) + class_sum(tl.where(value != value, value, 0.0))


@triton.jit
def region_tiles(
    x, target, member, t, w, k, v, inside, xC, xV, XU: tl.constexpr, tC, tV,
    TU: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    CT: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, ACT: tl.constexpr, HARD: tl.constexpr, MASKED: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Return p, d and target y of the regions k, [KT, BV] each, and m, log_sum of a softmax over all classes (else w).
    d = log2 sum exp(x - m) over a region's classes, and not log2 of their summed p, which is -inf once p underflows;
    without a softmax, where x are probabilities, it is p. y is the largest target of its classes. x, target: pointers
    to the sample. t is read if HARD, target if not."""
    m, log_sum = w, w
    if ACT == SOFTMAX:
        m, log_sum = softmax_rows(x, v, inside, w, xC, xV, XU, C, CT, BV, MASKED, W)
    p = tl.zeros([KT, BV], W)
    y = tl.zeros([KT, BV], W)
    top = tl.full([KT, BV], LOWEST, W)
    for c0 in range(0, C, CT):
        c = rows(c0, CT)
        value = class_tile(x, c, v, inside, w, xC, xV, XU, C, CT, MASKED, 0.0, W)
        true = value  # Triton wants a name defined on every path
        if not HARD:
            true = class_tile(target, c, v, inside, w, tC, tV, TU, C, CT, MASKED, 0.0, W)
        for r in range(K):
            chosen = tl.load(member + r * C + c, mask=c < C, other=0) > 0
            here = k == r  # the row of this region
            if ACT == SOFTMAX:
                # p = sum exp(x - top) of the classes so far, top the largest x of them
                far = tl.where(chosen, value, LOWEST)
                peak = class_max(far)
                row = class_sum(tl.where(chosen, exp2((far - peak) * LOG2E), 0.0))
                most = tl.maximum(top, peak, propagate_nan=KEPT)
                grown = p * exp2((top - most) * LOG2E) + row * exp2((peak - most) * LOG2E)
                p = tl.where(here, grown, p)
                top = tl.where(here, most, top)
            else:
                row = class_sum(tl.where(chosen, value, 0.0))
                p += tl.where(here, row, 0.0)
            if not HARD:
                row = largest(tl.where(chosen, true, 0.0))
                y = tl.maximum(y, tl.where(here, row, 0.0), propagate_nan=KEPT)
    d = p
    if ACT == SOFTMAX:
        d = tl.where(p == 0, float("-inf"), (top - m) * LOG2E + log2(tl.where(p == 0, 1.0, p)))
        p = exp2(d - log_sum)
    if HARD:
        place = k * C + t
        y = tl.load(member + place, mask=within(k, t >= 0, K, KT), other=0).to(W)
    return p, d, y, m, log_sum
