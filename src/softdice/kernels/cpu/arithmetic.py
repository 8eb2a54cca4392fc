"""e^x, ln x and ln(1 + x) as a few multiplications that the compiler turns into vector instructions (Numba)."""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from softdice.kernels.cpu.compiled import bits, exact_each


@exact_each
def minus(a, b):
    """a - b, in the order that is written: a - b - c is no a - (b + c), which would lose what large a and b leave."""
    return a - b


def _by_type(function: Any, single: Any, double: Any) -> None:
    """Compiled code that calls the function takes one of the two others."""

    def of_single(x):
        return single(x)

    def of_double(x):
        return double(x)

    overload(function)(lambda x: of_single if x == types.float32 else of_double)


def exp(x: Any) -> Any:
    """x -> e^x for x <= 88 (float32) or 709 (float64); 0 far below, NaN for NaN."""
    return math.exp(x)  # compiled code takes one of the two below


@exact_each
def _exp32(x: np.float32) -> np.float32:
    # 2^n 2^r with n the nearest integer to x log2(e) and abs(r) <= 1/2. Adding 1.5 * 2^23 rounds, and leaves n in the
    # low bits; with the bias of the exponent added too, those bits shifted up are 2^n, and n = -127 is an exact 0.
    low, ratio, magic = np.float32(-88.0), np.float32(1.4426950408889634), np.float32(12582912.0 + 127.0)
    z = low if x < low else x
    shifted = z * ratio + magic
    r = (z * ratio - (shifted - magic)) + z * np.float32(1.925963033500e-8)  # and what float32 has not of log2(e)
    p = np.float32(1.534581242594868e-4)  # the polynomial of degree 6 nearest to 2^r, relatively: within 1.9e-9
    p = p * r + np.float32(1.3399930903688073e-3)
    p = p * r + np.float32(9.618489071726799e-3)
    p = p * r + np.float32(5.550328642129898e-2)
    p = p * r + np.float32(2.4022646248340607e-1)
    p = p * r + np.float32(6.931471824645996e-1)
    p = p * r + np.float32(1.0)
    return p * bits(np.int32(bits(shifted) << np.int32(23)))


@exact_each
def _exp64(x: float) -> float:
    low = -708.0
    z = low if x < low else x
    shifted = z * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = z - n * 6.93145751953125e-1
    r = r - n * 1.42860682030941723212e-6
    p = 1.6059043836821613e-10  # 1/13!, 1/12!, ... : the series to a term below 1e-17 for abs(r) < 0.35
    p = p * r + 2.0876756987868099e-9
    p = p * r + 2.5052108385441719e-8
    p = p * r + 2.7557319223985893e-7
    p = p * r + 2.7557319223985891e-6
    p = p * r + 2.4801587301587302e-5
    p = p * r + 1.9841269841269841e-4
    p = p * r + 1.3888888888888889e-3
    p = p * r + 8.3333333333333333e-3
    p = p * r + 4.1666666666666667e-2
    p = p * r + 1.6666666666666667e-1
    p = p * r + 0.5
    y = p * r * r + r + 1.0
    scaled = bits(np.int64(bits(y) + np.int64(bits(shifted) << np.int64(52))))
    return scaled if x >= low else (0.0 if x < low else x)


_by_type(exp, _exp32, _exp64)


def log(x: Any) -> Any:
    """x -> ln x for normal x > 0; NaN for NaN."""
    return math.log(x)  # compiled code takes one of the two below


@exact_each
def _log32(x: np.float32) -> np.float32:
    # x = 2^n m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1), abs(s) < 0.172.
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
def _log64(x: float) -> float:
    raw = bits(x)
    n = np.int64(np.int64(raw - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52))
    m = bits(np.int64(raw - np.int64(n << np.int64(52))))
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 2.0 / 21.0
    p = p * z + 2.0 / 19.0
    p = p * z + 2.0 / 17.0
    p = p * z + 2.0 / 15.0
    p = p * z + 2.0 / 13.0
    p = p * z + 2.0 / 11.0
    p = p * z + 2.0 / 9.0
    p = p * z + 2.0 / 7.0
    p = p * z + 2.0 / 5.0
    p = p * z + 2.0 / 3.0
    tail = p * z * s + float(n) * 1.42860682030941723212e-6
    value = float(n) * 6.93145751953125e-1 + (s + s + tail)
    return value if x == x else x


_by_type(log, _log32, _log64)


def log1p(x: Any) -> Any:
    """x -> ln(1 + x) for x in [0, 1], with all its digits where x is small."""
    return math.log1p(x)  # compiled code takes one of the two below


@exact_each
def _log1p32(z: np.float32) -> np.float32:
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


@exact_each
def _log1p64(z: float) -> float:
    s = z / (2.0 + z)
    w = s * s
    p = 2.0 / 33.0
    for k in range(31, 1, -2):
        p = p * w + 2.0 / k
    return s * (p * w) + (s + s)


_by_type(log1p, _log1p32, _log1p64)
