"""Score pairs one after another or in several processes; the cases come in the order of the pairs.

A pair that cannot be scored is a case with an error. A worker process that is killed costs its case only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice

from softdice.evaluation.labels import ScoreError
from softdice.images.files import FileError, image_name
from softdice.scoring.options import Options
from softdice.scoring.pair_scores import Case, score_classes, score_pair
from softdice.scoring.pairing import Pair


def run(pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
    """Score pairs in their order; a pair that cannot be scored is a case with the reason in `error`."""
    if jobs == 1 or len(pairs) < 2:
        for pair in pairs:
            yield _scored(pair, options)
        return
    waiting: deque[tuple[Pair, Future[Case]]] = deque()
    pool, remaining = _pool(min(jobs, len(pairs))), iter(pairs)
    try:
        while True:
            for pair in islice(remaining, max(0, 4 * jobs + 1 - len(waiting))):  # a window: memory does not grow
                waiting.append((pair, _submit(pool, pair, options)))
            if not waiting:
                return
            pair, future = waiting.popleft()
            try:
                case = future.result()
            except BrokenProcessPool:  # all unfinished pairs fail, and which of them killed a worker is not known
                pool.shutdown(wait=True, cancel_futures=True)
                case = _scored_alone(pair, options)
                pool = _pool(min(jobs, len(pairs)))
                waiting = deque(
                    (pair, future if _finished(future) else _submit(pool, pair, options)) for pair, future in waiting
                )
            yield case
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of that many processes, which start with the first pairs."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    return ProcessPoolExecutor(jobs, context, initializer=_worker)


def _submit(pool: ProcessPoolExecutor, pair: Pair, options: Options) -> Future[Case]:
    """Hand a pair to a pool while Ctrl-C is ignored: a worker that starts meanwhile inherits that.

    A broken pool gives a future that has failed.
    """
    main = threading.current_thread() is threading.main_thread()  # only this thread may set signals
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        return pool.submit(_scored, pair, options)
    except BrokenProcessPool as error:
        failed: Future[Case] = Future()
        failed.set_exception(error)
        return failed
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _finished(future: Future[Case]) -> bool:
    """Return whether a future has a case."""
    return future.done() and not future.cancelled() and future.exception() is None


def _scored_alone(pair: Pair, options: Options) -> Case:
    """Score a pair that may have killed its worker, in a pool of its own, where it takes no other pair with it."""
    with _pool(1) as pool:
        try:
            return _submit(pool, pair, options).result()
        except BrokenProcessPool:
            reason = "the process that scored it was killed, probably because memory ran out"
            return replace(_failed(pair), error=f"{pair.prediction}: {reason}. Pass fewer --jobs, or score it alone.")


def _worker() -> None:
    """Set up a worker process: Ctrl-C is the parent's affair, and torch uses one thread."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Wait for the parent process, and end this one with it: a parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _failed(pair: Pair) -> Case:
    """Return the case of a pair that was not scored, still without the reason."""
    return Case(pair.case, str(pair.prediction or ""), str(pair.truth or ""))


def _scored(pair: Pair, options: Options) -> Case:
    """Score a pair, or return a case with the reason why it cannot be scored."""
    failed = _failed(pair)
    if pair.prediction is None and pair.truth is not None and options.missing == "0":
        pair = replace(pair, error="")
    elif pair.error or pair.prediction is None or pair.truth is None:
        return replace(failed, error=pair.error)
    assert pair.truth is not None
    try:
        score = score_classes if pair.truth.is_dir() and image_name(pair.truth) is None else score_pair
        return score(pair.prediction, pair.truth, options, pair.case)
    except (FileError, ScoreError, ModuleNotFoundError) as error:  # a module that only one format needs
        return replace(failed, error=str(error))
    except MemoryError:
        return replace(failed, error=f"{pair.prediction}: not enough memory")
