"""memory of any dtype <-> rows of a block (Numba).

A row is a run of n values in a flat array, given as array and offset: a slice would cost a reference count each time.
Offsets and lengths are unsigned, so that no loop tests for negative indices.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types

from softdice.kernels.cpu.compiled import (  # noqa: F401 - peek: generated
    bits,
    each,
    exact_each,
    jit,
    memory,
    peek,
    place,
    prefetch_line,
    shared,
)
from softdice.terms import function

FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
NARROW = {
    torch.uint8: "uint8",
    torch.bool: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.uint16: "uint16",
    torch.int32: "int32",
}
WIDE = {torch.int64: "int64", torch.uint32: "uint32", torch.uint64: "uint64"}
"""dtypes that the kernel reads, and how numpy calls them: labels of NARROW ones are handled in 32 bits."""

DTYPES = {**FLOATS, **NARROW, **WIDE}
CODES = {name: code for code, name in enumerate(dict.fromkeys(DTYPES.values()))}
"""How a tensor's bytes are to be read: one compiled kernel then serves every dtype of labels, weights and logits."""

LINE = np.uint64(16)  # float32 in a cache line
IGNORED, OUTSIDE = np.int32(-2), np.int32(-3)  # beside class numbers, and -1 for no class


@jit
def prefetch(array, off, n):
    """Ask for array[off : off + n] while something else is being computed."""
    for v in range(np.uint64(0), n, LINE):
        prefetch_line(array, off + v)


@each
def from_bfloat16(half):
    """A bfloat16 is the upper half of a float32."""
    return bits(np.int32(np.int32(half) << np.int32(16)))


@each
def from_float16(half):
    """In integers: not every processor converts halves, and no library need do it for the others."""
    raw = np.int32(half)
    size = np.int32(raw & np.int32(0x7FFF))
    small = np.float32(size) * np.float32(2.0**-24)
    normal = bits(np.int32(np.int32(size << np.int32(13)) + np.int32(0x38000000)))
    strange = bits(np.int32(np.int32(size << np.int32(13)) | np.int32(0x7F800000)))
    value = small if size < np.int32(0x0400) else (strange if size >= np.int32(0x7C00) else normal)
    return -value if raw & np.int32(0x8000) else value


@each
def to_bfloat16(x: np.float32):
    """Rounded to nearest, ties to even."""
    raw = bits(x)
    rounded = np.int32(raw + np.int32(0x7FFF) + np.int32(np.int32(raw >> np.int32(16)) & np.int32(1)))
    return np.uint16(np.int32(rounded >> np.int32(16)) if x == x else np.int32(0x7FC0))


@exact_each
def to_float16(x: np.float32):
    """Rounded to nearest, ties to even; too large becomes infinite."""
    raw = bits(x)
    size = np.int32(raw & np.int32(0x7FFFFFFF))
    scaled = bits(size) * np.float32(2.0**24)
    whole = np.int32((scaled + np.float32(12582912.0)) - np.float32(12582912.0)) if size < 0x38800000 else np.int32(0)
    up = np.int32(np.int32(size >> np.int32(13)) & np.int32(1)) + np.int32(0x0FFF)
    normal = np.int32(np.int32(size + up - np.int32(0x38000000)) >> np.int32(13))
    found = whole if size < np.int32(0x38800000) else (np.int32(0x7C00) if size >= np.int32(0x477FF000) else normal)
    found = np.int32(0x7E00) if size > np.int32(0x7F800000) else found
    return np.uint16(found | np.int32(np.int32(raw >> np.int32(16)) & np.int32(0x8000)))


def _by_dtype(signature: str, loop: str, dtypes: dict[Any, str] = DTYPES):
    """A loop in which `{value}` and `{dtype}` stand for an element of raw and its type -> one for every dtype."""
    text = ""
    for name, code in CODES.items():
        if name in dtypes.values():
            value = f"peek(raw, {'uint16' if 'float16' in name else name}, off + v * stride)"
            value = f"from_{name}({value})" if "float16" in name else value
            text += f"    {'el' if text else ''}if code == {code}:\n        for v in range(n):\n"
            text += f"            {loop.format(value=value, dtype=name, bits=64 if name in WIDE.values() else 32)}\n"
    known = {name: getattr(np, name) for name in (*CODES, "int64", "uint64", "uint16") if hasattr(np, name)}
    return jit(function(signature, text.strip(), {**globals(), **known}))


_values = _by_dtype("values(raw, code, off, stride, n, out)", "out[v] = {value}")
_classes = _by_dtype(
    "classes(raw, code, off, stride, n, first, top, out)",
    "out[v] = int32({value}) - first if uint{bits}({value}) < uint{bits}(top) else OUTSIDE",
    {**NARROW, **WIDE},
)
_ignored = _by_dtype(
    "ignored(raw, code, off, stride, n, ignore, out)",
    "out[v] = IGNORED if int{bits}({value}) == int{bits}(ignore) else out[v]",
    {**NARROW, **WIDE},
)
ADDRESS, SIZE = types.uint64, types.int64


@shared(types.void(ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS, ADDRESS, SIZE))
def _load(address, code, off, stride, n, out, size):
    if size == 8:
        _values(memory(address, np.uint8), code, off, stride, n, memory(out, np.float64))
    else:
        _values(memory(address, np.uint8), code, off, stride, n, memory(out, np.float32))


@jit
def load(address, code, off, stride, n, out, o):
    """n values of any dtype, `stride` elements apart, from element `off` of an address on -> a row."""
    _load(address, code, off, stride, n, place(out, o), out.itemsize)


@shared(types.int32(ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS, types.int32, SIZE, SIZE, SIZE, ADDRESS))
def _load_labels(address, code, off, stride, n, first, top, has_ignore, ignore, out):
    raw, found = memory(address, np.uint8), memory(out, np.int32)
    _classes(raw, code, off, stride, n, first, top, found)
    if has_ignore:
        _ignored(raw, code, off, stride, n, ignore, found)
    bad = np.int32(0)
    for v in range(n):
        bad = np.int32(bad + np.int32(found[v] == OUTSIDE))
    return bad


@jit
def load_labels(address, code, off, stride, n, first, top, has_ignore, ignore, out, w):
    """n labels -> class numbers (below 0: none), weight 0 where ignored; returns how many are out of range."""
    begin = place(out, np.uint64(0))
    bad = _load_labels(address, code, off, stride, n, first, top, np.int64(has_ignore), ignore, begin)
    if has_ignore:
        for v in range(n):
            w[v] = w.dtype.type(0) if out[v] == IGNORED else w[v]
    return bad


@jit
def _rounded(row, n, address, code, off, stride):
    if code == 0:
        single = memory(address, np.float32)
        for v in range(n):
            single[off + v * stride] = row[v]
    elif code == 1:
        double = memory(address, np.float64)
        for v in range(n):
            double[off + v * stride] = row[v]
    elif code == 2:
        high = memory(address, np.uint16)
        for v in range(n):
            high[off + v * stride] = to_bfloat16(np.float32(row[v]))
    else:
        half = memory(address, np.uint16)
        for v in range(n):
            half[off + v * stride] = to_float16(np.float32(row[v]))


@shared(types.void(ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, ADDRESS, ADDRESS))
def _store(row, size, n, address, code, off, stride):
    if size == 8:
        _rounded(memory(row, np.float64), n, address, code, off, stride)
    else:
        _rounded(memory(row, np.float32), n, address, code, off, stride)


@jit
def store(row, o, n, address, code, off, stride):
    """A row -> n values of a floating dtype at an address, rounded to nearest, `stride` elements apart."""
    _store(place(row, o), row.itemsize, n, address, code, off, stride)


@jit
def beyond(row, o, n, low, high, w):
    """How many values of a row lie outside [low, high], voxels of weight 0 aside."""
    count = np.int32(0)
    for v in range(n):
        x = row[o + v]
        count = np.int32(count + np.int32(((x < low) | (x > high)) & (w[v] > 0)))
    return count


@jit
def clean_weights(w, n):
    """A weight that is NaN or negative becomes 0; returns how many did."""
    bad = np.int32(0)
    for v in range(n):
        right = w[v] >= 0
        bad = np.int32(bad + np.int32(1) - np.int32(right))
        w[v] = w[v] if right else w.dtype.type(0)
    return bad
