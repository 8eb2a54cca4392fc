"""e^x, ln x and ln(1 + x) of float32 as a few multiplications, which LLVM turns into vector instructions (Numba)."""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

import numpy as np

from softdice.backends.cpu.compiler import each, exact_each
from softdice.backends.cpu.intrinsics import bits

ZERO, ONE, SMALL = np.float32(0), np.float32(1), np.float32(np.finfo(np.float32).tiny)


@exact_each
def minus(a, b):
    """Return a - b, not reordered: a - (b + c), for a - b - c, would lose digits of c where a and b are large."""
    return a - b


@exact_each
def exp(x: np.float32) -> np.float32:
    """Return e^x for x <= 88 within two units in the last place; 0 below -87.7, NaN for NaN."""
    # 2^n 2^r with n the nearest integer to x log2(e) and abs(r) <= 1/2. Adding 1.5 * 2^23 rounds, and leaves n in the
    # low bits; with the bias of the exponent added too, those bits shifted up are 2^n, and n = -127 is an exact 0.
    low, ratio, magic = np.float32(-88.0), np.float32(1.4426950408889634), np.float32(12582912.0 + 127.0)
    z = low if x < low else x
    shifted = z * ratio + magic
    r = (z * ratio - (shifted - magic)) + z * np.float32(1.925963033500e-8)  # the digits of log2(e) beyond float32
    p = np.float32(1.534581242594868e-4)  # the polynomial of degree 6 nearest to 2^r, relatively: within 1.9e-9
    p = p * r + np.float32(1.3399930903688073e-3)
    p = p * r + np.float32(9.618489071726799e-3)
    p = p * r + np.float32(5.550328642129898e-2)
    p = p * r + np.float32(2.4022646248340607e-1)
    p = p * r + np.float32(6.931471824645996e-1)
    p = p * r + np.float32(1.0)
    return p * bits(np.int32(bits(shifted) << np.int32(23)))


@exact_each
def log(x: np.float32) -> np.float32:
    """Return ln x for normal x > 0; NaN for NaN."""
    # x = 2^n m with m in [sqrt(1/2), sqrt(2)), whose bits begin at 0x3F3504F3; ln m = 2 atanh(s), s = (m - 1) / (m + 1)
    # and abs(s) < 0.172. ln 2 in two parts: n times the first, of few bits, is exact.
    raw = bits(x)
    n = np.int32(np.int32(raw - np.int32(0x3F3504F3)) >> np.int32(23))
    m = bits(np.int32(raw - np.int32(n << np.int32(23))))
    s = (m - np.float32(1.0)) / (m + np.float32(1.0))
    z = s * s
    p = np.float32(0.2222222222)
    p = p * z + np.float32(0.2857142857)
    p = p * z + np.float32(0.4)
    p = p * z + np.float32(0.6666666667)
    tail = p * z * s + np.float32(n) * np.float32(-2.12194440e-4)
    value = np.float32(n) * np.float32(0.693359375) + (s + s + tail)
    return value if x == x else x


@exact_each
def log1p(z: np.float32) -> np.float32:
    """Return ln(1 + z) for z in [0, 1], with all its digits where z is small."""
    # 2 atanh(s) with s = z / (2 + z) <= 1/3: the series to a term below 1e-8
    s = z / (np.float32(2.0) + z)
    w = s * s
    p = np.float32(2 / 15)
    p = p * w + np.float32(2 / 13)
    p = p * w + np.float32(2 / 11)
    p = p * w + np.float32(2 / 9)
    p = p * w + np.float32(2 / 7)
    p = p * w + np.float32(2 / 5)
    p = p * w + np.float32(2 / 3)
    return s * (p * w) + (s + s)


@each
def power_of(base, exponent):
    """Return base^exponent for base >= 0; exponents 0, 1 and 2, the usual ones, without rounding of a logarithm."""
    value = exp(exponent * log(SMALL if base < SMALL else base))
    value = base * base if exponent == np.float32(2) else value
    return ONE if exponent == ZERO else (base if exponent == ONE else value)


@each
def complement(p):
    """Return 1 - p, at least 0."""
    return ZERO if p >= ONE else ONE - p


@each
def ratio(a, q):
    """Return -ln(p) / (1 - p), where a = -ln p and q = 1 - p; by its series where q has few digits left."""
    series = ONE + q * (np.float32(0.5) + q * (np.float32(1 / 3) + q * np.float32(0.25)))
    return a / q if q > np.float32(0.01) else series
