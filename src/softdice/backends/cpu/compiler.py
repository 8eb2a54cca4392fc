"""Compile Python functions with Numba, keep the machine code on disk, and call compiled functions by address.

This is the only module of the package that touches Numba's private names. What it needs from them, and why:

* `JITCodeLibrary`, `Lower`, `NativeLowering`: LLVM defaults to 256-bit vectors on AVX-512, and takes 512 only from a
  function attribute; and Numba makes machine code for functions that other compiled code inlines anyway.
* `FunctionCache`, `IndexDataCacheFile`, `Dispatcher._cache`: Numba stamps what it keeps with the file of one function,
  where a kernel holds code from many files; and it cannot tell the variants apart that a factory makes.

tests/test_kernels.py fails when a release of Numba takes one of them away.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering

from softdice.statistics import declared


class _WideLower(Lower):
    """Ask LLVM for 512-bit vectors, which it otherwise spares on AVX-512 for code with few of them."""

    def setup_function(self, fndesc: Any) -> None:
        super().setup_function(fndesc)
        set.add(self.function.attributes, '"prefer-vector-width"="512"')  # the set's own `add` knows LLVM's words only


class _InlinedLibrary(JITCodeLibrary):
    """Hold a function that only compiled code calls: its callers link it in, so no machine code is made here."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None:
        pass


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    _name = "softdice_lowering"
    lowering_class = _WideLower

    def run_pass(self, state: Any) -> bool:
        if state.flags.no_cpython_wrapper:
            state.library = _InlinedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return bool(super().run_pass(state))


class Compiler(CompilerBase):
    """Numba's compiler with `_Lowering` in the place of its own step."""

    def define_pipelines(self) -> list[Any]:
        """Return the one pipeline."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [(_Lowering if step is NativeLowering else step, why) for step, why in passes.passes]
        passes.finalize()
        return [passes]


FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Flags of fast arithmetic that keep NaN and infinity: a NaN logit must give a NaN loss."""
OPTIONS = {"error_model": "numpy", "nogil": True, "pipeline_class": Compiler}
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}  # called by compiled code only
jit = njit(fastmath=FAST, **_INNER)
each = njit(fastmath=FAST, forceinline=True, **_INNER)  # per voxel: a loop that calls a function is not vectorised
exact_each = njit(fastmath={"contract"}, forceinline=True, **_INNER)  # reassoc would undo deliberate rounding


def _digest() -> str:
    """Return the on-disk cache key: editing a source of this folder, or a declaration, invalidates cached kernels."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(declared.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES = _digest()


class _VariantCache(FunctionCache):
    """Keep a function that a factory makes in many variants: by the variant's name, stamped with all sources."""

    def __init__(self, function: Callable[..., Any], variant: str, label: str) -> None:
        super().__init__(function)
        self.variant, self.label = variant, label
        base = f"{function.__name__}-{variant}"
        self._cache_file = IndexDataCacheFile(cache_path=self._cache_path, filename_base=base, source_stamp=SOURCES)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self.variant

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        overload = super().load_overload(sig, target_context)
        if overload is None:
            _announce()
            compiled.append(self.label)
        return overload


compiled: list[str] = []
"""What this process has compiled because the disk did not hold it, by name and variant."""


@cache
def _announce() -> None:
    """Say once that compiling takes a while; not in the worker processes of one command."""
    if multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0":
        text = "softdice: compiling the CPU kernel for this machine (once; it is kept for the next process)"
        print(text, file=sys.stderr, flush=True)


def _name_variant(function: Callable[..., Any], variant: Hashable) -> str:
    """Put a digest of the variant into the function's symbol: equal names must be equal code, and two processes may
    each have kept kernels that a third one loads."""
    digest = hashlib.sha256(repr((function.__qualname__, variant)).encode()).hexdigest()[:16]
    function.__qualname__ += f"_{digest}"
    return digest


def body(variant: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator for a function that a factory makes in variants, and that compiled code alone calls."""

    def decorate(function: Callable[..., Any]) -> Any:
        _name_variant(function, variant)
        return jit(function)

    return decorate


def kernel(variant: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles one variant of a function on first use and keeps the result on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        digest = _name_variant(function, variant)
        dispatcher = njit(fastmath=FAST, **OPTIONS)(function)
        try:
            dispatcher._cache = _VariantCache(function, digest, f"{function.__name__} {variant}")
        except RuntimeError as problem:  # nowhere to keep it: a read-only package and no home
            warnings.warn(
                f"softdice: expected a folder to keep compiled kernels in, got {problem}. They are compiled in every "
                "process; set NUMBA_CACHE_DIR to a folder that can be written.",
                RuntimeWarning,
                stacklevel=2,
            )
        return dispatcher

    return decorate


def address_of(dispatcher: Any, signature: Any) -> np.uint64:
    """Compile a `kernel` for a signature of numbers and return its address, for `intrinsics.call`.

    What many kernels share is compiled once and called by address: inlined, LLVM would optimise it in each of them.
    """
    dispatcher.compile(signature)
    overload = dispatcher.overloads[signature.args]
    _loaded.append(dispatcher)
    return np.uint64(overload.library.get_pointer_to_function(overload.fndesc.llvm_cfunc_wrapper_name))


_loaded: list[Any] = []  # code that is called by address must not be unloaded

ADDRESS, COUNT = types.uint64, types.int64
