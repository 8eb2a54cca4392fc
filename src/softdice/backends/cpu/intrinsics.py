"""Instructions that Numba has no word for: memory by address, calls by address, hints to the vectoriser.

Loops take rows as addresses (uint64): an array would cost a reference count per call, in memory that threads share.
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

_TWIN = {
    types.float32: types.int32,
    types.int32: types.float32,
    types.float64: types.int64,
    types.int64: types.float64,
}


@intrinsic
def bits(typing_context: Any, x: Any) -> Any:
    """Reinterpret a float as an integer of the same width, or back."""
    twin = _TWIN[x]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return twin(x), generate


def _pointer(context: Any, builder: Any, kinds: Any, args: Any, dtype: Any) -> Any:
    """Return a pointer to element args[1] of an array args[0], or of the numbers from the address args[0] on."""
    base, kind = args[0], kinds[0]
    if isinstance(kind, types.Array):
        data = context.make_array(kind)(context, builder, base).data
    else:
        data = builder.inttoptr(base, context.get_data_type(dtype).as_pointer())
    return builder.gep(data, [args[1]])


def _written(builder: Any) -> Any:
    """Return the alias scope of all memory that `write` writes."""
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "softdice")])
    return module.add_metadata([module.add_metadata([ir.MetaDataString(module, "written"), domain])])


def _load(dtype: Any, apart: bool) -> Any:
    """Return an intrinsic that loads the number at an index of an array, or of an address as `dtype`.

    apart: the promise that no `write` of the same compiled function touches it. Where that is broken, numbers are wrong
    without a word.
    """

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
    """Store a number that no `read` of this loop reads; at an address, a float as float32: rows hold no wider ones.

    A loop that writes several rows is not vectorised otherwise: it would first need a check of each pair for overlap.
    """
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
    """Add a number to the float64 `index` float64s beyond an address; not atomic: each task has its own."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _pointer(context, builder, signature.args, args, types.float64)
        term = context.cast(builder, args[2], value, types.float64)
        builder.store(builder.fadd(builder.load(place), term), place)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, value), generate


@intrinsic
def element(typing_context: Any, dtype: Any, base: Any, index: Any) -> Any:
    """Load element `index` of the numbers of a dtype from an address of any alignment on."""
    kind = dtype.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[1:], args[1:], kind), align=1)

    return kind(dtype, types.uint64, types.uint64), generate


@intrinsic
def set_element(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Store element `index` of the numbers of a dtype from an address of any alignment on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature.args, args, value), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, value), generate


@intrinsic
def call(typing_context: Any, function: Any, arguments: Any) -> Any:
    """Call a function by the address that `compiler.address_of` returned, with a tuple of numbers; it returns int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = [context.get_value_type(kind) for kind in arguments.types]
        pointer = ir.FunctionType(context.get_value_type(types.int64), kinds).as_pointer()
        values = [builder.extract_value(args[1], i) for i in range(len(kinds))]
        return builder.call(builder.inttoptr(args[0], pointer), values)

    return types.int64(types.uint64, arguments), generate


def record_at(dtype: Any) -> Any:
    """Return an intrinsic that sees a record of a dtype at an address; its fields can be read and set."""
    kind = from_dtype(dtype)

    def at(typing_context: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.uint64), generate

    return intrinsic(at)


@intrinsic
def prefetch_line(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address; a hint, so any address is right."""

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
    """Return arrays, or tuples of arrays and numbers, without a reference count.

    Every function counts the arrays that it is called with, in memory that the threads share. Whoever borrows keeps the
    owner: an argument of a kernel, or what `alive` is called with.
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
    for position, item in enumerate(kind.types if isinstance(kind, types.BaseTuple) else ()):
        part = _unowned(context, builder, item, builder.extract_value(value, position))
        value = builder.insert_value(value, part, position)
    return value


@intrinsic
def alive(typing_context: Any, value: Any) -> Any:
    """Keep the owner of `borrowed` arrays up to here."""
    return types.void(value), lambda context, builder, signature, args: context.get_dummy_value()
