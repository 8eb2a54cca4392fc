"""The Triton kernels compiled ahead of time, as they are launched: no local memory in a loop. No GPU is needed.

`make test` has a representative set; `make test-triton` adds the tests that are marked.

`nvdisasm`, which Triton's wheel carries, shows the machine's instructions. Registers spilled to memory (STL, LDL) for
every tile would cost more than the whole pass; a number that waits there from the first tile to the last costs nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="no triton; test_triton.py fails where it should be there")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton is interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from softdice.backends.cuda import declared, launch  # noqa: E402
from softdice.backends.cuda import driver as cuda  # noqa: E402
from softdice.backends.cuda.backward import backward_kernel  # noqa: E402
from softdice.backends.cuda.forward import forward_kernel, rows_kernel  # noqa: E402
from softdice.statistics.declared import FIELDS  # noqa: E402
from softdice.statistics.request import Pass, Request  # noqa: E402

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
CAPABILITIES = (80, 90, 120)
DICE = ("intersection", "prediction", "target")
DICE_AND_CROSS_ENTROPY = (*DICE, "cross_entropy")
BYTES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def compiled(kernel: Any, given: dict[str, Any], tile: launch.Tile, capability: int) -> Any:
    """A kernel and what it is called with -> its binary, specialised as a call would specialise it."""
    signature, constants, attributes = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        general = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not general):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not general):
            attributes[place,] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def loops(binary: Any, folder: Path) -> list[list[str]]:
    """A compiled kernel -> the instructions of each of its loops."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    lines = subprocess.run([NVDISASM, file], capture_output=True, text=True, check=True).stdout.splitlines()
    labels = {line.rstrip(":"): place for place, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    jumps = [(place, re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) for place, line in enumerate(lines)]
    every = [(labels[found[1]], place) for place, found in jumps if found and labels[found[1]] < place]
    long = [(begin, end) for begin, end in every if end > begin + 1]  # a kernel ends with a jump to itself
    assert long
    return [[line for line in lines[begin:end] if re.match(r"\s+/\*", line)] for begin, end in long]


def spilled(binary: Any, folder: Path) -> list[str]:
    """A compiled kernel -> its instructions that use local memory inside a loop."""
    return [line for loop in loops(binary, folder) for line in loop if re.search(r"\b(STL|LDL)\b", line)]


def binaries(
    C: int,
    dtype: torch.dtype,
    fields: tuple[str, ...],
    capability: int,
    *,
    activation: str = "softmax",
    dense: bool = False,
    weighted: bool = False,
    regions: int = 0,
    smoothing: float = 0.0,
    label: torch.dtype = torch.int64,
    channels_last: bool = False,
    V: int = 1 << 20,
) -> dict[str, Any]:
    """One case -> the kernels that serve it, compiled. The tensors have shapes and strides, but no memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(2, V, C, dtype=dtype).transpose(1, 2) if channels_last else empty(2, C, V, dtype=dtype)
    target = empty(2, C, V, dtype=dtype) if dense else empty(2, V, dtype=label)
    weight = empty(2, V) if weighted else None
    member = empty(regions, C, dtype=torch.bool) if regions else None
    ignore = None if dense else 255
    settings = Pass(activation, ignore, smoothing, fields=tuple(fields))
    request = Request(x, target, weight, member, settings=settings)
    rows = list(dict.fromkeys(cuda._same_sum(name, not dense, smoothing > 0) for name in fields))
    wide = empty(2, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = {"programs": 2112, "steps": 17}
    found = {}

    call = cuda.arguments(request) | declared.terms(tuple(rows), cuda.constants(x, settings))
    tile = launch.tile(C, regions, x.element_size(), len(rows))
    two_steps = activation == "softmax" and C > launch.WIDEST and not regions
    call |= {**rest, **tile.constants, "VALIDATE": True, "LOW": -1e-3, "HIGH": 1.001}
    call |= {"partial": wide, "bad": empty(4, dtype=torch.int32), "ROWS": len(rows)}
    call |= dict.fromkeys(("maxima", "logs"), wide if two_steps else None)
    found["forward"] = compiled(forward_kernel, call, tile, capability)
    if two_steps:
        found["rows"] = compiled(rows_kernel, call, tile, capability)

    call = cuda.arguments(request) | declared.slopes(tuple(fields), cuda.constants(x, settings))
    tile = launch.tile(C, regions, x.element_size(), call["SLOPED"])
    call |= {**rest, **tile.constants, "grad": wide, "gF": 2 * C, "gB": C, "gK": 1, "out": x}
    call |= cuda._strides("o", x)
    found["backward"] = compiled(backward_kernel, call, tile, capability)
    return found


def assert_no_spills(found: dict[str, Any], folder: Path) -> None:
    for name, binary in found.items():
        assert spilled(binary, folder) == [], name


def beyond(*values: Any) -> Any:
    """Return a parameter that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.triton)


REPRESENTATIVE = ((4, 4, 90), (64, 2, 90), (16, 8, 80))
"""Classes, bytes of a number, capability."""
CLASSES = sorted({most for most, _ in launch.BY_CLASS} | {rows for rows, _ in launch.PADDED if rows > launch.EACH})
"""Of every entry of the two tables that serves without regions the most classes."""


def entries() -> list[Any]:
    """Return every entry of the tables for every capability; those beyond the representative set are marked."""
    every = [(C, itemsize, capability) for C in CLASSES for itemsize in BYTES for capability in CAPABILITIES]
    return [each if each in REPRESENTATIVE else beyond(*each) for each in every]


def test_every_entry_of_the_tables_serves_somebody() -> None:
    """A class by itself up to 24 classes, as long as a thread holds its sums; else, and with regions, rows."""
    each = {launch.tile(C, 0, size, sums) for C in range(1, 25) for size in BYTES for sums in (1, 3)}
    assert {tile._replace(groups=1) for tile in each if tile.rows == 1} >= {*launch.BY_CLASS.values()}
    regions = range(1, cuda.REGIONS + 1)
    padded = {launch.tile(C, 0, size, 3) for C in (25, 64, 128, 300) for size in BYTES}
    padded |= {launch.tile(C, R, size, 3) for C in (2, 4, 8, 16) for R in regions for size in BYTES}
    assert {(tile.voxels, tile.warps) for tile in padded} >= {
        (tile.voxels, tile.warps) for tile in launch.PADDED.values()
    }


@pytest.mark.parametrize(("C", "itemsize", "capability"), entries())
def test_every_entry_of_the_tables_compiles_without_spills(
    C: int, itemsize: int, capability: int, tmp_path: Path
) -> None:
    thorough = capability == 90 and itemsize < 8
    for fields in (DICE, DICE_AND_CROSS_ENTROPY) if thorough else (DICE_AND_CROSS_ENTROPY,):
        for channels_last in (False, True) if thorough and C <= launch.EACH else (False,):
            found = binaries(C, BYTES[itemsize], fields, capability, channels_last=channels_last)
            assert_no_spills(found, tmp_path)


@pytest.mark.parametrize("regions", [beyond(2), beyond(4), 8, beyond(16), beyond(32)])
@pytest.mark.parametrize("capability", [beyond(80), 90, beyond(120)])
def test_regions_compile_without_spills(regions: int, capability: int, tmp_path: Path) -> None:
    assert_no_spills(binaries(regions, torch.bfloat16, DICE, capability, regions=regions), tmp_path)


@pytest.mark.parametrize(
    ("C", "dtype", "fields", "options"),
    [
        beyond(2, torch.float16, DICE, {"label": torch.uint8}),
        beyond(14, torch.bfloat16, DICE, {}),
        (14, torch.bfloat16, DICE, {"channels_last": True}),
        beyond(3, torch.float32, DICE_AND_CROSS_ENTROPY, {"channels_last": True}),
        beyond(14, torch.float32, DICE_AND_CROSS_ENTROPY, {"channels_last": True}),
        beyond(2, torch.bfloat16, DICE, {"channels_last": True}),
        beyond(21, torch.bfloat16, DICE, {"channels_last": True}),
        beyond(3, torch.float32, DICE, {"V": 91**3}),
        beyond(14, torch.bfloat16, DICE_AND_CROSS_ENTROPY, {"V": 375 * 500}),
        beyond(118, torch.float32, DICE, {"label": torch.int16, "weighted": True}),
        beyond(4, torch.float32, FIELDS, {"smoothing": 0.1, "weighted": True}),
        beyond(118, torch.bfloat16, FIELDS, {"smoothing": 0.1, "weighted": True}),
        beyond(16, torch.float64, FIELDS, {"smoothing": 0.1, "dense": True}),
        beyond(3, torch.float32, FIELDS, {"activation": "sigmoid", "dense": True, "weighted": True}),
        beyond(4, torch.float32, FIELDS, {"activation": "none", "weighted": True}),
        (4, torch.bfloat16, FIELDS, {"regions": 3}),
        beyond(150, torch.float32, FIELDS, {"regions": cuda.REGIONS, "dense": True}),
        (200, torch.float32, DICE_AND_CROSS_ENTROPY, {}),
        beyond(1024, torch.bfloat16, FIELDS, {"smoothing": 0.1}),
    ],
)
@pytest.mark.parametrize("capability", [80, 90, *map(beyond, (89, 100, 120))])
def test_other_cases_compile_without_spills(
    C: int, dtype: torch.dtype, fields: tuple[str, ...], options: dict[str, Any], capability: int, tmp_path: Path
) -> None:
    assert_no_spills(binaries(C, dtype, fields, capability, **options), tmp_path)


CEILINGS = {
    # classes, dtype, voxels side by side: instructions forward, with cross-entropy, backward
    (3, torch.float32, False): (22, 28, 25),
    (3, torch.bfloat16, False): (23, 30, 28),
    (3, torch.float32, True): (26, 32, 32),
    (3, torch.bfloat16, True): (28, 33, 35),
    (14, torch.float32, False): (18, 24, 23),
    (14, torch.bfloat16, False): (19, 25, 26),
    (14, torch.float32, True): (19, 24, 23),
    (14, torch.bfloat16, True): (20, 25, 26),
    (21, torch.float32, False): (19, 26, 29),
    (21, torch.bfloat16, False): (19, 25, 27),
    (21, torch.float32, True): (19, 26, 29),
    (21, torch.bfloat16, True): (19, 25, 27),
}
"""For each voxel and class; `channels_last` is the third of the key."""


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (case, capability) if (case, capability) == ((14, torch.bfloat16, True), 90) else beyond(case, capability)
        for case in CEILINGS
        for capability in CAPABILITIES
    ],
)
def test_instructions_for_each_voxel_and_class(
    case: tuple[int, torch.dtype, bool], capability: int, tmp_path: Path
) -> None:
    """Of a lane, in the loop over the tiles. No lane waits for another, and none asks another for a number."""
    C, dtype, channels_last = case
    forward, with_cross_entropy, backward = CEILINGS[case]
    rows = ((DICE, forward), (DICE_AND_CROSS_ENTROPY, with_cross_entropy))
    for fields, ceiling in rows if capability == 90 else rows[:1]:
        found = binaries(C, dtype, fields, capability, channels_last=channels_last)
        sums = {"forward": len(fields), "backward": len(fields) - 1}  # the target has no slope
        for kernel, most in (("forward", ceiling), ("backward", backward)):
            assert spilled(found[kernel], tmp_path) == [], (fields, kernel)
            loop = max(loops(found[kernel], tmp_path), key=len)
            tile = launch.tile(C, 0, dtype.itemsize, sums[kernel])
            assert len(loop) * 32 * tile.warps / (tile.voxels * C) <= most, (fields, kernel)
            assert not [line for line in loop if re.search(r"\b(BAR|SHFL)\b", line)], (fields, kernel)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, "v4"), (torch.bfloat16, "v2")])
@pytest.mark.parametrize("V", [375 * 500, 100 * 100 * 100 + 4])
def test_a_size_that_4_divides_is_read_and_written_four_at_a_time(dtype: torch.dtype, width: str, V: int) -> None:
    assert V % 4 == 0
    assert V % 16 != 0
    found = binaries(4, dtype, DICE, 90, V=V)
    for name in ("forward", "backward"):
        assert f"ld.global.{width}.b32" in found[name].asm["ptx"]
    assert f"st.global.{width}.b32" in found["backward"].asm["ptx"]
    assert "st.global.b16" not in found["backward"].asm["ptx"]


def test_nothing_waits_in_shared_memory_for_its_turn() -> None:
    """With two stages the next tile was asked for at the end of a turn and waited for at once: for nothing."""
    assert "cp.async" not in binaries(4, torch.bfloat16, DICE, 90)["forward"].asm["ptx"]


def test_labels_are_compared_in_32_bits() -> None:
    """All that is compared in 64 bits is the place of a voxel with the end."""
    for binary in binaries(4, torch.float32, DICE, 90).values():
        lines = binary.asm["ttir"].splitlines()
        wide = [line for line in lines if re.search(r"arith\.cmpi .*xi64", line)]
        assert len(wide) == 1
        assert "slt" in wide[0]


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
@pytest.mark.parametrize("dense", [False, True])
def test_no_maximum_drops_a_nan(activation: str, dense: bool) -> None:
    """arith.maxnumf returns the number beside a NaN, arith.maximumf the NaN."""
    for binary in binaries(3, torch.float32, FIELDS, 90, activation=activation, dense=dense).values():
        assert not re.search(r"arith\.(max|min)numf", binary.asm["ttir"])
        assert "arith.maximumf" in binary.asm["ttir"]


def test_offsets_are_64_bit() -> None:
    """The tile's number times its length, and the class's times its stride, overflow 32 bits for a large volume."""
    for C, classes in ((64, "tensor<64x1xi64>"), (4, "i64")):
        text = binaries(C, torch.float32, DICE, 90)["forward"].asm["ttir"]
        assert re.search(rf"arith\.muli .*: {classes}", text)
        assert re.search(r"arith\.muli .*: i64", text)  # samples, tiles
        assert not re.search(r"tt\.addptr .*, tensor<.*xi32>", text)
