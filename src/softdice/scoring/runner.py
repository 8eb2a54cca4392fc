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
from itertools import islice

from softdice.evaluation.labels import ScoreError
from softdice.images.files import FileError, image_name
from softdice.scoring.options import Options
from softdice.scoring.pair_scores import Case, score_classes, score_pair
from softdice.scoring.pairing import Pair


def run(pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
    """Yield the case of each pair in their order; a pair that cannot be scored is a case with the reason in `error`.

    `jobs` is the number of processes; with 1 this one scores. To leave the rest, close the generator.
    """
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
    """Return a pool of `jobs` worker processes; they start when pairs are submitted."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    return ProcessPoolExecutor(jobs, context, initializer=_worker)


def _submit(pool: ProcessPoolExecutor, pair: Pair, options: Options) -> Future[Case]:
    """Submit a pair to a pool while this process ignores Ctrl-C: a worker that starts meanwhile inherits that.

    If the pool is broken, return a future that has failed with BrokenProcessPool instead of raising it.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # only this thread may set signals
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        return pool.submit(_scored, pair, options)
    except BrokenProcessPool as error:
        broken: Future[Case] = Future()
        broken.set_exception(error)
        return broken
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def _finished(future: Future[Case]) -> bool:
    """Return whether a future holds a case: it is done, and neither cancelled nor failed."""
    return future.done() and not future.cancelled() and future.exception() is None


def _scored_alone(pair: Pair, options: Options) -> Case:
    """Score a pair that may have killed its worker, in a pool of its own; if it kills that too, its case says so."""
    with _pool(1) as pool:
        try:
            return _submit(pool, pair, options).result()
        except BrokenProcessPool:
            reason = "the process that scored it was killed, probably because memory ran out"
            return _failed(pair, f"{pair.prediction}: {reason}. Pass fewer --jobs, or score it alone.")


def _worker() -> None:
    """Set up this process as a worker: it ignores Ctrl-C, ends with its parent, and gives torch one thread."""
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


def _failed(pair: Pair, error: str) -> Case:
    """Return the case of a pair that was not scored, with the reason."""
    return Case(pair.case, str(pair.prediction or ""), str(pair.truth or ""), error=error)


def _scored(pair: Pair, options: Options) -> Case:
    """Score a pair of files, or of folders with a file per class; what cannot be scored is a case with the reason.

    With `--missing 0` a pair without prediction is scored, although `pair.error` says that there is none.
    """
    is_empty = pair.prediction is None and options.missing == "0"
    if pair.truth is None or (not is_empty and (pair.error or pair.prediction is None)):
        return _failed(pair, pair.error)
    try:
        score = score_classes if pair.truth.is_dir() and image_name(pair.truth) is None else score_pair
        return score(pair.prediction, pair.truth, options, pair.case)
    except (FileError, ScoreError, ModuleNotFoundError) as error:  # a module that only one format needs
        return _failed(pair, str(error))
    except MemoryError:
        return _failed(pair, f"{pair.prediction}: not enough memory")
