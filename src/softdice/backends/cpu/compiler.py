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
        """Return Numba's pipeline for compiled code without Python objects, with that step replaced."""
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


_FILES = (*sorted(Path(__file__).parent.glob("*.py")), Path(declared.__file__))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()
"""Part of the on-disk cache key: editing a source of this folder, or a declaration, invalidates cached kernels."""


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
        """Return the code that the disk holds for a signature, or None: Numba then compiles it.
        That is announced to the user, and the variant's label is added to `compiled`."""
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
    """Append a digest of the variant to the function's qualified name, which becomes its symbol; return the digest.
    Equal symbols must be equal code: two processes may each have kept kernels on disk that a third one loads."""
    digest = hashlib.sha256(repr((function.__qualname__, variant)).encode()).hexdigest()[:16]
    function.__qualname__ += f"_{digest}"
    return digest


def body(variant: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function for compiled code to call; Python calls a `kernel`.
    variant: the arguments of the factory that made the function, whose repr tells its variants apart, on disk, too."""

    def decorate(function: Callable[..., Any]) -> Any:
        _name_variant(function, variant)
        return jit(function)

    return decorate


def kernel(variant: Hashable) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function on first use and keeps its code on disk, one file for each variant.
    variant: all that the code depends on beside its source, such as the arguments of the factory that made the
    function; its text must be the same in every process."""

    def decorate(function: Callable[..., Any]) -> Any:
        """Return Numba's dispatcher of the function; warn if there is no folder that its code can be kept in."""
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
    """Compile a `kernel` for a Numba signature and return its address, for `intrinsics.call`.
    dispatcher: the kernel, as the decorator returned it. signature: of numbers alone, returning int64. Functions that
    many kernels share are called by address and compiled once; inlined, LLVM would optimise them in each kernel."""
    dispatcher.compile(signature)
    overload = dispatcher.overloads[signature.args]
    _loaded.append(dispatcher)  # its code must stay where the address points
    return np.uint64(overload.library.get_pointer_to_function(overload.fndesc.llvm_cfunc_wrapper_name))


_loaded: list[Any] = []  # code that is called by address must not be unloaded

ADDRESS, COUNT = types.uint64, types.int64
