"""Run tasks on as many threads as torch may use: the one thread pool of the package.

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

ALONE_NUMEL = 1 << 18  # fewer elements than this are done before a second thread has woken up
SHARES = 4  # per thread, so that one that was held up does not hold up the rest

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # void body(void *data): what GOMP_parallel runs in each thread
_compiled: set[Any] = set()  # kernels that have been called

_forks: list[int] = []  # ids of this process and of its parents, as far as they are forks
if hasattr(os, "register_at_fork"):  # from the package's first import on: the threads of a parent are gone in its child
    os.register_at_fork(after_in_child=lambda: _forks.append(os.getpid()))


def forked() -> bool:
    """Return whether this process is a fork, whose copy of torch's OpenMP runtime has lost its threads."""
    return bool(_forks)


def share_out(kernel: Any, arguments: tuple[Any, ...], tasks: int, numel: int, scratch: int | None = None) -> None:
    """Call kernel(*arguments, begin, end) for consecutive shares of range(tasks), on torch's threads, and wait.

    Args:
        kernel: a Numba function that does the tasks [begin, end) (uint64) and releases the GIL.
        arguments: the kernel's first arguments, the same for each share. tasks: number of tasks, parts of the tensors.
        numel: number of elements of all tasks together; below ALONE_NUMEL this thread does the work alone.
        scratch: number of bytes of scratch memory for each call. Its address (uint64) is passed to the kernel before
            begin. None: no address is passed.
    """

    def call(begin: int, end: int) -> None:
        """Do tasks [begin, end) in this thread; [0, 0) only compiles."""
        memory = np.empty(scratch or 0, np.uint8)
        address = () if scratch is None else (np.uint64(memory.__array_interface__["data"][0]),)
        kernel(*arguments, *address, np.uint64(begin), np.uint64(end))

    if kernel not in _compiled:
        call(0, 0)  # Numba compiles at the first call: an empty one, before several threads would all compile
        _compiled.add(kernel)
    threads = 1 if numel < ALONE_NUMEL else min(torch.get_num_threads(), tasks)
    if threads == 1:
        call(0, tasks)
        return
    shares = min(tasks, threads * SHARES)  # several for each thread: a thread that is held up does fewer
    bounds = [tasks * i // shares for i in range(shares + 1)]
    for_each(lambda i: call(bounds[i], bounds[i + 1]), range(shares), threads)


def for_each(work: Callable[[Any], None], tasks: Iterable[Any], threads: int) -> None:
    """Call work(task) for every task, each in whichever of `threads` threads is free, and wait.

    The first error is raised when all threads have ended. With one thread the tasks go in order.
    """
    if threads <= 1:
        for task in tasks:
            work(task)
        return
    waiting, lock, end = iter(tasks), threading.Lock(), object()

    def take_tasks() -> None:
        """Work on one waiting task after the other until there is none; run by each thread."""
        while True:
            with lock:
                task = next(waiting, end)
            if task is end:
                return
            work(task)

    in_threads(take_tasks, threads)


def in_threads(work: Callable[[], None], threads: int) -> None:
    """Call work() once in each of `threads` threads, this one among them, and wait; then raise the first error."""
    errors: list[BaseException] = []

    def guarded(_: Any = None) -> None:
        """Call `work` and keep its error: OpenMP lets no exception pass. `_` is OpenMP's data pointer, NULL."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    gomp_parallel = None if forked() else _openmp()
    if gomp_parallel is not None:
        gomp_parallel(_Body(guarded), None, threads, 0)  # no data, no flags
    else:
        others = [_pool(threads - 1, os.getpid()).submit(guarded) for _ in range(threads - 1)]  # a fork has its own
        guarded()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """Return GNU OpenMP's GOMP_parallel(body, data, threads, flags), torch's own; None where torch runs on another."""
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        gomp_parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    gomp_parallel.argtypes, gomp_parallel.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return gomp_parallel


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the pool of workers beside the calling thread; a fork, whose `process` id differs, makes its own."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="softdice")
