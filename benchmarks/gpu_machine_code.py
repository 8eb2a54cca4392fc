"""The machine code of a step's Triton kernels, counted without a GPU.

`recorded` runs a loss, forward and backward, on tensors that have shapes and strides but no memory. A stand-in for the
CUDA driver compiles each Triton kernel as its launch would specialise it, and launches nothing; operations of torch
that would start a kernel of their own are counted. What is read from a binary is what `nvdisasm` and `cuobjdump` print,
which Triton's wheel carries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from softdice import internals
from softdice.backends import route
from softdice.backends.cuda import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Code(NamedTuple):
    """The instructions of a kernel, by their names, and what a program of it takes of a multiprocessor."""

    loop: tuple[str, ...]  # of one turn of its longest loop, which goes over the tiles; empty where it has none
    outside: tuple[str, ...]
    tiles_per_turn: int  # above 1 where the assembler has unrolled the loop
    registers: int
    shared_bytes: int


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    name: str
    programs: int
    warps: int
    tiles: int | None  # that a program walks; None for a kernel that does not go over voxels
    code: Code


class Recorded(NamedTuple):
    """What one call starts on the device."""

    launches: list[Launch]
    operations: list[str]  # of torch, those that start a kernel


LABEL = re.compile(r"^\s*(\.L_x_\w+|\$L__\w+):")
SASS_JUMP = re.compile(r"\b(?:BRA|CALL)\b.*`\((\.L_x_\w+)\)")
PTX_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\$L__\w+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def loops(lines: list[str], jump: re.Pattern[str] = SASS_JUMP) -> list[tuple[int, int]]:
    """Return first and last line of each loop: from a label to a later jump back to it. A jump to itself is none."""
    places = {match[1]: place for place, line in enumerate(lines) if (match := LABEL.match(line))}
    jumps = [(place, match[1]) for place, line in enumerate(lines) if (match := jump.search(line))]
    every = [(places[label], place) for place, label in jumps if label in places and places[label] < place]
    return [(begin, end) for begin, end in every if end > begin + 1]


def instructions(lines: list[str]) -> list[str]:
    """Return the names of the instructions in some lines of nvdisasm's, without what only fills the end."""
    names = [match[1] for line in lines if (match := INSTRUCTION.match(line))]
    return [name for name in names if name != "NOP"]


def parts(lines: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the instructions of the longest loop, and those outside it, which run once: other loops too.

    Raises:
        ValueError: the longest loop holds another one, whose turns are not known.
    """
    found = loops(lines)
    if not found:
        return (), tuple(instructions(lines))
    begin, end = max(found, key=lambda loop: loop[1] - loop[0])
    if any(begin < other[0] and other[1] < end for other in found):
        raise ValueError("gpu_machine_code: expected a loop over the tiles without another one in it, got one.")
    return tuple(instructions(lines[begin : end + 1])), tuple(instructions(lines[:begin] + lines[end + 1 :]))


def loads(lines: list[str], jump: re.Pattern[str], load: str) -> int:
    """Return how many loads from device memory the longest loop holds."""
    begin, end = max(loops(lines, jump), key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return sum(load in line for line in lines[begin : end + 1])


def tool(name: str, *arguments: str | Path) -> list[str]:
    """Return the lines that one of Triton's copies of NVIDIA's tools prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


@cache
def code(cubin: bytes, ptx: str, shared_bytes: int) -> Code:
    """Return the counts of a kernel from its binary and the text that it was assembled from."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = tool("nvdisasm", "-c", file.name)
        usage = "\n".join(tool("cuobjdump", "-res-usage", file.name))
    loop, outside = parts(lines)
    written, assembled = loads(ptx.splitlines(), PTX_JUMP, "ld.global"), loads(lines, SASS_JUMP, "LDG")
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Code(loop, outside, max(1, assembled // written if written else 1), int(registers[1]), shared_bytes)


class _Operations(TorchDispatchMode):
    """Note each operation of torch that starts a kernel: all but views, and memory that nothing is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if not (operation.is_view or name.startswith(("empty", "new_empty"))):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def _driver(capability: int) -> Any:
    """Return what Triton asks of a driver before it compiles."""
    return SimpleNamespace(
        get_current_device=lambda: capability,  # Triton keeps binaries by device: each capability has its own
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )


@contextmanager
def without_device(capability: int, processors: int) -> Iterator[list[Launch]]:
    """Inside the `with` tensors on the meta device take the way of CUDA tensors; yield the launches as they come."""
    launches: list[Launch] = []
    run, wanted = triton.runtime.JITFunction.run, launch.wanted

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **values: Any) -> None:
        binary = run(self, *args, grid=grid, warmup=True, **values)
        programs = grid[0] * (grid[1] if len(grid) > 1 else 1)
        counts = code(binary.asm["cubin"], binary.asm["ptx"], binary.metadata.shared)
        launches.append(Launch(self.fn.__name__, programs, binary.metadata.num_warps, values.get("steps"), counts))

    changes = [
        (triton.runtime.driver, "_active", _driver(capability)),
        (triton.runtime.JITFunction, "run", compiled),
        (torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type in ("cuda", "meta"))),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=processors)),
        (launch, "wanted", lambda device, *rest: wanted(torch.device("cuda"), *rest)),
        (route, "choose", lambda request: "triton"),
        (internals, "observed", lambda: False),
    ]
    with ExitStack() as stack:
        for holder, name, value in changes:
            stack.enter_context(mock.patch.object(holder, name, value))
        yield launches


def recorded(call: Callable[[], Any], capability: int, processors: int) -> Recorded:
    """Return what a call on tensors of the meta device would start on a device of that capability and size."""
    operations = _Operations()
    with without_device(capability, processors) as launches, operations:
        call()
    return Recorded(launches, operations.names)


def step(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, capability: int, processors: int
) -> tuple[Recorded, Recorded]:
    """Return what the forward and the backward pass of a loss would start. Logits and labels are on the meta device."""
    values: list[Tensor] = []
    forward = recorded(lambda: values.append(loss(logits, labels)), capability, processors)
    return forward, recorded(values[0].backward, capability, processors)
