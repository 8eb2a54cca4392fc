"""Numba's compiler, but for two things: vectors are as wide as the processor's, and no machine code is made in vain.

Both concern the step from Numba's own representation to LLVM's, so that step is replaced in the pipeline.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering


class _Lower(Lower):
    """A function whose loops may use 512 bits: of AVX-512 LLVM takes one half unless it is asked for more.

    It spares code that has few vectors the lower clock that wide ones may bring. Here loops are all there is.
    """

    def setup_function(self, fndesc: Any) -> None:
        super().setup_function(fndesc)
        set.add(self.function.attributes, '"prefer-vector-width"="512"')  # its own `add` knows LLVM's words only


class _Taken(JITCodeLibrary):
    """The code of a function that only compiled code calls: each caller takes it in, and machine code is made there.

    Numba would make it here, too, and write the address of Python's environment into it.
    """

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
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        if state.flags.no_cpython_wrapper:
            state.library = _Taken(state.targetctx.codegen(), state.func_id.func_qualname)
        return bool(super().run_pass(state))


class Compiler(CompilerBase):
    """For `njit(pipeline_class=...)`."""

    def define_pipelines(self) -> list[Any]:
        """() -> the one pipeline."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [(_Lowering if step is NativeLowering else step, why) for step, why in passes.passes]
        passes.finalize()
        return [passes]
