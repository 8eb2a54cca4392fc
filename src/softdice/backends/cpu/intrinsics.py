"""Instructions that Numba has no word for: memory by address, calls by address, hints to the vectoriser.

Loops take rows as addresses (uint64): an array would cost a reference count per call, in memory that threads share.

An intrinsic is called with Numba's types of its arguments when a caller is typed. It returns the signature and a
function `generate`, which is called with LLVM's builder and values when code is made. So each intrinsic here has two
sets of arguments; its docstring describes the instruction, and names the arguments that compiled code passes.

    base, address, index    uint64 address (or an array), of whose element `index` the instruction reads or writes
    kind, dtype             a Numba type of a number
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import from_dtype, types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
LANES = 8 if "+avx" in FEATURES else 4
"""float32 numbers in a vector, at least: more lanes leave fewer numbers for each of them to add up."""

_TWIN = {types.float32: types.int32, types.float64: types.int64}
_TWIN |= {twin: kind for kind, twin in _TWIN.items()}


@intrinsic
def bits(typing_context: Any, x: Any) -> Any:
    """Reinterpret the bits of a float as an integer of the same width, or the other way."""
    twin = _TWIN[x]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return twin(x), generate


def _pointer(context: Any, builder: Any, kinds: Any, args: Any, dtype: Any) -> Any:
    """Return an LLVM pointer to element args[1] of an array args[0], or of numbers of `dtype` from address args[0] on.
    kinds, args: Numba types and LLVM values of an instruction's arguments; dtype: a Numba type."""
    base, kind = args[0], kinds[0]
    if isinstance(kind, types.Array):
        data = context.make_array(kind)(context, builder, base).data
    else:
        data = builder.inttoptr(base, context.get_data_type(dtype).as_pointer())
    return builder.gep(data, [args[1]])


def _written(builder: Any) -> Any:
    """Return LLVM's metadata for one alias scope: all memory that the `write`s of a module write.
    A load that is marked "noalias" with it is never a load of that memory."""
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "softdice")])
    return module.add_metadata([module.add_metadata([ir.MetaDataString(module, "written"), domain])])


def _load(dtype: Any, apart: bool) -> Any:
    """Return an intrinsic (base, index) that loads an element of an array, or of numbers of `dtype` at an address.
    apart: whether its caller promises that no `write` of the same compiled function writes that element. Where the
    promise is broken, results are wrong without an error."""

    def load(typing_context: Any, base: Any, index: Any) -> Any:
        kind = base.dtype if isinstance(base, types.Array) else dtype

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(context, builder, signature.args, args, kind))
            if apart:
                value.set_metadata("noalias", _written(builder))
            return value

        return kind(base, types.uint64), generate

    return intrinsic(load)


read = _load(types.float32, apart=True)
read_label = _load(types.int32, apart=True)
reread = _load(types.float32, apart=False)


@intrinsic
def write(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Store a number as element `index` of an array in its dtype, or of a row at an address: a float as float32.
    The caller promises that no `read` of the same compiled function reads that element: without the promise LLVM
    vectorises no loop that writes several rows, since each pair of rows might overlap."""
    by_address = types.float32 if isinstance(value, types.Float) else value
    kind = base.dtype if isinstance(base, types.Array) else by_address

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.store(args[2], _pointer(context, builder, signature.args, args, kind))
        for name in ("alias.scope", "noalias"):
            stored.set_metadata(name, _written(builder))
        return context.get_dummy_value()

    return types.void(base, types.uint64, kind), generate


@intrinsic
def add(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Add a number to element `index` of the float64 at an address; not atomic, since each task has its own memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _pointer(context, builder, signature.args, args, types.float64)
        term = context.cast(builder, args[2], value, types.float64)
        builder.store(builder.fadd(builder.load(place), term), place)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, value), generate


@intrinsic
def element(typing_context: Any, dtype: Any, base: Any, index: Any) -> Any:
    """Load element `index` of numbers of a dtype at a uint64 address of any alignment.

    Compiled code passes a type of NumPy, such as np.uint8; here `dtype` is Numba's type of it, whose `.dtype` is the
    number's.
    """
    kind = dtype.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[1:], args[1:], kind), align=1)

    return kind(dtype, types.uint64, types.uint64), generate


@intrinsic
def set_element(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Store a value as element `index` of numbers of its own type at an address of any alignment."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature.args, args, value), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, value), generate


@intrinsic
def call(typing_context: Any, function: Any, arguments: Any) -> Any:
    """Call a function by the address that `compiler.address_of` returned, and return its int64.
    arguments: a tuple of numbers, of the types that the function was compiled for; nothing checks them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = [context.get_value_type(kind) for kind in arguments.types]
        pointer = ir.FunctionType(context.get_value_type(types.int64), kinds).as_pointer()
        values = [builder.extract_value(args[1], i) for i in range(len(kinds))]
        return builder.call(builder.inttoptr(args[0], pointer), values)

    return types.int64(types.uint64, arguments), generate


def record_at(dtype: Any) -> Any:
    """Return an intrinsic (address) that returns the record of a structured NumPy dtype there, to be read and set."""
    kind = from_dtype(dtype)

    def at(typing_context: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.uint64), generate

    return intrinsic(at)


@intrinsic
def prefetch_line(typing_context: Any, address: Any) -> Any:
    """Prefetch the cache line at an address; a hint, so any address is right."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line.type, word, word, word])
        hint = builder.module.declare_intrinsic("llvm.prefetch", (line.type,), kind)
        builder.call(hint, [line, word(0), word(2), word(1)])  # to read, into L2, data
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def borrowed(typing_context: Any, value: Any) -> Any:
    """Return the array, or tuple of arrays and numbers, without its reference count.
    Every function counts the arrays that it is called with, in memory that the threads share, which is slow. The caller
    must keep the owner alive: an argument of a kernel lives until it returns, any other value until its `alive`."""
    return value(value), lambda context, builder, signature, args: _unowned(context, builder, value, args[0])


def _unowned(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Return an LLVM value of the Numba type `kind` with the owner removed from its arrays, at any depth of tuples.
    Numba counts no references to an array without an owner."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.meminfo.type(None)
        array.parent = array.parent.type(None)
        return array._getvalue()
    for position, item in enumerate(kind.types if isinstance(kind, types.BaseTuple) else ()):
        part = _unowned(context, builder, item, builder.extract_value(value, position))
        value = builder.insert_value(value, part, position)
    return value


@intrinsic
def alive(typing_context: Any, value: Any) -> Any:
    """Keep the owner of `borrowed` arrays alive up to this call, by using it."""
    return types.void(value), lambda context, builder, signature, args: context.get_dummy_value()
