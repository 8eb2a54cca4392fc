"""One voxel tile at a time: what the Triton kernels of both directions are made of.

Tiles are [class, voxel] or [region, voxel], in W: float32, or float64 for float64 input. A voxel has a class number t
(-1: none) and a weight w (0: it does not count, and nothing that stands there may reach a sum). Offsets are 64-bit.
"""

# mypy: allow-untyped-defs
# (Triton reads the annotations of a kernel and knows none for a runtime value.)

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)  # softdice.settings.ACTIVATIONS
SOFTMAX = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)
LOWEST = tl.constexpr(-1.0e38)  # below any logit that has a probability; no infinity, whose difference is NaN


@triton.jit
def voxels(
    target, weight, b, v, inside, tB, tV, wB, wV, ignore, FIRST: tl.constexpr, TOP: tl.constexpr, HARD: tl.constexpr,
    WEIGHTED: tl.constexpr, IGNORE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Voxel numbers -> class numbers, weights, and where a label or a weight is out of range."""
    w = tl.where(inside, 1.0, 0.0).to(W)
    t = tl.where(inside, 0, -1)
    bad_label = t > 0
    bad_weight = t > 0
    if WEIGHTED:
        raw = tl.load(weight + b * wB + v * wV, mask=inside, other=0).to(W)
        fine = raw >= 0
        bad_weight = inside & (fine == 0)  # also where NaN
        w = tl.where(raw > 0, raw, 0.0)
    if HARD:
        label = tl.load(target + b * tB + v * tV, mask=inside, other=0).to(tl.int64)
        counts = inside
        if IGNORE:
            counts = inside & (label != ignore)
            w = tl.where(counts, w, 0.0)
        known = (label >= 0) & (label < TOP)
        bad_label = counts & (known == 0) & (w > 0)
        t = tl.where(counts & known, label - FIRST, -1).to(tl.int32)
    return t, w, bad_label, bad_weight


@triton.jit
def class_tile(
    x, c, v, inside, w, xC, xV, C: tl.constexpr, CT: tl.constexpr, MASKED: tl.constexpr, FILL: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Class and voxel numbers -> values; 0 at voxels that do not count, FILL beyond the last class."""
    value = tl.load(x + (c[:, None] * xC + v[None, :] * xV), mask=(c < C)[:, None] & inside[None, :], other=0.0).to(W)
    if MASKED:
        value = tl.where((w > 0)[None, :], value, 0.0)
    if C % CT != 0 and FILL != 0:
        value = tl.where((c < C)[:, None], value, FILL)
    return value


@triton.jit
def softmax_rows(
    x, v, inside, w, xC, xV, C: tl.constexpr, CT: tl.constexpr, BV: tl.constexpr, MASKED: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Any number of classes, tile after tile -> the maximum and log2 of the sum of exponentials of each voxel."""
    m = tl.full([BV], LOWEST, W)
    s = tl.zeros([BV], W)
    for c0 in range(0, C, CT):
        c = (c0 + tl.arange(0, CT)).to(tl.int64)
        value = class_tile(x, c, v, inside, w, xC, xV, C, CT, MASKED, float("-inf"), W)
        top = tl.maximum(m, tl.max(value, 0))
        s = s * tl.exp2((m - top) * LOG2E) + tl.sum(tl.exp2((value - top[None, :]) * LOG2E), 0)
        m = top
    return m, tl.log2(s)


@triton.jit
def softmax_tile(value):
    """All classes of the voxels -> p, d = log2 exp(x - max), log2 sum."""
    m = tl.max(value, 0)
    d = (value - m[None, :]) * LOG2E
    e = tl.exp2(d)
    s = tl.sum(e, 0)
    return e * (1.0 / s)[None, :], d, tl.log2(s)


@triton.jit
def softmax_given(value, m, log_sum):
    """Some classes of the voxels, and the voxels' maximum and log2 sum -> p, d."""
    d = (value - m[None, :]) * LOG2E
    return tl.exp2(d - log_sum[None, :]), d


@triton.jit
def sigmoid(x):
    """x -> p, without overflow."""
    z = tl.exp2(-tl.abs(x) * LOG2E)
    q = 1.0 / (1.0 + z)
    return tl.where(x >= 0, q, z * q)


@triton.jit
def sigmoid_logs(x):
    """x -> -ln p, -ln(1 - p)."""
    z = tl.exp2(-tl.abs(x) * LOG2E)
    u = 1.0 + z  # log1p(z) = log(u) z / (u - 1), exact where u rounds
    both = tl.where(u > 1.0, tl.log2(u) * LN2 * z / tl.where(u > 1.0, u - 1.0, 1.0), z)
    return both - tl.minimum(x, 0.0), both + tl.maximum(x, 0.0)


@triton.jit
def minus_log(p):
    """p -> -ln p, finite at 0."""
    return -tl.log2(tl.maximum(p, TINY)) * LN2


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """base^exponent for base in [0, 1]; the small whole exponents of the papers without a logarithm."""
    if EXPONENT == 0:
        result = base * 0.0 + 1.0
    elif EXPONENT == 1:
        result = base
    elif EXPONENT == 2:
        result = base * base
    else:
        result = tl.exp2(EXPONENT * tl.log2(tl.maximum(base, TINY)))
    return result


@triton.jit
def outside(value, low, high):
    """Tile -> 1 for each voxel with a value outside [low, high]."""
    return tl.max(((value < low) | (value > high)).to(tl.int32), 0)


@triton.jit
def region_tiles(
    x, target, member, m, log_sum, t, w, k, v, inside, xC, xV, tC, tV, C: tl.constexpr, K: tl.constexpr,
    CT: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, ACT: tl.constexpr, HARD: tl.constexpr, MASKED: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Voxels -> p and y of each region: the sum of its classes' probabilities, the largest of their targets."""
    p = tl.zeros([KT, BV], W)
    y = tl.zeros([KT, BV], W)
    for c0 in range(0, C, CT):
        c = (c0 + tl.arange(0, CT)).to(tl.int64)
        value = class_tile(x, c, v, inside, w, xC, xV, C, CT, MASKED, 0.0, W)
        if ACT == SOFTMAX:
            value, _ = softmax_given(value, m, log_sum)
        true = value
        if not HARD:
            true = class_tile(target, c, v, inside, w, tC, tV, C, CT, MASKED, 0.0, W)
        for r in range(K):
            chosen = tl.load(member + r * C + c, mask=c < C, other=0) > 0
            row = tl.sum(tl.where(chosen[:, None], value, 0.0), 0)
            p += tl.where((k == r)[:, None], row[None, :], 0.0)
            if not HARD:
                row = tl.max(tl.where(chosen[:, None], true, 0.0), 0)
                y = tl.maximum(y, tl.where((k == r)[:, None], row[None, :], 0.0))
    if HARD:
        place = k[:, None] * C + t[None, :]
        y = tl.load(member + place, mask=(k < K)[:, None] & (t >= 0)[None, :], other=0).to(W)
    return p, y
