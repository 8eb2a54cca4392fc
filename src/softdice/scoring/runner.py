"""pairs -> cases, one after another or in several processes; errors are cases too, and nothing done is lost.

A journal beside the output holds one line of JSON per finished case, so that a run that was stopped goes on from
there. Cases come in the order of the pairs whatever the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.files import FileError, image_name, stored
from softdice.scoring.cases import Case, score_classes, score_pair
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.pairing import Pair


def run(pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
    """pairs -> cases in the same order; a pair that cannot be scored is a case with its reason in `error`."""
    if jobs == 1 or len(pairs) < 2:
        for pair in pairs:
            yield _one(pair, options)
        return
    waiting: deque[tuple[Pair, Future[Case]]] = deque()
    pool, left = _pool(min(jobs, len(pairs))), iter(pairs)
    try:
        while True:
            for pair in islice(left, max(0, 4 * jobs + 1 - len(waiting))):  # a window: memory does not grow
                waiting.append((pair, _submit(pool, pair, options)))
            if not waiting:
                return
            pair, future = waiting.popleft()
            try:
                case = future.result()
            except BrokenProcessPool:  # takes all that is not finished with it; which worker ended is not said
                pool.shutdown(wait=True, cancel_futures=True)
                case = _alone(pair, options)
                pool = _pool(min(jobs, len(pairs)))
                waiting = deque((p, f if _finished(f) else _submit(pool, p, options)) for p, f in waiting)
            yield case
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    return ProcessPoolExecutor(jobs, context, initializer=_worker)


def _submit(pool: ProcessPoolExecutor, pair: Pair, options: Options) -> Future[Case]:
    """Where a worker was killed before, the future says so. A process that this starts hears no Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        return _accepted(pool, pair, options)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, so from its first moment
    try:
        return _accepted(pool, pair, options)
    finally:
        signal.signal(signal.SIGINT, before)


def _accepted(pool: ProcessPoolExecutor, pair: Pair, options: Options) -> Future[Case]:
    try:
        return pool.submit(_one, pair, options)
    except BrokenProcessPool as error:
        failed: Future[Case] = Future()
        failed.set_exception(error)
        return failed


def _finished(future: Future[Case]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _alone(pair: Pair, options: Options) -> Case:
    """A pair whose process may have been killed, once more in one of its own: it takes no other with it."""
    with _pool(1) as pool:
        try:
            return _submit(pool, pair, options).result()
        except BrokenProcessPool:
            reason = "the process that scored it was ended, probably for want of memory"
            return replace(_failed(pair), error=f"{pair.prediction}: {reason}. Pass fewer --jobs, or score it alone.")


def _worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _failed(pair: Pair) -> Case:
    return Case(pair.case, str(pair.prediction or ""), str(pair.truth or ""))


def _one(pair: Pair, options: Options) -> Case:
    failed = _failed(pair)
    if pair.prediction is None and pair.truth is not None and options.missing == "0":
        pair = replace(pair, error="")
    elif pair.error or pair.prediction is None or pair.truth is None:
        return replace(failed, error=pair.error)
    assert pair.truth is not None
    try:
        score = score_classes if pair.truth.is_dir() and image_name(pair.truth) is None else score_pair
        return score(pair.prediction, pair.truth, options, pair.case)
    except (FileError, ScoreError, ModuleNotFoundError) as error:  # of one format: the others can be scored
        return replace(failed, error=str(error))
    except MemoryError:
        return replace(failed, error=f"{pair.prediction}: not enough memory")


class Journal:
    """The finished cases of a run, on disk: a line that says what the run is, then one with a checksum per case."""

    def __init__(self, path: Path, options: Options, about: Sequence[str], *, resume: bool) -> None:
        self.path = path
        self._head = json.dumps({"softdice score": [*about, asdict(options)]}, sort_keys=True)
        self.done: dict[tuple[str, str], Case] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if text and not text.startswith('{"softdice score"'):
            got = "a file of another kind, or a run whose first line is damaged"
            raise ScoreError(f"--out: expected the place of {path} to be free, got {got}. Rename it.")
        lines = text.split("\n")[:-1] if resume else []  # whole ones: a run that was killed may have left half of one
        if lines and lines[0] != self._head:
            advice = "Repeat the options of that run, or leave --resume out to start anew."
            raise ScoreError(f"--resume: expected the same folders and options as in {path}. {advice}")
        for line in lines[1:]:
            checksum, _, content = line.partition(" ")
            if checksum != _checksum(content):
                continue  # damaged, as by a power cut: scored again
            record = json.loads(content)
            if record["stamp"] == _stamp(record["prediction"], record["truth"]):
                self.done[record["side"], record["case"]] = _from_record(record)
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w", encoding="utf-8") as self._file:
            self._file.write(self._head + "\n")
            for (side, _), case in self.done.items():
                self.add(side, case)
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, side: str, case: Case) -> None:
        """Keep a case; errors are not kept, so that they are tried again."""
        if not case.error:
            content = json.dumps(_to_record(side, case))
            self._file.write(f"{_checksum(content)} {content}\n")
            self._file.flush()

    def close(self, *, finished: bool) -> None:
        """Close it; a run that is finished needs it no longer."""
        self._file.close()
        if finished:
            self.path.unlink()


def _checksum(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def _stamp(*paths: str) -> list[list[int]]:
    """Size and time of files, to see whether one was changed between two runs."""
    stamps = []
    for path in filter(None, paths):
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [stored(Path(path))]
        stats = [file.stat() for file in files if file.exists()]
        stamps.append([number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)])
    return stamps


_BY_LABEL = ("names", "unnamed", "colours")
"""What a case says of labels; JSON has texts in their place."""


def _to_record(side: str, case: Case) -> dict[str, Any]:
    record = {
        name: getattr(case, name)
        for name in ("case", "prediction", "truth", "keys", "voxels", "voxel_ml", "renumbered")
    }
    labels = {name: {str(label): value for label, value in getattr(case, name).items()} for name in _BY_LABEL}
    stamp = _stamp(case.prediction, case.truth)
    arrays = {"counts": case.counts.tolist(), "measured": case.measured.tolist()}
    return {**record, "side": side, **arrays, **labels, "stamp": stamp}


def _from_record(record: dict[str, Any]) -> Case:
    labels = {name: {int(label): value for label, value in record[name].items()} for name in _BY_LABEL}
    return Case(
        record["case"],
        record["prediction"],
        record["truth"],
        tuple(record["keys"]),
        np.array(record["counts"]).reshape(3, len(record["keys"])),
        record["voxels"],
        labels["names"],
        voxel_ml=record["voxel_ml"],
        unnamed=labels["unnamed"],
        colours=labels["colours"],
        renumbered=record["renumbered"],
        measured=np.array(record["measured"]).reshape(len(record["measured"]), len(record["keys"])),
    )
