"""Rows of a block: the vectorised loops that the CPU kernel is made of (Numba).

A row is a run of n floats in a flat array, given as array and offset: a slice would cost a reference count each time.
Offsets and lengths are unsigned, so that no loop tests for negative indices. Each reduction sums one type in one loop;
anything else stops LLVM from using vector registers. `softdice.kernels.cpu` says what the rows mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# Flags that keep NaN and infinity: a NaN logit must give a NaN loss.
FAST = {"contract", "reassoc", "nsz", "arcp"}
MODULES = ("rows", "plain", "general", "cpu")


def _sources() -> str:
    """() -> a digest of the modules whose functions call each other."""
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


SOURCES = _sources()


def _compiled(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """fastmath flags -> decorator that compiles on first use and keeps the result on disk.

    Numba stamps what it keeps with the digest of the one file that a function stands in, though it holds the code of
    the functions called, too. Here the stamp covers all these modules, so that no stale kernel survives an upgrade.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(fastmath=fastmath, error_model="numpy", nogil=True, cache=True)(function)
        index = dispatcher._cache._cache_file
        index._source_stamp = (index._source_stamp, SOURCES)
        return dispatcher

    return decorate


jit = _compiled(FAST)
exact_jit = _compiled({"contract"})  # reassoc would undo the rounding

_TWIN = {
    types.float32: types.int32,
    types.int32: types.float32,
    types.float64: types.int64,
    types.int64: types.float64,
}


@intrinsic
def bits(typing_context: Any, x: Any) -> Any:
    """float <-> integer of the same width, bit for bit."""
    twin = _TWIN[x]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return twin(x), generate


@intrinsic
def widen_half(typing_context: Any, x: Any) -> Any:
    """uint16 with the bits of a float16 -> float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def narrow_half(typing_context: Any, x: Any) -> Any:
    """float32 -> uint16 with the bits of the nearest float16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index]; a hint, so any index is right."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        line = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        hint = builder.module.declare_intrinsic("llvm.prefetch", (line.type,), _PREFETCH)
        word = ir.IntType(32)
        builder.call(hint, [line, word(0), word(2), word(1)])  # to read, into L2, data
        return context.get_dummy_value()

    return types.void(array, index), generate


_PREFETCH = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[ir.IntType(32)] * 3])


def exp(x: Any) -> Any:
    """x -> e^x for x <= 88 (float32) or 709 (float64); 0 far below, NaN for NaN."""
    return math.exp(x)  # compiled code takes the overload below


@exact_jit
def _exp32(x: np.float32) -> np.float32:
    low = np.float32(-87.0)
    z = low if x < low else x
    # Adding 1.5 * 2^23 rounds to the nearest integer n and leaves it in the low bits.
    shifted = z * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = z - n * np.float32(0.693359375)  # ln 2 in two parts: the first product is exact
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1.0)
    scaled = bits(np.int32(bits(y) + np.int32(bits(shifted) << np.int32(23))))
    return scaled if x >= low else (np.float32(0.0) if x < low else x)


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
        _prefetch(array, off + v)


@jit
def _copy(src: Any, off: Any, stride: Any, n: Any, out: Any, o: Any) -> None:
    if stride == 1:
        for v in range(n):
            out[o + v] = src[off + v]
    else:
        for v in range(n):
            out[o + v] = src[off + v * stride]


@jit
def load(raw: Any, code: Any, off: Any, stride: Any, n: Any, out: Any, o: Any) -> None:
    """n values of any dtype, `stride` elements apart -> a row."""
    if code == 0:
        _copy(raw.view(np.float32), off, stride, n, out, o)
    elif code == 1:
        _copy(raw.view(np.float64), off, stride, n, out, o)
    elif code == 2:
        high = raw.view(np.int16)  # bfloat16 is the upper half of a float32
        for v in range(n):
            out[o + v] = bits(np.int32(np.int32(high[off + v * stride]) << np.int32(16)))
    elif code == 3:
        half = raw.view(np.uint16)
        for v in range(n):
            out[o + v] = widen_half(half[off + v * stride])
    elif code == 4:
        _copy(raw, off, stride, n, out, o)
    elif code == 5:
        _copy(raw.view(np.int8), off, stride, n, out, o)
    elif code == 6:
        _copy(raw.view(np.int16), off, stride, n, out, o)
    elif code == 7:
        _copy(raw.view(np.int32), off, stride, n, out, o)
    else:
        _copy(raw.view(np.int64), off, stride, n, out, o)


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
    """n labels of any integer dtype -> int32; those of int64 that do not fit become -2^31, which no class has."""
    zero, one = np.uint64(0), np.uint64(1)
    if code == 4:
        _copy(raw, off, one, n, out, zero)
    elif code == 5:
        _copy(raw.view(np.int8), off, one, n, out, zero)
    elif code == 6:
        _copy(raw.view(np.int16), off, one, n, out, zero)
    elif code == 7:
        _copy(raw.view(np.int32), off, one, n, out, zero)
    else:
        wide = raw.view(np.int64)
        for v in range(n):
            label = wide[off + v]
            out[v] = np.int32(label) if (label > -(1 << 31)) & (label < 1 << 31) else np.int32(-(1 << 31))


@jit
def load_labels(
    raw: Any, code: Any, off: Any, n: Any, first: Any, top: Any, has_ignore: Any, ignore: Any, out: Any, w: Any
) -> Any:
    """n labels -> class numbers (-1: none), weight 0 where ignored; returns how many are out of range."""
    _load_integers(raw, code, off, n, out)
    if has_ignore:
        for v in range(n):
            w[v] = w[v] if out[v] != ignore else w.dtype.type(0)
    bad = np.int32(0)
    for v in range(n):
        label = out[v]
        inside = (label >= np.int32(0)) & (label < top)
        bad += np.int32(not inside) & np.int32((not has_ignore) | (label != ignore))
        out[v] = label - first if inside & ((not has_ignore) | (label != ignore)) else np.int32(-1)
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
