"""How time, memory and error are measured.

Time: medians over rounds in which all contenders take turns, in one process, after a warm-up, in an order that is
shuffled anew each round, since what ran before leaves its caches and spinning threads behind. What a step or the floor
returns is freed before the next one starts, outside the timed part. The floor is what no loss can go below: read the
logits once, read them again and write a gradient of their size, into memory that is there already (`logits.sum()` and a
copy). Where a gradient goes into fresh memory, the system has to hand out its pages first: `fresh` is that floor.

Memory: the growth of the resident set of a process of its own, its high-water mark reset before each phase, with an
allocator that gives freed memory back at once. Input, labels and all that the warm-up leaves do not count.

Error: distance to the same loss in float64, relative; for gradients relative to the largest entry.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from softdice.backends.cpu.gradient_memory import forget

Loss = Callable[[Tensor, Tensor], Tensor]


class Time(NamedTuple):
    """Milliseconds: the median, and the quartiles around it."""

    median_ms: float
    low_ms: float
    high_ms: float


def step(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """One forward and backward pass on logits without a gradient; returns the loss, leaves logits.grad."""
    value = loss(logits, labels)
    value.backward()
    return value.detach()


def floor(logits: Tensor) -> Callable[[], object]:
    """Read, then read and write: the least that a training step of any loss must do."""
    data = logits.detach()
    kept = data.clone()
    return lambda: (data.sum(), kept.copy_(data))


def fresh(logits: Tensor) -> Callable[[], object]:
    """The floor, but for a gradient in memory that the system has to hand out first."""
    data = logits.detach()
    return lambda: (data.sum(), data.clone())


def interleaved(contenders: dict[str, Callable[[], object]], logits: Tensor, budget_s: float) -> dict[str, Time]:
    """name -> function of logits, seconds -> times. A slow contender is left out of some rounds, not the rest."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(0).sample
    for function in [*contenders.values()] * 2:
        logits.grad = None
        function()
    begin = time.perf_counter()
    rounds = 0
    while rounds < 7 or (time.perf_counter() - begin < budget_s and rounds < 60):
        for name, function in shuffle(list(contenders.items()), len(contenders)):
            spent = sum(taken[name])
            if len(taken[name]) >= 5 and spent > budget_s / len(contenders):
                continue
            logits.grad = None
            start = time.perf_counter()
            result = function()
            taken[name].append(time.perf_counter() - start)
            del result
        rounds += 1
    return {name: _summary(seconds) for name, seconds in taken.items()}


def _summary(seconds: list[float]) -> Time:
    low, middle, high = statistics.quantiles([1e3 * second for second in seconds], n=4, method="inclusive")
    return Time(middle, low, high)


class Memory(NamedTuple):
    """Bytes beyond the inputs: forward's peak, what stays for backward, backward's peak (the gradient included)."""

    forward: int
    saved: int
    backward: int


def prepare_memory() -> None:
    """Make freed memory leave the process at once (glibc), so that the resident set shows what is held."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    mallopt(-1, 0)  # M_TRIM_THRESHOLD


def resident(peak: bool) -> int:
    """Bytes of this process in memory: now, or the most since `reset_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: expected a line {key}, got none. Memory is measured on Linux only.")


def reset_peak() -> int:
    """Forget the peak; returns what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident(peak=False)


def memory(loss: Loss, logits: Tensor, labels: Tensor) -> Memory:
    """loss, inputs -> bytes, after a warm-up step. Call `prepare_memory` first, in a process of its own."""
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    step(loss, logits, labels)
    logits.grad = None
    forget()  # so that the gradient is counted, and not taken from the warm-up's
    before = reset_peak()
    value = loss(logits, labels)
    forward = resident(peak=True) - before
    saved = reset_peak() - before
    value.backward()
    backward = resident(peak=True) - before
    return Memory(forward, max(saved, 0), backward)


class Error(NamedTuple):
    """Relative distance to float64: of the loss, and of the gradient relative to its largest entry."""

    loss: float
    gradient: float


def error(loss: Loss, exact: Loss, logits: Tensor, labels: Tensor) -> Error:
    """loss, the same loss for float64 input -> distance."""
    logits.grad = None
    value = step(loss, logits, labels).double()
    assert logits.grad is not None
    gradient = logits.grad
    wide = logits.detach().double().requires_grad_()
    exact_value = step(exact, wide, labels)
    assert wide.grad is not None
    distance = (wide.grad - gradient).abs_().max() / wide.grad.abs().max()
    return Error(float((value - exact_value).abs() / exact_value.abs()), float(distance))


def apart(ours: Loss, other: Loss, logits: Tensor, labels: Tensor) -> Error:
    """Two losses on the same inputs -> their distance, relative to the other."""
    found = []
    for loss in (ours, other):
        logits.grad = None
        value = float(step(loss, logits, labels))
        assert logits.grad is not None
        found.append((value, logits.grad.double()))
    (value, gradient), (expected, slope) = found
    return Error(abs(value - expected) / abs(expected), float((gradient - slope).abs().max() / slope.abs().max()))


def machine() -> str:
    """() -> processor, its vectors, threads, versions: one line for the head of a table."""
    name = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({vectors}), {torch.get_num_threads()} threads, torch {torch.__version__}"
