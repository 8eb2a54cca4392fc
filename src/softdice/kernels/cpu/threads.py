"""A number of tasks -> the CPU kernel, run over them on as many threads as torch may use.

The threads are torch's own where its OpenMP runtime can be reached: they have just finished the layer before the loss
and still wait for work in a loop, which would otherwise take a core from ours for some milliseconds. Elsewhere (another
runtime, a forked process, whose copy of the runtime has lost its threads) they are Python's. Results cannot depend on
it: every task writes to its own slot.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softdice.kernels import registry

ALONE_NUMEL = 1 << 18  # fewer elements than this are done before a second thread has woken up
SHARES = 4  # per thread, so that one that was held up does not hold up the rest

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def share_out(kernel: Any, arguments: tuple[Any, ...], tasks: int, numel: int) -> None:
    """Call kernel(*arguments, begin, end) for consecutive shares of range(tasks)."""
    if kernel not in _compiled:
        kernel(*arguments, np.uint64(0), np.uint64(0))  # it compiles once, not in every thread
        _compiled.add(kernel)
    threads = 1 if numel < ALONE_NUMEL else min(torch.get_num_threads(), tasks)
    if threads == 1:
        kernel(*arguments, np.uint64(0), np.uint64(tasks))
        return
    shares = min(tasks, threads * SHARES)
    bounds = [np.uint64(tasks * i // shares) for i in range(shares + 1)]
    for_each(lambda i: kernel(*arguments, bounds[i], bounds[i + 1]), range(shares), threads)


_compiled: set[Any] = set()


def for_each(work: Callable[[Any], None], tasks: Iterable[Any], threads: int) -> None:
    """Call work(task) for every task, each in whichever of the threads is free."""
    if threads <= 1:
        for task in tasks:
            work(task)
        return
    waiting, lock, end = iter(tasks), threading.Lock(), object()

    def some() -> None:
        while True:
            with lock:
                task = next(waiting, end)
            if task is end:
                return
            work(task)

    in_threads(some, threads)


def in_threads(work: Callable[[], None], threads: int) -> None:
    """Call work() once in each of `threads` threads, this one among them, and wait; the first error is raised."""
    errors: list[BaseException] = []

    def guarded(_: Any = None) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
            errors.append(error)

    parallel = None if registry.forked() else _openmp()
    if parallel is not None:
        parallel(_Body(guarded), None, threads, 0)
    else:
        others = [_pool(threads - 1, os.getpid()).submit(guarded) for _ in range(threads - 1)]
        guarded()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """GNU OpenMP's entry point as torch itself resolves it, or None where torch runs on something else."""
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Workers beside the calling thread; a forked process makes its own."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="softdice")
