"""Which machine code the Triton kernels are launched with: a driver that compiles nothing and launches nothing counts.

Tensors are on the meta device: shapes, strides and addresses without memory. Triton's own binder says what a launch is
specialised for; a new combination would be compiled. No GPU is needed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="no triton; test_triton.py fails where it should be there")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton is interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from softdice.backends import selftest  # noqa: E402
from softdice.backends.cuda import backward, forward, launch, layout  # noqa: E402
from softdice.backends.cuda import driver as cuda  # noqa: E402
from softdice.statistics.request import Pass, Request  # noqa: E402

DICE = ("intersection", "prediction", "target")


class StandIn:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


class Launches:
    """The launches of a test: kernel, what it would be compiled for, and its steps and grid."""

    def __init__(self) -> None:
        self.binaries: dict[str, set[str]] = defaultdict(set)
        self.steps: list[int] = []
        self.programs: list[int] = []

    def new(self, call: Callable[[], Any]) -> dict[str, set[str]]:
        """Return the binaries of a call that were not there before."""
        before = {name: set(keys) for name, keys in self.binaries.items()}
        call()
        return {name: new for name, keys in self.binaries.items() if (new := keys - before.get(name, set()))}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    seen = Launches()
    monkeypatch.setattr(triton.runtime.driver, "_active", StandIn())

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **values: Any) -> None:
        _, keys, _, _, binder = self.device_caches[0]
        _, specialization, options = binder(*args, **values, debug=False, instrumentation_mode="")
        seen.binaries[self.fn.__name__].add(triton.runtime.jit.compute_cache_key(keys, specialization, options))
        if "steps" in values:
            seen.steps.append(values["steps"])
            seen.programs.append(values["programs"])

    for kernel in (forward.forward_kernel, forward.rows_kernel, backward.backward_kernel):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    return seen


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(request: Request, wanted: int | None = 2112) -> None:
    """Launch forward and backward, with the gradient that the losses' graph gives: of any strides."""
    sums, _ = cuda.statistics(request, wanted)
    cuda.gradient(torch.empty_like(sums), request, wanted)


def volume(
    B: int, C: int, V: int, dtype: torch.dtype = torch.float32, *, labels: torch.dtype = torch.int64, **options: Any
) -> Request:
    settings = Pass("softmax", 255, fields=DICE)
    request = Request(empty(B, C, V, dtype=dtype), empty(B, V, dtype=labels), settings=settings)
    return request._replace(**options)


def test_a_smaller_batch_or_another_size_compiles_nothing_new(launches: Launches) -> None:
    step(volume(8, 3, 512 * 512))
    assert sum(len(keys) for keys in launches.binaries.values()) == 2
    for B, V in ((3, 512 * 512), (1, 512 * 512), (2, 96**3), (5, 496), (16, 16)):
        assert launches.new(lambda B=B, V=V: step(volume(B, 3, V))) == {}


def test_another_gradient_of_the_sums_compiles_nothing_new(launches: Launches) -> None:
    request = volume(8, 3, 4096)
    step(request)
    for grad in (
        empty(1, 1, 1).expand(3, 8, 3),
        empty(3, 1, 3).expand(3, 8, 3),
        empty(3, 8).T[:, :, None].expand(8, 3, 3).transpose(0, 1),
    ):
        assert launches.new(lambda grad=grad: cuda.gradient(grad, request, 2112)) == {}


@pytest.mark.parametrize("one", [empty(1, 3, 640).as_strided((1, 3, 640), (7, 640, 1))])
def test_the_stride_of_a_single_sample_means_nothing(one: Tensor, launches: Launches) -> None:
    step(volume(2, 3, 640))
    labels = empty(1, 640, dtype=torch.int64).as_strided((1, 640), (1, 1))
    assert launches.new(lambda: step(volume(1, 3, 640, input=one, target=labels))) == {}


def test_odd_sizes_have_few_binaries(launches: Launches) -> None:
    """One for each power of two that divides the number of voxels, up to 16."""
    for V in range(1000, 1033):
        step(volume(2, 3, V))
    assert {name: len(keys) for name, keys in launches.binaries.items()} == {"forward_kernel": 5, "backward_kernel": 5}


CHANNELS_LAST = empty(3, 1000, 14).transpose(1, 2)
CASES = {
    "a multiple of 16": volume(8, 3, 512 * 512),
    "odd": volume(2, 4, 37 * 71),
    "a multiple of 4": volume(2, 21, 375 * 500, torch.bfloat16, labels=torch.uint8),
    "channels last": volume(3, 14, 1000, input=CHANNELS_LAST),
    "one sample": volume(1, 2, 999, torch.float16),
    "a slice": volume(
        2, 3, 640, input=empty(2, 3, 1000)[:, :, :640], target=empty(2, 1000, dtype=torch.int64)[:, :640]
    ),
    "an address that is not aligned": volume(2, 3, 640, input=empty(2, 3, 656)[:, :, 1:641]),
    "every second voxel": volume(2, 3, 640, input=empty(2, 3, 1280)[..., ::2], target=empty(2, 640, dtype=torch.int16)),
    "classes of a larger tensor": volume(2, 3, 640, input=empty(2, 9, 640)[:, 2:5]),
    "weights that are all alike": volume(2, 3, 640, weight=empty(2, 1).expand(2, 640)),
    "one weight": volume(2, 3, 644, weight=empty(1, 1).expand(2, 644)),
    "half the batch": volume(4, 3, 648, input=empty(8, 3, 648)[::2]),
    "a map": volume(
        2, 3, 650, voxel_map=empty(2, 1, 650), settings=Pass("softmax", 255, fields=("mapped_prediction",))
    ),
    "more classes than a tile holds": volume(2, 200, 99),
    "a value per class": volume(
        2, 40, 660, target=empty(2, 40, 660), settings=Pass("sigmoid", fields=(*DICE, "cross_entropy"))
    ),
    "one class": volume(2, 1, 660, settings=Pass("sigmoid", fields=DICE)),
    "regions": volume(2, 5, 1000, regions=empty(3, 5, dtype=torch.bool)),
    "samples innermost": volume(6, 3, 80, input=empty(3, 80, 6).permute(2, 0, 1)),
    "float64": volume(2, 3, 1002, torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_the_self_test_compares_the_binaries_that_serve(name: str, launches: Launches) -> None:
    request = CASES[name]
    case = selftest._case(request)
    step(case, selftest.SAMPLES * selftest.PROGRAMS)
    assert min(launches.steps) >= selftest.TILES == 3
    assert min(launches.programs) >= 2
    assert launches.new(lambda: step(request)) == {}
    assert layout.layout(case) == layout.layout(request)


@pytest.mark.parametrize(
    ("B", "V", "voxels", "wanted", "expected"),
    [
        (8, 512 * 512, 512, 2112, (128, 4)),  # 2112 programs would walk two tiles each
        (2, 96**3, 128, 2112, (1056, 7)),  # 6912 tiles: enough for all
        (2, 64 * 64, 512, 2112, (8, 1)),  # a tile each: fewer programs would leave multiprocessors without work
        (1, 512 * 600, 512, 2112, (528, 2)),  # 4 for each of 132 multiprocessors, with fewer than 4 tiles each
        (1, 2**27, 512, 16, (4096, 64)),  # no program adds more than 64 tiles
        (1, 1, 512, 2112, (1, 1)),
        (0, 100, 512, 2112, (1, 1)),
    ],
)
def test_programs_and_tiles(B: int, V: int, voxels: int, wanted: int, expected: tuple[int, int]) -> None:
    programs, steps = launch.grid(B, V, voxels, wanted)
    assert (programs, steps) == expected
    assert programs * steps * voxels >= V
