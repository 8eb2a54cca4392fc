"""Functions -> machine code that is kept on disk, and the instructions that Numba has no word for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Flags that keep NaN and infinity: a NaN logit must give a NaN loss.
FAST = {"contract", "reassoc", "nsz", "arcp"}


def _sources() -> str:
    """() -> a digest of the modules in this folder: their functions call each other."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES = _sources()


def _compiled(fastmath: set[str], **options: bool) -> Callable[[Callable[..., Any]], Any]:
    """fastmath flags -> decorator that compiles on first use and keeps the result on disk.

    Numba stamps what it keeps with the digest of the one file that a function stands in, though it holds the code of
    the functions called, too. Here the stamp covers all these modules, so that no stale kernel survives an upgrade.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(fastmath=fastmath, error_model="numpy", nogil=True, cache=True, **options)(function)
        index = dispatcher._cache._cache_file
        index._source_stamp = (index._source_stamp, SOURCES)
        return dispatcher

    return decorate


INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called by compiled code only
jit = _compiled(FAST, **INNER)
kernel = _compiled(FAST)
exact_jit = _compiled({"contract"}, **INNER)  # reassoc would undo the rounding

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
def prefetch_line(typing_context: Any, array: Any, index: Any) -> Any:
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


def _apart(builder: Any) -> Any:
    """What tells LLVM that memory written with `write_apart` is no memory read with `read_apart`."""
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "softdice")])
    return module.add_metadata([module.add_metadata([ir.MetaDataString(module, "written"), domain])])


@intrinsic
def read_apart(typing_context: Any, array: Any, index: Any) -> Any:
    """array[index], which nothing in this loop writes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        value = builder.load(builder.gep(data, [args[1]]))
        value.set_metadata("noalias", _apart(builder))
        return value

    return array.dtype(array, index), generate


@intrinsic
def write_apart(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, which nothing else in this loop reads or writes.

    A loop that writes several rows is not vectorised otherwise: it would need too many checks for overlaps first.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        written = builder.store(args[2], builder.gep(data, [args[1]]))
        for kind in ("alias.scope", "noalias"):
            written.set_metadata(kind, _apart(builder))
        return context.get_dummy_value()

    return types.void(array, index, array.dtype), generate


@intrinsic
def peek(typing_context: Any, raw: Any, dtype: Any, index: Any) -> Any:
    """Element `index` of flat bytes that hold values of a dtype."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        kind = context.get_data_type(signature.return_type)
        return builder.load(builder.gep(builder.bitcast(data, kind.as_pointer()), [args[2]]), align=1)

    return dtype.dtype(raw, dtype, index), generate
