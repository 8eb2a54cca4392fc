"""Rows of a block: the vectorised loops that the CPU kernel is made of (Numba).

A row is a run of n floats in a flat array, given as array and offset: a slice would cost a reference count each time.
Offsets and lengths are unsigned, so that no loop tests for negative indices. Each reduction sums one type in one loop;
anything else stops LLVM from using vector registers. `softdice.kernels.cpu.driver` says what the rows mean.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from softdice.kernels.cpu.compiled import bits, exact_jit, jit, narrow_half, peek, prefetch_line, widen_half


def exp(x: Any) -> Any:
    """x -> e^x for x <= 88 (float32) or 709 (float64); 0 far below, NaN for NaN."""
    return math.exp(x)  # compiled code takes the overload below


@exact_jit
def _exp32(x: np.float32) -> np.float32:
    # 2^n 2^r with n the nearest integer to x log2(e) and abs(r) <= 1/2. Adding 1.5 * 2^23 rounds, and leaves n in the
    # low bits; with the bias of the exponent added too, those bits shifted up are 2^n, and n = -127 is an exact 0.
    low, ratio, magic = np.float32(-88.0), np.float32(1.4426950408889634), np.float32(12582912.0 + 127.0)
    z = low if x < low else x
    shifted = z * ratio + magic
    r = z * ratio - (shifted - magic)
    p = np.float32(1.534581242594868e-4)  # the polynomial of degree 6 nearest to 2^r, relatively: within 1.9e-9
    p = p * r + np.float32(1.3399930903688073e-3)
    p = p * r + np.float32(9.618489071726799e-3)
    p = p * r + np.float32(5.550328642129898e-2)
    p = p * r + np.float32(2.4022646248340607e-1)
    p = p * r + np.float32(6.931471824645996e-1)
    p = p * r + np.float32(1.0)
    return p * bits(np.int32(bits(shifted) << np.int32(23)))


@exact_jit
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


@overload(exp)
def _exp_by_type(x: Any) -> Any:
    def single(x: Any) -> Any:
        return _exp32(x)

    def double(x: Any) -> Any:
        return _exp64(x)

    return single if x == types.float32 else double


def log(x: Any) -> Any:
    """x -> ln x for normal x > 0; NaN for NaN."""
    return math.log(x)  # compiled code takes the overload below


@exact_jit
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


@exact_jit
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


@overload(log)
def _log_by_type(x: Any) -> Any:
    def single(x: Any) -> Any:
        return _log32(x)

    def double(x: Any) -> Any:
        return _log64(x)

    return single if x == types.float32 else double


# --- in and out of memory -----------------------------------------------------------------------------------------

CODES = {"f4": 0, "f8": 1, "bf": 2, "f2": 3, "u1": 4, "i1": 5, "i2": 6, "i4": 7, "i8": 8}
"""How a tensor's bytes are to be read: one compiled kernel then serves every dtype of labels, weights and logits."""


LINE = np.uint64(16)  # float32 in a cache line


@jit
def prefetch(array: Any, off: Any, n: Any) -> None:
    """Ask for array[off : off + n] while something else is being computed."""
    for v in range(np.uint64(0), n, LINE):
        prefetch_line(array, off + v)


@jit
def prefetch_bytes(raw: Any, off: Any, n: Any) -> None:
    """The same for bytes."""
    for v in range(np.uint64(0), n, np.uint64(64)):
        prefetch_line(raw, off + v)


@jit
def load(raw: Any, code: Any, off: Any, stride: Any, n: Any, out: Any, o: Any) -> None:
    """n values of any dtype, `stride` elements apart -> a row."""
    if code == 0:
        for v in range(n):
            out[o + v] = peek(raw, np.float32, off + v * stride)
    elif code == 1:
        for v in range(n):
            out[o + v] = peek(raw, np.float64, off + v * stride)
    elif code == 2:  # bfloat16 is the upper half of a float32
        for v in range(n):
            out[o + v] = bits(np.int32(np.int32(peek(raw, np.int16, off + v * stride)) << np.int32(16)))
    elif code == 3:
        for v in range(n):
            out[o + v] = widen_half(peek(raw, np.uint16, off + v * stride))
    elif code == 4:
        for v in range(n):
            out[o + v] = peek(raw, np.uint8, off + v * stride)
    elif code == 5:
        for v in range(n):
            out[o + v] = peek(raw, np.int8, off + v * stride)
    elif code == 6:
        for v in range(n):
            out[o + v] = peek(raw, np.int16, off + v * stride)
    elif code == 7:
        for v in range(n):
            out[o + v] = peek(raw, np.int32, off + v * stride)
    else:
        for v in range(n):
            out[o + v] = peek(raw, np.int64, off + v * stride)


@jit
def _bfloat16(x: np.float32) -> Any:
    raw = bits(x)
    rounded = np.int32(raw + np.int32(0x7FFF) + np.int32(np.int32(raw >> np.int32(16)) & np.int32(1)))
    return np.int16(rounded >> np.int32(16)) if x == x else np.int16(0x7FC0)


@jit
def store(row: Any, o: Any, n: Any, raw: Any, code: Any, off: Any, stride: Any) -> None:
    """A row -> n values of a floating dtype, rounded to nearest, `stride` elements apart."""
    if code == 0:
        single = raw.view(np.float32)
        for v in range(n):
            single[off + v * stride] = row[o + v]
    elif code == 1:
        double = raw.view(np.float64)
        for v in range(n):
            double[off + v * stride] = row[o + v]
    elif code == 2:
        high = raw.view(np.int16)
        for v in range(n):
            high[off + v * stride] = _bfloat16(np.float32(row[o + v]))
    else:
        half = raw.view(np.uint16)
        for v in range(n):
            half[off + v * stride] = narrow_half(np.float32(row[o + v]))


@jit
def _load_integers(raw: Any, code: Any, off: Any, n: Any, out: Any) -> None:
    """n labels of any integer type -> int32; those of int64 that do not fit become -2^31, which no class has."""
    if code == 4:
        for v in range(n):
            out[v] = peek(raw, np.uint8, off + v)
    elif code == 5:
        for v in range(n):
            out[v] = peek(raw, np.int8, off + v)
    elif code == 6:
        for v in range(n):
            out[v] = peek(raw, np.int16, off + v)
    elif code == 7:
        for v in range(n):
            out[v] = peek(raw, np.int32, off + v)
    else:
        for v in range(n):
            label = peek(raw, np.int64, off + v)
            short = np.int32(label)
            out[v] = short if np.int64(short) == label else np.int32(-(1 << 31))


@jit
def load_labels(
    raw: Any, code: Any, off: Any, n: Any, first: Any, top: Any, has_ignore: Any, ignore: Any, out: Any, w: Any
) -> Any:
    """n labels -> class numbers (-1: none), weight 0 where ignored; returns how many are out of range."""
    _load_integers(raw, code, off, n, out)
    bad = np.int32(0)
    if has_ignore:
        for v in range(n):
            w[v] = w[v] if out[v] != ignore else w.dtype.type(0)
        for v in range(n):
            label, kept = out[v], out[v] != ignore
            inside = np.uint32(label) < top  # a negative one is large
            bad += np.int32(kept & (not inside))
            out[v] = label - first if kept & inside else np.int32(-1)
    else:
        for v in range(n):
            label = out[v]
            inside = np.uint32(label) < top
            bad += np.int32(not inside)
            out[v] = label - first if inside else np.int32(-1)
    return bad


@jit
def outside(row: Any, o: Any, n: Any, low: Any, high: Any, w: Any) -> Any:
    """How many values of a row lie outside [low, high], voxels of weight 0 aside."""
    count = np.int32(0)
    for v in range(n):
        x = row[o + v]
        count += np.int32(((x < low) | (x > high)) & (w[v] > 0))
    return count


@jit
def clean_weights(w: Any, n: Any) -> Any:
    """A weight that is NaN or negative becomes 0; returns how many did."""
    bad = np.int32(0)
    for v in range(n):
        right = w[v] >= 0
        bad += np.int32(1) - np.int32(right)
        w[v] = w[v] if right else w.dtype.type(0)
    return bad


@jit
def scrub(row: Any, o: Any, n: Any, w: Any, value: Any) -> None:
    """`value` where the weight is 0: a NaN at an ignored voxel must not reach a sum."""
    for v in range(n):
        row[o + v] = row[o + v] if w[v] > 0 else value
