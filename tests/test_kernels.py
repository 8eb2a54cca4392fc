"""The CPU kernel: half precision, the same bits always, operators, memory, refusals. Values: test_agreement.py."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

import softdice
from softdice.backends import route
from softdice.backends.cpu import centreline, compiler, intrinsics, walk
from softdice.statistics.declared import FIELDS
from softdice.statistics.request import Pass, Request, decode


@pytest.fixture(autouse=True)
def _on_the_kernel() -> Iterator[None]:
    with softdice.use_backend("cpu"):
        yield


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sums_and_gradient(input: Tensor, target: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return all statistics, and the gradient of a fixed random combination of them."""
    leaf = input.detach().requires_grad_()
    stats = softdice.overlap_statistics(leaf, target, **settings)
    sums = torch.stack([getattr(stats, name) for name in stats.fields])
    mix = torch.rand(sums.shape[0], 1, sums.shape[2], generator=torch.Generator().manual_seed(7)).to(sums)
    (gradient,) = torch.autograd.grad((sums * mix).sum(), leaf)
    return sums, gradient


def case(
    C: int,
    activation: str,
    dense: bool,
    *,
    B: int = 2,
    S: tuple[int, ...] = (5, 70),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(C)
    input = torch.randn(B, C, *S, dtype=torch.float64, generator=generator) * 3
    if activation == "none":
        input = input.softmax(1) if C > 1 else input.sigmoid()
    if dense:
        target = torch.rand(B, C, *S, dtype=torch.float64, generator=generator)
    else:
        target = torch.randint(0, max(C, 2), (B, *S), generator=generator)
    return input.to(dtype), target


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [1, 4, 20])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_is_widened_in_the_pass(dtype: torch.dtype, C: int, channels_last: bool) -> None:
    input, target = case(C, "sigmoid", False, S=(9, 33), dtype=dtype)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    sums, gradient = sums_and_gradient(input, target, activation="sigmoid")
    with softdice.use_backend("reference"):
        exact_sums, exact_gradient = sums_and_gradient(input.double(), target, activation="sigmoid")
    assert gradient.dtype == dtype
    assert gradient.stride() == input.stride()
    assert ((sums - exact_sums).abs() <= 2e-6 * exact_sums.abs()).all()
    rounded = exact_gradient.to(dtype).double()  # the nearest value that the gradient can hold, give or take one step
    step = torch.finfo(dtype).eps * exact_gradient.abs() + torch.finfo(dtype).smallest_normal
    assert ((gradient.double() - rounded).abs() <= step).all()


def test_every_bit_pattern_of_half_precision_is_read_right() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        pattern = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        values = pattern[pattern.isfinite() & (pattern >= 0) & (pattern <= 1)]
        stats = softdice.overlap_statistics(
            values.view(1, 1, -1), torch.ones(1, values.numel(), dtype=torch.bool), fields=("prediction",)
        )
        assert stats.prediction.item() == pytest.approx(values.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 41, 1000), (3, 20, 31, 301), (2, 2, 7)])
@pytest.mark.parametrize("dense", [False, True])
def test_same_bits_for_any_number_of_threads(threads: Any, shape: tuple[int, ...], dense: bool) -> None:
    input, target = case(shape[1], "softmax", dense, B=shape[0], S=shape[2:], dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 2, 5):
        threads(count)
        results.append(sums_and_gradient(input, target, activation="softmax"))
    for sums, gradient in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_two_python_threads_at_once() -> None:
    input, target = case(4, "softmax", False, B=2, S=(300, 300), dtype=torch.float32)
    expected = sums_and_gradient(input, target, activation="softmax")
    found: list[tuple[Tensor, Tensor]] = []
    workers = [
        threading.Thread(target=lambda: found.append(sums_and_gradient(input, target, activation="softmax")))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for sums, gradient in found:
        assert torch.equal(sums, expected[0])
        assert torch.equal(gradient, expected[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on fork
def test_works_in_a_forked_process(threads: Any) -> None:
    threads(2)
    input, target = case(4, "softmax", False, B=2, S=(300, 300), dtype=torch.float32)
    expected, _ = sums_and_gradient(input, target, activation="softmax")  # the parent's workers exist now
    child = os.fork()
    if child == 0:
        sums = torch.stack(
            [getattr(softdice.overlap_statistics(input, target, activation="softmax"), name) for name in FIELDS]
        )
        os._exit(0 if torch.equal(sums, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_inference_mode() -> None:
    input, target = case(3, "softmax", False, dtype=torch.float32)
    expected = softdice.SoftDiceLoss(3, activation="softmax")(input, target)
    with torch.inference_mode():
        assert torch.equal(softdice.SoftDiceLoss(3, activation="softmax")(input, target), expected)


# --- torch.library ------------------------------------------------------------------------------------------------


def operator_arguments(
    dense: bool, activation: str, unions: bool, dtype: torch.dtype = torch.float64
) -> tuple[Any, ...]:
    input, target = case(3, activation, dense, S=(35,), dtype=dtype)
    weight = torch.rand(2, 35, dtype=torch.float64)
    regions = torch.tensor([[True, True, False], [False, True, True]]) if unions else None
    settings = Pass(activation=activation, label_smoothing=0.1, gamma=1.5, power=1.5)
    return input.requires_grad_(), target, weight, regions, None, settings.text


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", torch.float32), ("sliced", torch.float64)])
@pytest.mark.parametrize(
    ("dense", "activation", "unions"), [(False, "softmax", False), (True, "softmax", True), (True, "sigmoid", False)]
)
def test_opcheck(dense: bool, activation: str, unions: bool, backend: str, dtype: torch.dtype) -> None:
    arguments = operator_arguments(dense, activation, unions, dtype)
    torch.library.opcheck(torch.ops.softdice.statistics.default, (*arguments, backend))
    grad = torch.rand(len(FIELDS), 2, 2 if unions else 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.softdice.statistics_backward.default, (grad, *arguments, backend))


def test_second_derivatives_come_from_the_reference() -> None:
    input, target = case(3, "softmax", True, S=(7,))
    loss = softdice.SoftDiceLoss(3, activation="softmax")
    with softdice.use_backend("auto"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "SMALL_NUMEL", 0)  # the definition in slices, which has no graph of its own
        assert torch.autograd.gradcheck(lambda x: loss(x, target), input.requires_grad_())
        assert torch.autograd.gradgradcheck(lambda x: loss(x, target), input)
    half = input.detach().float().requires_grad_()
    (slope,) = torch.autograd.grad(loss(half, target), half, create_graph=True)  # of the kernel
    (second,) = torch.autograd.grad(slope.square().sum(), half)
    with softdice.use_backend("reference"):
        (exact_slope,) = torch.autograd.grad(loss(input, target), input, create_graph=True)
        (exact,) = torch.autograd.grad(exact_slope.square().sum(), input)
    assert (second - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    input, target = case(4, "softmax", False, S=(6, 10), dtype=torch.float32)
    loss = softdice.SoftDiceLoss(4, activation="softmax", absent="skip") + 0.5 * softdice.CrossEntropyLoss(
        4, activation="softmax"
    )
    compiled = torch.compile(loss, fullgraph=True)
    a, b = input.clone().requires_grad_(), input.clone().requires_grad_()
    eager_value, compiled_value = loss(a, target), compiled(b, target)
    assert torch.allclose(compiled_value, eager_value, rtol=1e-6)
    eager_value.backward()
    compiled_value.backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad - b.grad).abs().max() <= 1e-6 * a.grad.abs().max()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("with_cross_entropy", "most"), [(False, 12), (True, 16)])
def test_a_compiled_step_has_few_operations(with_cross_entropy: bool, most: int) -> None:
    """What follows the pass, forward and backward, is fused: on a GPU each operation is a launch."""
    from torch._inductor import metrics
    from torch._inductor.utils import fresh_cache

    loss: torch.nn.Module = softdice.SoftDiceLoss(4, activation="softmax")
    if with_cross_entropy:
        loss = loss + softdice.CrossEntropyLoss(4, activation="softmax")
    input, target = case(4, "softmax", False, S=(6, 10), dtype=torch.float32)
    metrics.reset()
    with fresh_cache():  # what is found in a cache is not counted
        torch.compile(loss, fullgraph=True)(input.requires_grad_(), target).backward()
    assert 0 < metrics.generated_kernel_count + 2 <= most  # two: the passes over the voxels


def test_settings_as_an_operator_takes_them() -> None:
    third = np.float64(1 / 3)  # a float whose repr names numpy
    settings = Pass("sigmoid", -7, third, None, False, gamma=2, power=1 + third, fields=("focal", "labelled"))
    assert decode(settings.text) == settings
    assert decode(Pass(regions=((0, 1),)).text) == Pass()  # the regions are a tensor there


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_compiled_code_may_change_a_setting() -> None:
    input, target = case(3, "softmax", False, S=(6, 10), dtype=torch.float32)

    def focal(x: Tensor, gamma: float) -> Tensor:
        return softdice.overlap_statistics(x, target, activation="softmax", gamma=gamma).pool().focal

    compiled = torch.compile(focal, fullgraph=True, backend="aot_eager")
    for gamma in (1.0, 2.0, 2.5):  # from the second value on the compiler takes it for a number that varies
        torch.testing.assert_close(compiled(input, gamma), focal(input, gamma))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_full_size_is_allocated(label_dtype: torch.dtype, channels_last: bool) -> None:
    input = torch.randn(2, 16, 640, 640)  # scratch is a constant: below some 30 MB it is more than 2 %
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 16, (2, 640, 640), dtype=label_dtype)
    loss = softdice.SoftDiceLoss(16, activation="softmax")
    input.requires_grad_()
    loss(input, target).backward()
    size = input.numel() * 4
    assert numpy_peak(lambda: loss(input, target)) <= 0.02 * size
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        value = loss(input, target)
    assert max((event.cpu_memory_usage for event in profile.events()), default=0) <= 0.02 * size
    assert numpy_peak(lambda: loss(input, target).backward()) <= 0.02 * size
    input.grad = None
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        value.backward()
    assert max(event.cpu_memory_usage for event in profile.events()) <= 1.02 * size  # the gradient
    assert input.grad is not None
    assert input.grad.stride() == input.stride()


def numpy_peak(function: Callable[[], Any]) -> int:
    """Return the most bytes that Python and NumPy hold while it runs; torch's memory is in torch's profile."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# --- which backend, and refusals ----------------------------------------------------------------------------------


def test_auto_takes_the_kernel_for_all_but_small_inputs() -> None:
    with softdice.use_backend("auto"):
        large = torch.zeros(1, 2, route.SMALL_NUMEL)
        assert route.choose(Request(large, large[:, 0].long())) == "cpu"
        assert route.choose(Request(large[..., :4], large[:, 0, :4].long())) == "reference"
        weight = torch.ones(1, route.SMALL_NUMEL, requires_grad=True)
        assert route.choose(Request(large, large[:, 0].long(), weight)) == "reference"
        assert route.choose(Request(large.double(), large[:, 0].long())) == "sliced"


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    input, target = case(3, "softmax", True, dtype=torch.float32)
    with pytest.raises(
        RuntimeError, match=r"use_backend: expected tensors .*target, voxel_weight or voxel_map requires a gradient"
    ):
        softdice.overlap_statistics(input, target.requires_grad_(), activation="softmax")
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.func.grad(lambda x: softdice.SoftDiceLoss(3, activation="softmax")(x, target.detach()))(input)
    monkeypatch.setattr(route, "cpu_missing", lambda: "numba is not installed: pip install 'softdice[cpu]'")
    with pytest.raises(RuntimeError, match=r"pip install 'softdice\[cpu\]'"):
        softdice.overlap_statistics(input, target.detach(), activation="softmax")


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "_in_use", [])
    monkeypatch.setenv("SOFTDICE_BACKEND", "reference")
    assert route.asked() == "reference"
    monkeypatch.setenv("SOFTDICE_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"SOFTDICE_BACKEND: .* got 'gpu'"):
        route.asked()


@pytest.mark.parametrize("bad", ["label", "probability", "weight", "dense"])
def test_range_errors_of_the_pass_itself(bad: str) -> None:
    input, target = case(3, "none", bad == "dense", S=(40, 40), dtype=torch.float32)
    weight = torch.ones(2, 40, 40)
    if bad == "label":
        target[1, 3, 3] = 3
    elif bad == "probability":
        input[1, 2, 3, 3] = 1.5
    elif bad == "weight":
        weight[0, 0, 0] = -1
    else:
        target[0, 0, 0, 0] = -0.5
    expected = {"label": "got 3 ", "probability": "got 1.5 ", "weight": "got -1.0 ", "dense": "got -0.5 "}[bad]
    with pytest.raises(ValueError, match=expected):
        softdice.overlap_statistics(input, target, voxel_weight=weight)
    softdice.overlap_statistics(input, target, voxel_weight=weight, validate=False)


def test_kept_kernels_know_all_their_sources() -> None:
    input, target = case(3, "softmax", False, dtype=torch.float32)
    sums_and_gradient(input, target, activation="softmax")
    assert compiler._loaded
    for function in (walk.walk, *compiler._loaded):
        assert function._cache._cache_file._source_stamp == compiler.SOURCES


NAMED = """
import sys
from softdice.backends.cpu.compiler import kernel

def made(factor):
    @kernel(("made", factor))
    def scaled(x):
        return factor * x
    return scaled

function = made(float(sys.argv[1]))
function(1.0)
print(*(overload.fndesc.mangled_name for overload in function.overloads.values()))
"""


def test_a_factory_compiles_names_that_no_other_process_has(tmp_path: Path) -> None:
    script = tmp_path / "named.py"
    script.write_text(NAMED)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}  # by which names vary, too
    runs = [[sys.executable, str(script), factor] for factor in ("2", "3")]
    names = [subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout for run in runs]
    assert all("scaled" in name for name in names)
    assert names[0] != names[1]  # equal ones are taken for equal code where both are loaded from disk


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors have other names on this processor")
def test_a_float64_is_written_to_a_row_as_float32() -> None:
    """A number in a declared slope, as in "3 * p", is float64 to Numba: eight bytes would run over the next voxel."""
    write = intrinsics.write

    @compiler.kernel("a test of write")
    def put(row, value):
        write(row, np.uint64(1), value)

    row = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    put(np.uint64(row.__array_interface__["data"][0]), 2.5)
    assert row.tolist() == [1.0, 2.5, 3.0, 4.0]


def test_loops_use_vectors_as_wide_as_the_processor_has() -> None:
    @njit(fastmath=compiler.FAST, **compiler.OPTIONS)
    def doubled(x: Any) -> None:
        for v in range(x.shape[0]):
            x[v] = x[v] + x[v]

    doubled(np.ones(64, np.float32))
    (code,) = doubled.inspect_asm().values()
    assert ("zmm" if "+avx512f" in intrinsics.FEATURES else "ymm" if "+avx" in intrinsics.FEATURES else "xmm") in code


def test_functions_of_compiled_code_alone_have_no_code_of_their_own() -> None:
    @compiler.jit
    def inner(x: Any) -> Any:
        return x + x

    @njit(**compiler.OPTIONS)
    def outer(x: Any) -> Any:
        return inner(x) + inner(x + 1)

    assert outer(3) == 14
    engine = outer.targetctx.codegen()._engine
    (taken,) = inner.overloads.values()
    (made,) = outer.overloads.values()
    assert engine.is_symbol_defined(made.fndesc.llvm_cpython_wrapper_name)
    assert not engine.is_symbol_defined(taken.fndesc.llvm_func_name)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int64])
def test_a_label_beyond_the_classes_has_no_class_in_a_skeleton(dtype: torch.dtype) -> None:
    """In a byte the mark of no class, -1, would be the label 255."""
    labels = torch.tensor([[0, 1] if dtype == torch.bool else [0, 1, 5, 120]], dtype=dtype)
    two, one = centreline._class_numbers(labels, None, 2, None), centreline._class_numbers(labels, None, 1, None)
    assert two.tolist() == [[0, 1, -1, -1][: labels.shape[1]]]
    assert one.tolist() == [[-1, 0, -1, -1][: labels.shape[1]]]
    many = centreline._class_numbers(labels, None, 130, None)  # beyond what a signed byte holds
    assert many.tolist() == labels.long().tolist()
