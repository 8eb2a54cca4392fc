"""Rows of a block <-> tensors of any dtype and stride: one small compiled function for each dtype, called by address.

Arguments are uint64, and int64 from `first` on:

    source, target        address of a tensor's first element that is read or written
    step, n               elements from one voxel to the next (1: neighbours, whose loop LLVM vectorises); voxels
    row, count            address of the first row, n float32 (class numbers: int32); how many rows, one for each class
    per_class, per_row    bytes from one class of the tensor, or one row, to the next
    first, top            label of class 0 (1 of a single mask, whose 0 is NO_CLASS); the bound that labels are below
    ignoring, ignore      whether a label is IGNORED (0 or 1), and which
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from softdice.backends.cpu.compiler import ADDRESS, COUNT, address_of, body, each, exact_each, kernel
from softdice.backends.cpu.intrinsics import bits, element, read, read_label, set_element, write

WIDTHS: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16, torch.float16: np.uint16,
    torch.uint8: np.uint8, torch.bool: np.uint8, torch.int8: np.int8, torch.int16: np.int16, torch.uint16: np.uint16,
    torch.int32: np.int32, torch.uint32: np.uint32, torch.int64: np.int64, torch.uint64: np.uint64,
}  # fmt: skip
"""dtype -> the type of number that its elements are loaded as: for half precision, and bool, their bits."""
NO_CLASS, IGNORED, OUTSIDE = np.int32(-1), np.int32(-2), np.int32(-3)
"""Values of a row of class numbers that are no class."""
_WIDE = (torch.uint32, torch.int64, torch.uint64)  # labels of the others fit 32 bits

VALUES = types.int64(*[ADDRESS] * 7)
LABELS = types.int64(ADDRESS, ADDRESS, ADDRESS, ADDRESS, COUNT, COUNT, COUNT, COUNT)


@each
def _identity(value):
    """Return a number as float32."""
    return np.float32(value)


@each
def _from_bfloat16(half):
    """Widen a bfloat16, its bits as uint16: it is the upper half of a float32."""
    return bits(np.int32(np.int32(half) << np.int32(16)))


@each
def _from_float16(half):
    """Widen a float16, its bits as uint16, to float32 in integers: not every processor converts halves."""
    raw = np.int32(half)
    size = np.int32(raw & np.int32(0x7FFF))  # without the sign: subnormal below 0x0400, infinite or NaN from 0x7C00 on
    subnormal = np.float32(size) * np.float32(2.0**-24)
    normal = bits(np.int32(np.int32(size << np.int32(13)) + np.int32(0x38000000)))
    special = bits(np.int32(np.int32(size << np.int32(13)) | np.int32(0x7F800000)))
    value = subnormal if size < np.int32(0x0400) else (special if size >= np.int32(0x7C00) else normal)
    return -value if raw & np.int32(0x8000) else value


@each
def _to_bfloat16(x: np.float32):
    """Round to the nearest bfloat16, ties to even; return its bits, uint16."""
    raw = bits(x)
    rounded = np.int32(raw + np.int32(0x7FFF) + np.int32(np.int32(raw >> np.int32(16)) & np.int32(1)))
    return np.uint16(np.int32(rounded >> np.int32(16)) if x == x else np.int32(0x7FC0))


@exact_each
def _to_float16(x: np.float32):
    """Round to the nearest float16, ties to even, too large becomes infinite; return its bits, uint16.
    Below 2^-14 float16 counts in steps of 2^-24: adding 1.5 * 2^23 rounds to a whole number of them. From there on the
    mantissa loses 13 bits and the exponent 112; 0x477FF000 and more are nearer to infinity."""
    raw = bits(x)
    size = np.int32(raw & np.int32(0x7FFFFFFF))
    scaled = bits(size) * np.float32(2.0**24)
    tiny = np.int32((scaled + np.float32(12582912.0)) - np.float32(12582912.0)) if size < 0x38800000 else np.int32(0)
    rounding = np.int32(np.int32(size >> np.int32(13)) & np.int32(1)) + np.int32(0x0FFF)
    normal = np.int32(np.int32(size + rounding - np.int32(0x38000000)) >> np.int32(13))
    value = tiny if size < np.int32(0x38800000) else (np.int32(0x7C00) if size >= np.int32(0x477FF000) else normal)
    value = np.int32(0x7E00) if size > np.int32(0x7F800000) else value
    return np.uint16(value | np.int32(np.int32(raw >> np.int32(16)) & np.int32(0x8000)))


_WIDEN = {torch.bfloat16: _from_bfloat16, torch.float16: _from_float16}
_NARROW = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}


@cache
def reader(dtype: torch.dtype) -> np.uint64:
    """Return the address of the function that reads `count` classes of a tensor of a dtype into rows of float32."""
    kind, widen = WIDTHS[dtype], _WIDEN.get(dtype, _identity)

    @body(str(dtype))
    def read_row(source, step, n, row):
        """Read n elements, `step` apart, into a row."""
        if step == 1:
            for v in range(n):
                write(row, v, widen(element(kind, source, v)))
        else:
            for v in range(n):
                write(row, v, widen(element(kind, source, v * step)))

    @kernel(str(dtype))
    def read_values(source, step, n, row, count, per_class, per_row):
        for c in range(count):
            read_row(source + c * per_class, step, n, row + c * per_row)
        return 0

    return address_of(read_values, VALUES)


@cache
def writer(dtype: torch.dtype) -> np.uint64:
    """Return the address of the function that rounds `count` rows of float32 to a dtype and writes them to a tensor."""
    narrow = _NARROW.get(dtype, _identity)

    @body(str(dtype))
    def write_row(target, step, n, row):
        """Write a row to n elements, `step` apart."""
        if step == 1:
            for v in range(n):
                set_element(target, v, narrow(read(row, v)))
        else:
            for v in range(n):
                set_element(target, v * step, narrow(read(row, v)))

    @kernel(str(dtype))
    def write_values(target, step, n, row, count, per_class, per_row):
        for c in range(count):
            write_row(target + c * per_class, step, n, row + c * per_row)
        return 0

    return address_of(write_values, VALUES)


@cache
def label_reader(dtype: torch.dtype) -> np.uint64:
    """Return the address of the function (source, step, n, row, first, top, ignoring, ignore) that reads labels of a
    dtype into a row of int32 and returns bad, how many are out of range. The row gets class numbers from 0 on,
    NO_CLASS, IGNORED, or OUTSIDE for a label out of range."""
    kind = WIDTHS[dtype]
    signed, unsigned = (np.int64, np.uint64) if dtype in _WIDE else (np.int32, np.uint32)

    @body(str(dtype))
    def class_of(label, low, high, ignoring, ignored):
        """Return the class number label - low of a label in [0, high), else OUTSIDE; IGNORED if it is `ignored`.
        low: the label of class 0; it is 1 for a single mask, whose label 0 becomes NO_CLASS, -1. The comparison is
        unsigned: a negative label is beyond `high`."""
        number = np.int32(np.int32(label) - low) if unsigned(label) < high else OUTSIDE
        return IGNORED if ignoring and signed(label) == ignored else number

    @kernel(str(dtype))
    def read_labels(source, step, n, row, first, top, ignoring, ignore):
        """Read n labels, `step` elements apart, into the row; return bad, how many of them are OUTSIDE."""
        bad, skip = np.int32(0), ignoring != 0
        low, high, ignored = np.int32(first), unsigned(top), signed(ignore)
        if step == 1:
            for v in range(n):
                write(row, v, np.int32(class_of(element(kind, source, v), low, high, skip, ignored)))
        else:
            for v in range(n):
                write(row, v, np.int32(class_of(element(kind, source, v * step), low, high, skip, ignored)))
        for v in range(n):
            bad = np.int32(bad + np.int32(read_label(row, v) == OUTSIDE))
        return np.int64(bad)

    return address_of(read_labels, LABELS)
