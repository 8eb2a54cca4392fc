"""Functions -> machine code that is kept on disk, and the instructions that Numba has no word for."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Hashable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import config
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from softdice import terms
from softdice.kernels.cpu.compiler import Compiler

# Flags that keep NaN and infinity: a NaN logit must give a NaN loss.
FAST = {"contract", "reassoc", "nsz", "arcp"}


def _digest() -> str:
    """() -> a digest of the sources of this folder and of the declarations: all of it may stand in one kernel."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(terms.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Numba names a compiled function by its place in the source and a counter, and equal names pass for equal code. Kernels
# that two processes kept on disk would share names, though made of other settings: each process counts from elsewhere.
FunctionIdentity._unique_ids = count(secrets.randbits(60))

SOURCES = _digest()
FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
LANES = 8 if "+avx" in FEATURES else 4
"""Numbers of float32 in a vector, at least: the more lanes, the fewer numbers each of them adds up."""
ENDLESS = 1 << 62  # bytes: more than any tensor has
OPTIONS = {"error_model": "numpy", "nogil": True, "pipeline_class": Compiler}
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}  # called by compiled code only
jit = njit(fastmath=FAST, **INNER)
each = njit(fastmath=FAST, forceinline=True, **INNER)  # of a voxel: a loop that calls anything is no vector loop
exact_each = njit(fastmath={"contract"}, forceinline=True, **INNER)  # reassoc would undo the rounding


class _Kept(FunctionCache):
    """Numba's cache on disk for a function that a factory makes in many variants.

    Numba tells them apart by what they enclose, where functions are new in every process, and stamps what it keeps with
    the file of the one function, though the code of the functions called is in it, too. Here the variant is named, and
    the stamp covers all the sources.
    """

    def __init__(self, function: Callable[..., Any], variant: Hashable) -> None:
        super().__init__(function)
        self.variant = hashlib.sha256(repr(variant).encode()).hexdigest()
        base = f"{function.__name__}-{self.variant[:16]}"
        self._cache_file = IndexDataCacheFile(cache_path=self._cache_path, filename_base=base, source_stamp=SOURCES)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self.variant

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        kept = super().load_overload(sig, target_context)
        if kept is None:
            _notice()
        return kept


@cache
def _notice() -> None:
    """Say once what takes long; not in the other processes of the same work."""
    if multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0":
        text = "softdice: compiling the CPU kernel for this machine (once; it is kept for the next process)"
        print(text, file=sys.stderr, flush=True)


def kernel(variant: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """variant of a function -> decorator that compiles it on first use and keeps the result on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(fastmath=FAST, **OPTIONS)(function)
        try:
            dispatcher._cache = _Kept(function, variant)
        except RuntimeError as problem:  # nowhere to keep it: a read-only package and no home
            warnings.warn(
                f"softdice: expected a folder to keep compiled kernels in, got {problem}. They are compiled in every "
                "process; set NUMBA_CACHE_DIR to a folder that can be written.",
                RuntimeWarning,
                stacklevel=2,
            )
        return dispatcher

    return decorate


def shared(signature: Any, *variant: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """Signature of numbers and addresses, variant -> decorator: a function that kernels call by its address.

    Other functions a kernel takes in, and LLVM works through them again for every kernel. What is long and the same in
    many kernels is compiled here, once, and kept by itself.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = (function.__name__, *variant)
        dispatcher = kernel(("shared", *name))(function)
        dispatcher.compile(signature)
        (made,) = dispatcher.overloads.values()
        symbol = "_".join(map(str, ("softdice", *name, SOURCES)))
        binding.add_symbol(symbol, made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name))
        _alive.append(dispatcher)
        return types.ExternalFunction(symbol, signature)

    return decorate


_alive: list[Any] = []  # what is called by address

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
def memory(typing_context: Any, address: Any, dtype: Any) -> Any:
    """Address of a tensor's first element, and a dtype -> a flat array without an end, and without an owner."""
    kind = types.Array(dtype.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        word = context.get_value_type(types.intp)
        size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        populate_array(
            array,
            data=builder.inttoptr(args[0], array.data.type),
            shape=[word(ENDLESS // size)],
            strides=[word(size)],
            itemsize=word(size),
            meminfo=None,
        )
        return array._getvalue()

    return kind(address, dtype), generate


@intrinsic
def place(typing_context: Any, array: Any, index: Any) -> Any:
    """Address of array[index], for a `shared` function, which makes it a `memory` again."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.gep(data, [args[1]]), context.get_value_type(types.uint64))

    return types.uint64(array, index), generate


@intrinsic
def borrowed(typing_context: Any, value: Any) -> Any:
    """Arrays, or tuples of arrays and numbers -> the same without a reference count.

    Every function counts the arrays that it is handed, and back, in memory that the threads share, for every block.
    Whoever borrows keeps the owner: an argument of a kernel, or what `alive` is called with.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _unowned(context, builder, value, args[0])

    return value(value), generate


def _unowned(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.meminfo.type(None)
        array.parent = array.parent.type(None)
        return array._getvalue()
    for place, item in enumerate(kind.types if isinstance(kind, types.BaseTuple) else ()):
        made = _unowned(context, builder, item, builder.extract_value(value, place))
        value = builder.insert_value(value, made, place)
    return value


@intrinsic
def alive(typing_context: Any, value: Any) -> Any:
    """What was borrowed from is needed up to here."""
    return types.void(value), lambda context, builder, signature, args: context.get_dummy_value()


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
