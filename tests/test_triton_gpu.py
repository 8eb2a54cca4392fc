"""The Triton kernels on a GPU: `make test-gpu`. Without a device nothing here runs, and that target fails.

What the interpreter cannot show: streams, devices, graphs, the absence of host syncs, memory, sizes beyond 2^31.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_kernels import case, sums_and_gradient
from torch import Tensor

import softdice
from softdice.backends import route, selftest
from softdice.statistics.declared import FIELDS
from softdice.statistics.request import Pass, Request

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() and not os.environ.get("SOFTDICE_REQUIRE_GPU"):
    pytest.skip("no CUDA device (make test-gpu fails here instead)", allow_module_level=True)


@pytest.fixture(autouse=True)
def _on_the_kernel() -> Iterator[None]:
    assert route.kernel_backends()["triton"] is None, route.kernel_backends()["triton"]
    assert not route.interpreting(), "the kernels would be interpreted: unset TRITON_INTERPRET"
    with softdice.use_backend("triton"):
        yield


def on_gpu(C: int, activation: str, dense: bool, **options: Any) -> tuple[Tensor, Tensor]:
    input, target = case(C, activation, dense, **options)
    return input.cuda(), target.cuda()


def dice_and_cross_entropy(C: int, **options: Any) -> Callable[..., Tensor]:
    options["activation"] = "softmax"
    return softdice.SoftDiceLoss(C, **options) + softdice.CrossEntropyLoss(C, **options)


def step(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def test_auto_chooses_the_kernels() -> None:
    input, target = on_gpu(3, "softmax", False)
    with softdice.use_backend("auto"):
        assert route.choose(Request(input.flatten(2), target.flatten(1))) == "triton"


def test_the_trial_of_a_kind_passes_and_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    input, target = on_gpu(3, "softmax", False, dtype=torch.float32)
    seconds = []
    with softdice.use_backend("auto"):
        for _ in range(2):  # the first compiles
            monkeypatch.setattr(selftest, "_outcomes", {})
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = selftest.problem(Request(input.flatten(2), target.flatten(1), settings=Pass(activation="softmax")))
            seconds.append(time.perf_counter() - start)
            assert found is None
    assert seconds[1] < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("C", "activation", "dense"),
    [
        *itertools.product([1, 2, 3, 8, 14, 32, 64, 118, 128, 200], ["softmax"], [False]),
        *itertools.product([1, 3, 40, 200], ["softmax", "sigmoid", "none"], [True]),
        *itertools.product([1, 4, 200], ["sigmoid", "none"], [False]),
    ],
)
@pytest.mark.parametrize("S", [(37, 70), (50, 60), (96, 128)], ids=["divided by 2", "by 8", "by 16"])
def test_agreement_with_float64(
    C: int, activation: str, dense: bool, dtype: torch.dtype, S: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs for a sample, which walk several tiles each; what divides the voxels decides how they are read."""
    monkeypatch.setattr("softdice.backends.cuda.launch.wanted", lambda device: 4)
    input, target = on_gpu(C, activation, dense, S=S, dtype=dtype)
    options: dict[str, Any] = {"activation": activation, "label_smoothing": 0.1 * dense}
    sums, gradient = sums_and_gradient_on_gpu(input, target, **options)
    with softdice.use_backend("reference"):
        exact_sums, exact_gradient = sums_and_gradient_on_gpu(input.double(), target, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert ((sums - exact_sums).abs() <= tolerance * exact_sums.abs()).all()
    scale = exact_gradient.abs().max() if C > 1 or activation != "softmax" else 1.0
    rounding = torch.finfo(dtype).eps * exact_gradient.abs() + torch.finfo(dtype).smallest_normal
    assert ((gradient.double() - exact_gradient).abs() <= tolerance * scale + rounding).all()


def sums_and_gradient_on_gpu(input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = input.detach().requires_grad_()
    stats = softdice.overlap_statistics(leaf, target, **options)
    sums = torch.stack([getattr(stats, name) for name in FIELDS])
    mix = torch.rand(sums.shape[0], 1, sums.shape[2], generator=torch.Generator().manual_seed(7)).to(sums)
    (gradient,) = torch.autograd.grad((sums * mix).sum(), leaf)
    return sums, gradient


@pytest.mark.parametrize("regions", [((0, 1), (1, 2), (2,)), tuple((r % 4,) for r in range(40))])
def test_regions_weights_and_ignored_voxels(regions: Any) -> None:
    input, target = on_gpu(4, "softmax", False, S=(37, 70), dtype=torch.float32)
    target[:, :3] = 255
    weight = torch.rand(2, 37, 70, device="cuda")
    options = {"activation": "softmax", "regions": regions, "ignore_index": 255, "voxel_weight": weight}
    sums, gradient = sums_and_gradient(input, target, **options)
    with softdice.use_backend("reference"):
        exact_sums, exact_gradient = sums_and_gradient(input.double(), target, **options)
    assert ((sums - exact_sums).abs() <= 2e-6 * exact_sums.abs()).all()
    assert (gradient - exact_gradient).abs().max() <= 2e-6 * exact_gradient.abs().max()
    assert (gradient[:, :, :3] == 0).all()


def test_channels_last_is_read_in_place() -> None:
    input, target = on_gpu(14, "softmax", False, S=(64, 64), dtype=torch.bfloat16)
    expected = sums_and_gradient(input, target, activation="softmax")
    found = sums_and_gradient(input.contiguous(memory_format=torch.channels_last), target, activation="softmax")
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found[0], expected[0], rtol=1e-6)
    assert (found[1] - expected[1]).abs().max() <= 0.01 * expected[1].abs().max()


def test_same_bits_again() -> None:
    torch.use_deterministic_algorithms(True)
    input, target = on_gpu(14, "softmax", False, S=(96, 96, 96), dtype=torch.bfloat16)
    first = step(dice_and_cross_entropy(14), input, target)
    for _ in range(5):
        again = step(dice_and_cross_entropy(14), input, target)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


SETTINGS: list[dict[str, Any]] = [
    {},
    {"classes": range(1, 4)},
    {"classes": (3, 1)},
    {"regions": ((0, 1), (2, 3))},
    {"class_weight": (1.0, 2.0, 3.0, 4.0)},  # of a loss that is not moved to the device
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_host_sync(settings: dict[str, Any]) -> None:
    input, target = on_gpu(4, "softmax", False, S=(64, 64), dtype=torch.float32)
    loss = dice_and_cross_entropy(4, absent="skip", ignore_index=9, **settings)
    step(loss, input, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, input, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_graph_capture(validate: bool, settings: dict[str, Any]) -> None:
    input, target = on_gpu(4, "softmax", False, S=(64, 64), dtype=torch.float32)
    loss = dice_and_cross_entropy(4, validate=validate, **settings)
    static = input.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(static, target), static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(static, target)
        (gradient,) = torch.autograd.grad(value, static)
    other = torch.randn_like(input)
    with torch.no_grad():
        static.copy_(other)
    graph.replay()
    expected = step(loss, other, target)
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(gradient, expected[1])


def test_side_stream() -> None:
    input, target = on_gpu(4, "softmax", False, S=(256, 256), dtype=torch.float32)
    loss = dice_and_cross_entropy(4)
    expected = step(loss, input, target)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a launch on the default stream would not wait for this
        late = input * 1.0
        found = step(loss, late, target)
    side.synchronize()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    input, target = on_gpu(4, "softmax", False, S=(64, 64), dtype=torch.float32)
    expected = step(dice_and_cross_entropy(4), input, target)
    found = step(dice_and_cross_entropy(4), input.to("cuda:1"), target.to("cuda:1"))
    assert found[1].device == torch.device("cuda:1")
    assert torch.equal(found[0].cpu(), expected[0].cpu())
    assert torch.equal(found[1].cpu(), expected[1].cpu())


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_into_one_graph() -> None:
    input, target = on_gpu(4, "softmax", False, S=(64, 64), dtype=torch.float32)
    expected = step(dice_and_cross_entropy(4), input, target)
    found = step(torch.compile(dice_and_cross_entropy(4), fullgraph=True), input, target)
    assert torch.allclose(found[0], expected[0], rtol=1e-6)
    assert (found[1] - expected[1]).abs().max() <= 1e-6 * expected[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_full_size_but_the_gradient(dtype: torch.dtype) -> None:
    input = torch.randn(2, 14, 128, 128, 128, device="cuda", dtype=dtype, requires_grad=True)
    target = torch.randint(0, 14, (2, 128, 128, 128), device="cuda")
    loss = dice_and_cross_entropy(14)
    step(loss, input, target)
    size = input.numel() * input.element_size()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = loss(input, target)
    assert torch.cuda.max_memory_allocated() - before <= 0.02 * size
    torch.autograd.grad(value, input)
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * size


def test_a_hundred_million_voxels_in_float16() -> None:
    """Neither overflow nor a gradient that is lost, under autocast and a GradScaler."""
    half_precision_at_scale(torch.device("cuda"), 10**8)


def half_precision_at_scale(device: torch.device, V: int) -> None:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(1, 2, V, device=device, dtype=torch.float16, generator=generator)
    target = (torch.rand(1, V, device=device, generator=generator) < 0.3).to(torch.uint8)
    scaler = torch.amp.GradScaler(device.type)
    leaf = logits.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.float16):
        value = softdice.SoftDiceLoss(2, activation="softmax")(leaf, target)
    scaler.scale(value).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float16
    assert (leaf.grad != 0).float().mean() > 0.99

    def true(part: slice) -> Tensor:
        return torch.stack([target[0, part] == 0, target[0, part] == 1]).double()

    intersection, prediction, count = torch.zeros(3, 2, device=device, dtype=torch.float64)
    for start in range(0, V, 10**7):
        part = slice(start, start + 10**7)
        prob = logits[0, :, part].double().softmax(0)
        intersection += (prob * true(part)).sum(1)
        prediction += prob.sum(1)
        count += true(part).sum(1)
    part = slice(V - 10**5, V)  # the gradient of some voxels: that of the whole sums, times their own share
    wide = logits[0, :, part].double().requires_grad_()
    prob = wide.softmax(0)
    whole = [(prob * true(part)).sum(1), prob.sum(1)]
    dice = (2 * (whole[0] - whole[0].detach() + intersection) + 1e-5) / (
        whole[1] - whole[1].detach() + prediction + count + 1e-5
    )
    loss = -dice.log().mean()
    assert abs(value.item() - loss.item()) <= 1e-6
    (expected,) = torch.autograd.grad(loss, wide)
    found = leaf.grad[0, :, part].double() / scaler.get_scale()
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 logits; the last class and the last voxels are looked at."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of GPU memory is free")
    V = 2**31 // 100 + 1001
    logits = torch.zeros(1, 100, V, device="cuda", dtype=torch.bfloat16)
    logits[:, 99, -1000:] = 9.0
    target = torch.zeros(1, V, device="cuda", dtype=torch.uint8)
    target[:, -1000:] = 99
    leaf = logits.requires_grad_()
    stats = softdice.overlap_statistics(leaf, target, activation="softmax", fields=("intersection", "target"))
    assert stats.target[0, 99].item() == 1000
    p = torch.tensor(9.0).exp() / (torch.tensor(9.0).exp() + 99)
    assert stats.intersection[0, 99].item() == pytest.approx(1000 * p.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(stats.intersection[0, 99], leaf)
    assert gradient[0, 99, -1].item() == pytest.approx((p * (1 - p)).item(), rel=1e-2)
    assert (gradient[0, :, :-1000] == 0).all()


@pytest.mark.parametrize("bad", ["label", "probability"])
def test_a_value_out_of_range_stops_the_device(bad: str) -> None:
    """In a process of its own: a failed assertion leaves the device unusable."""
    import subprocess
    import sys

    script = f"""
import torch, softdice
input = torch.full((1, 2, 64), {1.5 if bad == "probability" else 0.5}, device="cuda")
target = torch.full((1, 64), {7 if bad == "label" else 0}, device="cuda")
softdice.overlap_statistics(input, target, validate=False)
torch.cuda.synchronize()
print("unchecked")
softdice.overlap_statistics(input, target)
torch.cuda.synchronize()
print("checked")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "unchecked" in run.stdout
    assert "\nchecked" not in run.stdout
    assert run.returncode != 0
